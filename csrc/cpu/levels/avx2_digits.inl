// A single token, multiplied in bytes; included by avx2.cpp.

namespace nvfp4::cpu {
namespace {

// A single token's values are split into two digits, value = 256 * high + low, both int8: vpmaddubsw then multiplies 32
// weights at a time, which need not be widened. It takes weights without a sign, 2 * code + 12; what that adds to a
// group's sums depends on the token alone. The integers that result are those of multiply_registers.
constexpr int kWeightOffset = 12;
constexpr int kDigits = 2;

// Of a block, in place of its int16 values: for every run the digits of columns 0 2 4 6, then those of 1 3 5 7.
struct DigitBlock {
  int8_t digits[2 * kBlockGroups][2][kDigits][4];
};
static_assert(sizeof(DigitBlock) == kBlockColumns * sizeof(int16_t));

// What to add to a group's sums of a digit: over columns 0 to 3 of its runs, and over columns 4 to 7.
struct DigitCorrections {
  int16_t sums[kBlockGroups][kDigits][2];
};
static_assert(sizeof(DigitCorrections) % sizeof(int32_t) == 0);

NVFP4_INLINE bool has_digits(const TokenTile& tile) { return !tile.exact && tile.count == 1; }

void split_digits(TokenTile* tile, int64_t block) {
  if (!has_digits(*tile)) return;
  auto* values = static_cast<int16_t*>(tile->values) + block * kBlockColumns;
  auto* corrections = reinterpret_cast<DigitCorrections*>(tile->corrections) + block;
  const __m256i order = twice(_mm_setr_epi8(1, 9, 3, 11, 0, 8, 2, 10, 5, 13, 7, 15, 4, 12, 6, 14));
  for (int group = 0; group < kBlockGroups; ++group) {
    // Adding 128 rounds the upper byte, as a low digit with a sign wants it, and makes the lower one that digit + 128.
    const __m256i rounded = _mm256_add_epi16(load(values + group * 16), _mm256_set1_epi16(128));
    const __m256i digits = _mm256_shuffle_epi8(_mm256_xor_si256(rounded, _mm256_set1_epi16(128)), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + group * 16), digits);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(kWeightOffset), digits);
    const __m256i runs = _mm256_add_epi16(pairs, _mm256_srli_si256(pairs, 8));
    const __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(runs), _mm256_extracti128_si256(runs, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(corrections->sums[group]), _mm_sub_epi16(_mm_setzero_si128(), sums));
  }
}

void join_digits(const DigitBlock& block, int16_t* values) {
  const __m256i order = twice(_mm_setr_epi8(4, 0, 6, 2, 12, 8, 14, 10, 5, 1, 7, 3, 13, 9, 15, 11));
  for (int group = 0; group < kBlockGroups; ++group) {
    const __m256i digits = _mm256_shuffle_epi8(load(block.digits[2 * group]), order);
    const __m256i rounded = _mm256_xor_si256(digits, _mm256_set1_epi16(128));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + group * 16),
                        _mm256_sub_epi16(rounded, _mm256_set1_epi16(128)));
  }
}

NVFP4_INLINE __m256i broadcast_4_bytes(const void* from) {
  int32_t bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return _mm256_set1_epi32(bytes);
}

// sum (+)= the products of a run with one digit
NVFP4_INLINE void add_digits(__m256i& sum, const CodeBytes& weights, const int8_t (*even)[4], const int8_t (*odd)[4]) {
  __m256i a = _mm256_maddubs_epi16(weights.even, broadcast_4_bytes(even));
  __m256i b = _mm256_maddubs_epi16(weights.odd, broadcast_4_bytes(odd));
  pin(a, b);
  sum = _mm256_add_epi16(_mm256_add_epi16(sum, a), b);
}

// A folded block with one token.
NVFP4_INLINE void multiply_digits(const uint8_t* block, const FoldedScales& scales, const DigitBlock& token,
                                  const DigitCorrections& corrections, float token_scale, float* sums) {
  __m256i totals[2][kDigits];
  NVFP4_UNROLL for (int group = 0; group < kBlockGroups; ++group) {
    __m256i dots[2][kDigits];
    NVFP4_UNROLL for (int run = 0; run < 2; ++run) {
      const auto& digits = token.digits[2 * group + run];
      NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
        const CodeBytes weights = decode_run<kWeightOffset>(block + group * 128 + run * 64 + half * 32);
        NVFP4_UNROLL for (int digit = 0; digit < kDigits; ++digit) {
          __m256i& dot = dots[half][digit];
          if (run == 0) dot = broadcast_4_bytes(corrections.sums[group][digit]);
          add_digits(dot, weights, &digits[0][digit], &digits[1][digit]);
        }
        pin(dots[half][0], dots[half][1]);
      }
    }
    NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
      const __m256i factors = factor_pairs(scales, group, half);
      NVFP4_UNROLL for (int digit = 0; digit < kDigits; ++digit) {
        const __m256i product = _mm256_madd_epi16(dots[half][digit], factors);
        totals[half][digit] = group == 0 ? product : _mm256_add_epi32(totals[half][digit], product);
      }
      pin(totals[half][0], totals[half][1]);
    }
  }
  NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
    const __m256i total = _mm256_add_epi32(_mm256_slli_epi32(totals[half][0], 8), totals[half][1]);
    const __m256 products = _mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_load_ps(scales.units[half]));
    add_to(sums + half * kHalfRows, products, _mm256_set1_ps(token_scale));
  }
}

}  // namespace
}  // namespace nvfp4::cpu
