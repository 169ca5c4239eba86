#include <cmath>
#include <cstdio>
#include <iterator>
#include <limits>

#include "checks.h"

namespace nvfp4 {
namespace {

// Python's f"{value:g}".
std::string format_g(double value) {
  if (std::isnan(value)) return "nan";
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

}  // namespace

Gate check_gate(const char* op, int64_t activation, std::optional<double> clamp_limit, double alpha, double beta,
                bool gated) {
  static constexpr const char* kNames[] = {"silu", "swiglustep", "gelu", "gelu_tanh", "relu2", "situ"};
  constexpr double kMax = std::numeric_limits<float>::max();
  constexpr double kZero = 0x1p-150;  // the largest number that fp32 rounds to 0
  if (activation < 0 || activation >= std::ssize(kNames)) {
    fail(op,
         "expected activation to be one of 0 (silu), 1 (swiglustep), 2 (gelu), 3 (gelu_tanh), 4 (relu2), 5 (situ), ",
         "got ", activation);
  }
  const auto kind = static_cast<Activation>(activation);
  const char* name = kNames[activation];
  if (clamp_limit && !(kZero < *clamp_limit && *clamp_limit <= kMax)) {
    fail(op, "expected clamp_limit to be finite and positive (in fp32) or None for no clamp, got ",
         format_g(*clamp_limit));
  }
  if (!gated && (kind == Activation::swiglustep || kind == Activation::situ)) {
    fail(op, "expected activation to be one of silu, gelu, gelu_tanh, relu2 for experts without a gate, got ", name);
  }
  if (clamp_limit && !gated) {
    fail(op, "expected clamp_limit to be None for experts without a gate, for which no clamp is defined, got ",
         format_g(*clamp_limit), "; a clamp is never skipped silently: pass None, or gate and up rows");
  }
  if (clamp_limit && kind != Activation::silu && kind != Activation::swiglustep) {
    fail(op, "expected clamp_limit to be None for activation ", name, ", which has no clamp, got ",
         format_g(*clamp_limit), "; a clamp is never skipped silently: pass None or use silu or swiglustep");
  }
  const auto fail_constants = [&](const auto&... expected) {
    fail(op, expected..., ", got alpha=", format_g(alpha), ", beta=", format_g(beta));
  };
  if (!(std::abs(alpha) <= kMax && std::abs(beta) <= kMax)) {
    fail_constants("expected alpha and beta to be finite (in fp32)");
  }
  const bool has_constants = alpha != 1.0 || beta != 0.0;
  if (!gated && has_constants) fail_constants("expected alpha=1, beta=0 for experts without a gate");
  if (kind != Activation::silu && kind != Activation::situ && has_constants) {
    fail_constants("expected alpha=1, beta=0 for activation ", name, ", which takes neither (only silu and situ do)");
  }
  if (kind == Activation::situ && !(alpha > 0.0 && beta >= 0.0)) {
    fail_constants("expected alpha > 0 and beta >= 0 for activation situ (beta=0: up without a limit)");
  }
  // Beyond, fp32 divisions by them and products before an exponential over- or underflow for usual values.
  constexpr double kSmallest = 0x1p-64, kLargest = 0x1p64;
  const auto usable = [&](double constant) { return kSmallest <= constant && constant <= kLargest; };
  if (kind == Activation::situ && !(usable(alpha) && (beta == 0.0 || usable(beta)))) {
    fail_constants("expected alpha and beta from 2**-64 to 2**64, or beta=0, for activation situ");
  }
  if (std::abs(alpha) > kLargest) fail_constants("expected alpha from -2**64 to 2**64 for activation ", name);
  return Gate{
      .activation = kind,
      .clamped = clamp_limit.has_value(),
      .limit = static_cast<float>(clamp_limit.value_or(0.0)),
      .alpha = static_cast<float>(alpha),
      .beta = static_cast<float>(beta),
  };
}

}  // namespace nvfp4
