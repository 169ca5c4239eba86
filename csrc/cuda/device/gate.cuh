// The gated activations in fp32. A NaN passes through every clamp, as it does not through fminf and fmaxf.
#pragma once

#include "common.cuh"
#include "ptx/arithmetic.cuh"

namespace nvfp4::cuda {

__device__ __forceinline__ float clamp_above(float x, float limit) { return ptx::min_nan(x, limit); }
__device__ __forceinline__ float clamp_below(float x, float limit) { return ptx::max_nan(x, limit); }

// sigmoid(alpha x)
__device__ __forceinline__ float sigmoid(float x, float alpha = 1.0f) {
  constexpr float kLog2E = 1.4426950408889634f;
  return ptx::reciprocal(1.0f + ptx::exp2(x * (-kLog2E * alpha)));
}

// x times a share that tends to 0 faster than x grows. The product is 0 where the share is, also where x is infinite: a
// pre-activation that has overflowed to minus infinity stands for a finite number.
__device__ __forceinline__ float share_of(float x, float share) { return (share == 0.0f ? 0.0f : x) * share; }

// tanh(x) to 4e-7 relative, without a branch: a series where 1 - exp(-2 |x|) would cancel.
__device__ __forceinline__ float tanh_of(float x) {
  constexpr float kTwoLog2E = 2.8853900817779268f;
  const float square = x * x;
  float p = 0.02186949f;
  p = p * square - 0.05396825f;
  p = p * square + 0.13333333f;
  p = p * square - 0.33333333f;
  const float e = ptx::exp2(fabsf(x) * -kTwoLog2E);
  const float large = copysignf((1.0f - e) * ptx::reciprocal(1.0f + e), x);
  return fabsf(x) < 0.25f ? x + x * square * p : large;
}

// kExtended: SiTU too, which only kernels of their own have, so that no other loses registers to it.
template <bool kExtended = false>
__device__ __forceinline__ float apply_gate(const Gate& gate, float g, float u) {
  const float limit = gate.limit;
  if (__builtin_expect(gate.activation == Activation::silu, 1)) {
    if (gate.clamped) {
      g = clamp_above(g, limit);
      u = clamp_below(clamp_above(u, limit), -limit);
    }
    return share_of(g, sigmoid(g, gate.alpha)) * (u + gate.beta);
  }
  if constexpr (kExtended) {
    if (gate.activation == Activation::situ) {
      if (gate.beta != 0.0f) u = gate.beta * tanh_of(u * ptx::reciprocal(gate.beta));
      return gate.alpha * tanh_of(g * ptx::reciprocal(gate.alpha)) * sigmoid(g) * u;
    }
  }
  switch (gate.activation) {
    case Activation::swiglustep: {
      float s = share_of(g, sigmoid(g));
      if (gate.clamped) {
        s = clamp_above(s, limit);
        u = clamp_below(clamp_above(u, limit), -limit);
      }
      return s * u;
    }
    case Activation::gelu:
      return share_of(g, 0.5f * (1.0f + erff(g * 0.7071067811865476f))) * u;
    case Activation::gelu_tanh:
      return share_of(g, 0.5f * (1.0f + tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g)))) * u;
    case Activation::relu2: {
      // In this order the product overflows only where it is beyond fp32 itself: a large gate beside up 0 gives 0, not
      // NaN.
      const float r = clamp_below(g, 0.0f);
      return r * (r * u);
    }
    default:
      return 0.0f;
  }
}

// f(gate) with an activation that the compiler knows there: a loop over values in it has no branch for each of them.
template <bool kExtended, class F>
__device__ __forceinline__ void with_known_activation(const Gate& gate, const F& f) {
  const auto known = [&](Activation activation) __attribute__((always_inline)) {
    Gate g = gate;
    g.activation = activation;
    f(g);
  };
  switch (gate.activation) {
    case Activation::silu:
      if constexpr (kExtended) known(Activation::silu);
      break;
    case Activation::situ:
      if constexpr (kExtended) known(Activation::situ);
      break;
    case Activation::swiglustep:
      known(Activation::swiglustep);
      break;
    case Activation::gelu:
      known(Activation::gelu);
      break;
    case Activation::gelu_tanh:
      known(Activation::gelu_tanh);
      break;
    case Activation::relu2:
      known(Activation::relu2);
      break;
  }
}

// Without a gate up is 1, which multiplies exactly.
__device__ __forceinline__ float apply_activation(const Gate& gate, float x) { return apply_gate<true>(gate, x, 1.0f); }

// What is added to an expert's row; 0, and added all the same, where there is no bias: all kernels give the same bits.
__device__ __forceinline__ float bias_of(const float* bias, int expert, int64_t n, int64_t row) {
  return bias == nullptr ? 0.0f : bias[expert * n + row];
}

}  // namespace nvfp4::cuda
