// The AVX-512 level. Build with
// -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c
//
// Two kinds of kernels multiply panels with a token tile, in int16 and in fp32 (`exact`):
//   for few tokens codes are decoded straight into registers, because reading the weights is what takes the time;
//   for many tokens a block is decoded into L1 and run over six tokens at a time (avx512_many.inl).

// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "decode512.inl"

namespace nvfp4::cpu {
namespace {

constexpr int kPairsPerBlock = kBlockColumns / 2;  // a step of vpdpwssd takes two columns of each row
constexpr int kPairsPerGroup = 8;
constexpr int kFewTokens = 8;
constexpr int kTileTokens = 6;  // 2 panels x 6 tokens of accumulators fill the registers

#define NVFP4_UNROLL _Pragma("GCC unroll 32")

// Twice the e2m1 values, once more for the code bit above that a shift leaves in the index.
NVFP4_INLINE __m512i code_table() {
  const __m256i once = _mm256_setr_epi16(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  return _mm512_broadcast_i64x4(once);
}

// Columns j and j + 4 of a run of eight, as int16 side by side in each row's lane.
template <int j>
NVFP4_INLINE __m512i decode_pair(__m512i codes, __m512i table) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * j), table);
}

// Four pairs of columns of a run of eight.
NVFP4_INLINE void decode_run(const uint8_t* run, __m512i table, __m512i* pairs) {
  const __m512i codes = _mm512_loadu_si512(run);
  pairs[0] = decode_pair<0>(codes, table);
  pairs[1] = decode_pair<1>(codes, table);
  pairs[2] = decode_pair<2>(codes, table);
  pairs[3] = decode_pair<3>(codes, table);
}

NVFP4_INLINE __m512i broadcast_pair(const int16_t* pair) {
  int32_t both;
  std::memcpy(&both, pair, sizeof(both));
  return _mm512_set1_epi32(both);
}

// Into L2 and far ahead: fetching nearer blocks, or into L1, gets in the way of the hardware's own prefetching.
constexpr int kPrefetchBlocks = 16;

template <int kTokens>
void multiply_few(const uint8_t* panel, const TokenTile& tile, float* sums) {
  const __m512i table = code_table();
  const int16_t* values = static_cast<const int16_t*>(tile.values);
  const float* scale = tile.scale;
  __m512 totals[kTokens];
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) totals[t] = _mm512_setzero_ps();
  for (int64_t block = 0; block < tile.blocks; ++block, panel += kBlockBytes) {
    NVFP4_UNROLL for (int line = 0; line < kBlockBytes; line += 64) {
      _mm_prefetch(panel + kPrefetchBlocks * kBlockBytes + line, _MM_HINT_T1);
    }
    __m512 block_totals[kTokens];
    NVFP4_UNROLL for (int group = 0; group < kBlockGroups; ++group) {
      __m512i weights[kPairsPerGroup];
      decode_run(panel + group * 128, table, weights);
      decode_run(panel + group * 128 + 64, table, weights + 4);
      const __m512 group_scales = decode_scales(panel + kBlockCodeBytes + group * kPanelRows);
      NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
        const int16_t* pairs = values + t * kBlockColumns + group * 16;
        __m512i dots = _mm512_madd_epi16(weights[0], broadcast_pair(pairs));
        NVFP4_UNROLL for (int i = 1; i < kPairsPerGroup; ++i) {
          dots = _mm512_dpwssd_epi32(dots, weights[i], broadcast_pair(pairs + 2 * i));
        }
        const __m512 products = _mm512_cvtepi32_ps(dots);
        block_totals[t] = group == 0 ? _mm512_mul_ps(products, group_scales)
                                     : _mm512_fmadd_ps(products, group_scales, block_totals[t]);
      }
    }
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
      totals[t] = _mm512_fmadd_ps(block_totals[t], _mm512_set1_ps(scale[t]), totals[t]);
    }
    values += kTokens * kBlockColumns;
    scale += kTokens;
  }
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) _mm512_storeu_ps(sums + t * 2 * kPanelRows, totals[t]);
}

}  // namespace
}  // namespace nvfp4::cpu

#include "avx512_exact.inl"
#include "avx512_many.inl"

namespace nvfp4::cpu {
namespace {

// Panels 0 and 1; a missing second panel is multiplied as a copy of the first, into sums that nobody reads.
void multiply(const uint8_t* panels, int64_t panel_count, const TokenTile& tile, float* sums) {
  constexpr void (*kMultiplyFew[kFewTokens])(const uint8_t*, const TokenTile&, float*) = {
      multiply_few<1>, multiply_few<2>, multiply_few<3>, multiply_few<4>,
      multiply_few<5>, multiply_few<6>, multiply_few<7>, multiply_few<8>};
  constexpr void (*kMultiplyFewExact[kFewTokens])(const uint8_t*, const TokenTile&, float*) = {
      multiply_few_exact<1>, multiply_few_exact<2>, multiply_few_exact<3>, multiply_few_exact<4>,
      multiply_few_exact<5>, multiply_few_exact<6>, multiply_few_exact<7>, multiply_few_exact<8>};
  const int64_t bytes = tile.blocks * kBlockBytes;
  const uint8_t* second = panels + (panel_count - 1) * bytes;
  // multiply_few_exact sums group by group, multiply_many_exact column by column.
  if (tile.count > kFewTokens || (tile.exact && tile.batch_invariant)) {
    return tile.exact ? multiply_many_exact(panels, second, tile, sums) : multiply_many(panels, second, tile, sums);
  }
  const auto& few = tile.exact ? kMultiplyFewExact : kMultiplyFew;
  for (int64_t panel = 0; panel < panel_count; ++panel) {
    few[tile.count - 1](panels + panel * bytes, tile, sums + panel * kPanelRows);
  }
}

void gather(const TokenRows& tokens, TokenTile* tile) {
  gather_tokens(tokens, tile, [&](int64_t index) { correct_pairs(tile, index); });
}

void fill_block(const float* values, int64_t block, TokenTile* tile) {
  fill_tokens(values, block, tile, [&](int64_t index) { correct_pairs(tile, index); });
}

// ---- derivatives

using Floats = __m512;
constexpr int kBackwardTokens = 6;

NVFP4_INLINE void decode_rows(const uint8_t* block, float (*rows)[kBlockColumns]) {
  const __m512 table = exact_code_table();
  const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  for (int group = 0; group < kBlockGroups; ++group) {
    alignas(64) float scales[kPanelRows];
    _mm512_store_ps(scales, decode_exact_scales(block + kBlockCodeBytes + group * kPanelRows));
    alignas(64) int32_t codes[2][kPanelRows];
    std::memcpy(codes, block + group * sizeof(codes), sizeof(codes));
    NVFP4_UNROLL for (int row = 0; row < kPanelRows; ++row) {
      const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(codes[0][row]), 0xff00, codes[1][row]);
      const __m512 values = _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shifts), table);
      _mm512_store_ps(rows[row] + group * 16, _mm512_mul_ps(values, _mm512_set1_ps(scales[row])));
    }
  }
}

}  // namespace
}  // namespace nvfp4::cpu

#include "backward.inl"

namespace nvfp4::cpu {

const LevelKernels kAvx512Kernels = {false,
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
                                     multiply_transposed};

}  // namespace nvfp4::cpu
