// Products in fp32 (`exact`); included by avx2.cpp.

namespace nvfp4::cpu {
namespace {

// code * scale in fp32, [64 columns, 16 rows].
struct DecodedExact {
  alignas(32) float weights[kBlockColumns][2][kHalfRows];
};

// The values of the codes in the lowest four bits of each lane.
NVFP4_INLINE __m256 decode_exact_values(__m256i codes) {
  const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28), _mm256_set1_epi32(INT32_MIN));
  return _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, codes), _mm256_castsi256_ps(sign));
}

NVFP4_INLINE __m256 decode_exact_scales(const uint8_t* bytes) {
  return _mm256_mul_ps(decode_scales(bytes), _mm256_set1_ps(256.0f));
}

void decode_exact(const uint8_t* block, DecodedExact* out) {
  for (int run = 0; run < 8; ++run) {
    for (int half = 0; half < 2; ++half) {
      __m256i codes = load(block + run * 64 + half * 32);
      const __m256 scales = decode_exact_scales(block + kBlockCodeBytes + run / 2 * kPanelRows + half * kHalfRows);
      for (int column = 0; column < 8; ++column) {
        _mm256_store_ps(out->weights[run * 8 + column][half], _mm256_mul_ps(decode_exact_values(codes), scales));
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
  constexpr void (*kMultiply[kExactTokens])(const DecodedExact&, const float*, float*) = {
      multiply_exact<1>, multiply_exact<2>, multiply_exact<3>, multiply_exact<4>};
  const int64_t count = tile.count;
  DecodedExact decoded;
  for (int64_t block = 0; block < tile.blocks; ++block) {
    decode_exact(panel + block * kBlockBytes, &decoded);
    for (int64_t token = 0; token < count; token += kExactTokens) {
      const int64_t tokens = count - token < kExactTokens ? count - token : kExactTokens;
      kMultiply[tokens - 1](decoded, static_cast<const float*>(tile.values) + (block * count + token) * kBlockColumns,
                            sums + token * 2 * kPanelRows);
    }
  }
}

}  // namespace
}  // namespace nvfp4::cpu
