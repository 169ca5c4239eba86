// More than two token tiles: some blocks of some panel pairs lie decoded in L1, and all token tiles pass by, each of
// which is fetched from L2 once for all those pairs. Included by amx.cpp.

namespace nvfp4::cpu {
namespace {

// What lies decoded in L1 while all token tiles pass: some blocks of some pairs.
struct Chunk {
  int64_t index;
  int64_t pair;
  int64_t pairs;
  int64_t block;
  int64_t blocks;
};

// The chunks of a call: those of all pairs before the next blocks, so that the tokens' values of a chunk stay in L2.
struct Chunks {
  const PanelPairs& pairs;
  int64_t blocks;                                      // of a panel
  DecodedBlock (*decoded)[kChunkPairs][kChunkBlocks];  // of even and of odd chunks

  int64_t groups() const { return (pairs.count() + kChunkPairs - 1) / kChunkPairs; }
  int64_t count() const { return (blocks + kChunkBlocks - 1) / kChunkBlocks * groups(); }

  // An empty chunk behind the last one.
  Chunk at(int64_t index) const {
    const int64_t pair = index % groups() * kChunkPairs, block = index / groups() * kChunkBlocks;
    const int64_t pairs_left = pairs.count() - pair, blocks_left = blocks - block;
    if (blocks_left <= 0) return {index, 0, 0, 0, 0};
    return {index, pair, pairs_left < kChunkPairs ? pairs_left : kChunkPairs, block,
            blocks_left < kChunkBlocks ? blocks_left : kChunkBlocks};
  }

  DecodedBlock* decoded_pair(const Chunk& chunk, int64_t pair) const { return decoded[chunk.index % 2][pair]; }

  // The chunk's panels block by block.
  int64_t panel_blocks(const Chunk& chunk) const { return chunk.pairs * chunk.blocks * 2; }
  PanelBlock panel_block(const Chunk& chunk, int64_t i) const {
    static_assert(kChunkPairs == 2);
    const int64_t pair = i < 2 * chunk.blocks ? 0 : 1, block = i / 2 - pair * chunk.blocks, panel = i % 2;
    return {pairs.block(chunk.pair + pair, panel, chunk.block + block), decoded_pair(chunk, pair) + block, panel};
  }
  void decode(const Chunk& chunk, int64_t first) const {
    for (int64_t i = first; i < panel_blocks(chunk); ++i) decode_block(panel_block(chunk, i));
  }
};

// A tile of tokens times one pair of a chunk.
struct Pass {
  const DecodedBlock* decoded;
  const uint16_t* values;       // of the chunk's first block
  const uint16_t* next_values;  // of some of the next tile's tokens, to be fetched
  const float* next_sums;       // of the next pass, to be fetched
  float* sums;
  float* unstored;     // the sums of the pass before, which are still in their tiles, or null
  bool first;          // nothing has been added to the sums
  PanelBlock next[2];  // to be decoded meanwhile
};

// The sums of the pass before leave their tiles when this pass has loaded its first operands.
NVFP4_INLINE void exchange_sums(const Pass& pass) {
  if (pass.unstored != nullptr) store_sums<false>(pass.unstored, 0);
  if (pass.first) {
    clear_sums<false>();
  } else {
    load_sums(pass.sums);
  }
}

// Adds the products of 32 columns of a pass and fetches the same columns of the next tile's tokens. A core that runs
// two threads is the faster the fewer tiles are in use, so one holds the weights of one panel after the other.
template <int kParts, bool kFirst>
NVFP4_INLINE void multiply_pass_step(const Pass& pass, const uint16_t (&weights)[2][kTileRows][2 * kPanelRows],
                                     const TokenValues& tokens, int64_t at) {
  constexpr int kRows = kTileRows / kChunkPairs;
  auto fetch = [&](int from, int end) __attribute__((always_inline)) {
    NVFP4_UNROLL for (int row = from; row < end; ++row) {
      _mm_prefetch(pass.next_values + at + row * kBlockColumns, _MM_HINT_T0);
    }
  };
  _tile_loadd(4, pass.values + at, kTokenBytes);
  fetch(0, kRows / 2);
  _tile_loadd(6, weights[0], 64);
  if constexpr (kFirst) exchange_sums(pass);
  fetch(kRows / 2, kRows);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(6, weights[1], 64);
  _tile_dpbf16ps(1, 4, 6);
  if constexpr (kParts == 2) {
    _tile_loadd(4, pass.values + tokens.part_values + at, kTokenBytes);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(6, weights[0], 64);
    _tile_dpbf16ps(0, 4, 6);
  }
}

// kBlocks blocks; decodes kDecoded others meanwhile. A run or two of each in a step cost less than whole blocks at a
// time: vector instructions run beside products, but only as far as the core looks ahead.
template <int kParts, int kBlocks, int kDecoded>
NVFP4_INLINE void multiply_pass(const Pass& pass, const TokenValues& tokens) {
  constexpr int kSteps = kBlocks * kBlockSteps;
  constexpr int kSumLines = (2 * kTileRows + kSteps - 1) / kSteps;
  GroupScales scales[2];
  NVFP4_UNROLL for (int i = 0; i < kSteps; ++i) {
    const int64_t at = i / kBlockSteps * tokens.block_values + i % kBlockSteps * kStepColumns;
    const auto& weights = pass.decoded[i / kBlockSteps].weights[i % kBlockSteps];
    if (i == 0) {
      multiply_pass_step<kParts, true>(pass, weights, tokens, at);
    } else {
      multiply_pass_step<kParts, false>(pass, weights, tokens, at);
    }
    NVFP4_UNROLL for (int line = 0; line < kSumLines; ++line) {
      _mm_prefetch(pass.next_sums + (i * kSumLines + line) * 16, _MM_HINT_T0);
    }
    NVFP4_UNROLL for (int run = i * kRuns / kSteps; run < (i + 1) * kRuns / kSteps; ++run) {
      NVFP4_UNROLL for (int j = 0; j < kDecoded; ++j) decode_next_run(pass.next[j], run, scales[j]);
    }
  }
}

// Returns how many blocks it has decoded: only passes over all of a chunk's blocks decode.
template <int kParts>
NVFP4_INLINE int64_t multiply_pass(const Pass& pass, const TokenValues& tokens, int64_t blocks, int64_t decoded) {
  static_assert(kChunkBlocks == 3);
  switch (blocks) {
    case 1:
      return multiply_pass<kParts, 1, 0>(pass, tokens), 0;
    case 2:
      return multiply_pass<kParts, 2, 0>(pass, tokens), 0;
  }
  switch (decoded) {
    case 0:
      multiply_pass<kParts, 3, 0>(pass, tokens);
      break;
    case 1:
      multiply_pass<kParts, 3, 1>(pass, tokens);
      break;
    default:
      multiply_pass<kParts, 3, 2>(pass, tokens);
  }
  return decoded;
}

// The blocks that are decoded while a chunk is multiplied: those of the next chunk, in the last passes, so that they
// are still in L1 when they are needed.
struct DecodingPlan {
  int64_t blocks;
  int64_t per_pass;
  int64_t first_pass;
};

NVFP4_INLINE DecodingPlan plan_decoding(int64_t blocks, int64_t passes) {
  const int64_t per_pass = blocks <= passes ? 1 : 2;
  const int64_t needed = (blocks + per_pass - 1) / per_pass;
  return {blocks, per_pass, passes > needed ? passes - needed : 0};
}

// The sums of a call: those of a pair are pair_sums(count) apart, those of a token tile `tile_sums`.
struct PassSums {
  float* sums;
  int64_t pair_sums;
  int64_t tile_sums;

  float* of(int64_t pair, int64_t token_tile) const { return sums + pair * pair_sums + token_tile * tile_sums; }
};

// What changes from pass to pass.
struct Turn {
  int64_t token_tile;
  int64_t pair;  // of the chunk
};

// Of every other token tile the pairs are multiplied in the opposite order: what is in L1 is used twice.
NVFP4_INLINE Turn turn_after(const Turn& turn, const Chunk& chunk) {
  const int64_t way = turn.token_tile % 2 == 0 ? 1 : -1, pair = turn.pair + way;
  if (pair < 0 || pair == chunk.pairs) return {turn.token_tile + 1, turn.pair};
  return {turn.token_tile, pair};
}

// Chunk after chunk, and with every chunk pass after pass.
template <int kParts>
void multiply_chunks(const PanelPairs& pairs, const TokenTile& tile, const TokenValues& tokens, float* all_sums) {
  DecodedBlock decoded[2][kChunkPairs][kChunkBlocks];
  const Chunks chunks = {pairs, tile.blocks, decoded};
  const PassSums sums = {all_sums, pair_sums(tile.count), tokens.rows * 2 * kPanelRows};
  chunks.decode(chunks.at(0), 0);
  Pass pass{};
  for (int64_t index = 0; index < chunks.count(); ++index) {
    order_memory(decoded);
    const Chunk chunk = chunks.at(index), next = chunks.at(index + 1), behind = chunks.at(index + 2);
    const uint16_t* values = tokens.values + chunk.block * tokens.block_values;
    const int64_t passes = tokens.tiles * chunk.pairs;
    const DecodingPlan plan = plan_decoding(chunks.panel_blocks(next), passes);
    int64_t done = 0, fetched = 0;
    Turn turn{0, 0};
    for (int64_t i = 0; i < passes; ++i) {
      const Turn after = i + 1 < passes ? turn_after(turn, chunk) : Turn{0, 0};
      const bool last_tile = turn.token_tile + 1 == tokens.tiles;
      pass.decoded = chunks.decoded_pair(chunk, turn.pair);
      pass.values = values + turn.token_tile * tokens.tile_values;
      pass.next_values =
          last_tile ? tokens.values + next.block * tokens.block_values : pass.values + tokens.tile_values;
      pass.next_values += turn.pair * (kTileRows / kChunkPairs) * kBlockColumns;
      pass.sums = sums.of(chunk.pair + turn.pair, turn.token_tile);
      pass.next_sums = sums.of((i + 1 < passes ? chunk.pair : next.pair) + after.pair, after.token_tile);
      pass.first = chunk.block == 0;
      // Little by little, because many lines at once would keep the tokens' values waiting.
      for (; fetched * passes < (i + 1) * chunks.panel_blocks(behind); ++fetched) {
        prefetch_block<_MM_HINT_T1>(chunks.panel_block(behind, fetched).from);
      }
      const int64_t left = plan.blocks - done;
      const int64_t count = i < plan.first_pass ? 0 : left < plan.per_pass ? left : plan.per_pass;
      for (int64_t j = 0; j < count; ++j) pass.next[j] = chunks.panel_block(next, done + j);
      done += multiply_pass<kParts>(pass, tokens, chunk.blocks, count);
      pass.unstored = pass.sums;
      turn = after;
    }
    chunks.decode(next, done);
  }
  store_sums<false>(pass.unstored, 0);
}

}  // namespace
}  // namespace nvfp4::cpu
