// The AMX level: bf16 products in tiles, for processors with AMX-BF16. Build with the flags of AVX-512 and
// -mamx-tile -mamx-bf16
//
// Blocks of two panels are decoded to bf16, in which code times block scale is exact, and multiplied with tiles of up
// to 16 tokens: tiles of 16 tokens x 32 columns and of 32 columns x 16 rows make tiles of fp32 sums. A decoded vector
// holds two columns of each of a panel's 16 rows, which is one row of AMX's second operand.
//
// bf16 activations are multiplied as they are. fp16 ones are the sum of two bf16 values, exactly, and so, to 2^-16, is
// what the activation makes of fp16: each takes two products. Few tokens and fp32 go the way of avx512.cpp.

// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "decode512.inl"

#ifdef NVFP4_EMULATE_AMX
#include "emulated_tiles.inl"
#endif

namespace nvfp4::cpu {
namespace {

constexpr int kFewTokens = 4;     // up to which avx512.cpp's way is faster
constexpr int kTileRows = 16;     // tokens or weight rows of a tile
constexpr int kStepColumns = 32;  // of a tile
constexpr int kBlockSteps = kBlockColumns / kStepColumns;
constexpr int kMostTokens = 512;  // of an expert at a time
constexpr int kMostPairs = 8;     // panel pairs at a time
constexpr int kChunkBlocks = 4;   // decoded at a time for more than two token tiles: 16 KiB
constexpr int kAheadBlocks = 4;   // how far ahead blocks are fetched for fewer

#define NVFP4_UNROLL _Pragma("GCC unroll 32")

// Tiles: sums of token tile t and panel p in 2 t + p, tokens in 4, weights in 6 and 7.

// GCC's intrinsics do not say that loading a tile reads memory.
NVFP4_INLINE void order_memory(const void* read) { asm volatile("" ::"r"(read) : "memory"); }

// Whether a token tile is multiplied here. Only bf16 sums have the same bits for every number of tokens.
NVFP4_INLINE bool uses_tiles(const TokenTile& tile) {
  return !tile.exact && (tile.count > kFewTokens || tile.batch_invariant);
}

// [k step, panel, pair of columns, row, 2]
struct DecodedBlock {
  alignas(64) uint16_t weights[kBlockSteps][2][kTileRows][2 * kPanelRows];
};

// Where 32-bit lane i of a decoded vector `run * 4 + j` (columns 8 run + j and 8 run + j + 4) is stored.
NVFP4_INLINE uint16_t* vector_at(DecodedBlock* out, int64_t panel, int64_t index) {
  return out->weights[index / kTileRows][panel][index % kTileRows];
}

// Decoding adds in the domain of bf16 bits, where a power of two is an addition: with the bits S of a block scale and T
// of 1.5 times that scale, a code of magnitude 2^n is S + (n << 7) and one of 1.5 * 2^n is T + (n << 7). The table
// holds (kBias + n) << 7 and the code's sign, and kOdd for the second kind, of which T - S is taken by an AND. What is
// then subtracted, (kBias << 7) - S, saturates zero codes at zero and leaves the sign alone.
constexpr int kBias = 200;
constexpr int kOdd = 127;  // T - S is 64 .. 84

NVFP4_INLINE __m512i biased_table() {
  constexpr int16_t kOne = static_cast<int16_t>(kBias << 7);
  constexpr int16_t kHalf = kOne - 128, kTwo = kOne + 128, kFour = kOne + 256;
  constexpr int16_t kSign = INT16_MIN;
  const __m256i once = _mm256_setr_epi16(0, kHalf, kOne, kOne | kOdd, kTwo, kTwo | kOdd, kFour, kFour | kOdd, 0,
                                         kSign | kHalf, kSign | kOne, kSign | kOne | kOdd, kSign | kTwo,
                                         kSign | kTwo | kOdd, kSign | kFour, kSign | kFour | kOdd);
  return _mm512_broadcast_i64x4(once);
}

// T - S for the three mantissa bits of an E4M3 scale, by the lowest four bits of its byte.
NVFP4_INLINE __m512i odd_table() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(64, 72, 80, 84, 80, 76, 72, 68, 64, 72, 80, 84, 80, 76, 72, 68));
}

// Four pairs of columns, j and j + 4, of a run of eight.
NVFP4_INLINE void decode_run(const uint8_t* run, __m512i table, __m512i kept, __m512i subtracted, __m512i* pairs) {
  const __m512i codes = _mm512_loadu_si512(run);
  const __m512i shifted[4] = {codes, _mm512_srli_epi16(codes, 4), _mm512_srli_epi16(codes, 8),
                              _mm512_srli_epi16(codes, 12)};
  NVFP4_UNROLL for (int j = 0; j < 4; ++j) {
    const __m512i biased = _mm512_permutexvar_epi16(shifted[j], table);
    pairs[j] = _mm512_subs_epu16(_mm512_and_si512(biased, kept), subtracted);
  }
}

// A group of any scales: the products in fp32, whose upper halves are bf16 and whose lower halves are zero.
NVFP4_INLINE void decode_any(const uint8_t* block, int64_t panel, int64_t group, DecodedBlock* out) {
  const __m512 table = exact_code_table();
  const __m512 scales = decode_exact_scales(block + kBlockCodeBytes + group * kPanelRows);
  for (int64_t run = 2 * group; run < 2 * group + 2; ++run) {
    const __m512i codes = _mm512_loadu_si512(block + run * 64);
    for (int j = 0; j < 4; ++j) {
      const __m512 first = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), table), scales);
      const __m512 second = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j + 16), table), scales);
      const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
      _mm512_store_si512(vector_at(out, panel, run * 4 + j),
                         _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(second)));
    }
  }
}

// Sixteen columns of a block of one panel.
NVFP4_INLINE void decode_group(const uint8_t* block, int64_t panel, int64_t group, DecodedBlock* out) {
  const __m128i scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + kBlockCodeBytes) + group);
  const __mmask16 normal = _mm_cmpgt_epi8_mask(scales, _mm_set1_epi8(7));
  if (__builtin_expect(normal != 0xffff, 0)) {  // negative, zero and subnormal scales
    return decode_any(block, panel, group, out);
  }
  // Byte r of 16 into both halves of lane r.
  const __m512i spread =
      _mm512_set_epi32(0x800f800f, 0x800e800e, 0x800d800d, 0x800c800c, 0x800b800b, 0x800a800a, 0x80098009, 0x80088008,
                       0x80078007, 0x80068006, 0x80058005, 0x80048004, 0x80038003, 0x80028002, 0x80018001, 0x80008000);
  const __m512i base = _mm512_set1_epi16((kBias - 120) << 7);  // a scale's bits are (byte << 4) + (120 << 7)
  const __m512i all_but_odd = _mm512_set1_epi16(static_cast<int16_t>(~kOdd));
  const __m512i bytes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(scales), spread);
  const __m512i subtracted = _mm512_sub_epi16(base, _mm512_slli_epi16(bytes, 4));
  const __m512i kept = _mm512_or_si512(_mm512_shuffle_epi8(odd_table(), bytes), all_but_odd);
  NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
    __m512i pairs[4];
    decode_run(block + (2 * group + half) * 64, biased_table(), kept, subtracted, pairs);
    NVFP4_UNROLL for (int j = 0; j < 4; ++j) {
      _mm512_store_si512(vector_at(out, panel, (2 * group + half) * 4 + j), pairs[j]);
    }
  }
}

NVFP4_INLINE void prefetch_block(const uint8_t* block) {
  NVFP4_UNROLL for (int line = 0; line < kBlockBytes; line += 64) _mm_prefetch(block + line, _MM_HINT_T0);
}

struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles of `rows` tokens.
NVFP4_INLINE void configure(int64_t rows) {
  alignas(64) TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = tile < 6 ? static_cast<uint8_t>(rows) : kTileRows;
  }
  order_memory(&config);
  _tile_loadconfig(&config);
}

// How the values of a token tile lie.
struct TokenValues {
  const uint16_t* values;  // [parts, blocks, count, 64]
  int64_t block_values;    // from one block to the next
  int64_t part_values;     // from the upper parts to the lower ones
  int64_t tile_values;     // from one tile of tokens to the next
  int64_t rows;            // of a tile
  int64_t tiles;
};

constexpr int64_t kTokenBytes = kBlockColumns * 2;             // from one token of a tile to the next
constexpr int64_t kSumBytes = 2 * kPanelRows * sizeof(float);  // the same of its sums

// Some blocks of a panel pair that are decoded piece by piece between the products of others. A piece is what one scale
// of each of a panel's rows applies to: 16 rows and 16 columns.
struct Decoding {
  const uint8_t* panels[2];
  const uint8_t* ahead[2];  // blocks to be fetched meanwhile
  DecodedBlock* out;
  int64_t pieces;  // of both panels
  int64_t done;

  // Decodes up to `count` pieces.
  __attribute__((always_inline)) void advance(int64_t count) {
    const int64_t last = done + count < pieces ? done + count : pieces;
    for (; done < last; ++done) {
      const int64_t block = done / (2 * kBlockGroups), panel = done / kBlockGroups % 2, group = done % kBlockGroups;
      if (group == 0) prefetch_block(ahead[panel] + block * kBlockBytes);
      decode_group(panels[panel] + block * kBlockBytes, panel, group, out + block);
    }
  }

  // Decodes the rest, a panel's block at a time.
  __attribute__((always_inline)) void finish() {
    advance(-done & (kBlockGroups - 1));
    for (; done < pieces; done += kBlockGroups) {
      const int64_t block = done / (2 * kBlockGroups), panel = done / kBlockGroups % 2;
      prefetch_block(ahead[panel] + block * kBlockBytes);
      NVFP4_UNROLL for (int64_t group = 0; group < kBlockGroups; ++group) {
        decode_group(panels[panel] + block * kBlockBytes, panel, group, out + block);
      }
    }
  }
};

// One block of the tokens of a tile, into L1.
NVFP4_INLINE void fetch_tokens(const uint16_t* values, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    _mm_prefetch(values + row * kBlockColumns, _MM_HINT_T0);
    _mm_prefetch(values + row * kBlockColumns + kBlockColumns / 2, _MM_HINT_T0);
  }
}

// Adds the products of 32 columns with one or two tiles of tokens. Operands are loaded again rather than kept in more
// tiles: a core that runs two threads is slow where all eight are in use.
template <bool kTwo>
NVFP4_INLINE void multiply_step(const uint16_t (&weights)[2][kTileRows][2 * kPanelRows], const uint16_t* first,
                                const uint16_t* second) {
  _tile_loadd(4, first, kTokenBytes);
  _tile_loadd(6, weights[0], 64);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kTwo) {
    _tile_loadd(6, weights[1], 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(4, second, kTokenBytes);
    _tile_dpbf16ps(3, 4, 6);
    _tile_loadd(6, weights[0], 64);
    _tile_dpbf16ps(2, 4, 6);
  } else {
    _tile_loadd(7, weights[1], 64);
    _tile_dpbf16ps(1, 4, 7);
  }
}

// Adds the products of some decoded blocks with one or two tiles of tokens, whose first value is `values`. Meanwhile
// fetches the values of the next block, or of the first one at `next_values`, and decodes `pieces` pieces a step.
template <int kParts, bool kTwo>
NVFP4_INLINE void multiply_blocks(const DecodedBlock* decoded, int64_t blocks, const TokenValues& tokens,
                                  const uint16_t* values, const uint16_t* next_values, Decoding& decoding,
                                  int64_t pieces) {
  for (int64_t block = 0; block < blocks; ++block) {
    const uint16_t* fetched = block + 1 < blocks ? values + (block + 1) * tokens.block_values : next_values;
    NVFP4_UNROLL for (int step = 0; step < kBlockSteps; ++step) {
      const uint16_t* upper = values + block * tokens.block_values + step * kStepColumns;
      const auto& weights = decoded[block].weights[step];
      multiply_step<kTwo>(weights, upper, upper + tokens.tile_values);
      if (fetched != nullptr && (kTwo || step == 0)) fetch_tokens(fetched + step * tokens.tile_values, tokens.rows);
      decoding.advance(pieces);
      if constexpr (kParts == 2) {
        multiply_step<kTwo>(weights, upper + tokens.part_values, upper + tokens.part_values + tokens.tile_values);
      }
    }
  }
}

template <bool kTwo>
NVFP4_INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

NVFP4_INLINE void load_sums(const float* sums) {
  order_memory(sums);
  _tile_loadd(0, sums, kSumBytes);
  _tile_loadd(1, sums + kPanelRows, kSumBytes);
}

// `sums` are those of the first token; the second tile's begin `rows` tokens behind.
template <bool kTwo>
NVFP4_INLINE void store_sums(float* sums, int64_t rows) {
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + kPanelRows, kSumBytes);
  if constexpr (kTwo) {
    _tile_stored(2, sums + rows * 2 * kPanelRows, kSumBytes);
    _tile_stored(3, sums + rows * 2 * kPanelRows + kPanelRows, kSumBytes);
  }
}

// One tile of tokens for a chunk of decoded blocks from `block` on; the sums are kept in memory.
template <int kParts>
NVFP4_INLINE void multiply_chunk(const DecodedBlock* decoded, int64_t block, int64_t blocks, const TokenValues& tokens,
                                 int64_t token_tile, float* sums, Decoding& decoding, int64_t pieces) {
  float* to = sums + token_tile * tokens.rows * 2 * kPanelRows;
  if (block == 0) {
    clear_sums<false>();
  } else {
    load_sums(to);
  }
  const uint16_t* values = tokens.values + block * tokens.block_values;
  const int64_t next = token_tile + 1 < tokens.tiles ? token_tile + 1 : 0;
  multiply_blocks<kParts, false>(decoded, blocks, tokens, values + token_tile * tokens.tile_values,
                                 values + next * tokens.tile_values, decoding, pieces);
  store_sums<false>(to, tokens.rows);
}

// The panel pairs of a call. A missing last panel is multiplied as a copy of the one before, into sums that nobody
// reads.
struct PanelPairs {
  const uint8_t* panels;
  int64_t panel_count;
  int64_t panel_bytes;

  int64_t count() const { return (panel_count + 1) / 2; }
  const uint8_t* block(int64_t pair, int64_t panel, int64_t block) const {
    const int64_t index = 2 * pair + panel < panel_count ? 2 * pair + panel : panel_count - 1;
    return panels + index * panel_bytes + block * kBlockBytes;
  }
};

// Chunk after chunk of the blocks of all pairs, so that a chunk of the tokens' values stays in the caches. Every step
// multiplies a chunk of one pair with all tokens and decodes that of the next step.
template <int kParts>
void multiply_chunks(const PanelPairs& pairs, const TokenTile& tile, const TokenValues& tokens, float* sums) {
  DecodedBlock decoded[2][kChunkBlocks];
  const int64_t steps = (tile.blocks + kChunkBlocks - 1) / kChunkBlocks * pairs.count();
  auto first_block = [&](int64_t step) { return step / pairs.count() * kChunkBlocks; };
  auto block_count = [&](int64_t step) {
    const int64_t left = tile.blocks - first_block(step);
    return left < kChunkBlocks ? left : kChunkBlocks;
  };
  auto decoding_of = [&](int64_t step) {
    Decoding decoding{};
    if (step == steps) return decoding;
    const int64_t ahead = step + 1 < steps ? step + 1 : step;
    for (int64_t panel = 0; panel < 2; ++panel) {
      decoding.panels[panel] = pairs.block(step % pairs.count(), panel, first_block(step));
      decoding.ahead[panel] = pairs.block(ahead % pairs.count(), panel, first_block(ahead));
    }
    decoding.out = decoded[step % 2];
    decoding.pieces = block_count(step) * 2 * kBlockGroups;
    return decoding;
  };
  decoding_of(0).finish();
  for (int64_t step = 0; step < steps; ++step) {
    order_memory(decoded);
    Decoding next = decoding_of(step + 1);
    const int64_t products = tokens.tiles * block_count(step) * kBlockSteps;
    const int64_t pieces = (next.pieces + products - 1) / products;
    for (int64_t i = 0; i < tokens.tiles; ++i) {
      multiply_chunk<kParts>(decoded[step % 2], first_block(step), block_count(step), tokens, i,
                             sums + step % pairs.count() * pair_sums(tile.count), next, pieces);
    }
    next.finish();
  }
}

// One or two tiles of tokens: pair after pair, and the sums stay in their tiles.
template <int kParts, bool kTwo>
void multiply_pairs(const PanelPairs& pairs, const TokenTile& tile, const TokenValues& tokens, float* sums) {
  DecodedBlock decoded[2];
  for (int64_t pair = 0; pair < pairs.count(); ++pair) {
    auto decoding_of = [&](int64_t block) {
      Decoding decoding{};
      if (block == tile.blocks) return decoding;
      for (int64_t panel = 0; panel < 2; ++panel) {
        decoding.panels[panel] = pairs.block(pair, panel, block);
        decoding.ahead[panel] = pairs.block(pair, panel, block + kAheadBlocks);
      }
      decoding.out = &decoded[block % 2];
      decoding.pieces = 2 * kBlockGroups;
      return decoding;
    };
    clear_sums<kTwo>();
    decoding_of(0).finish();
    for (int64_t block = 0; block < tile.blocks; ++block) {
      order_memory(decoded);
      Decoding next = decoding_of(block + 1);
      next.finish();  // before the products, whose tiles are so loaded from lines long stored
      multiply_blocks<kParts, kTwo>(&decoded[block % 2], 1, tokens, tokens.values + block * tokens.block_values,
                                    nullptr, next, 0);
    }
    store_sums<kTwo>(sums + pair * pair_sums(tile.count), tokens.rows);
  }
}

// Tiles of equal size. The last may reach up to kTileSlack rows behind the last token, into
// whatever lies there: a row of a tile makes its own sums only, and nobody reads those.
template <int kParts>
void multiply_tiles(const PanelPairs& pairs, const TokenTile& tile, float* sums) {
  static_assert(kMostTokens / kTileRows <= kTileSlack);
  const int64_t token_tiles = (tile.count + kTileRows - 1) / kTileRows;
  const int64_t rows = (tile.count + token_tiles - 1) / token_tiles;
  TokenValues tokens;
  tokens.values = static_cast<const uint16_t*>(tile.values);
  tokens.block_values = tile.count * kBlockColumns;
  tokens.part_values = tile.blocks * tokens.block_values;
  tokens.tile_values = rows * kBlockColumns;
  tokens.rows = rows;
  tokens.tiles = token_tiles;
  configure(rows);
  if (token_tiles == 1) {
    multiply_pairs<kParts, false>(pairs, tile, tokens, sums);
  } else if (token_tiles == 2) {
    multiply_pairs<kParts, true>(pairs, tile, tokens, sums);
  } else {
    multiply_chunks<kParts>(pairs, tile, tokens, sums);
  }
  _tile_release();
}

void multiply(const uint8_t* panels, int64_t panel_count, const TokenTile& tile, float* sums) {
  const PanelPairs pairs = {panels, panel_count, tile.blocks * kBlockBytes};
  if (uses_tiles(tile))
    return tile.parts == 2 ? multiply_tiles<2>(pairs, tile, sums) : multiply_tiles<1>(pairs, tile, sums);
  for (int64_t pair = 0; pair < pairs.count(); ++pair) {
    const int64_t count = panel_count - 2 * pair < 2 ? 1 : 2;
    kAvx512Kernels.multiply(pairs.block(pair, 0, 0), count, tile, sums + pair * pair_sums(tile.count));
  }
}

NVFP4_INLINE bool all_finite(const __m512* values) {
  __mmask16 bad = 0;
  NVFP4_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(values[i]), _mm512_set1_epi32(0x7fffffff));
    bad |= _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  }
  return bad == 0;
}

NVFP4_INLINE __m512i nan_values() { return _mm512_set1_epi16(0x7fc0); }

NVFP4_INLINE void store_vectors(__m512i first, __m512i second, uint16_t* out) {
  _mm512_storeu_si512(out, first);
  _mm512_storeu_si512(out + 32, second);
}

// The upper halves of 64 floats, each run of eight in the order 0 4 1 5 2 6 3 7.
NVFP4_INLINE void store_upper_halves(const __m512i* bits, uint16_t* out) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
  __m512i halves[2];
  NVFP4_UNROLL for (int i = 0; i < 2; ++i) {
    const __m512i even = _mm512_permutex2var_epi32(bits[2 * i], low, bits[2 * i + 1]);
    const __m512i odd = _mm512_permutex2var_epi32(bits[2 * i], high, bits[2 * i + 1]);
    halves[i] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
  }
  store_vectors(halves[0], halves[1], out);
}

// Finite fp32 to the nearest bf16, the largest one where that would be an infinity.
NVFP4_INLINE __m512i round_to_upper_half(__m512 x) {
  const __m512 largest = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));
  const __m512 least = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xff7f0000)));
  const __m512i bits = _mm512_castps_si512(_mm512_max_ps(_mm512_min_ps(x, largest), least));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

// 64 fp32 values into row `index` of a tile, all of them NaN where one is not finite.
NVFP4_INLINE void store_floats(const __m512* values, int64_t index, const TokenTile& tile) {
  auto* upper = static_cast<uint16_t*>(tile.values) + index * kBlockColumns;
  uint16_t* lower = upper + tile.blocks * tile.count * kBlockColumns;
  if (!all_finite(values)) {
    store_vectors(nan_values(), nan_values(), upper);
    if (tile.parts == 2) store_vectors(nan_values(), nan_values(), lower);
    return;
  }
  __m512i bits[4];
  if (tile.parts == 1) {
    NVFP4_UNROLL for (int i = 0; i < 4; ++i) bits[i] = round_to_upper_half(values[i]);
    return store_upper_halves(bits, upper);
  }
  __m512i rest[4];
  NVFP4_UNROLL for (int i = 0; i < 4; ++i) {
    bits[i] = _mm512_and_si512(_mm512_castps_si512(values[i]), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    rest[i] = round_to_upper_half(_mm512_sub_ps(values[i], _mm512_castsi512_ps(bits[i])));
  }
  store_upper_halves(bits, upper);
  store_upper_halves(rest, lower);
}

// A block of a bf16 row, zeros from column `columns` on.
NVFP4_INLINE void copy_bf16(const uint16_t* row, int64_t columns, uint16_t* out) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  const __m512i infinity = _mm512_set1_epi16(0x7f80);
  const __mmask64 wanted = columns >= kBlockColumns ? ~__mmask64{0} : (__mmask64{1} << columns) - 1;
  const __m512i first = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(wanted), row);
  const __m512i second = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(wanted >> 32), row + 32);
  const __mmask32 bad = _mm512_cmpeq_epi16_mask(_mm512_and_si512(first, infinity), infinity) |
                        _mm512_cmpeq_epi16_mask(_mm512_and_si512(second, infinity), infinity);
  if (bad != 0) return store_vectors(nan_values(), nan_values(), out);
  store_vectors(_mm512_shuffle_epi8(first, order), _mm512_shuffle_epi8(second, order), out);
}

NVFP4_INLINE void load_fp16(const uint16_t* row, int64_t columns, __m512* values) {
  NVFP4_UNROLL for (int i = 0; i < 4; ++i) {
    const int64_t left = columns - 16 * i;
    const __mmask16 wanted = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
    values[i] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(wanted, row + 16 * i));
  }
}

void gather(const TokenRows& tokens, TokenTile* tile) {
  if (!uses_tiles(*tile)) return kAvx512Kernels.gather(tokens, tile);
  const auto* x = static_cast<const uint16_t*>(tokens.x);
  for (int64_t token = 0; token < tile->count; ++token) {
    const uint16_t* row = x + tokens.rows[token] * tokens.k;
    for (int64_t block = 0; block < tile->blocks; ++block) {
      const int64_t columns = tokens.k - block * kBlockColumns;
      const int64_t index = block * tile->count + token;
      if (tokens.dtype == DType::bf16) {
        copy_bf16(row + block * kBlockColumns, columns, static_cast<uint16_t*>(tile->values) + index * kBlockColumns);
      } else {
        __m512 values[4];
        load_fp16(row + block * kBlockColumns, columns, values);
        store_floats(values, index, *tile);
      }
    }
  }
}

void fill_block(const float* values, int64_t block, TokenTile* tile) {
  if (!uses_tiles(*tile)) return kAvx512Kernels.fill_block(values, block, tile);
  for (int64_t token = 0; token < tile->count; ++token) {
    __m512 row[4];
    NVFP4_UNROLL for (int i = 0; i < 4; ++i) row[i] = _mm512_loadu_ps(values + token * kBlockColumns + 16 * i);
    store_floats(row, block * tile->count + token, *tile);
  }
}

}  // namespace

// The derivatives are those of AVX-512: they multiply in fp32.
const LevelKernels kAmxKernels = {false,
                                  gather,
                                  fill_block,
                                  multiply,
                                  gate_panel,
                                  activate_panel,
                                  accumulate_row,
                                  store_row,
                                  swiglu_row,
                                  kAvx512Kernels.differentiate_panel,
                                  kAvx512Kernels.swiglu_backward,
                                  kAvx512Kernels.multiply_transposed,
                                  kMostTokens,
                                  kMostPairs,
                                  true};

}  // namespace nvfp4::cpu
