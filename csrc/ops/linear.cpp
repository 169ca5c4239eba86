#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

Tensor linear(const Tensor& x,                    // [..., K]
              const Tensor& weight,               // packed [N, K]
              const Tensor& global_scale,         // [], or [2] when packed gated
              const std::optional<Tensor>& bias,  // [N]
              bool batch_invariant) {
  const char* op = "linear";
  check_activations(op, "x", x, any_shape(x, "K"));
  check_k(op, "x", x);
  const int64_t k = x.size(x.dim() - 1);
  const Weight packed =
      check_weight(op, "weight", weight, global_scale, "x", x,
                   {.batched = false, .gated = is_gated(op, global_scale, false), .experts = -1, .n = -1, .k = k});
  check_count(op, "the number of x's rows", x.numel() / k);
  if (bias) check_tensor(op, "bias", *bias, "x", x, {x.scalar_type()}, {packed.n});
  Tensor out = empty(op, "out", x, with_last_dim(x, packed.n), x.scalar_type());
  if (out.numel() == 0) return out;
  const LinearArgs args{
      .dtype = dtype_of(x),
      .x = x.data_ptr(),
      .rows = x.numel() / k,
      .weight = packed,
      .bias = optional_data<const void>(bias),
      .batch_invariant = batch_invariant,
      .out = out.data_ptr(),
  };
  Launch launch(op, x);
  launch.reserve(backend::linear_workspace(args, launch.context()));
  backend::linear(args, launch.context());
  return out;
}

// The gradient of x [..., K].
Tensor linear_backward(const Tensor& grad_output,  // [..., N]
                       const Tensor& weight, const Tensor& global_scale, int64_t in_features) {
  const char* op = "linear_backward";
  check_activations(op, "grad_output", grad_output, any_shape(grad_output, "N"));
  check_in_features(op, in_features);
  check_last_dim(op, "grad_output", grad_output, kGroupSize);
  const int64_t n = grad_output.size(grad_output.dim() - 1);
  const Weight packed = check_weight(
      op, "weight", weight, global_scale, "grad_output", grad_output,
      {.batched = false, .gated = is_gated(op, global_scale, false), .experts = -1, .n = n, .k = in_features});
  check_count(op, "the number of grad_output's rows", grad_output.numel() / n);
  Tensor grad_x =
      empty(op, "the gradient of x", grad_output, with_last_dim(grad_output, in_features), grad_output.scalar_type());
  if (grad_x.numel() == 0) return grad_x;
  const LinearBackwardArgs args{
      .dtype = dtype_of(grad_output),
      .grad_out = grad_output.data_ptr(),
      .rows = grad_output.numel() / n,
      .weight = packed,
      .grad_x = grad_x.data_ptr(),
  };
  Launch launch(op, grad_output);
  launch.reserve(backend::linear_backward_workspace(args, launch.context()));
  backend::linear_backward(args, launch.context());
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace nvfp4
