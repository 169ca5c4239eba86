// The AVX2 level. Build with -mavx2 -mfma -mf16c
//
// As in avx512.cpp, few tokens are multiplied straight from decoded registers, many from a block decoded into L1. A
// panel's 16 rows are two registers of eight. Both ways give a token the same bits: the products of a block are summed
// as integers, so that their order does not matter.
#include <immintrin.h>

#include "elementwise.inl"

namespace nvfp4::cpu {
namespace {

constexpr int kHalfRows = 8;
constexpr int kPairsPerGroup = 8;  // a step of vpmaddwd takes two columns of each row
constexpr int kFewTokens = 4;
// Tokens whose sums fill the registers: two for each token, with a scale per group another two.
constexpr int kFoldedTokens = 6;
constexpr int kGroupedTokens = 3;
constexpr int kExactTokens = 4;
// Few tokens: into L2, less than two pages of 4 KiB ahead. Many: the next blocks into L1.
constexpr int kPrefetchFew = 12;
constexpr int kPrefetchMany = 2;
constexpr int kScaleBlocks = 4;  // whose scales are decoded before their codes, so that nothing waits for them

#define NVFP4_UNROLL _Pragma("GCC unroll 32")

NVFP4_INLINE __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
NVFP4_INLINE __m128i load_8_bytes(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
NVFP4_INLINE void store(void* to, __m256i x) { _mm256_store_si256(static_cast<__m256i*>(to), x); }

NVFP4_INLINE __m256i twice(__m128i x) { return _mm256_broadcastsi128_si256(x); }

// Leaves two values in registers and the code before and after them in its order. GCC 12 otherwise multiplies far ahead
// of the additions, runs out of registers and takes 1.6 times as long.
NVFP4_INLINE void pin(__m256i& a, __m256i& b) { asm volatile("" : "+x"(a), "+x"(b)); }

NVFP4_INLINE __m256i broadcast_pair(const int16_t* pair) {
  int32_t both;
  std::memcpy(&both, pair, sizeof(both));
  return _mm256_set1_epi32(both);
}

// dots[half] (+)= weights[half] * x
NVFP4_INLINE void add_dots(__m256i (&dots)[2], __m256i first_half, __m256i second_half, __m256i x, bool begins) {
  __m256i a = _mm256_madd_epi16(first_half, x);
  __m256i b = _mm256_madd_epi16(second_half, x);
  pin(a, b);
  dots[0] = begins ? a : _mm256_add_epi32(dots[0], a);
  dots[1] = begins ? b : _mm256_add_epi32(dots[1], b);
  pin(dots[0], dots[1]);
}

NVFP4_INLINE void add_to(float* sums, __m256 products, __m256 scale) {
  _mm256_storeu_ps(sums, _mm256_fmadd_ps(products, scale, _mm256_loadu_ps(sums)));
}

}  // namespace
}  // namespace nvfp4::cpu

#include "avx2_decode.inl"

namespace nvfp4::cpu {
namespace {

// One block with a few tokens: values [tokens, 64], scales [tokens], sums [tokens, 2, 16].
using MultiplyBlock = void (*)(const DecodedBlock& block, const int16_t* values, const float* token_scales,
                               float* sums);

// The products of a group with all tokens.
template <int kTokens>
NVFP4_INLINE void add_group(const DecodedBlock& block, int group, const int16_t* values, bool begins,
                            __m256i (&dots)[kTokens][2]) {
  NVFP4_UNROLL for (int i = 0; i < kPairsPerGroup; ++i) {
    const __m256i first = load(block.weights[group][i][0]);
    const __m256i second = load(block.weights[group][i][1]);
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
      const __m256i x = broadcast_pair(values + t * kBlockColumns + group * 16 + i * 2);
      add_dots(dots[t], first, second, x, begins && i == 0);
    }
  }
}

template <int kTokens>
void multiply_folded(const DecodedBlock& block, const int16_t* values, const float* token_scales, float* sums) {
  __m256i dots[kTokens][2];
  NVFP4_UNROLL for (int group = 0; group < kBlockGroups; ++group) {
    add_group<kTokens>(block, group, values, group == 0, dots);
  }
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
    NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
      const __m256 products = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[t][half]), _mm256_load_ps(block.scales[0][half]));
      add_to(sums + t * 2 * kPanelRows + half * kHalfRows, products, _mm256_set1_ps(token_scales[t]));
    }
  }
}

template <int kTokens>
void multiply_grouped(const DecodedBlock& block, const int16_t* values, const float* token_scales, float* sums) {
  __m256 products[kTokens][2];
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) products[t][0] = products[t][1] = _mm256_setzero_ps();
  for (int group = 0; group < kBlockGroups; ++group) {
    __m256i dots[kTokens][2];
    add_group<kTokens>(block, group, values, true, dots);
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
      NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
        products[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t][half]),
                                            _mm256_load_ps(block.scales[group][half]), products[t][half]);
      }
    }
  }
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
    NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
      add_to(sums + t * 2 * kPanelRows + half * kHalfRows, products[t][half],
             _mm256_set1_ps(token_scales[t] * kWidenedUnit));
    }
  }
}

// Indexed by the number of tokens less one.
constexpr MultiplyBlock kMultiplyFolded[kFoldedTokens] = {multiply_folded<1>, multiply_folded<2>, multiply_folded<3>,
                                                          multiply_folded<4>, multiply_folded<5>, multiply_folded<6>};
constexpr MultiplyBlock kMultiplyGrouped[kGroupedTokens] = {multiply_grouped<1>, multiply_grouped<2>,
                                                            multiply_grouped<3>};

// Decodes a block and multiplies it with all tokens, in steps of equal size. Not inline: the loop around a call would
// lose registers to it.
__attribute__((noinline)) void multiply_decoded(const uint8_t* block, const FoldedScales& scales, int64_t count,
                                                const int16_t* values, const float* token_scales, float* sums) {
  DecodedBlock decoded;
  if (scales.folded) {
    decode_folded(block, scales, &decoded);
  } else {
    decode_grouped(block, &decoded);
  }
  const MultiplyBlock* multiply = scales.folded ? kMultiplyFolded : kMultiplyGrouped;
  const int64_t most = scales.folded ? kFoldedTokens : kGroupedTokens;
  for (int64_t steps = (count + most - 1) / most; steps > 0; --steps) {
    const int64_t tokens = (count + steps - 1) / steps;
    multiply[tokens - 1](decoded, values, token_scales, sums);
    values += tokens * kBlockColumns;
    token_scales += tokens;
    sums += tokens * 2 * kPanelRows;
    count -= tokens;
  }
}

template <_mm_hint kHint>
NVFP4_INLINE void prefetch_block(const uint8_t* block) {
  NVFP4_UNROLL for (int line = 0; line < kBlockBytes; line += 64) _mm_prefetch(block + line, kHint);
}

// sums [count, 2, 16] of the panel that it points at.
void multiply_many(const uint8_t* panel, const TokenTile& tile, float* sums) {
  const int64_t count = tile.count;
  FoldedScales scales;
  for (int64_t block = 0; block < tile.blocks; ++block, panel += kBlockBytes) {
    prefetch_block<_MM_HINT_T0>(panel + kPrefetchMany * kBlockBytes);
    fold_scales(panel, &scales);
    multiply_decoded(panel, scales, count, static_cast<const int16_t*>(tile.values) + block * count * kBlockColumns,
                     tile.scale + block * count, sums);
  }
}

// A folded block with a few tokens. Factors multiply the groups' sums here, which gives the same integers as factors in
// the weights.
template <int kTokens>
NVFP4_INLINE void multiply_registers(const uint8_t* block, const FoldedScales& scales, const int16_t* values,
                                     const float* token_scales, float* sums) {
  __m256i totals[kTokens][2];
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) totals[t][0] = totals[t][1] = _mm256_setzero_si256();
  NVFP4_UNROLL for (int group = 0; group < kBlockGroups; ++group) {
    __m256i dots[kTokens][2];
    NVFP4_UNROLL for (int run = 0; run < 2; ++run) {
      __m256i first[4], second[4];
      widen(decode_run(block + group * 128 + run * 64), first);
      widen(decode_run(block + group * 128 + run * 64 + 32), second);
      NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
        const int16_t* pairs = values + t * kBlockColumns + group * 16 + run * 8;
        NVFP4_UNROLL for (int i = 0; i < 4; ++i) {
          add_dots(dots[t], first[i], second[i], broadcast_pair(pairs + 2 * i), run + i == 0);
        }
      }
    }
    NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
      const __m256i factors = _mm256_cvtepu8_epi32(load_8_bytes(scales.factors[group] + half * kHalfRows));
      NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
        const __m256i dot = _mm256_srai_epi32(dots[t][half], kWidenedBits);
        totals[t][half] = _mm256_add_epi32(totals[t][half], _mm256_mullo_epi32(dot, factors));
      }
    }
  }
  NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
      const __m256 products = _mm256_mul_ps(_mm256_cvtepi32_ps(totals[t][half]), _mm256_load_ps(scales.units[half]));
      add_to(sums + t * 2 * kPanelRows + half * kHalfRows, products, _mm256_set1_ps(token_scales[t]));
    }
  }
}

}  // namespace
}  // namespace nvfp4::cpu

#include "avx2_digits.inl"

namespace nvfp4::cpu {
namespace {

template <int kTokens>
void multiply_few(const uint8_t* panel, const TokenTile& tile, float* sums) {
  const int16_t* values = static_cast<const int16_t*>(tile.values);
  const float* token_scales = tile.scale;
  FoldedScales scales[kScaleBlocks];
  for (int64_t block = 0; block < tile.blocks; ++block, panel += kBlockBytes) {
    const int64_t in_turn = block % kScaleBlocks;
    const int64_t left = tile.blocks - block;
    for (int64_t i = 0; in_turn == 0 && i < (left < kScaleBlocks ? left : kScaleBlocks); ++i) {
      fold_scales(panel + i * kBlockBytes, &scales[i]);
    }
    prefetch_block<_MM_HINT_T1>(panel + kPrefetchFew * kBlockBytes);
    if constexpr (kTokens == 1) {
      const auto& digits = static_cast<const DigitBlock*>(tile.values)[block];
      if (scales[in_turn].folded) {
        const auto& corrections = reinterpret_cast<const DigitCorrections*>(tile.corrections)[block];
        multiply_digits(panel, scales[in_turn], digits, corrections, *token_scales, sums);
      } else {
        int16_t joined[kBlockColumns];
        join_digits(digits, joined);
        multiply_decoded(panel, scales[in_turn], kTokens, joined, token_scales, sums);
      }
    } else if (scales[in_turn].folded) {
      multiply_registers<kTokens>(panel, scales[in_turn], values, token_scales, sums);
    } else {
      multiply_decoded(panel, scales[in_turn], kTokens, values, token_scales, sums);
    }
    values += kTokens * kBlockColumns;
    token_scales += kTokens;
  }
}

}  // namespace
}  // namespace nvfp4::cpu

#include "avx2_exact.inl"

namespace nvfp4::cpu {
namespace {

void multiply(const uint8_t* panels, int64_t panel_count, const TokenTile& tile, float* sums) {
  constexpr void (*kMultiplyFew[kFewTokens])(const uint8_t*, const TokenTile&, float*) = {
      multiply_few<1>, multiply_few<2>, multiply_few<3>, multiply_few<4>};
  std::memset(sums, 0, tile.count * 2 * kPanelRows * sizeof(float));
  // Another thread may have had the panels before these.
  for (int64_t i = 0; i < kPrefetchFew && !tile.exact && tile.count <= kFewTokens; ++i) {
    prefetch_block<_MM_HINT_T1>(panels + i * kBlockBytes);
  }
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
  gather_tokens(tokens, tile, [&](int64_t index) { split_digits(tile, index); });
}

void fill_block(const float* values, int64_t block, TokenTile* tile) {
  fill_tokens(values, block, tile, [&](int64_t index) { split_digits(tile, index); });
}

// ---- derivatives

using Floats = __m256;
constexpr int kBackwardTokens = 3;

void decode_rows(const uint8_t* block, float (*rows)[kBlockColumns]) {
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  for (int run = 0; run < 8; ++run) {
    alignas(32) float scales[kPanelRows];
    for (int half = 0; half < 2; ++half) {
      const uint8_t* bytes = block + kBlockCodeBytes + run / 2 * kPanelRows + half * kHalfRows;
      _mm256_store_ps(scales + half * kHalfRows, decode_exact_scales(bytes));
    }
    for (int row = 0; row < kPanelRows; ++row) {
      int32_t eight;
      std::memcpy(&eight, block + run * 64 + row * 4, sizeof(eight));
      const __m256 values = decode_exact_values(_mm256_srlv_epi32(_mm256_set1_epi32(eight), shifts));
      _mm256_store_ps(rows[row] + run * 8, _mm256_mul_ps(values, _mm256_set1_ps(scales[row])));
    }
  }
}

}  // namespace
}  // namespace nvfp4::cpu

#include "backward.inl"

namespace nvfp4::cpu {

const LevelKernels kAvx2Kernels = {false,
                                   gather,
                                   fill_block,
                                   multiply,
                                   gate_panel,
                                   activate_panel,
                                   accumulate_row,
                                   store_row,
                                   swiglu_row,
                                   differentiate_panel,
                                   swiglu_backward_row,
                                   multiply_transposed,
                                   kMaxTileTokens,
                                   1,
                                   false,
                                   sizeof(DigitCorrections) / sizeof(int32_t)};

}  // namespace nvfp4::cpu
