// moe with FP8 activations, and the order of packed codes that it reads.
#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

constexpr const char* kLike = "hidden_states";

void check_device(const char* op, const Launch* launch) {
#ifdef USE_CUDA
  if (backend::runs_fp8(launch->context())) return;
  fail(op, "expected a GPU of compute capability 9.0 and its kernels (TORCH_NVFP4_ARCH unset), got another; use moe");
#else
  static_cast<void>(launch);
  fail(op, "expected tensors on a CUDA device, got them on the cpu, which has no kernels for FP8; use moe");
#endif
}

// Weights that order_for_fp8 gave: of its dtype, which no other op takes.
Weight check_ordered(const char* op, const char* name, const Tensor& packed, const Tensor& global_scale,
                     const Tensor& like, PackedSize size) {
  size.dtype = ScalarType::Char;
  return check_weight(op, name, packed, global_scale, kLike, like, size);
}

Tensor moe_fp8(const Tensor& hidden_states, const Tensor& w13, const Tensor& w13_global_scale, const Tensor& w2,
               const Tensor& w2_global_scale, const Tensor& topk_weights, const Tensor& topk_ids,
               const std::optional<Tensor>& expert_map, int64_t activation, std::optional<double> clamp_limit,
               double alpha, double beta, bool apply_router_weight_on_input) {
  const char* op = "moe_fp8";
  if (!kIsCuda) check_device(op, nullptr);
  check_tensor(op, kLike, hidden_states, kLike, hidden_states, {ScalarType::BFloat16, ScalarType::Half}, {"M", "K"});
  check_k(op, kLike, hidden_states);
  const int64_t tokens = hidden_states.size(0);
  const int64_t k = hidden_states.size(1);
  const Weight gate_up = check_ordered(op, "w13", w13, w13_global_scale, hidden_states,
                                       {.batched = true, .gated = true, .experts = -1, .n = -1, .k = k});
  const Weight down =
      check_ordered(op, "w2", w2, w2_global_scale, hidden_states,
                    {.batched = true, .gated = false, .experts = gate_up.experts, .n = k, .k = gate_up.features()});
  check_tensor(op, "topk_weights", topk_weights, kLike, hidden_states, {ScalarType::Float}, {tokens, "top_k"});
  const Routing routing =
      check_routing(op, topk_ids, expert_map, tokens, topk_weights.size(1), gate_up.experts, kLike, hidden_states);
  const Gate gate = check_gate(op, activation, clamp_limit, alpha, beta, /*gated=*/true);
  if (gate.activation != Activation::silu) {
    fail(op, "activation must be silu (0), got ", activation, "; use moe for others");
  }
  if (gate_up.experts > cuda::kFp8MaxExperts) {
    fail(op, "w13 must hold at most ", cuda::kFp8MaxExperts, " experts, got ", gate_up.experts);
  }
  Tensor out = empty(op, "out", hidden_states, {tokens, k}, hidden_states.scalar_type());
  if (out.numel() == 0) return out;
#ifdef USE_CUDA
  const MoeArgs args{.dtype = dtype_of(hidden_states),
                     .hidden_states = hidden_states.data_ptr(),
                     .w13 = gate_up,
                     .w2 = down,
                     .topk_weights = static_cast<const float*>(topk_weights.data_ptr()),
                     .routing = routing,
                     .gate = gate,
                     .apply_router_weight_on_input = apply_router_weight_on_input,
                     .batch_invariant = false,
                     .out = out.data_ptr()};
  Launch launch(op, hidden_states);
  check_device(op, &launch);
  launch.reserve(backend::moe_fp8_workspace(args, launch.context()));
  backend::moe_fp8(args, launch.context());
#else
  static_cast<void>(apply_router_weight_on_input);
  static_cast<void>(down);
  static_cast<void>(routing);
#endif
  return out;
}

Tensor order_for_fp8(const Tensor& packed, int64_t in_features, bool gated) {
  const char* op = "order_for_fp8";
  if (!kIsCuda) check_device(op, nullptr);
  check_in_features(op, in_features);
  const PackedSize size{.batched = true, .gated = gated, .experts = -1, .n = -1, .k = in_features};
  const int64_t n = check_packed(op, "packed", packed, "packed", packed, size);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < packed.dim(); ++i) shape.push_back(packed.size(i));
  Tensor ordered = empty(op, "the ordered weight", packed, shape, ScalarType::Char);
#ifdef USE_CUDA
  const Launch launch(op, packed);
  check_device(op, &launch);
  backend::order_for_fp8(static_cast<const uint8_t*>(packed.data_ptr()), static_cast<uint8_t*>(ordered.data_ptr()),
                         packed.size(0), packed.numel() / packed.size(0), n, in_features, launch.context());
#else
  static_cast<void>(n);
#endif
  return ordered;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) {
  m.impl("moe_fp8", TORCH_BOX(&moe_fp8));
  m.impl("order_for_fp8", TORCH_BOX(&order_for_fp8));
}

}  // namespace nvfp4
