// fp16 activations as the sum of two bf16 numbers, exactly: 11 significant bits are 8 and at most 3 more, and bf16 has
// fp16's exponents. So weights that are decoded to bf16, which takes fewer instructions than to fp16, multiply fp16
// activations too, where a column tile has room for both parts of its tokens.
#pragma once

#include "common.cuh"

namespace nvfp4::cuda {

struct SplitPair {
  uint32_t high;  // the values rounded to bf16; infinities and NaN are here
  uint32_t low;   // the rest
};

__device__ __forceinline__ SplitPair split(uint32_t pair) {
  constexpr float kMost = 65504.0f;
  const float2 v = unpack2<fp16>(pair);
  SplitPair s;
  s.high = pack2<bf16>(v.x, v.y);
  const float2 high = unpack2<bf16>(s.high);
  s.low = pack2<bf16>(fabsf(v.x) <= kMost ? v.x - high.x : 0.0f, fabsf(v.y) <= kMost ? v.y - high.y : 0.0f);
  return s;
}

// 8 values at `chunk`, of which the low parts go to `low`.
__device__ __forceinline__ void store_split(uint4 v, uint8_t* high, uint8_t* low) {
  const SplitPair x = split(v.x), y = split(v.y), z = split(v.z), w = split(v.w);
  *reinterpret_cast<uint4*>(high) = make_uint4(x.high, y.high, z.high, w.high);
  *reinterpret_cast<uint4*>(low) = make_uint4(x.low, y.low, z.low, w.low);
}

}  // namespace nvfp4::cuda
