// Types and arithmetic that every piece shares; plain CUDA C++, no PTX.
//
// The words of csrc/cuda (csrc/cpu has panels, blocks and tiles of its own sizes):
//   slot        a routed (token, j), j < top_k; never a place in a ring, which is a stage
//   block       64 weight rows x 64 k, packed into kBlockBytes (decode.cuh); never a thread block, which is a CTA
//   panel       64 weight rows along all of k: consecutive blocks
//   warp tile   16 rows of a block: the rows of one MMA
//   column tile 8 tokens: the columns of one MMA
//   token tile  tokens of one expert that are multiplied together (ExpertTile)
//   item        one token tile times one panel; a team of warps shares it, and each warp is one of its ways through k
//   row tile    wgmma_experts only: the panels of one CTA, one for each consumer warpgroup
//   turn        kTurnBlocks blocks: one pass of a streaming main loop
//   parity      of an mbarrier's phase: 0 on the first pass through a ring, 1 on the second, and so on in turn
//   r, t        of lane l: l / 4 and l % 4, its row and its quad thread in an MMA fragment
//   g, u        the gate and up values that enter the activation
//   gemm_index  0 is w13 (or the only GEMM), 1 is w2
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sizes.h"

namespace nvfp4::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Division by a number that the host knows; exact while dividend times divisor is below 2^32.
class Divider {
 public:
  Divider() = default;
  explicit Divider(uint32_t divisor) : is_one_(divisor == 1), factor_(0xFFFFFFFFu / divisor + 1) {}
  __device__ __forceinline__ int quotient(int dividend) const {
    return is_one_ ? dividend : static_cast<int>(__umulhi(dividend, factor_));
  }

 private:
  bool is_one_;
  uint32_t factor_;  // 2^32 / divisor, rounded up
};

template <class T>
__device__ __forceinline__ float to_float(T value);
template <>
__device__ __forceinline__ float to_float<bf16>(bf16 value) {
  return __bfloat162float(value);
}
template <>
__device__ __forceinline__ float to_float<fp16>(fp16 value) {
  return __half2float(value);
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float value) {
  return __float2half_rn(value);
}

// Two consecutive values as they lie in memory: `low` first.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack2<fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack2<bf16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
template <>
__device__ __forceinline__ float2 unpack2<fp16>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

}  // namespace nvfp4::cuda
