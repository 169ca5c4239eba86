// The element-wise kernels, written once as scalar code that the compiler vectorises with the flags of the file that
// includes this. Everything has internal linkage: a shared inline symbol compiled for a higher level could otherwise
// be the copy that the linker keeps for a lower one.

#include <cstdint>
#include <cstring>

#include "../layout.h"
#include "../level_kernels.h"

#pragma GCC optimize("no-trapping-math,no-math-errno")

namespace nvfp4::cpu {
namespace {

#define NVFP4_INLINE static inline __attribute__((always_inline))

constexpr int kLanes = 16;  // elements a step; every level splits them into its own registers

NVFP4_INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
NVFP4_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

NVFP4_INLINE float bf16_to_float(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

NVFP4_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

NVFP4_INLINE float fp16_to_float(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t value = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
  return float_of(value | static_cast<uint32_t>(x & 0x8000) << 16);
}

NVFP4_INLINE uint16_t float_to_fp16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;  // 0.5 has the ulp 2^-24
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

struct Bf16 {
  using Storage = uint16_t;
  NVFP4_INLINE float load(uint16_t x) { return bf16_to_float(x); }
  NVFP4_INLINE uint16_t round(float x) { return float_to_bf16(x); }
};

struct Fp16 {
  using Storage = uint16_t;
  NVFP4_INLINE float load(uint16_t x) { return fp16_to_float(x); }
  NVFP4_INLINE uint16_t round(float x) { return float_to_fp16(x); }
};

struct Fp32 {
  using Storage = float;
  NVFP4_INLINE float load(float x) { return x; }
  NVFP4_INLINE float round(float x) { return x; }
};

// Calls body with the format of a dtype.
template <class Body>
NVFP4_INLINE void with_format(DType dtype, const Body& body) {
  if (dtype == DType::bf16) return body(Bf16{});
  if (dtype == DType::fp16) return body(Fp16{});
  body(Fp32{});
}

// exp(x) to 2e-7 relative. Overflows to infinity, underflows through the subnormals to zero, NaN stays NaN.
NVFP4_INLINE float exp_of(float x) {
  x = x > 90.0f ? 90.0f : x;
  x = x < -110.0f ? -110.0f : x;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts, the first times n exact
  float p = 1.3949783e-3f;
  p = p * r + 8.3759708e-3f;
  p = p * r + 4.1666200e-2f;
  p = p * r + 1.6666405e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // Two factors, because 2^n alone leaves the normal range before the product does.
  const int32_t exponent = static_cast<int32_t>(bits_of(shifted)) - static_cast<int32_t>(bits_of(kRound));
  const int32_t half = exponent >> 1;
  return p * float_of(static_cast<uint32_t>(half + 127) << 23) *
         float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
}

// tanh(x) to 3e-7 relative: a series where 1 - exp(-2 |x|) would cancel.
NVFP4_INLINE float tanh_of(float x) {
  const float size = float_of(bits_of(x) & 0x7fffffff);
  const float square = x * x;
  float p = 0.02186949f;
  p = p * square - 0.05396825f;
  p = p * square + 0.13333333f;
  p = p * square - 0.33333333f;
  const float e = exp_of(-2.0f * size);
  const float large = (1.0f - e) / (1.0f + e);
  const float result = size < 0.25f ? size + size * square * p : large;
  return float_of(bits_of(result) | (bits_of(x) & 0x80000000));
}

NVFP4_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// The normal distribution function, accurate in the lower tail too: erfc(z) = t exp(-z^2 + polynomial(t)) with
// t = 1 / (1 + z / 2), a fit of degree 9 with error 9e-8 in the exponent, at z = |x| / sqrt(2). The square is split so
// that its rounding error does not grow in the exponential.
NVFP4_INLINE float normal_cdf(float x) {
  const float size = float_of(bits_of(x) & 0x7fffffff);
  const float t = 1.0f / (1.0f + 0.35355339f * size);
  float p = 0.17901419f;
  p = p * t - 0.86146182f;
  p = p * t + 1.56874156f;
  p = p * t - 1.22522891f;
  p = p * t + 0.33937672f;
  p = p * t - 0.21116582f;
  p = p * t + 0.10291164f;
  p = p * t + 0.37324521f;
  p = p * t + 1.00008082f;
  p = p * t - 1.26551354f;
  const float high = float_of(bits_of(size) & 0xfffff000);
  const float low = 0.5f * (size - high) * (size + high);
  const float tail = size > 40.0f ? 0.0f : 0.5f * t * exp_of(-0.5f * high * high) * exp_of(p - low);
  return x > 0.0f ? 1.0f - tail : tail;
}

// Comparisons that let NaN pass.
NVFP4_INLINE float at_most(float x, float limit) { return x > limit ? limit : x; }
NVFP4_INLINE float at_least(float x, float limit) { return x < limit ? limit : x; }

// x times a share that tends to 0 faster than x grows. The product is 0 where the share is, also where x is infinite: a
// pre-activation that has overflowed to minus infinity stands for a finite number.
NVFP4_INLINE float share_of(float x, float share) { return (share == 0.0f ? 0.0f : x) * share; }

template <Activation kActivation, bool kClamped>
NVFP4_INLINE float activate(const Gate& gate, float g, float u) {
  if constexpr (kActivation == Activation::silu) {
    if constexpr (kClamped) {
      g = at_most(g, gate.limit);
      u = at_least(at_most(u, gate.limit), -gate.limit);
    }
    return share_of(g, sigmoid(gate.alpha * g)) * (u + gate.beta);
  } else if constexpr (kActivation == Activation::swiglustep) {
    float s = share_of(g, sigmoid(g));
    if constexpr (kClamped) {
      s = at_most(s, gate.limit);
      u = at_least(at_most(u, gate.limit), -gate.limit);
    }
    return s * u;
  } else if constexpr (kActivation == Activation::gelu) {
    return share_of(g, normal_cdf(g)) * u;
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    return share_of(g, sigmoid(1.59576912f * (g + 0.044715f * g * g * g))) * u;
  } else if constexpr (kActivation == Activation::situ) {
    if (gate.beta != 0.0f) u = gate.beta * tanh_of(u / gate.beta);
    return gate.alpha * tanh_of(g / gate.alpha) * sigmoid(g) * u;
  } else {
    // In this order the product overflows only where it is beyond fp32 itself: a large gate beside up 0 gives 0, not
    // NaN.
    const float r = at_least(g, 0.0f);
    return r * (r * u);
  }
}

template <Activation kActivation, bool kClamped>
struct Activate {
  NVFP4_INLINE float apply(const Gate& gate, float g, float u) { return activate<kActivation, kClamped>(gate, g, u); }
};

// Calls body with the Activate<> of a gate.
template <class Body>
NVFP4_INLINE void with_activation(const Gate& gate, const Body& body) {
  switch (gate.activation) {
    case Activation::silu:
      return gate.clamped ? body(Activate<Activation::silu, true>{}) : body(Activate<Activation::silu, false>{});
    case Activation::swiglustep:
      return gate.clamped ? body(Activate<Activation::swiglustep, true>{})
                          : body(Activate<Activation::swiglustep, false>{});
    case Activation::gelu:
      return body(Activate<Activation::gelu, false>{});
    case Activation::gelu_tanh:
      return body(Activate<Activation::gelu_tanh, false>{});
    case Activation::relu2:
      return body(Activate<Activation::relu2, false>{});
    case Activation::situ:
      return body(Activate<Activation::situ, false>{});
  }
}

static void gate_panel(const Gate& gate, const float* sums, float gate_scale, float up_scale, DType dtype, void* out) {
  with_activation(gate, [&](auto activation) {
    float values[kPanelRows];
    for (int i = 0; i < kPanelRows; ++i) {
      values[i] = activation.apply(gate, gate_scale * sums[i], up_scale * sums[kPanelRows + i]);
    }
    with_format(dtype, [&](auto format) {
      auto* o = static_cast<typename decltype(format)::Storage*>(out);
      for (int i = 0; i < kPanelRows; ++i) o[i] = format.round(values[i]);
    });
  });
}

// What enters the activation. Without a gate up is 1, which multiplies exactly.
NVFP4_INLINE void preactivations(const PanelTerms& terms, const float* sums, float* g, float* u) {
  for (int i = 0; i < kPanelRows; ++i) {
    g[i] = terms.gate_scale * sums[i] + (terms.gate_bias == nullptr ? 0.0f : terms.gate_bias[i]);
    u[i] = 1.0f;
  }
  for (int i = 0; terms.gated && i < kPanelRows; ++i) {
    u[i] = terms.up_scale * sums[kPanelRows + i] + (terms.up_bias == nullptr ? 0.0f : terms.up_bias[i]);
  }
}

static void activate_panel(const Gate& gate, const PanelTerms& terms, const float* sums, DType dtype, void* out) {
  float g[kPanelRows];
  float u[kPanelRows];
  preactivations(terms, sums, g, u);
  with_activation(gate, [&](auto activation) {
    float values[kPanelRows];
    for (int i = 0; i < kPanelRows; ++i) values[i] = activation.apply(gate, g[i], u[i]);
    with_format(dtype, [&](auto format) {
      auto* o = static_cast<typename decltype(format)::Storage*>(out);
      for (int i = 0; i < kPanelRows; ++i) o[i] = format.round(values[i]);
    });
  });
}

static void swiglu_row(const Gate& gate, const void* gate_row, const void* up_row, int64_t n, DType dtype, void* out) {
  with_activation(gate, [&](auto activation) {
    with_format(dtype, [&](auto format) {
      using Storage = typename decltype(format)::Storage;
      auto* __restrict o = static_cast<Storage*>(out);
      auto* g = static_cast<const Storage*>(gate_row);
      auto* u = static_cast<const Storage*>(up_row);
      for (int64_t i = 0; u == nullptr && i < n; ++i) {
        o[i] = format.round(activation.apply(gate, format.load(g[i]), 1.0f));
      }
      for (int64_t i = 0; u != nullptr && i < n; ++i) {
        o[i] = format.round(activation.apply(gate, format.load(g[i]), format.load(u[i])));
      }
    });
  });
}

static void accumulate_row(DType dtype, const void* x, int64_t n, float scale, float* __restrict sums) {
  with_format(dtype, [&](auto format) {
    auto* values = static_cast<const typename decltype(format)::Storage*>(x);
    for (int64_t i = 0; i < n; ++i) sums[i] += scale * format.load(values[i]);
  });
}

static void store_row(const float* sums, int64_t n, float scale, const void* bias, DType dtype, void* out) {
  with_format(dtype, [&](auto format) {
    using Storage = typename decltype(format)::Storage;
    auto* __restrict o = static_cast<Storage*>(out);
    if (bias == nullptr) {
      for (int64_t i = 0; i < n; ++i) o[i] = format.round(scale * sums[i]);
    } else {
      auto* b = static_cast<const Storage*>(bias);
      for (int64_t i = 0; i < n; ++i) o[i] = format.round(scale * sums[i] + format.load(b[i]));
    }
  });
}

// The multipliers between a block's values and int16: the largest magnitude comes to lie in [2^13, 2^14).
struct BlockScale {
  float to_int;
  float from_int;  // also undoes the factor 2^-7 of the weights: codes doubled, scales times 2^-8
};

NVFP4_INLINE BlockScale block_scale(uint32_t largest_magnitude) {
  uint32_t exponent = largest_magnitude >> 23;
  if (exponent == 255) return {0.0f, __builtin_nanf("")};
  if (exponent < 14) exponent = 14;  // keeps both factors normal
  return {float_of((267 - exponent) << 23), float_of((exponent - 6) << 23)};
}

// 64 values to int16, each run of eight in the order 0 4 1 5 2 6 3 7.
NVFP4_INLINE void quantize_block(const float* values, float to_int, int16_t* out) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the rounded value in the low 16 bits
  uint32_t shifted[kBlockColumns];
  for (int i = 0; i < kBlockColumns; ++i) shifted[i] = bits_of(at_most(values[i] * to_int + kRound, kRound + 16383.0f));
  for (int run = 0; run < kBlockColumns; run += 8) {
    uint32_t pairs[4];
    for (int j = 0; j < 4; ++j) pairs[j] = (shifted[run + j] & 0xffff) | shifted[run + 4 + j] << 16;
    std::memcpy(out + run, pairs, sizeof(pairs));
  }
}

// The block of a row as 64 floats, zeros from column k on.
template <class Format>
NVFP4_INLINE void load_block(Format format, const typename Format::Storage* row, int64_t columns, float* values) {
  if (columns >= kBlockColumns) {
    for (int i = 0; i < kBlockColumns; ++i) values[i] = format.load(row[i]);
  } else {
    for (int i = 0; i < kBlockColumns; ++i) values[i] = i < columns ? format.load(row[i]) : 0.0f;
  }
}

// 64 values into row `index` of a tile. An infinity becomes NaN, so that a clamp cannot make it look like a number.
NVFP4_INLINE void store_values(const float* values, int64_t index, TokenTile* tile) {
  uint32_t largest = 0;
  for (int i = 0; i < kBlockColumns; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool finite = largest < 0x7f800000;
  if (tile->exact) {
    float* out = static_cast<float*>(tile->values) + index * kBlockColumns;
    for (int i = 0; i < kBlockColumns; ++i) out[i] = finite ? values[i] : __builtin_nanf("");
    return;
  }
  auto* quantized = static_cast<int16_t*>(tile->values) + index * kBlockColumns;
  const BlockScale scale = block_scale(largest);
  tile->scale[index] = scale.from_int;
  if (finite) {
    quantize_block(values, scale.to_int, quantized);
  } else {
    std::memset(quantized, 0, kBlockColumns * sizeof(int16_t));
  }
}

// `finish` is called with the index of every row that has been stored.
template <class Finish>
NVFP4_INLINE void gather_tokens(const TokenRows& tokens, TokenTile* tile, const Finish& finish) {
  with_format(tokens.dtype, [&](auto format) {
    auto* x = static_cast<const typename decltype(format)::Storage*>(tokens.x);
    for (int64_t token = 0; token < tile->count; ++token) {
      auto* row = x + tokens.rows[token] * tokens.k;
      for (int64_t block = 0; block < tile->blocks; ++block) {
        alignas(64) float values[kBlockColumns];
        load_block(format, row + block * kBlockColumns, tokens.k - block * kBlockColumns, values);
        store_values(values, block * tile->count + token, tile);
        finish(block * tile->count + token);
      }
    }
  });
}

template <class Finish>
NVFP4_INLINE void fill_tokens(const float* values, int64_t block, TokenTile* tile, const Finish& finish) {
  for (int64_t token = 0; token < tile->count; ++token) {
    store_values(values + token * kBlockColumns, block * tile->count + token, tile);
    finish(block * tile->count + token);
  }
}

}  // namespace
}  // namespace nvfp4::cpu
