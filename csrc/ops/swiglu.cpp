#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

Tensor swiglu(const Tensor& gate_up,  // [..., 2I], gate columns first, or [..., I]
              int64_t activation, std::optional<double> clamp_limit, double alpha, double beta, bool gated) {
  const char* op = "swiglu";
  const int64_t halves = gated ? 2 : 1;
  check_activations(op, "gate_up", gate_up, any_shape(gate_up, gated ? "2I" : "I"));
  check_last_dim(op, "gate_up", gate_up, halves);
  const Gate gate = check_gate(op, activation, clamp_limit, alpha, beta, gated);
  const int64_t intermediate = gate_up.size(gate_up.dim() - 1) / halves;
  Tensor out = empty(op, "out", gate_up, with_last_dim(gate_up, intermediate), gate_up.scalar_type());
  if (out.numel() == 0) return out;
  const SwigluArgs args{
      .dtype = dtype_of(gate_up),
      .gate_up = gate_up.data_ptr(),
      .rows = out.numel() / intermediate,
      .intermediate = intermediate,
      .gated = gated,
      .gate = gate,
      .out = out.data_ptr(),
  };
  const Launch launch(op, gate_up);
  backend::swiglu(args, launch.context());
  return out;
}

// The gradient of gate_up.
Tensor swiglu_backward(const Tensor& grad_output,  // [..., I]
                       const Tensor& gate_up, int64_t activation, std::optional<double> clamp_limit, double alpha,
                       double beta, bool gated) {
  const char* op = "swiglu_backward";
  const int64_t halves = gated ? 2 : 1;
  check_activations(op, "gate_up", gate_up, any_shape(gate_up, gated ? "2I" : "I"));
  check_last_dim(op, "gate_up", gate_up, halves);
  const Gate gate = check_gate(op, activation, clamp_limit, alpha, beta, gated);
  const int64_t intermediate = gate_up.size(gate_up.dim() - 1) / halves;
  Dims dims = any_shape(gate_up, "I");
  dims.back() = intermediate;
  check_tensor(op, "grad_output", grad_output, "gate_up", gate_up, {gate_up.scalar_type()}, dims);
  Tensor grad = grad_tensor(op, "the gradient of gate_up", gate_up, true);
  if (grad.numel() == 0) return grad;
  const SwigluBackwardArgs args{
      .forward =
          {
              .dtype = dtype_of(gate_up),
              .gate_up = gate_up.data_ptr(),
              .rows = grad_output.numel() / intermediate,
              .intermediate = intermediate,
              .gated = gated,
              .gate = gate,
              .out = nullptr,
          },
      .grad_out = grad_output.data_ptr(),
      .grad_gate_up = grad.data_ptr(),
  };
  const Launch launch(op, gate_up);
  backend::swiglu_backward(args, launch.context());
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace nvfp4
