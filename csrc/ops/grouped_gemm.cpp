#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

// All but the result's place. With a gate the result is [slots, I], else [slots, N].
GroupedGemmArgs check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& global_scale,
                      const Tensor& order, const Tensor& offsets, const std::optional<Tensor>& topk_weights,
                      const std::optional<Tensor>& bias, bool gated, const Gate* gate, bool batch_invariant) {
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
  return {
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
      .out = nullptr,
  };
}

int64_t columns(const GroupedGemmArgs& args) { return args.gate ? args.weight.features() : args.weight.n; }

Tensor run(const char* op, const Tensor& x, GroupedGemmArgs args) {
  Tensor out = empty(op, "out", x, {args.slots, columns(args)}, x.scalar_type());
  args.out = out.data_ptr();
  Launch launch(op, x);
  launch.reserve(backend::grouped_gemm_workspace(args, launch.context()));
  backend::grouped_gemm(args, launch.context());
  return out;
}

// The gradients of x and topk_weights; one that is not wanted is empty.
std::tuple<Tensor, Tensor> run_backward(const char* op, const Tensor& grad_output, const Tensor& x,
                                        const std::optional<Tensor>& topk_weights, const GroupedGemmArgs& forward,
                                        bool needs_x, bool needs_topk_weights) {
  check_tensor(op, "grad_output", grad_output, "x", x, {x.scalar_type()}, {forward.slots, columns(forward)});
  if (needs_topk_weights && !topk_weights) {
    fail(op, "expected topk_weights where needs_topk_weights is True, got None");
  }
  Tensor grad_x = grad_tensor(op, "the gradient of x", x, needs_x);
  Tensor grad_weights =
      grad_tensor(op, "the gradient of topk_weights", topk_weights ? *topk_weights : x, needs_topk_weights);
  const GroupedGemmBackwardArgs args{
      .forward = forward,
      .grad_out = grad_output.data_ptr(),
      .grad_x = grad_x.numel() == 0 ? nullptr : grad_x.data_ptr(),
      .grad_slot_scale = grad_weights.numel() == 0 ? nullptr : static_cast<float*>(grad_weights.data_ptr()),
  };
  Launch launch(op, x);
  launch.reserve(backend::grouped_gemm_backward_workspace(args, launch.context()));
  backend::grouped_gemm_backward(args, launch.context());
  return {grad_x, grad_weights};
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
  return run(op, x,
             check(op, x, weight, global_scale, order, offsets, topk_weights, bias, is_gated(op, global_scale, true),
                   nullptr, batch_invariant));
}

std::tuple<Tensor, Tensor> grouped_gemm_backward(const Tensor& grad_output,  // [slots, N]
                                                 const Tensor& x, const Tensor& weight, const Tensor& global_scale,
                                                 const Tensor& order, const Tensor& offsets,
                                                 const std::optional<Tensor>& topk_weights, bool batch_invariant,
                                                 bool needs_x, bool needs_topk_weights) {
  const char* op = "grouped_gemm_backward";
  check_x(op, x);
  return run_backward(op, grad_output, x, topk_weights,
                      check(op, x, weight, global_scale, order, offsets, topk_weights, std::nullopt,
                            is_gated(op, global_scale, true), nullptr, batch_invariant),
                      needs_x, needs_topk_weights);
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
  return run(op, x,
             check(op, x, weight, global_scale, order, offsets, topk_weights, bias, gated, &gate, batch_invariant));
}

std::tuple<Tensor, Tensor> grouped_gemm_swiglu_backward(const Tensor& grad_output,  // [slots, I]
                                                        const Tensor& x, const Tensor& weight,
                                                        const Tensor& global_scale, const Tensor& order,
                                                        const Tensor& offsets,
                                                        const std::optional<Tensor>& topk_weights,
                                                        const std::optional<Tensor>& bias, int64_t activation,
                                                        std::optional<double> clamp_limit, double alpha, double beta,
                                                        bool batch_invariant, bool needs_x, bool needs_topk_weights) {
  const char* op = "grouped_gemm_swiglu_backward";
  check_x(op, x);
  const bool gated = has_gate(weight, global_scale);
  const Gate gate = check_gate(op, activation, clamp_limit, alpha, beta, gated);
  return run_backward(
      op, grad_output, x, topk_weights,
      check(op, x, weight, global_scale, order, offsets, topk_weights, bias, gated, &gate, batch_invariant), needs_x,
      needs_topk_weights);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) {
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_gemm_swiglu", TORCH_BOX(&grouped_gemm_swiglu));
  m.impl("grouped_gemm_backward", TORCH_BOX(&grouped_gemm_backward));
  m.impl("grouped_gemm_swiglu_backward", TORCH_BOX(&grouped_gemm_swiglu_backward));
}

}  // namespace nvfp4
