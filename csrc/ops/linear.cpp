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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace nvfp4
