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
