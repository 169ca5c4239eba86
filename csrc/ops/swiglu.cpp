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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) { m.impl("swiglu", TORCH_BOX(&swiglu)); }

}  // namespace nvfp4
