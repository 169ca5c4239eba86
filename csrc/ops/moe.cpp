#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

Tensor moe(const Tensor& hidden_states,              // [M, K]
           const Tensor& w13,                        // packed [E, 2I, K], gated
           const Tensor& w13_global_scale,           // [E, 2]
           const Tensor& w2,                         // packed [E, K, I]
           const Tensor& w2_global_scale,            // [E]
           const Tensor& topk_weights,               // [M, top_k]
           const Tensor& topk_ids,                   // [M, top_k]
           const std::optional<Tensor>& expert_map,  // [global experts]
           int64_t activation, std::optional<double> clamp_limit, double alpha, double beta,
           bool apply_router_weight_on_input) {
  const char* op = "moe";
  const char* like = "hidden_states";
  check_activations(op, like, hidden_states, {"M", "K"});
  check_k(op, like, hidden_states);
  const int64_t tokens = hidden_states.size(0);
  const int64_t k = hidden_states.size(1);
  const Weight gate_up = check_weight(op, "w13", w13, w13_global_scale, like, hidden_states,
                                      {.batched = true, .gated = true, .experts = -1, .n = -1, .k = k});
  const Weight down =
      check_weight(op, "w2", w2, w2_global_scale, like, hidden_states,
                   {.batched = true, .gated = false, .experts = gate_up.experts, .n = k, .k = gate_up.n / 2});
  check_tensor(op, "topk_weights", topk_weights, like, hidden_states, {ScalarType::Float}, {tokens, "top_k"});
  const Routing routing =
      check_routing(op, topk_ids, expert_map, tokens, topk_weights.size(1), gate_up.experts, like, hidden_states);
  const Gate gate = check_gate(op, activation, clamp_limit, alpha, beta);

  Tensor out = empty(op, "out", hidden_states, {tokens, k}, hidden_states.scalar_type());
  if (out.numel() == 0) return out;
  const MoeArgs args{
      .dtype = dtype_of(hidden_states),
      .hidden_states = hidden_states.data_ptr(),
      .w13 = gate_up,
      .w2 = down,
      .topk_weights = static_cast<const float*>(topk_weights.data_ptr()),
      .routing = routing,
      .gate = gate,
      .apply_router_weight_on_input = apply_router_weight_on_input,
      .out = out.data_ptr(),
  };
  Launch launch(op, hidden_states);
  launch.reserve(backend::moe_workspace(args, launch.context()));
  backend::moe(args, launch.context());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) { m.impl("moe", TORCH_BOX(&moe)); }

}  // namespace nvfp4
