// E4M3: conversions, two values each. One PTX instruction per function; SM89 and later have them.
#pragma once

#include "../common.cuh"

namespace nvfp4::cuda::ptx {

// Rounded to nearest even; beyond 448 it is 448, and NaN is NaN. `low` goes to the lower byte.
__device__ __forceinline__ uint32_t to_e4m3x2(float low, float high) {
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ uint32_t to_e4m3x2(uint32_t halves) {
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(d) : "r"(halves));
  return d;
}

// To two fp16 values, exactly.
__device__ __forceinline__ uint32_t from_e4m3x2(uint32_t bytes) {
  uint32_t d;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(static_cast<uint16_t>(bytes)));
  return d;
}

// The larger of two bf16 values, twice; NaN only if both are.
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

}  // namespace nvfp4::cuda::ptx
