#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

constexpr const char* kLike = "hidden_states";

// All but the result's place.
MoeArgs check_moe(const char* op, const Tensor& hidden_states,  // [M, K]
                  const Tensor& w13,                            // packed [E, 2I, K], gated, or [E, I, K]
                  const Tensor& w13_global_scale,               // [E, 2], or [E]
                  const Tensor& w2,                             // packed [E, K, I]
                  const Tensor& w2_global_scale,                // [E]
                  const Tensor& topk_weights,                   // [M, top_k]
                  const Tensor& topk_ids,                       // [M, top_k]
                  const std::optional<Tensor>& expert_map,      // [global experts]
                  const std::optional<Tensor>& w13_bias,        // [E, 2I], or [E, I]
                  const std::optional<Tensor>& w2_bias,         // [E, K]
                  int64_t activation, std::optional<double> clamp_limit, double alpha, double beta,
                  bool apply_router_weight_on_input, bool batch_invariant) {
  check_activations(op, kLike, hidden_states, {"M", "K"});
  check_k(op, kLike, hidden_states);
  const int64_t tokens = hidden_states.size(0);
  const int64_t k = hidden_states.size(1);
  const bool gated = has_gate(w13, w13_global_scale);
  Weight gate_up = check_weight(op, "w13", w13, w13_global_scale, kLike, hidden_states,
                                {.batched = true, .gated = gated, .experts = -1, .n = -1, .k = k});
  Weight down =
      check_weight(op, "w2", w2, w2_global_scale, kLike, hidden_states,
                   {.batched = true, .gated = false, .experts = gate_up.experts, .n = k, .k = gate_up.features()});
  check_tensor(op, "topk_weights", topk_weights, kLike, hidden_states, {ScalarType::Float}, {tokens, "top_k"});
  const Routing routing =
      check_routing(op, topk_ids, expert_map, tokens, topk_weights.size(1), gate_up.experts, kLike, hidden_states);
  gate_up.bias = check_bias(op, "w13_bias", w13_bias, kLike, hidden_states, gate_up);
  down.bias = check_bias(op, "w2_bias", w2_bias, kLike, hidden_states, down);
  const Gate gate = check_gate(op, activation, clamp_limit, alpha, beta, gated);
  return {
      .dtype = dtype_of(hidden_states),
      .hidden_states = hidden_states.data_ptr(),
      .w13 = gate_up,
      .w2 = down,
      .topk_weights = static_cast<const float*>(topk_weights.data_ptr()),
      .routing = routing,
      .gate = gate,
      .apply_router_weight_on_input = apply_router_weight_on_input,
      .batch_invariant = batch_invariant,
      .out = nullptr,
  };
}

void run(const char* op, const Tensor& hidden_states, const MoeArgs& args) {
  Launch launch(op, hidden_states);
  launch.reserve(backend::moe_workspace(args, launch.context()));
  backend::moe(args, launch.context());
}

Tensor moe(const Tensor& hidden_states, const Tensor& w13, const Tensor& w13_global_scale, const Tensor& w2,
           const Tensor& w2_global_scale, const Tensor& topk_weights, const Tensor& topk_ids,
           const std::optional<Tensor>& expert_map, const std::optional<Tensor>& w13_bias,
           const std::optional<Tensor>& w2_bias, int64_t activation, std::optional<double> clamp_limit, double alpha,
           double beta, bool apply_router_weight_on_input, bool batch_invariant) {
  const char* op = "moe";
  MoeArgs args =
      check_moe(op, hidden_states, w13, w13_global_scale, w2, w2_global_scale, topk_weights, topk_ids, expert_map,
                w13_bias, w2_bias, activation, clamp_limit, alpha, beta, apply_router_weight_on_input, batch_invariant);
  const std::vector<int64_t> shape{hidden_states.size(0), hidden_states.size(1)};
  Tensor out = empty(op, "out", hidden_states, shape, hidden_states.scalar_type());
  if (out.numel() == 0) return out;
  args.out = out.data_ptr();
  run(op, hidden_states, args);
  return out;
}

void moe_out(const Tensor& hidden_states, const Tensor& w13, const Tensor& w13_global_scale, const Tensor& w2,
             const Tensor& w2_global_scale, const Tensor& topk_weights, const Tensor& topk_ids,
             const std::optional<Tensor>& expert_map, const std::optional<Tensor>& w13_bias,
             const std::optional<Tensor>& w2_bias, int64_t activation, std::optional<double> clamp_limit, double alpha,
             double beta, bool apply_router_weight_on_input, bool batch_invariant, const Tensor& out) {
  const char* op = "moe.out";
  MoeArgs args =
      check_moe(op, hidden_states, w13, w13_global_scale, w2, w2_global_scale, topk_weights, topk_ids, expert_map,
                w13_bias, w2_bias, activation, clamp_limit, alpha, beta, apply_router_weight_on_input, batch_invariant);
  check_out(op, out, kLike, hidden_states, {hidden_states.size(0), hidden_states.size(1)});
  check_apart(op, out, kLike, hidden_states, /*whole=*/true);
  check_apart(op, out, "w13", w13);
  check_apart(op, out, "w13_global_scale", w13_global_scale);
  check_apart(op, out, "w2", w2);
  check_apart(op, out, "w2_global_scale", w2_global_scale);
  check_apart(op, out, "topk_weights", topk_weights);
  check_apart(op, out, "topk_ids", topk_ids);
  if (expert_map) check_apart(op, out, "expert_map", *expert_map);
  if (w13_bias) check_apart(op, out, "w13_bias", *w13_bias);
  if (w2_bias) check_apart(op, out, "w2_bias", *w2_bias);
  if (out.numel() == 0) return;
  args.out = out.data_ptr();
  run(op, hidden_states, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) {
  m.impl("moe", TORCH_BOX(&moe));
  m.impl("moe.out", TORCH_BOX(&moe_out));
}

}  // namespace nvfp4
