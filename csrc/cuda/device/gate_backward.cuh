// The derivatives of the gated activations in fp32.
#pragma once

#include "gate.cuh"

namespace nvfp4::cuda {

// An activation's value, and what flows back into gate and up from `flow` into that value.
struct GateBackward {
  float value;
  float gate;
  float up;
};

// x where it is multiplied with a share that tends to 0 faster than x grows: see share_of.
__device__ __forceinline__ float beside(float x, float share) { return share == 0.0f ? 0.0f : x; }

// The clamps have aten's derivative: 1 up to the limit itself, 0 beyond it and for NaN, whatever flows back.
__device__ __forceinline__ GateBackward gate_backward(const Gate& gate, float g, float u, float flow) {
  const float limit = gate.limit;
  const bool clamped = gate.clamped;
  switch (gate.activation) {
    case Activation::silu: {
      const float least = clamped ? clamp_above(g, limit) : g;
      const float v = clamped ? clamp_below(clamp_above(u, limit), -limit) : u;
      const float s = sigmoid(least, gate.alpha);
      const float c = beside(least, s);
      const float by_gate = flow * (v + gate.beta) * (s * (1.0f + gate.alpha * c * (1.0f - s)));
      const float by_up = flow * (c * s);
      return {c * s * (v + gate.beta), !clamped || g <= limit ? by_gate : 0.0f,
              !clamped || (u <= limit && u >= -limit) ? by_up : 0.0f};
    }
    case Activation::swiglustep: {
      const float s = sigmoid(g);
      g = beside(g, s);
      const float silu = g * s;
      const float c = clamped ? clamp_above(silu, limit) : silu;
      const float v = clamped ? clamp_below(clamp_above(u, limit), -limit) : u;
      const float to_silu = !clamped || silu <= limit ? flow * v : 0.0f;
      return {c * v, to_silu * (s * (1.0f + g * (1.0f - s))),
              !clamped || (u <= limit && u >= -limit) ? flow * c : 0.0f};
    }
    case Activation::gelu: {
      const float cdf = 0.5f * (1.0f + erff(g * 0.7071067811865476f));
      const float density = 0.3989422804014327f * __expf(-0.5f * g * g);
      const float value = share_of(g, cdf);
      return {value * u, flow * u * (cdf + share_of(g, density)), flow * value};
    }
    case Activation::gelu_tanh: {
      const float t = tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g));
      const float s = 0.5f * (1.0f + t);
      const float density = 0.5f * (1.0f - t * t);
      const float value = share_of(g, s);
      g = beside(g, density);
      const float slope = 0.7978845608028654f * (1.0f + 0.134145f * g * g);
      return {value * u, flow * u * (s + g * density * slope), flow * value};
    }
    case Activation::situ: {
      const bool limits_up = gate.beta != 0.0f;
      const float v = limits_up ? tanh_of(u * ptx::reciprocal(gate.beta)) : 0.0f;
      const float limited = limits_up ? gate.beta * v : u;
      const float t = tanh_of(g * ptx::reciprocal(gate.alpha));
      const float s = sigmoid(g);
      const float value = gate.alpha * t * s;
      return {value * limited, flow * limited * ((1.0f - t * t) * s + value * (1.0f - s)),
              flow * value * (1.0f - v * v)};
    }
    default: {  // relu2
      const float r = clamp_below(g, 0.0f);
      const float by_gate = 2.0f * (flow * u * r);
      return {r * (r * u), g <= 0.0f ? 0.0f : by_gate, r * (r * flow)};
    }
  }
}

}  // namespace nvfp4::cuda
