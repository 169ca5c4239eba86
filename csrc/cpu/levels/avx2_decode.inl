// Packed blocks decoded to int16 for vpmaddwd, and their scales folded into one unit per row; included by avx2.cpp.

namespace nvfp4::cpu {
namespace {

// One half of a run of eight columns, 2 * code + kOffset in bytes: columns 0 2 4 6 of a row in its 32-bit lane, and
// 1 3 5 7.
struct CodeBytes {
  __m256i even;
  __m256i odd;
};

template <int kOffset = 0>
NVFP4_INLINE CodeBytes decode_run(const uint8_t* run) {
  const __m128i doubled = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m256i table = twice(_mm_add_epi8(doubled, _mm_set1_epi8(kOffset)));
  const __m256i low_nibbles = _mm256_set1_epi8(15);
  const __m256i codes = load(run);
  return {_mm256_shuffle_epi8(table, _mm256_and_si256(codes, low_nibbles)),
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), low_nibbles))};
}

// To pairs of columns j and j + 4 as 2 * code * 2^8 in int16: leaving a byte in the upper half of its 16 bits is
// cheaper than extending its sign. The sum over a group is at most 16 * 12 * 2^8 * 2^14 < 2^30.
constexpr int kWidenedBits = 8;
constexpr float kWidenedUnit = 0x1p-8f;

NVFP4_INLINE void widen(const CodeBytes& bytes, __m256i* pairs) {
  const __m256i upper_bytes = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
  pairs[0] = _mm256_slli_epi16(bytes.even, 8);
  pairs[1] = _mm256_slli_epi16(bytes.odd, 8);
  pairs[2] = _mm256_and_si256(bytes.even, upper_bytes);
  pairs[3] = _mm256_and_si256(bytes.odd, upper_bytes);
}

// Eight E4M3 bytes times 2^-8: that is fp16 with the exponent field in its place.
NVFP4_INLINE __m256 decode_scales(const uint8_t* bytes) {
  const __m128i wide = _mm_cvtepi8_epi16(load_8_bytes(bytes));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xbfff))));
}

// The four scales of every row of a block as integers of eight bits times one power of two per row. The sum over the
// block is then an integer. It fits int32 while the factors of a row add up to at most 682: 16 * 12 * 682 * (2^14 - 1).
struct FoldedScales {
  alignas(32) uint8_t factors[kBlockGroups][kPanelRows];
  alignas(32) float units[2][kHalfRows];
  bool folded;  // false: a row's scales lie too far apart, or one is negative
};

NVFP4_INLINE void fold_scales(const uint8_t* block, FoldedScales* out) {
  const uint8_t* scales = block + kBlockCodeBytes;
  const __m256i bytes[2] = {load(scales), load(scales + 32)};  // two groups each
  const __m256i one = _mm256_set1_epi8(1);
  // A row's smallest scale that is not zero, less one: zeros wrap to 255.
  const __m256i pairs = _mm256_min_epu8(_mm256_sub_epi8(bytes[0], one), _mm256_sub_epi8(bytes[1], one));
  const __m256i smallest = _mm256_min_epu8(pairs, _mm256_permute4x64_epi64(pairs, 0x4e));
  // Its exponent in place, less that of the subnormals. Where it is subtracted, codes up to 15 are their own values.
  const __m256i exponent_bits = _mm256_and_si256(_mm256_add_epi8(smallest, one), _mm256_set1_epi8(0x78));
  const __m256i exponents = _mm256_subs_epu8(exponent_bits, _mm256_set1_epi8(8));
  const __m256i from_16 = twice(_mm_setr_epi8(16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60));
  const __m256i from_32 =
      twice(_mm_setr_epi8(64, 72, 80, 88, 96, 104, 112, 120, -128, -112, -96, -80, -64, -48, -32, -16));
  __m256i codes[2], values[2];
  NVFP4_UNROLL for (int i = 0; i < 2; ++i) {
    codes[i] = _mm256_subs_epu8(bytes[i], exponents);
    // A blend takes the second value where the highest bit of the last operand is set: bits 4 and 5 of the code.
    values[i] = _mm256_blendv_epi8(codes[i], _mm256_shuffle_epi8(from_16, codes[i]), _mm256_slli_epi16(codes[i], 3));
    values[i] = _mm256_blendv_epi8(values[i], _mm256_shuffle_epi8(from_32, codes[i]), _mm256_slli_epi16(codes[i], 2));
    store(out->factors[2 * i], values[i]);
  }
  // A quarter of a row's sum, rounded up.
  const __m256i half_sums = _mm256_avg_epu8(values[0], values[1]);
  const __m256i quarters = _mm256_avg_epu8(half_sums, _mm256_permute4x64_epi64(half_sums, 0x4e));
  // The highest bit is set by a sign, a code above 47, and a quarter above 682 / 4.
  const __m256i signs = _mm256_or_si256(bytes[0], bytes[1]);
  const __m256i apart = _mm256_adds_epu8(_mm256_max_epu8(codes[0], codes[1]), _mm256_set1_epi8(127 - 47));
  const __m256i above = _mm256_subs_epu8(quarters, _mm256_set1_epi8(682 / 4 - 127));
  out->folded = _mm256_movemask_epi8(_mm256_or_si256(signs, _mm256_or_si256(apart, above))) == 0;
  // 2^(exponent - 10) for integers 2 * code * factor, in units of 2^-8, as the bits of floats.
  const __m128i rows = _mm256_castsi256_si128(exponents);
  const __m256i wide[2] = {_mm256_cvtepu8_epi32(rows), _mm256_cvtepu8_epi32(_mm_srli_si128(rows, 8))};
  NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
    store(out->units[half], _mm256_add_epi32(_mm256_slli_epi32(wide[half], 20), _mm256_set1_epi32(110 << 23)));
  }
}

// The factors of eight rows, each in both int16 of its row's lane.
NVFP4_INLINE __m256i factor_pairs(const FoldedScales& scales, int group, int half) {
  const __m256i first = _mm256_setr_epi8(0, -128, 0, -128, 1, -128, 1, -128, 2, -128, 2, -128, 3, -128, 3, -128, 4,
                                         -128, 4, -128, 5, -128, 5, -128, 6, -128, 6, -128, 7, -128, 7, -128);
  const __m256i spread = _mm256_add_epi8(first, _mm256_set1_epi8(static_cast<int8_t>(half * kHalfRows)));
  const __m128i factors = _mm_load_si128(reinterpret_cast<const __m128i*>(scales.factors[group]));
  return _mm256_shuffle_epi8(twice(factors), spread);
}

// The panel's 16 rows, [group, pair of columns, half]. Folded blocks have weights 2 * code * factor and one scale per
// row in scales[0], others weights as widen() makes them and one scale per group.
struct DecodedBlock {
  alignas(32) int16_t weights[kBlockGroups][kPairsPerGroup][2][2 * kHalfRows];
  alignas(32) float scales[kBlockGroups][2][kHalfRows];
};

void decode_folded(const uint8_t* block, const FoldedScales& scales, DecodedBlock* out) {
  for (int half = 0; half < 2; ++half) {
    for (int group = 0; group < kBlockGroups; ++group) {
      const __m256i low = factor_pairs(scales, group, half);
      const __m256i high = _mm256_slli_epi16(low, 8);
      for (int run = 0; run < 2; ++run) {
        const CodeBytes bytes = decode_run(block + group * 128 + run * 64 + half * 32);
        auto* pairs = &out->weights[group][run * 4];
        store(pairs[0][half], _mm256_maddubs_epi16(low, bytes.even));
        store(pairs[1][half], _mm256_maddubs_epi16(low, bytes.odd));
        store(pairs[2][half], _mm256_maddubs_epi16(high, bytes.even));
        store(pairs[3][half], _mm256_maddubs_epi16(high, bytes.odd));
      }
    }
    _mm256_store_ps(out->scales[0][half], _mm256_load_ps(scales.units[half]));
  }
}

void decode_grouped(const uint8_t* block, DecodedBlock* out) {
  for (int group = 0; group < kBlockGroups; ++group) {
    for (int half = 0; half < 2; ++half) {
      for (int run = 0; run < 2; ++run) {
        __m256i pairs[4];
        widen(decode_run(block + group * 128 + run * 64 + half * 32), pairs);
        NVFP4_UNROLL for (int i = 0; i < 4; ++i) store(out->weights[group][run * 4 + i][half], pairs[i]);
      }
      _mm256_store_ps(out->scales[group][half],
                      decode_scales(block + kBlockCodeBytes + group * kPanelRows + half * kHalfRows));
    }
  }
}

}  // namespace
}  // namespace nvfp4::cpu
