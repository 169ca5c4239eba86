// Many tokens, multiplied from blocks that are decoded into L1; included by avx512.cpp.

namespace nvfp4::cpu {
namespace {

// A decoded block of two panels. Where the four group scales of every row lie close together, their integer mantissas
// are folded into the int16 weights, so that a row has one power of two for the whole block and the sum over 64 columns
// stays in int32.
struct DecodedBlock {
  alignas(64) int16_t weights[kPairsPerBlock][2][2 * kPanelRows];
  alignas(64) float group_scales[kBlockGroups][2][kPanelRows];
  alignas(64) float row_scales[2][kPanelRows];     // folded only
  alignas(64) int32_t corrections[2][kPanelRows];  // folded only, see is_paired
};

// Winograd's inner product: for two steps with weights a, b and tokens x, y
//   (x + b) (y + a) = x a + y b + x y + b a
// takes one multiplication where two are plain. The two extra products depend on token or weights alone, so they are
// summed once and subtracted. Additions wrap nowhere (|x| < 2^14, |a| < 2^13) and sums wrap harmlessly: the result fits
// int32. Zen multiplies on two of its four vector pipes and adds on all four; 11 of 16 step pairs balances them. Where
// additions take the multipliers' ports, plain steps are faster. Both give the same bits.
constexpr bool is_paired(int step_pair) { return step_pair % 3 != 2; }

bool pairing_is_faster() { return __builtin_cpu_is("amd"); }

// The largest sum of a row's four folded scale mantissas for which 16 * 12 * sum * (2^14 - 1) fits int32.
constexpr int kLargestFold = 682;

// The four scales of every row as signed integers times one power of two a row; false if they lie too far apart.
NVFP4_INLINE bool fold_scales(const uint8_t* scales, __m512i* factors, __m512* row_scales) {
  const __m512i one = _mm512_set1_epi32(1);
  __m512i bytes[kBlockGroups], mantissas[kBlockGroups], exponents[kBlockGroups];
  __m512i smallest = _mm512_set1_epi32(15);
  NVFP4_UNROLL for (int group = 0; group < kBlockGroups; ++group) {
    bytes[group] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales) + group));
    const __m512i magnitude = _mm512_and_si512(bytes[group], _mm512_set1_epi32(127));
    // Subnormals have the exponent of the smallest normals and no leading one.
    exponents[group] = _mm512_max_epi32(_mm512_srli_epi32(magnitude, 3), one);
    mantissas[group] = _mm512_sub_epi32(magnitude, _mm512_slli_epi32(_mm512_sub_epi32(exponents[group], one), 3));
    const __mmask16 nonzero = _mm512_test_epi32_mask(magnitude, magnitude);
    smallest = _mm512_mask_min_epi32(smallest, nonzero, smallest, exponents[group]);
  }
  __m512i sum = _mm512_setzero_si512();
  NVFP4_UNROLL for (int group = 0; group < kBlockGroups; ++group) {
    __m512i factor = _mm512_sllv_epi32(mantissas[group], _mm512_sub_epi32(exponents[group], smallest));
    sum = _mm512_add_epi32(sum, factor);
    const __mmask16 negative = _mm512_test_epi32_mask(bytes[group], _mm512_set1_epi32(0x80));
    factor = _mm512_mask_sub_epi32(factor, negative, _mm512_setzero_si512(), factor);
    factors[group] = _mm512_mask_mov_epi16(_mm512_slli_epi32(factor, 16), 0x55555555, factor);
  }
  // 2^(smallest - 10) in units of 2^-8 and half a code.
  *row_scales = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(smallest, _mm512_set1_epi32(109)), 23));
  return _mm512_cmpgt_epi32_mask(sum, _mm512_set1_epi32(kLargestFold)) == 0;
}

// Returns false when the block's scales cannot be folded.
bool decode_folded(const uint8_t* block, int panel, DecodedBlock* out) {
  __m512i factors[kBlockGroups];
  __m512 row_scales;
  if (!fold_scales(block + kBlockCodeBytes, factors, &row_scales)) return false;
  const __m512i table = code_table();
  __m512i paired = _mm512_setzero_si512();
  NVFP4_UNROLL for (int run = 0; run < 8; ++run) {
    __m512i weights[4];
    decode_run(block + run * 64, table, weights);
    NVFP4_UNROLL for (int i = 0; i < 4; ++i) {
      weights[i] = _mm512_mullo_epi16(weights[i], factors[run / 2]);
      _mm512_store_si512(out->weights[run * 4 + i][panel], weights[i]);
    }
    if (is_paired(run * 2)) paired = _mm512_dpwssd_epi32(paired, weights[0], weights[1]);
    if (is_paired(run * 2 + 1)) paired = _mm512_dpwssd_epi32(paired, weights[2], weights[3]);
  }
  _mm512_store_si512(out->corrections[panel], _mm512_sub_epi32(_mm512_setzero_si512(), paired));
  _mm512_store_ps(out->row_scales[panel], row_scales);
  return true;
}

void decode_grouped(const uint8_t* block, int panel, DecodedBlock* out) {
  const __m512i table = code_table();
  NVFP4_UNROLL for (int run = 0; run < 8; ++run) {
    __m512i weights[4];
    decode_run(block + run * 64, table, weights);
    NVFP4_UNROLL for (int i = 0; i < 4; ++i) _mm512_store_si512(out->weights[run * 4 + i][panel], weights[i]);
  }
  NVFP4_UNROLL for (int group = 0; group < kBlockGroups; ++group) {
    _mm512_store_ps(out->group_scales[group][panel], decode_scales(block + kBlockCodeBytes + group * kPanelRows));
  }
}

template <int kTokens>
NVFP4_INLINE void add_products(const __m512 (&products)[kTokens][2], const float* token_scales, float* sums) {
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
    NVFP4_UNROLL for (int panel = 0; panel < 2; ++panel) {
      float* sum = sums + (t * 2 + panel) * kPanelRows;
      const __m512 scale = _mm512_set1_ps(token_scales[t]);
      _mm512_storeu_ps(sum, _mm512_fmadd_ps(products[t][panel], scale, _mm512_loadu_ps(sum)));
    }
  }
}

template <int kTokens, bool kPaired>
void multiply_folded(const DecodedBlock& block, const int16_t* values, const float* token_scales,
                     const int32_t* token_corrections, float* sums) {
  __m512i dots[kTokens][2];
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
    NVFP4_UNROLL for (int panel = 0; panel < 2; ++panel) {
      dots[t][panel] = kPaired ? _mm512_add_epi32(_mm512_load_si512(block.corrections[panel]),
                                                  _mm512_set1_epi32(token_corrections[t]))
                               : _mm512_setzero_si512();
    }
  }
  NVFP4_UNROLL for (int step = 0; step < kPairsPerBlock; step += 2) {
    const __m512i a[2] = {_mm512_load_si512(block.weights[step][0]), _mm512_load_si512(block.weights[step][1])};
    const __m512i b[2] = {_mm512_load_si512(block.weights[step + 1][0]), _mm512_load_si512(block.weights[step + 1][1])};
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
      const __m512i x = broadcast_pair(values + t * kBlockColumns + step * 2);
      const __m512i y = broadcast_pair(values + t * kBlockColumns + step * 2 + 2);
      NVFP4_UNROLL for (int panel = 0; panel < 2; ++panel) {
        __m512i& dot = dots[t][panel];
        if (kPaired && is_paired(step / 2)) {
          dot = _mm512_dpwssd_epi32(dot, _mm512_add_epi16(x, b[panel]), _mm512_add_epi16(y, a[panel]));
        } else {
          dot = _mm512_dpwssd_epi32(dot, a[panel], x);
          dot = _mm512_dpwssd_epi32(dot, b[panel], y);
        }
      }
    }
  }
  __m512 products[kTokens][2];
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
    NVFP4_UNROLL for (int panel = 0; panel < 2; ++panel) {
      products[t][panel] = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t][panel]), _mm512_load_ps(block.row_scales[panel]));
    }
  }
  add_products<kTokens>(products, token_scales, sums);
}

template <int kTokens>
void multiply_grouped(const DecodedBlock& block, const int16_t* values, const float* token_scales, const int32_t*,
                      float* sums) {
  __m512 products[kTokens][2];
  NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) products[t][0] = products[t][1] = _mm512_setzero_ps();
  for (int group = 0; group < kBlockGroups; ++group) {
    __m512i dots[kTokens][2];
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) dots[t][0] = dots[t][1] = _mm512_setzero_si512();
    NVFP4_UNROLL for (int i = 0; i < kPairsPerGroup; ++i) {
      const int step = group * kPairsPerGroup + i;
      const __m512i first = _mm512_load_si512(block.weights[step][0]);
      const __m512i second = _mm512_load_si512(block.weights[step][1]);
      NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
        const __m512i x = broadcast_pair(values + t * kBlockColumns + step * 2);
        dots[t][0] = _mm512_dpwssd_epi32(dots[t][0], first, x);
        dots[t][1] = _mm512_dpwssd_epi32(dots[t][1], second, x);
      }
    }
    NVFP4_UNROLL for (int t = 0; t < kTokens; ++t) {
      NVFP4_UNROLL for (int panel = 0; panel < 2; ++panel) {
        products[t][panel] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][panel]),
                                             _mm512_load_ps(block.group_scales[group][panel]), products[t][panel]);
      }
    }
  }
  add_products<kTokens>(products, token_scales, sums);
}

// One block with a few tokens: values [tokens, 64], scales and corrections [tokens], sums [tokens, 2, 16].
using MultiplyBlock = void (*)(const DecodedBlock& block, const int16_t* values, const float* token_scales,
                               const int32_t* token_corrections, float* sums);

// Indexed by the number of tokens less one.
constexpr MultiplyBlock kMultiplyGrouped[kTileTokens] = {multiply_grouped<1>, multiply_grouped<2>, multiply_grouped<3>,
                                                         multiply_grouped<4>, multiply_grouped<5>, multiply_grouped<6>};
constexpr MultiplyBlock kMultiplyFolded[kTileTokens] = {multiply_folded<1, false>, multiply_folded<2, false>,
                                                        multiply_folded<3, false>, multiply_folded<4, false>,
                                                        multiply_folded<5, false>, multiply_folded<6, false>};
constexpr MultiplyBlock kMultiplyPaired[kTileTokens] = {multiply_folded<1, true>, multiply_folded<2, true>,
                                                        multiply_folded<3, true>, multiply_folded<4, true>,
                                                        multiply_folded<5, true>, multiply_folded<6, true>};

// Decodes the same block of both panels and chooses the kernels that go with it. Only multiply_grouped rounds as
// multiply_few does, at every group: folded products are exact over a block.
NVFP4_INLINE const MultiplyBlock* decode_block(const uint8_t* first, const uint8_t* second, bool may_fold, bool pairing,
                                               DecodedBlock* out) {
  if (may_fold && decode_folded(first, 0, out) && decode_folded(second, 1, out)) {
    return pairing ? kMultiplyPaired : kMultiplyFolded;
  }
  decode_grouped(first, 0, out);
  decode_grouped(second, 1, out);
  return kMultiplyGrouped;
}

NVFP4_INLINE void prefetch_block(const uint8_t* block) {
  NVFP4_UNROLL for (int line = 0; line < kBlockBytes; line += 64) _mm_prefetch(block + line, _MM_HINT_T0);
}

void multiply_many(const uint8_t* first, const uint8_t* second, const TokenTile& tile, float* sums) {
  const bool may_fold = !tile.batch_invariant;
  const bool pairing = pairing_is_faster();
  const int64_t count = tile.count;
  // Steps of equal size, give or take one token: short steps keep the multipliers less busy.
  const int64_t steps = (count + kTileTokens - 1) / kTileTokens;
  const int64_t step_tokens = count / steps;
  const int64_t longer_steps = count % steps;
  std::memset(sums, 0, count * 2 * kPanelRows * sizeof(float));
  DecodedBlock decoded;
  for (int64_t block = 0; block < tile.blocks; ++block) {
    prefetch_block(first + (block + 2) * kBlockBytes);
    prefetch_block(second + (block + 2) * kBlockBytes);
    const MultiplyBlock* multiply =
        decode_block(first + block * kBlockBytes, second + block * kBlockBytes, may_fold, pairing, &decoded);
    const int16_t* values = static_cast<const int16_t*>(tile.values) + block * count * kBlockColumns;
    int64_t token = 0;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t tokens = step_tokens + (step < longer_steps);
      const int64_t index = block * count + token;
      multiply[tokens - 1](decoded, values + token * kBlockColumns, tile.scale + index, tile.corrections + index,
                           sums + token * 2 * kPanelRows);
      token += tokens;
    }
  }
}

// Sums up the products x y that is_paired() steps add to row `index` of a tile, negated.
NVFP4_INLINE void correct_pairs(TokenTile* tile, int64_t index) {
  if (tile->exact || tile->count <= kFewTokens) return;
  constexpr uint32_t kPairedLanes = [] {
    uint32_t lanes = 0;
    for (int step = 0; step < kPairsPerBlock; step += 2) lanes |= static_cast<uint32_t>(is_paired(step / 2)) << step;
    return lanes;
  }();
  const int16_t* values = static_cast<const int16_t*>(tile->values) + index * kBlockColumns;
  __m512i sum = _mm512_setzero_si512();
  NVFP4_UNROLL for (int half = 0; half < 2; ++half) {
    const __m512i x = _mm512_loadu_si512(values + half * 32);
    const __m512i y = _mm512_shuffle_epi32(x, _MM_PERM_CDAB);
    const __m512i products = _mm512_madd_epi16(x, y);
    sum = _mm512_mask_sub_epi32(sum, static_cast<__mmask16>(kPairedLanes >> (16 * half)), sum, products);
  }
  tile->corrections[index] = _mm512_reduce_add_epi32(sum);
}

}  // namespace
}  // namespace nvfp4::cpu
