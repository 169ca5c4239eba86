// Packed blocks decoded to bf16, as AMX multiplies them; included by amx.cpp.

namespace nvfp4::cpu {
namespace {

// [k step, panel, pair of columns, row, 2]
struct DecodedBlock {
  alignas(64) uint16_t weights[kBlockSteps][2][kTileRows][2 * kPanelRows];
};

// Where 32-bit lane i of a decoded vector `run * 4 + j` (columns 8 run + j and 8 run + j + 4) is stored.
NVFP4_INLINE uint16_t* vector_at(DecodedBlock* out, int64_t panel, int64_t index) {
  return out->weights[index / kTileRows][panel][index % kTileRows];
}

// Decoding adds in the domain of bf16 bits, where a power of two is an addition: with the bits S of a block scale and T
// of 1.5 times that scale, a code of magnitude 2^n is S + (n << 7) and one of 1.5 * 2^n is T + (n << 7). The table
// holds (kBias + n) << 7 and the code's sign, and kOdd for the second kind, of which T - S is taken by an AND. What is
// then subtracted, (kBias << 7) - S, saturates zero codes at zero and leaves the sign alone.
constexpr int kBias = 200;
constexpr int kOdd = 127;  // T - S is 64 .. 84

NVFP4_INLINE __m512i biased_table() {
  constexpr int16_t kOne = static_cast<int16_t>(kBias << 7);
  constexpr int16_t kHalf = kOne - 128, kTwo = kOne + 128, kFour = kOne + 256;
  constexpr int16_t kSign = INT16_MIN;
  const __m256i once = _mm256_setr_epi16(0, kHalf, kOne, kOne | kOdd, kTwo, kTwo | kOdd, kFour, kFour | kOdd, 0,
                                         kSign | kHalf, kSign | kOne, kSign | kOne | kOdd, kSign | kTwo,
                                         kSign | kTwo | kOdd, kSign | kFour, kSign | kFour | kOdd);
  return _mm512_broadcast_i64x4(once);
}

// T - S for the three mantissa bits of an E4M3 scale, by the lowest four bits of its byte.
NVFP4_INLINE __m512i odd_table() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(64, 72, 80, 84, 80, 76, 72, 68, 64, 72, 80, 84, 80, 76, 72, 68));
}

// Four pairs of columns, j and j + 4, of a run of eight.
NVFP4_INLINE void decode_run(const uint8_t* run, __m512i table, __m512i kept, __m512i subtracted, __m512i* pairs) {
  const __m512i codes = _mm512_loadu_si512(run);
  const __m512i shifted[4] = {codes, _mm512_srli_epi16(codes, 4), _mm512_srli_epi16(codes, 8),
                              _mm512_srli_epi16(codes, 12)};
  NVFP4_UNROLL for (int j = 0; j < 4; ++j) {
    const __m512i biased = _mm512_permutexvar_epi16(shifted[j], table);
    pairs[j] = _mm512_subs_epu16(_mm512_and_si512(biased, kept), subtracted);
  }
}

// A group of any scales: the products in fp32, whose upper halves are bf16 and whose lower halves are zero.
// A function of its own because
// negative, zero and subnormal scales are rare.
__attribute__((noinline)) void decode_any(const uint8_t* block, int64_t panel, int64_t group, DecodedBlock* out) {
  const __m512 table = exact_code_table();
  const __m512 scales = decode_exact_scales(block + kBlockCodeBytes + group * kPanelRows);
  for (int64_t run = 2 * group; run < 2 * group + 2; ++run) {
    const __m512i codes = _mm512_loadu_si512(block + run * 64);
    for (int j = 0; j < 4; ++j) {
      const __m512 first = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), table), scales);
      const __m512 second = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j + 16), table), scales);
      const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
      _mm512_store_si512(vector_at(out, panel, run * 4 + j),
                         _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(second)));
    }
  }
}

// What decode_run needs of the scales of a group of one panel.
struct GroupScales {
  __m512i kept;
  __m512i subtracted;
  bool normal;  // else decode_any's
};

NVFP4_INLINE GroupScales load_scales(const uint8_t* block, int64_t group) {
  const __m128i scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + kBlockCodeBytes) + group);
  // Byte r of 16 into both halves of lane r.
  const __m512i spread =
      _mm512_set_epi32(0x800f800f, 0x800e800e, 0x800d800d, 0x800c800c, 0x800b800b, 0x800a800a, 0x80098009, 0x80088008,
                       0x80078007, 0x80068006, 0x80058005, 0x80048004, 0x80038003, 0x80028002, 0x80018001, 0x80008000);
  const __m512i base = _mm512_set1_epi16((kBias - 120) << 7);  // a scale's bits are (byte << 4) + (120 << 7)
  const __m512i all_but_odd = _mm512_set1_epi16(static_cast<int16_t>(~kOdd));
  const __m512i bytes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(scales), spread);
  return {_mm512_or_si512(_mm512_shuffle_epi8(odd_table(), bytes), all_but_odd),
          _mm512_sub_epi16(base, _mm512_slli_epi16(bytes, 4)), _mm_cmpgt_epi8_mask(scales, _mm_set1_epi8(7)) == 0xffff};
}

constexpr int kRuns = kBlockColumns / 8;  // of a block: two per group

// A block of a panel that is to be decoded.
struct PanelBlock {
  const uint8_t* from;
  DecodedBlock* to;
  int64_t panel;
};

// The runs of a block one after the other; `scales` are those of the run before.
NVFP4_INLINE void decode_next_run(const PanelBlock& block, int run, GroupScales& scales) {
  if (run % 2 == 0) {
    scales = load_scales(block.from, run / 2);
    if (__builtin_expect(!scales.normal, 0)) decode_any(block.from, block.panel, run / 2, block.to);
  }
  if (__builtin_expect(!scales.normal, 0)) return;
  __m512i pairs[4];
  decode_run(block.from + run * 64, biased_table(), scales.kept, scales.subtracted, pairs);
  NVFP4_UNROLL for (int j = 0; j < 4; ++j) _mm512_store_si512(vector_at(block.to, block.panel, run * 4 + j), pairs[j]);
}

NVFP4_INLINE void decode_block(const PanelBlock& block) {
  GroupScales scales;
  NVFP4_UNROLL for (int run = 0; run < kRuns; ++run) decode_next_run(block, run, scales);
}

template <_mm_hint kHint>
NVFP4_INLINE void prefetch_block(const uint8_t* block) {
  NVFP4_UNROLL for (int line = 0; line < kBlockBytes; line += 64) _mm_prefetch(block + line, kHint);
}

}  // namespace
}  // namespace nvfp4::cpu
