// The derivatives, written once for all levels; included behind elementwise.inl. A level defines before it
//   Floats         a vector of floats, as GCC's vector extension has it
//   kBackwardTokens  how many rows are multiplied at a time: with four vectors each they fill the registers
//   decode_rows(block, rows)  the weights of a block as fp32 [kPanelRows][kBlockColumns], scales multiplied in

namespace nvfp4::cpu {
namespace {

// An activation's value, and what flows back into gate and up from `flow` into that value.
struct Backward {
  float value;
  float gate;
  float up;
};

// The clamps have aten's derivative: 1 up to the limit itself, 0 beyond it and for NaN, whatever flows back.
NVFP4_INLINE float up_to(float x, float limit, float flow) { return x <= limit ? flow : 0.0f; }
NVFP4_INLINE float within(float x, float limit, float flow) { return x <= limit && x >= -limit ? flow : 0.0f; }

// x where it is multiplied with a share that tends to 0 faster than x grows: see share_of.
NVFP4_INLINE float beside(float x, float share) { return share == 0.0f ? 0.0f : x; }

template <Activation kActivation, bool kClamped>
NVFP4_INLINE Backward differentiate(const Gate& gate, float g, float u, float flow) {
  if constexpr (kActivation == Activation::silu) {
    const float least = kClamped ? at_most(g, gate.limit) : g;
    const float v = kClamped ? at_least(at_most(u, gate.limit), -gate.limit) : u;
    const float s = sigmoid(gate.alpha * least);
    const float c = beside(least, s);
    const float by_gate = flow * (v + gate.beta) * (s * (1.0f + gate.alpha * c * (1.0f - s)));
    const float by_up = flow * (c * s);
    return {c * s * (v + gate.beta), kClamped ? up_to(g, gate.limit, by_gate) : by_gate,
            kClamped ? within(u, gate.limit, by_up) : by_up};
  } else if constexpr (kActivation == Activation::swiglustep) {
    const float s = sigmoid(g);
    g = beside(g, s);
    const float silu = g * s;
    const float c = kClamped ? at_most(silu, gate.limit) : silu;
    const float v = kClamped ? at_least(at_most(u, gate.limit), -gate.limit) : u;
    const float to_silu = kClamped ? up_to(silu, gate.limit, flow * v) : flow * v;
    return {c * v, to_silu * (s * (1.0f + g * (1.0f - s))), kClamped ? within(u, gate.limit, flow * c) : flow * c};
  } else if constexpr (kActivation == Activation::gelu) {
    const float cdf = normal_cdf(g);
    const float density = 0.39894228f * exp_of(-0.5f * g * g);
    const float value = share_of(g, cdf);
    return {value * u, flow * u * (cdf + share_of(g, density)), flow * value};
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    const float s = sigmoid(1.59576912f * (g + 0.044715f * g * g * g));
    const float density = s * (1.0f - s);
    const float value = share_of(g, s);
    g = beside(g, density);
    const float slope = 1.59576912f * (1.0f + 0.134145f * g * g);
    return {value * u, flow * u * (s + g * density * slope), flow * value};
  } else if constexpr (kActivation == Activation::situ) {
    const float v = gate.beta != 0.0f ? tanh_of(u / gate.beta) : 0.0f;
    const float limited = gate.beta != 0.0f ? gate.beta * v : u;
    const float t = tanh_of(g / gate.alpha);
    const float s = sigmoid(g);
    const float value = gate.alpha * t * s;
    return {value * limited, flow * limited * ((1.0f - t * t) * s + value * (1.0f - s)), flow * value * (1.0f - v * v)};
  } else {
    const float r = at_least(g, 0.0f);
    const float by_gate = 2.0f * (flow * u * r);
    return {r * (r * u), g <= 0.0f ? 0.0f : by_gate, r * (r * flow)};
  }
}

template <Activation kActivation, bool kClamped>
struct Differentiate {
  NVFP4_INLINE Backward apply(const Gate& gate, float g, float u, float flow) {
    return differentiate<kActivation, kClamped>(gate, g, u, flow);
  }
};

template <Activation kActivation, bool kClamped>
NVFP4_INLINE Differentiate<kActivation, kClamped> derivative_of(Activate<kActivation, kClamped>) {
  return {};
}

static void differentiate_panel(const Gate& gate, const PanelTerms& terms, const float* sums, const float* flow,
                                PanelBackward* out) {
  float g[kPanelRows];
  float u[kPanelRows];
  preactivations(terms, sums, g, u);
  with_activation(gate, [&](auto activation) {
    const auto derivative = derivative_of(activation);
    for (int i = 0; i < kPanelRows; ++i) {
      const Backward b = derivative.apply(gate, g[i], u[i], flow[i]);
      out->value[i] = b.value;
      out->gate[i] = b.gate;
      out->up[i] = b.up;
    }
  });
}

static void swiglu_backward_row(const Gate& gate, const void* flow_row, const void* gate_row, const void* up_row,
                                int64_t n, DType dtype, void* to_gate, void* to_up) {
  with_activation(gate, [&](auto activation) {
    const auto derivative = derivative_of(activation);
    with_format(dtype, [&](auto format) {
      using Storage = typename decltype(format)::Storage;
      auto* flow = static_cast<const Storage*>(flow_row);
      auto* g = static_cast<const Storage*>(gate_row);
      auto* u = static_cast<const Storage*>(up_row);
      auto* __restrict dg = static_cast<Storage*>(to_gate);
      auto* __restrict du = static_cast<Storage*>(to_up);
      for (int64_t i = 0; u == nullptr && i < n; ++i) {
        dg[i] = format.round(derivative.apply(gate, format.load(g[i]), 1.0f, format.load(flow[i])).gate);
      }
      for (int64_t i = 0; u != nullptr && i < n; ++i) {
        const Backward b = derivative.apply(gate, format.load(g[i]), format.load(u[i]), format.load(flow[i]));
        dg[i] = format.round(b.gate);
        du[i] = format.round(b.up);
      }
    });
  });
}

// sums [kTokens, kBlockColumns] += rows [kTokens, kPanelRows] times the panel's decoded rows.
template <int kTokens>
NVFP4_INLINE void add_panel_rows(const float (*weights)[kBlockColumns], const float* rows, float* sums) {
  constexpr int kVectors = 4;
  constexpr int kFloats = sizeof(Floats) / sizeof(float);
  for (int first = 0; first < kBlockColumns; first += kVectors * kFloats) {
    Floats total[kTokens][kVectors];
#pragma GCC unroll 32
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 32
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(&total[t][v], sums + t * kBlockColumns + first + v * kFloats, sizeof(Floats));
      }
    }
    for (int row = 0; row < kPanelRows; ++row) {
      Floats w[kVectors];
#pragma GCC unroll 32
      for (int v = 0; v < kVectors; ++v) std::memcpy(&w[v], weights[row] + first + v * kFloats, sizeof(Floats));
#pragma GCC unroll 32
      for (int t = 0; t < kTokens; ++t) {
        const float x = rows[t * kPanelRows + row];
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; ++v) total[t][v] += w[v] * x;
      }
    }
#pragma GCC unroll 32
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 32
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(sums + t * kBlockColumns + first + v * kFloats, &total[t][v], sizeof(Floats));
      }
    }
  }
}

static void multiply_transposed(const uint8_t* block, int64_t panel_stride, int64_t panels, const float* rows,
                                int64_t count, float* sums) {
  alignas(64) float weights[kPanelRows][kBlockColumns];
  for (int64_t panel = 0; panel < panels; ++panel, block += panel_stride) {
    if (panel + 1 < panels) {
      for (int line = 0; line < kBlockBytes; line += 64) __builtin_prefetch(block + panel_stride + line);
    }
    decode_rows(block, weights);
    int64_t token = 0;
    for (; token + kBackwardTokens <= count; token += kBackwardTokens, rows += kBackwardTokens * kPanelRows) {
      add_panel_rows<kBackwardTokens>(weights, rows, sums + token * kBlockColumns);
    }
    for (; token < count; ++token, rows += kPanelRows) {
      add_panel_rows<1>(weights, rows, sums + token * kBlockColumns);
    }
  }
}

}  // namespace
}  // namespace nvfp4::cpu
