#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

// Both ops are one GEMM; with a gate the result is [slots, I], else [slots, N].
Tensor run(const char* op, const Tensor& x, const Tensor& weight, const Tensor& global_scale, const Tensor& order,
           const Tensor& offsets, const std::optional<Tensor>& topk_weights, const std::optional<Tensor>& bias,
           bool gated, const Gate* gate, bool batch_invariant) {
  const int64_t rows = x.size(0);
  Weight packed = check_weight(op, "weight", weight, global_scale, "x", x,
                               {.batched = true, .gated = gated, .experts = -1, .n = -1, .k = x.size(1)});
  check_tensor(op, "order", order, "x", x, {ScalarType::Int}, {"slots"});
  check_tensor(op, "offsets", offsets, "x", x, {ScalarType::Int}, {packed.experts + 1});
  const int64_t slots = order.size(0);
  check_count(op, "order's size", slots);
  if (topk_weights) {
    check_tensor(op, "topk_weights", *topk_weights, "x", x, {ScalarType::Float}, {rows, "top_k"});
  }
  if (topk_weights ? slots != topk_weights->numel() : rows == 0 ? slots != 0 : slots % rows != 0) {
    fail(op, "order must hold ", topk_weights ? "as many slots as topk_weights" : "a multiple of x's rows", " (",
         topk_weights ? topk_weights->numel() : rows, "), got ", slots);
  }
  packed.bias = check_bias(op, "bias", bias, "x", x, packed);
  Tensor out = empty(op, "out", x, {slots, gate ? packed.features() : packed.n}, x.scalar_type());
  const GroupedGemmArgs args{
      .dtype = dtype_of(x),
      .x = x.data_ptr(),
      .rows = rows,
      .slots = slots,
      .weight = packed,
      .order = static_cast<const int32_t*>(order.data_ptr()),
      .offsets = static_cast<const int32_t*>(offsets.data_ptr()),
      .slot_scale = optional_data<const float>(topk_weights),
      .gate = gate,
      .batch_invariant = batch_invariant,
      .out = out.data_ptr(),
  };
  Launch launch(op, x);
  launch.reserve(backend::grouped_gemm_workspace(args, launch.context()));
  backend::grouped_gemm(args, launch.context());
  return out;
}

void check_x(const char* op, const Tensor& x) {
  check_activations(op, "x", x, {"rows", "K"});
  check_k(op, "x", x);
}

Tensor grouped_gemm(const Tensor& x,                            // [rows, K]
                    const Tensor& weight,                       // packed [E, N, K]
                    const Tensor& global_scale,                 // [E], or [E, 2] when packed gated
                    const Tensor& order,                        // [slots]
                    const Tensor& offsets,                      // [E + 1]
                    const std::optional<Tensor>& topk_weights,  // [rows, slots / rows]
                    const std::optional<Tensor>& bias,          // [E, N]
                    bool batch_invariant) {
  const char* op = "grouped_gemm";
  check_x(op, x);
  return run(op, x, weight, global_scale, order, offsets, topk_weights, bias, is_gated(op, global_scale, true), nullptr,
             batch_invariant);
}

Tensor grouped_gemm_swiglu(const Tensor& x,                            // [rows, K]
                           const Tensor& weight,                       // packed [E, 2I, K], gated, or [E, I, K]
                           const Tensor& global_scale,                 // [E, 2], or [E]
                           const Tensor& order,                        // [slots]
                           const Tensor& offsets,                      // [E + 1]
                           const std::optional<Tensor>& topk_weights,  // [rows, slots / rows]
                           const std::optional<Tensor>& bias,          // [E, 2I], or [E, I]
                           int64_t activation, std::optional<double> clamp_limit, double alpha, double beta,
                           bool batch_invariant) {
  const char* op = "grouped_gemm_swiglu";
  check_x(op, x);
  const bool gated = has_gate(weight, global_scale);
  const Gate gate = check_gate(op, activation, clamp_limit, alpha, beta, gated);
  return run(op, x, weight, global_scale, order, offsets, topk_weights, bias, gated, &gate, batch_invariant);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) {
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_gemm_swiglu", TORCH_BOX(&grouped_gemm_swiglu));
}

}  // namespace nvfp4
