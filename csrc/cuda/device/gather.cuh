// Token rows in the k order that decode.cuh's fragments want, ready for wgmma's B operand.
//
// wgmma reads the k positions 0..15 of step j from 16 j + 0..15 of a row, and the fragments have k = 16 t + 4 j + 2 h +
// i at k position 2 t + 8 h + i. So the 16-byte chunk c = 2 j + h of a permuted 64-k block holds, as its word t, the
// pair of values at k = 16 t + 2 c: the block's 4 x 8 matrix of words, transposed.
#pragma once

#include "common.cuh"

namespace nvfp4::cuda {

constexpr int kGatherBlock = 64;  // so many k are permuted among themselves

// The pair of values at `word` pairs from x. A view may start at any element, and then pairs are not aligned.
template <bool kAligned>
__device__ __forceinline__ uint32_t load_pair(const uint16_t* x, int64_t word) {
  if constexpr (kAligned) return reinterpret_cast<const uint32_t*>(x)[word];
  return x[2 * word] | static_cast<uint32_t>(x[2 * word + 1]) << 16;
}

// Rows row_of(0) .. row_of(rows - 1) of x [any, k] -> the same rows of permuted [any, round_up(k, 64)], zeros beyond k.
// Warp `warp` of `warps` does its share, 16 k-blocks of a row at a time.
template <bool kAligned, class RowOf>
__device__ __forceinline__ void permute_rows(const uint16_t* x, uint4* permuted, int64_t rows, int64_t k, int64_t warp,
                                             int64_t warps, const RowOf& row_of) {
  constexpr int kSteps = 4;
  constexpr int kSpan = kSteps * kWarp;
  const int lane = threadIdx.x % kWarp;
  const int words = static_cast<int>(k / 2);
  const int chunks = static_cast<int>(ceil_div<int64_t>(k, kGatherBlock)) * 8;
  const int spans = ceil_div(chunks, kSpan);
  for (int64_t i = warp; i < rows * spans; i += warps) {
    const int64_t index = i / spans;
    const int first = static_cast<int>(i - index * spans) * kSpan + lane;
    const int64_t row = row_of(index);
    uint4 v[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = first + step * kWarp;
      const int word = chunk / 8 * 32 + chunk % 8;
      const int64_t source = row * words + word;
      v[step].x = word < words ? load_pair<kAligned>(x, source) : 0;
      v[step].y = word + 8 < words ? load_pair<kAligned>(x, source + 8) : 0;
      v[step].z = word + 16 < words ? load_pair<kAligned>(x, source + 16) : 0;
      v[step].w = word + 24 < words ? load_pair<kAligned>(x, source + 24) : 0;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = first + step * kWarp;
      if (chunk < chunks) permuted[row * chunks + chunk] = v[step];
    }
  }
}

// The first `rows` rows of x.
template <bool kAligned>
__device__ __forceinline__ void permute_rows(const uint16_t* x, uint4* permuted, int64_t rows, int64_t k, int64_t warp,
                                             int64_t warps) {
  permute_rows<kAligned>(x, permuted, rows, k, warp, warps, [](int64_t i) { return i; });
}

}  // namespace nvfp4::cuda
