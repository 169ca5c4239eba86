// The AMX level: bf16 products in tiles, for processors with AMX-BF16. Build with the flags of AVX-512 and
// -mamx-tile -mamx-bf16
//
// A block of two panels is decoded to bf16, in which code times block scale is exact, and multiplied with up to 32
// tokens at a time: two tiles of 16 tokens x 32 columns and two of 32 columns x 16 rows make four tiles of fp32 sums.
// A decoded vector holds two columns of each of a panel's 16 rows, which is one row of AMX's second operand.
//
// bf16 activations are multiplied as they are. fp16 ones are the sum of two bf16 values, exactly, and so, to 2^-16, is
// what the activation makes of fp16: each takes two products. Few tokens and fp32 go the way of avx512.cpp.

// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "elementwise.inl"

#ifdef NVFP4_EMULATE_AMX
#include "emulated_tiles.inl"
#endif

namespace nvfp4::cpu {
namespace {

constexpr int kFewTokens = 8;     // up to which avx512.cpp's way is faster
constexpr int kTileRows = 16;     // tokens or weight rows of a tile
constexpr int kStepColumns = 32;  // of a tile
constexpr int kBlockSteps = kBlockColumns / kStepColumns;
constexpr int kChunkBlocks = 4;  // decoded at a time for more than two token tiles: 16 KiB

#define NVFP4_UNROLL _Pragma("GCC unroll 32")

// Tiles: sums of token tile t and panel p in 2 t + p, tokens in 4 and 5, weights in 6 and 7.

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
NVFP4_INLINE uint16_t* vector_at(DecodedBlock* out, int panel, int index) {
  return out->weights[index / kTileRows][panel][index % kTileRows];
}

// Decoding adds in the domain of bf16 bits, where a power of two is an addition: with the bits S of a block scale and T
// of 1.5 times that scale, a code of magnitude 2^n is S + (n << 7) and one of 1.5 * 2^n is T + (n << 7). The table
// holds (kBias + n) << 7, kClassBit for the second kind and the code's sign; what is subtracted from it, kBias << 7
// less S or T, saturates zero codes at zero and leaves the sign alone.
constexpr int kBias = 200;
constexpr int kClassBit = 64;  // T - S is 64 .. 84: the class bit is its least value

NVFP4_INLINE __m512i biased_table() {
  constexpr int16_t kOne = static_cast<int16_t>(kBias << 7);
  constexpr int16_t kHalf = kOne - 128, kTwo = kOne + 128, kFour = kOne + 256;
  constexpr int16_t kSign = INT16_MIN;
  const __m256i once =
      _mm256_setr_epi16(0, kHalf, kOne, kOne | kClassBit, kTwo, kTwo | kClassBit, kFour, kFour | kClassBit, 0,
                        kSign | kHalf, kSign | kOne, kSign | kOne | kClassBit, kSign | kTwo, kSign | kTwo | kClassBit,
                        kSign | kFour, kSign | kFour | kClassBit);
  return _mm512_broadcast_i64x4(once);
}

// T - S - 64 for the three mantissa bits of an E4M3 scale, by the lowest four bits of its byte.
NVFP4_INLINE __m512i class_table() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 16, 20, 16, 12, 8, 4, 0, 8, 16, 20, 16, 12, 8, 4));
}

// Four pairs of columns, j and j + 4, of a run of eight.
NVFP4_INLINE void decode_run(const uint8_t* run, __m512i table, __m512i plain, __m512i three_halves, __m512i* pairs) {
  const __m512i codes = _mm512_loadu_si512(run);
  const __m512i class_bit = _mm512_set1_epi16(kClassBit);
  const __m512i shifted[4] = {codes, _mm512_srli_epi16(codes, 4), _mm512_srli_epi16(codes, 8),
                              _mm512_srli_epi16(codes, 12)};
  NVFP4_UNROLL for (int j = 0; j < 4; ++j) {
    const __m512i biased = _mm512_permutexvar_epi16(shifted[j], table);
    const __mmask32 odd = _mm512_test_epi16_mask(biased, class_bit);
    pairs[j] = _mm512_mask_subs_epu16(_mm512_subs_epu16(biased, plain), odd, biased, three_halves);
  }
}

// Any block: the products in fp32, whose upper halves are bf16 and whose lower halves are zero.
NVFP4_INLINE void decode_any(const uint8_t* block, int panel, DecodedBlock* out) {
  const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f,
                                      -3.0f, -4.0f, -6.0f);
  for (int run = 0; run < 8; ++run) {
    const __m512i codes = _mm512_loadu_si512(block + run * 64);
    const uint8_t* bytes = block + kBlockCodeBytes + run / 2 * kPanelRows;
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    const __m512 scales = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
    for (int j = 0; j < 4; ++j) {
      const __m512 first = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), table), scales);
      const __m512 second = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j + 16), table), scales);
      const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
      _mm512_store_si512(vector_at(out, panel, run * 4 + j),
                         _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(second)));
    }
  }
}

NVFP4_INLINE void decode_block(const uint8_t* block, int panel, DecodedBlock* out) {
  const uint8_t* scales = block + kBlockCodeBytes;
  const __mmask64 normal = _mm512_cmpgt_epi8_mask(_mm512_loadu_si512(scales), _mm512_set1_epi8(7));
  if (normal != ~__mmask64{0}) return decode_any(block, panel, out);  // negative, zero and subnormal scales
  const __m512i table = biased_table();
  const __m512i classes = class_table();
  // Byte r of 16 into both halves of lane r.
  const __m512i spread =
      _mm512_set_epi32(0x800f800f, 0x800e800e, 0x800d800d, 0x800c800c, 0x800b800b, 0x800a800a, 0x80098009, 0x80088008,
                       0x80078007, 0x80068006, 0x80058005, 0x80048004, 0x80038003, 0x80028002, 0x80018001, 0x80008000);
  const __m512i base = _mm512_set1_epi16((kBias - 120) << 7);  // a scale's bits are (byte << 4) + (120 << 7)
  NVFP4_UNROLL for (int group = 0; group < kBlockGroups; ++group) {
    const __m128i group_scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales) + group);
    const __m512i bytes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(group_scales), spread);
    const __m512i plain = _mm512_sub_epi16(base, _mm512_slli_epi16(bytes, 4));
    const __m512i three_halves = _mm512_sub_epi16(plain, _mm512_shuffle_epi8(classes, bytes));
    NVFP4_UNROLL for (int run = 2 * group; run < 2 * group + 2; ++run) {
      __m512i pairs[4];
      decode_run(block + run * 64, table, plain, three_halves, pairs);
      NVFP4_UNROLL for (int j = 0; j < 4; ++j) _mm512_store_si512(vector_at(out, panel, run * 4 + j), pairs[j]);
    }
  }
}

NVFP4_INLINE void prefetch_block(const uint8_t* block) {
  NVFP4_UNROLL for (int line = 0; line < kBlockBytes; line += 64) _mm_prefetch(block + line, _MM_HINT_T0);
}

// Both panels' blocks from `block` on.
NVFP4_INLINE void decode_blocks(const uint8_t* first, const uint8_t* second, int64_t block, int64_t count,
                                DecodedBlock* out) {
  order_memory(out);
  for (int64_t i = 0; i < count; ++i) {
    prefetch_block(first + (block + i + 2) * kBlockBytes);
    prefetch_block(second + (block + i + 2) * kBlockBytes);
    decode_block(first + (block + i) * kBlockBytes, 0, out + i);
    decode_block(second + (block + i) * kBlockBytes, 1, out + i);
  }
  order_memory(out);
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
};

constexpr int64_t kTokenBytes = kBlockColumns * 2;             // from one token of a tile to the next
constexpr int64_t kSumBytes = 2 * kPanelRows * sizeof(float);  // the same of its sums

// Adds the products of some decoded blocks with one or two tiles of tokens, whose first value is `values`.
template <int kParts, bool kTwo>
NVFP4_INLINE void multiply_blocks(const DecodedBlock* decoded, int64_t blocks, const TokenValues& tokens,
                                  const uint16_t* values) {
  for (int64_t block = 0; block < blocks; ++block) {
    NVFP4_UNROLL for (int step = 0; step < kBlockSteps; ++step) {
      const uint16_t* upper = values + block * tokens.block_values + step * kStepColumns;
      _tile_loadd(6, decoded[block].weights[step][0], 64);
      _tile_loadd(4, upper, kTokenBytes);
      _tile_loadd(7, decoded[block].weights[step][1], 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwo) {
        _tile_loadd(5, upper + tokens.tile_values, kTokenBytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      if constexpr (kParts == 2) {
        const uint16_t* lower = upper + tokens.part_values;
        _tile_loadd(4, lower, kTokenBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTwo) {
          _tile_loadd(5, lower + tokens.tile_values, kTokenBytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
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

// `sums` are those of the first token; the second tile's begin `rows` tokens behind.
template <bool kTwo>
NVFP4_INLINE void load_sums(const float* sums, int64_t rows) {
  order_memory(sums);
  _tile_loadd(0, sums, kSumBytes);
  _tile_loadd(1, sums + kPanelRows, kSumBytes);
  if constexpr (kTwo) {
    _tile_loadd(2, sums + rows * 2 * kPanelRows, kSumBytes);
    _tile_loadd(3, sums + rows * 2 * kPanelRows + kPanelRows, kSumBytes);
  }
}

template <bool kTwo>
NVFP4_INLINE void store_sums(float* sums, int64_t rows) {
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + kPanelRows, kSumBytes);
  if constexpr (kTwo) {
    _tile_stored(2, sums + rows * 2 * kPanelRows, kSumBytes);
    _tile_stored(3, sums + rows * 2 * kPanelRows + kPanelRows, kSumBytes);
  }
}

// One or two tiles of tokens: the sums stay in their tiles. The next block is decoded before one is multiplied, so that
// tiles are loaded from lines long stored.
template <int kParts, bool kTwo>
void multiply_few_tiles(const uint8_t* first, const uint8_t* second, const TokenTile& tile, const TokenValues& tokens,
                        int64_t rows, float* sums) {
  DecodedBlock decoded[2];
  clear_sums<kTwo>();
  decode_blocks(first, second, 0, 1, &decoded[0]);
  for (int64_t block = 0; block < tile.blocks; ++block) {
    if (block + 1 < tile.blocks) decode_blocks(first, second, block + 1, 1, &decoded[(block + 1) % 2]);
    multiply_blocks<kParts, kTwo>(&decoded[block % 2], 1, tokens, tokens.values + block * tokens.block_values);
  }
  store_sums<kTwo>(sums, rows);
}

// Two tiles of tokens at a time, or a last one, for a chunk of decoded blocks; the sums are kept in memory.
template <int kParts, bool kTwo>
NVFP4_INLINE void multiply_chunk(const DecodedBlock* decoded, int64_t block, int64_t blocks, const TokenValues& tokens,
                                 int64_t rows, int64_t token_tile, float* sums) {
  float* to = sums + token_tile * rows * 2 * kPanelRows;
  if (block == 0) {
    clear_sums<kTwo>();
  } else {
    load_sums<kTwo>(to, rows);
  }
  multiply_blocks<kParts, kTwo>(decoded, blocks, tokens,
                                tokens.values + block * tokens.block_values + token_tile * tokens.tile_values);
  store_sums<kTwo>(to, rows);
}

template <int kParts>
void multiply_many_tiles(const uint8_t* first, const uint8_t* second, const TokenTile& tile, const TokenValues& tokens,
                         int64_t rows, int64_t token_tiles, float* sums) {
  DecodedBlock decoded[kChunkBlocks];
  for (int64_t block = 0; block < tile.blocks; block += kChunkBlocks) {
    const int64_t blocks = tile.blocks - block < kChunkBlocks ? tile.blocks - block : kChunkBlocks;
    decode_blocks(first, second, block, blocks, decoded);
    for (int64_t i = 0; i + 1 < token_tiles; i += 2) {
      multiply_chunk<kParts, true>(decoded, block, blocks, tokens, rows, i, sums);
    }
    if (token_tiles % 2 != 0) {
      multiply_chunk<kParts, false>(decoded, block, blocks, tokens, rows, token_tiles - 1, sums);
    }
  }
}

// Tiles of equal size. The last may reach up to kTileSlack rows behind the last token, into whatever lies there: a row
// of a tile makes its own sums only, and nobody reads those.
template <int kParts>
void multiply_tiles(const uint8_t* first, const uint8_t* second, const TokenTile& tile, float* sums) {
  const int64_t token_tiles = (tile.count + kTileRows - 1) / kTileRows;
  const int64_t rows = (tile.count + token_tiles - 1) / token_tiles;
  static_assert(kMaxTileTokens / kTileRows <= kTileSlack);
  const TokenValues tokens = {static_cast<const uint16_t*>(tile.values), tile.count * kBlockColumns,
                              tile.blocks * tile.count * kBlockColumns, rows * kBlockColumns};
  configure(rows);
  if (token_tiles == 1) {
    multiply_few_tiles<kParts, false>(first, second, tile, tokens, rows, sums);
  } else if (token_tiles == 2) {
    multiply_few_tiles<kParts, true>(first, second, tile, tokens, rows, sums);
  } else {
    multiply_many_tiles<kParts>(first, second, tile, tokens, rows, token_tiles, sums);
  }
  _tile_release();
}

// Panels 0 and 1; a missing second panel is multiplied as a copy of the first, into sums that nobody reads.
void multiply(const uint8_t* panels, int64_t panel_count, const TokenTile& tile, float* sums) {
  if (!uses_tiles(tile)) return kAvx512Kernels.multiply(panels, panel_count, tile, sums);
  const uint8_t* second = panels + (panel_count - 1) * tile.blocks * kBlockBytes;
  if (tile.parts == 2) {
    multiply_tiles<2>(panels, second, tile, sums);
  } else {
    multiply_tiles<1>(panels, second, tile, sums);
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

const LevelKernels kAmxKernels = {false,      true,           gather,         fill_block, multiply,
                                  gate_panel, activate_panel, accumulate_row, store_row,  swiglu_row};

}  // namespace nvfp4::cpu
