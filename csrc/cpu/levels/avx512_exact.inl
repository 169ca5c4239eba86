// Products in fp32 (`exact`); included by avx512.cpp.

namespace nvfp4::cpu {
namespace {

template <int kTokens>
void multiply_few_exact(const uint8_t* panel, const TokenTile& tile, float* sums) {
  const __m512 table = exact_code_table();
  const float* values = static_cast<const float*>(tile.values);
  __m512 totals[kTokens];
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) totals[t] = _mm512_setzero_ps();
  for (int64_t block = 0; block < tile.blocks; ++block, panel += kBlockBytes, values += kTokens * kBlockColumns) {
    NVFP4_UNROLL for (int group = 0; group < kBlockGroups; ++group) {
      __m512 products[kTokens];
      NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) products[t] = _mm512_setzero_ps();
      NVFP4_UNROLL for (int column = 0; column < 16; ++column) {
        const __m512i codes = _mm512_loadu_si512(panel + (group * 2 + column / 8) * 64);
        const __m512 weights = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, column % 8 * 4), table);
        NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
          const __m512 x = _mm512_set1_ps(values[t * kBlockColumns + group * 16 + column]);
          products[t] = _mm512_fmadd_ps(weights, x, products[t]);
        }
      }
      const __m512 scales = decode_exact_scales(panel + kBlockCodeBytes + group * kPanelRows);
      NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) totals[t] = _mm512_fmadd_ps(products[t], scales, totals[t]);
    }
  }
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) _mm512_storeu_ps(sums + t * 2 * kPanelRows, totals[t]);
}

// code * scale in fp32, [64 columns, 2 panels, 16 rows].
struct DecodedExact {
  alignas(64) float weights[kBlockColumns][2][kPanelRows];
};

void decode_exact(const uint8_t* block, int panel, DecodedExact* out) {
  const __m512 table = exact_code_table();
  for (int run = 0; run < 8; ++run) {
    __m512i codes = _mm512_loadu_si512(block + run * 64);
    const __m512 scales = decode_exact_scales(block + kBlockCodeBytes + run / 2 * kPanelRows);
    for (int column = 0; column < 8; ++column) {
      _mm512_store_ps(out->weights[run * 8 + column][panel],
                      _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), scales));
      codes = _mm512_srli_epi32(codes, 4);
    }
  }
}

template <int kTokens>
void multiply_exact(const DecodedExact& block, const float* values, float* sums) {
  __m512 products[kTokens][2];
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) products[t][0] = products[t][1] = _mm512_setzero_ps();
  for (int column = 0; column < kBlockColumns; ++column) {
    const __m512 first = _mm512_load_ps(block.weights[column][0]);
    const __m512 second = _mm512_load_ps(block.weights[column][1]);
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
      const __m512 x = _mm512_set1_ps(values[t * kBlockColumns + column]);
      products[t][0] = _mm512_fmadd_ps(first, x, products[t][0]);
      products[t][1] = _mm512_fmadd_ps(second, x, products[t][1]);
    }
  }
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
    NVFP4_UNROLL for (int panel = 0; panel < 2; ++panel) {
      float* sum = sums + (t * 2 + panel) * kPanelRows;
      _mm512_storeu_ps(sum, _mm512_add_ps(products[t][panel], _mm512_loadu_ps(sum)));
    }
  }
}

void multiply_many_exact(const uint8_t* first, const uint8_t* second, const TokenTile& tile, float* sums) {
  constexpr void (*kMultiply[kTileTokens])(const DecodedExact&, const float*, float*) = {
      multiply_exact<1>, multiply_exact<2>, multiply_exact<3>, multiply_exact<4>, multiply_exact<5>, multiply_exact<6>};
  const int64_t count = tile.count;
  std::memset(sums, 0, count * 2 * kPanelRows * sizeof(float));
  DecodedExact decoded;
  for (int64_t block = 0; block < tile.blocks; ++block) {
    decode_exact(first + block * kBlockBytes, 0, &decoded);
    decode_exact(second + block * kBlockBytes, 1, &decoded);
    for (int64_t token = 0; token < count; token += kTileTokens) {
      const int64_t tokens = count - token < kTileTokens ? count - token : kTileTokens;
      kMultiply[tokens - 1](decoded, static_cast<const float*>(tile.values) + (block * count + token) * kBlockColumns,
                            sums + token * 2 * kPanelRows);
    }
  }
}

}  // namespace
}  // namespace nvfp4::cpu
