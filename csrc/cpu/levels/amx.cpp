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
constexpr int kChunkBlocks = 3;   // decoded at a time for more than two token tiles,
constexpr int kChunkPairs = 2;    // of that many pairs: 24 KiB
constexpr int kAheadBlocks = 4;   // how far ahead blocks are fetched for fewer

#define NVFP4_UNROLL _Pragma("GCC unroll 32")

// Tiles: sums of token tile t and panel p in 2 t + p, tokens in 4, weights in 6 and 7.

// GCC's intrinsics do not say that loading a tile reads memory.
NVFP4_INLINE void order_memory(const void* read) { asm volatile("" ::"r"(read) : "memory"); }

// Whether a token tile is multiplied here. Only bf16 sums have the same bits for every number of tokens.
NVFP4_INLINE bool uses_tiles(const TokenTile& tile) {
  return !tile.exact && (tile.count > kFewTokens || tile.batch_invariant);
}

}  // namespace
}  // namespace nvfp4::cpu

#include "amx_decode.inl"

namespace nvfp4::cpu {
namespace {

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

// Adds the products of a decoded block with one or two tiles of tokens, whose first value is `values`.
template <int kParts, bool kTwo>
NVFP4_INLINE void multiply_block(const DecodedBlock& decoded, const TokenValues& tokens, const uint16_t* values) {
  NVFP4_UNROLL for (int step = 0; step < kBlockSteps; ++step) {
    const auto& weights = decoded.weights[step];
    NVFP4_UNROLL for (int part = 0; part < kParts; ++part) {
      const uint16_t* first = values + part * tokens.part_values + step * kStepColumns;
      multiply_step<kTwo>(weights, first, first + tokens.tile_values);
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

}  // namespace
}  // namespace nvfp4::cpu

#include "amx_chunks.inl"

namespace nvfp4::cpu {
namespace {

// One or two tiles of tokens: pair after pair, and the sums stay in their tiles.
template <int kParts, bool kTwo>
void multiply_pairs(const PanelPairs& pairs, const TokenTile& tile, const TokenValues& tokens, float* sums) {
  DecodedBlock decoded[2];
  for (int64_t pair = 0; pair < pairs.count(); ++pair) {
    auto decode = [&](int64_t block) __attribute__((always_inline)) {
      if (block == tile.blocks) return;
      NVFP4_UNROLL for (int panel = 0; panel < 2; ++panel) {
        prefetch_block<_MM_HINT_T0>(pairs.block(pair, panel, block + kAheadBlocks));
        decode_block({pairs.block(pair, panel, block), &decoded[block % 2], panel});
      }
    };
    clear_sums<kTwo>();
    decode(0);
    for (int64_t block = 0; block < tile.blocks; ++block) {
      order_memory(decoded);
      decode(block + 1);  // before the products, whose tiles are so loaded from lines long stored
      multiply_block<kParts, kTwo>(decoded[block % 2], tokens, tokens.values + block * tokens.block_values);
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
