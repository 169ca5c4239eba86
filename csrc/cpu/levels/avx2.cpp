// The AVX2 level. Build with -mavx2 -mfma -mf16c
//
// As in avx512.cpp, few tokens are multiplied straight from decoded registers, many from a block decoded into L1. A
// panel's 16 rows are two registers of eight.
#include <immintrin.h>

#include "elementwise.inl"

namespace nvfp4::cpu {
namespace {

constexpr int kHalfRows = 8;
constexpr int kPairsPerBlock = kBlockColumns / 2;  // a step of vpmaddwd takes two columns of each row
constexpr int kPairsPerGroup = 8;
constexpr int kFewTokens = 4;
constexpr int kTileTokens = 4;

#define NVFP4_UNROLL _Pragma("GCC unroll 16")

// Weights are 2 * code * 2^8 in int16: a byte shuffle leaves 2 * code in bytes, and leaving it in the upper half of its
// 16 bits is cheaper than extending its sign. The sum over a group is at most 16 * 12 * 2^8 * 2^14 < 2^30.
constexpr float kWeightUnit = 0x1p-8f;

// One half of a run of eight columns to four pairs of columns j and j + 4.
NVFP4_INLINE void decode_run(const uint8_t* run, __m256i* pairs) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  const __m256i low_nibbles = _mm256_set1_epi8(15);
  const __m256i upper_bytes = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run));
  const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, low_nibbles));
  const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), low_nibbles));
  pairs[0] = _mm256_slli_epi16(even, 8);
  pairs[1] = _mm256_slli_epi16(odd, 8);
  pairs[2] = _mm256_and_si256(even, upper_bytes);
  pairs[3] = _mm256_and_si256(odd, upper_bytes);
}

// Eight E4M3 bytes times 2^-8: that is fp16 with the exponent field in its place.
NVFP4_INLINE __m256 decode_scales(const uint8_t* bytes) {
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xbfff))));
}

NVFP4_INLINE __m256i broadcast_pair(const int16_t* pair) {
  int32_t both;
  std::memcpy(&both, pair, sizeof(both));
  return _mm256_set1_epi32(both);
}

NVFP4_INLINE __m256i add_dot(__m256i sum, __m256i weights, __m256i values) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(weights, values));
}

NVFP4_INLINE void add_to(float* sums, __m256 products, __m256 scale) {
  _mm256_storeu_ps(sums, _mm256_fmadd_ps(products, scale, _mm256_loadu_ps(sums)));
}

NVFP4_INLINE __m256 token_unit(float token_scale) { return _mm256_set1_ps(token_scale * kWeightUnit); }

template <int kTokens>
void multiply_few(const uint8_t* panel, const TokenTile& tile, float* sums) {
  const int16_t* values = static_cast<const int16_t*>(tile.values);
  const float* scale = tile.scale;
  for (int64_t block = 0; block < tile.blocks; ++block, panel += kBlockBytes) {
    for (int half = 0; half < 2; ++half) {
      __m256 products[kTokens];
      NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) products[t] = _mm256_setzero_ps();
      NVFP4_UNROLL for (int group = 0; group < kBlockGroups; ++group) {
        __m256i weights[kPairsPerGroup];
        decode_run(panel + group * 128 + half * 32, weights);
        decode_run(panel + group * 128 + 64 + half * 32, weights + 4);
        const __m256 scales = decode_scales(panel + kBlockCodeBytes + group * kPanelRows + half * kHalfRows);
        NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
          const int16_t* pairs = values + t * kBlockColumns + group * 16;
          __m256i dots = _mm256_madd_epi16(weights[0], broadcast_pair(pairs));
          NVFP4_UNROLL for (int i = 1; i < kPairsPerGroup; ++i) {
            dots = add_dot(dots, weights[i], broadcast_pair(pairs + 2 * i));
          }
          products[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scales, products[t]);
        }
      }
      NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
        add_to(sums + t * 2 * kPanelRows + half * kHalfRows, products[t], token_unit(scale[t]));
      }
    }
    values += kTokens * kBlockColumns;
    scale += kTokens;
  }
}

struct DecodedBlock {
  alignas(32) int16_t weights[kPairsPerBlock][2][2 * kHalfRows];
  alignas(32) float scales[kBlockGroups][2][kHalfRows];
};

void decode_block(const uint8_t* block, DecodedBlock* out) {
  for (int half = 0; half < 2; ++half) {
    for (int run = 0; run < 8; ++run) {
      __m256i pairs[4];
      decode_run(block + run * 64 + half * 32, pairs);
      NVFP4_UNROLL for (int i = 0; i < 4; ++i) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(out->weights[run * 4 + i][half]), pairs[i]);
      }
    }
    for (int group = 0; group < kBlockGroups; ++group) {
      _mm256_store_ps(out->scales[group][half],
                      decode_scales(block + kBlockCodeBytes + group * kPanelRows + half * kHalfRows));
    }
  }
}

template <int kTokens>
void multiply_block(const DecodedBlock& block, const int16_t* values, const float* token_scales, float* sums) {
  __m256 products[kTokens][2];
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) products[t][0] = products[t][1] = _mm256_setzero_ps();
  for (int group = 0; group < kBlockGroups; ++group) {
    __m256i dots[kTokens][2];
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) dots[t][0] = dots[t][1] = _mm256_setzero_si256();
    NVFP4_UNROLL for (int i = 0; i < kPairsPerGroup; ++i) {
      const int step = group * kPairsPerGroup + i;
      const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(block.weights[step][0]));
      const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(block.weights[step][1]));
      NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
        const __m256i x = broadcast_pair(values + t * kBlockColumns + step * 2);
        dots[t][0] = add_dot(dots[t][0], first, x);
        dots[t][1] = add_dot(dots[t][1], second, x);
      }
    }
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
      NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
        products[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t][half]),
                                            _mm256_load_ps(block.scales[group][half]), products[t][half]);
      }
    }
  }
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
    NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
      add_to(sums + t * 2 * kPanelRows + half * kHalfRows, products[t][half], token_unit(token_scales[t]));
    }
  }
}

// sums [count, 2, 16] of the panel that it points at.
void multiply_many(const uint8_t* panel, const TokenTile& tile, float* sums) {
  constexpr void (*kMultiply[kTileTokens])(const DecodedBlock&, const int16_t*, const float*, float*) = {
      multiply_block<1>, multiply_block<2>, multiply_block<3>, multiply_block<4>};
  const int64_t count = tile.count;
  DecodedBlock decoded;
  for (int64_t block = 0; block < tile.blocks; ++block) {
    decode_block(panel + block * kBlockBytes, &decoded);
    for (int64_t token = 0; token < count; token += kTileTokens) {
      const int64_t tokens = count - token < kTileTokens ? count - token : kTileTokens;
      const int64_t index = block * count + token;
      kMultiply[tokens - 1](decoded, static_cast<const int16_t*>(tile.values) + index * kBlockColumns,
                            tile.scale + index, sums + token * 2 * kPanelRows);
    }
  }
}

// code * scale in fp32, [64 columns, 16 rows].
struct DecodedExact {
  alignas(32) float weights[kBlockColumns][2][kHalfRows];
};

void decode_exact(const uint8_t* block, DecodedExact* out) {
  const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  const __m256i sign_bit = _mm256_set1_epi32(INT32_MIN);
  for (int run = 0; run < 8; ++run) {
    for (int half = 0; half < 2; ++half) {
      __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + run * 64 + half * 32));
      const __m256 scales = _mm256_mul_ps(
          decode_scales(block + kBlockCodeBytes + run / 2 * kPanelRows + half * kHalfRows), _mm256_set1_ps(256.0f));
      for (int column = 0; column < 8; ++column) {
        const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, codes);
        const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28), sign_bit);
        const __m256 value = _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign));
        _mm256_store_ps(out->weights[run * 8 + column][half], _mm256_mul_ps(value, scales));
        codes = _mm256_srli_epi32(codes, 4);
      }
    }
  }
}

template <int kTokens>
void multiply_exact(const DecodedExact& block, const float* values, float* sums) {
  __m256 products[kTokens][2];
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) products[t][0] = products[t][1] = _mm256_setzero_ps();
  for (int column = 0; column < kBlockColumns; ++column) {
    const __m256 first = _mm256_load_ps(block.weights[column][0]);
    const __m256 second = _mm256_load_ps(block.weights[column][1]);
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
      const __m256 x = _mm256_set1_ps(values[t * kBlockColumns + column]);
      products[t][0] = _mm256_fmadd_ps(first, x, products[t][0]);
      products[t][1] = _mm256_fmadd_ps(second, x, products[t][1]);
    }
  }
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
    NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
      add_to(sums + t * 2 * kPanelRows + half * kHalfRows, products[t][half], _mm256_set1_ps(1.0f));
    }
  }
}

void multiply_panel_exact(const uint8_t* panel, const TokenTile& tile, float* sums) {
  constexpr void (*kMultiply[kTileTokens])(const DecodedExact&, const float*, float*) = {
      multiply_exact<1>, multiply_exact<2>, multiply_exact<3>, multiply_exact<4>};
  const int64_t count = tile.count;
  DecodedExact decoded;
  for (int64_t block = 0; block < tile.blocks; ++block) {
    decode_exact(panel + block * kBlockBytes, &decoded);
    for (int64_t token = 0; token < count; token += kTileTokens) {
      const int64_t tokens = count - token < kTileTokens ? count - token : kTileTokens;
      kMultiply[tokens - 1](decoded, static_cast<const float*>(tile.values) + (block * count + token) * kBlockColumns,
                            sums + token * 2 * kPanelRows);
    }
  }
}

void multiply(const uint8_t* panels, int64_t panel_count, const TokenTile& tile, float* sums) {
  constexpr void (*kMultiplyFew[kFewTokens])(const uint8_t*, const TokenTile&, float*) = {
      multiply_few<1>, multiply_few<2>, multiply_few<3>, multiply_few<4>};
  std::memset(sums, 0, tile.count * 2 * kPanelRows * sizeof(float));
  for (int64_t i = 0; i < panel_count; ++i) {
    const uint8_t* panel = panels + i * tile.blocks * kBlockBytes;
    float* panel_sums = sums + i * kPanelRows;
    if (tile.exact) {
      multiply_panel_exact(panel, tile, panel_sums);
    } else if (tile.count > kFewTokens) {
      multiply_many(panel, tile, panel_sums);
    } else {
      kMultiplyFew[tile.count - 1](panel, tile, panel_sums);
    }
  }
}

void gather(const TokenRows& tokens, TokenTile* tile) {
  gather_tokens(tokens, tile, [](int64_t) {});
}

void fill_block(const float* values, int64_t block, TokenTile* tile) {
  fill_tokens(values, block, tile, [](int64_t) {});
}

}  // namespace

const LevelKernels kAvx2Kernels = {false,          gather,         fill_block, multiply,  gate_panel,
                                   activate_panel, accumulate_row, store_row,  swiglu_row};

}  // namespace nvfp4::cpu
