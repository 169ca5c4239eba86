// What amx.cpp shares with avx512.cpp: the element-wise kernels, and codes and scales as fp32 vectors.

#include <immintrin.h>

#include "elementwise.inl"

namespace nvfp4::cpu {
namespace {

// Sixteen E4M3 bytes times 2^-8: that is fp16 with the exponent field in its place.
NVFP4_INLINE __m512 decode_scales(const uint8_t* bytes) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  return _mm512_cvtph_ps(half);
}

NVFP4_INLINE __m512 exact_code_table() {
  return _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f,
                        -6.0f);
}

NVFP4_INLINE __m512 decode_exact_scales(const uint8_t* bytes) {
  return _mm512_mul_ps(decode_scales(bytes), _mm512_set1_ps(256.0f));
}

}  // namespace
}  // namespace nvfp4::cpu
