// The gated activations in fp32. Comparisons, not fminf/fmaxf: a NaN must pass through every clamp.
#pragma once

#include "../../kernels.h"
#include "common.cuh"

namespace nvfp4::cuda {

__device__ __forceinline__ float clamp_above(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamp_below(float x, float limit) { return x < limit ? limit : x; }
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ float apply_gate(const Gate& gate, float g, float u) {
  const float limit = gate.limit;
  if (__builtin_expect(gate.activation == Activation::silu, 1)) {
    if (gate.clamped) {
      g = clamp_above(g, limit);
      u = clamp_below(clamp_above(u, limit), -limit);
    }
    return g * sigmoid(gate.alpha * g) * (u + gate.beta);
  }
  switch (gate.activation) {
    case Activation::swiglustep: {
      float s = g * sigmoid(g);
      if (gate.clamped) {
        s = clamp_above(s, limit);
        u = clamp_below(clamp_above(u, limit), -limit);
      }
      return s * u;
    }
    case Activation::gelu:
      return 0.5f * g * (1.0f + erff(g * 0.7071067811865476f)) * u;
    case Activation::gelu_tanh:
      return 0.5f * g * (1.0f + tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g))) * u;
    case Activation::relu2: {
      const float r = clamp_below(g, 0.0f);
      return r * r * u;
    }
    default:
      return 0.0f;
  }
}

}  // namespace nvfp4::cuda
