// From per-warp partial sums to output rows: a fixed-order reduction over the warps that share an item, then scale,
// gate, bias, one rounding, and stores of consecutive features.
#pragma once

#include "common.cuh"
#include "decode.cuh"
#include "gate.cuh"
#include "shared_layout.h"

namespace nvfp4::cuda {

// One warp's sums of 64 rows x 8 tokens.
struct PartialSums {
  float token[8][kPartialRows];

  template <int kTiles>
  __device__ __forceinline__ void store(const float (&sum)[4][kTiles][4], int column_tile) {
    const int lane = threadIdx.x % kWarp;
    const int row = lane / 4;
    const int column = lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      token[column][16 * tile + row] = sum[tile][column_tile][0];
      token[column + 1][16 * tile + row] = sum[tile][column_tile][1];
      token[column][16 * tile + row + 8] = sum[tile][column_tile][2];
      token[column + 1][16 * tile + row + 8] = sum[tile][column_tile][3];
    }
  }
};

// Rows `row` and `row + 1` of one token, summed over `ways` warps in their order. Four warps at a time: a loop that
// took one by one would wait for every load.
__device__ __forceinline__ float2 reduce(const PartialSums* warps, int ways, int token, int row) {
  constexpr int kBatch = 4;
  float2 total = make_float2(0.0f, 0.0f);
  for (int first = 0; first < ways; first += kBatch) {
    float2 part[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      part[i] = make_float2(0.0f, 0.0f);
      if (first + i < ways) part[i] = *reinterpret_cast<const float2*>(&warps[first + i].token[token][row]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      total.x += part[i].x;
      total.y += part[i].y;
    }
  }
  return total;
}

// The same where a warp's sums have room for a run-time number of tokens only: the first `tokens` of a column tile's 8.
template <int kRowTiles>
__device__ __forceinline__ void store_partial(float* partial, int tokens, const float (&sum)[kRowTiles][1][4]) {
  const int lane = threadIdx.x % kWarp;
  const int column = lane % 4 * 2;
  float* at = partial + column * kPartialRows + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (column + i >= tokens) continue;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      at[i * kPartialRows + 16 * tile] = sum[tile][0][i];
      at[i * kPartialRows + 16 * tile + 8] = sum[tile][0][i + 2];
    }
  }
}

// The same from `partials`, which are `stride` floats apart. Eight at a time, and no more code than for eight: what is
// executed once costs its instructions one by one.
__device__ __forceinline__ float2 reduce(const float* partials, int stride, int ways, int token, int row) {
  constexpr int kBatch = 8;
  const float* at = partials + token * kPartialRows + row;
  float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 1
  for (; ways > 0; ways -= kBatch) {
    float2 part[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      part[i] = make_float2(0.0f, 0.0f);
      if (i < ways) part[i] = *reinterpret_cast<const float2*>(at);
      at += stride;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      total.x += part[i].x;
      total.y += part[i].y;
    }
  }
  return total;
}

// Not contracted with a following addition, which other kernels do not have: a row's bits are those that they give it.
__device__ __forceinline__ float2 scaled(float2 v, float scale) {
  return make_float2(__fmul_rn(v.x, scale), __fmul_rn(v.y, scale));
}

template <class T>
__device__ __forceinline__ void store_pair(void* out, int64_t at, float2 v) {
  *reinterpret_cast<uint32_t*>(static_cast<T*>(out) + at) = pack2<T>(v.x, v.y);
}

}  // namespace nvfp4::cuda
