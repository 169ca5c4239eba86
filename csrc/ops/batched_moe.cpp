#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

constexpr const char* kLike = "hidden_states";

// All but the result's place.
BatchedMoeArgs check_batched_moe(const char* op, const Tensor& hidden_states,  // [E, T, K]
                                 const Tensor& w13,                            // packed [E, 2I, K], gated, or [E, I, K]
                                 const Tensor& w13_global_scale,               // [E, 2], or [E]
                                 const Tensor& w2,                             // packed [E, K, I]
                                 const Tensor& w2_global_scale,                // [E]
                                 const Tensor& expert_num_tokens,              // [E]
                                 const std::optional<Tensor>& w13_bias,        // [E, 2I], or [E, I]
                                 const std::optional<Tensor>& w2_bias,         // [E, K]
                                 int64_t activation, std::optional<double> clamp_limit, double alpha, double beta) {
  check_activations(op, kLike, hidden_states, {"E", "T", "K"});
  check_k(op, kLike, hidden_states);
  const int64_t rows = hidden_states.size(1);
  const int64_t k = hidden_states.size(2);
  const bool gated = has_gate(w13, w13_global_scale);
  Weight gate_up = check_weight(op, "w13", w13, w13_global_scale, kLike, hidden_states,
                                {.batched = true, .gated = gated, .experts = hidden_states.size(0), .n = -1, .k = k});
  Weight down =
      check_weight(op, "w2", w2, w2_global_scale, kLike, hidden_states,
                   {.batched = true, .gated = false, .experts = gate_up.experts, .n = k, .k = gate_up.features()});
  check_tensor(op, "expert_num_tokens", expert_num_tokens, kLike, hidden_states, {ScalarType::Int}, {gate_up.experts});
  check_count(op, "E * T", gate_up.experts * rows);
  gate_up.bias = check_bias(op, "w13_bias", w13_bias, kLike, hidden_states, gate_up);
  down.bias = check_bias(op, "w2_bias", w2_bias, kLike, hidden_states, down);
  const Gate gate = check_gate(op, activation, clamp_limit, alpha, beta, gated);
  return {
      .dtype = dtype_of(hidden_states),
      .hidden_states = hidden_states.data_ptr(),
      .rows_per_expert = rows,
      .w13 = gate_up,
      .w2 = down,
      .expert_num_tokens = static_cast<const int32_t*>(expert_num_tokens.data_ptr()),
      .gate = gate,
      .clears_rest = false,
      .out = nullptr,
  };
}

// The CPU works on a copy of the counts, each of which is read once: it has been checked and nobody changes it. On CUDA
// only the device knows them.
std::vector<int32_t> checked_counts(const char* op, const BatchedMoeArgs& args) {
  std::vector<int32_t> counts(static_cast<size_t>(args.w13.experts));
  for (size_t expert = 0; expert < counts.size(); ++expert) {
    const int32_t count = __atomic_load_n(args.expert_num_tokens + expert, __ATOMIC_RELAXED);
    if (count < 0 || count > args.rows_per_expert) {
      fail(op, "expert_num_tokens must be from 0 to T = ", args.rows_per_expert, ", got ", count, " at index ", expert);
    }
    counts[expert] = count;
  }
  return counts;
}

void run(const char* op, const Tensor& hidden_states, BatchedMoeArgs& args) {
  std::vector<int32_t> counts;
  if (!kIsCuda) {
    counts = checked_counts(op, args);
    args.expert_num_tokens = counts.data();
  }
  Launch launch(op, hidden_states);
  launch.reserve(backend::batched_moe_workspace(args, launch.context()));
  backend::batched_moe(args, launch.context());
}

Tensor batched_moe(const Tensor& hidden_states, const Tensor& w13, const Tensor& w13_global_scale, const Tensor& w2,
                   const Tensor& w2_global_scale, const Tensor& expert_num_tokens,
                   const std::optional<Tensor>& w13_bias, const std::optional<Tensor>& w2_bias, int64_t activation,
                   std::optional<double> clamp_limit, double alpha, double beta) {
  const char* op = "batched_moe";
  BatchedMoeArgs args = check_batched_moe(op, hidden_states, w13, w13_global_scale, w2, w2_global_scale,
                                          expert_num_tokens, w13_bias, w2_bias, activation, clamp_limit, alpha, beta);
  const std::vector<int64_t> shape{hidden_states.size(0), hidden_states.size(1), hidden_states.size(2)};
  Tensor out = empty(op, "out", hidden_states, shape, hidden_states.scalar_type());
  args.clears_rest = true;
  args.out = out.data_ptr();
  run(op, hidden_states, args);
  return out;
}

void batched_moe_out(const Tensor& hidden_states, const Tensor& w13, const Tensor& w13_global_scale, const Tensor& w2,
                     const Tensor& w2_global_scale, const Tensor& expert_num_tokens,
                     const std::optional<Tensor>& w13_bias, const std::optional<Tensor>& w2_bias, int64_t activation,
                     std::optional<double> clamp_limit, double alpha, double beta, const Tensor& out) {
  const char* op = "batched_moe.out";
  BatchedMoeArgs args = check_batched_moe(op, hidden_states, w13, w13_global_scale, w2, w2_global_scale,
                                          expert_num_tokens, w13_bias, w2_bias, activation, clamp_limit, alpha, beta);
  check_out(op, out, kLike, hidden_states, {hidden_states.size(0), hidden_states.size(1), hidden_states.size(2)});
  check_apart(op, out, kLike, hidden_states, /*whole=*/true);
  check_apart(op, out, "w13", w13);
  check_apart(op, out, "w13_global_scale", w13_global_scale);
  check_apart(op, out, "w2", w2);
  check_apart(op, out, "w2_global_scale", w2_global_scale);
  check_apart(op, out, "expert_num_tokens", expert_num_tokens);
  if (w13_bias) check_apart(op, out, "w13_bias", *w13_bias);
  if (w2_bias) check_apart(op, out, "w2_bias", *w2_bias);
  args.out = out.data_ptr();
  run(op, hidden_states, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) {
  m.impl("batched_moe", TORCH_BOX(&batched_moe));
  m.impl("batched_moe.out", TORCH_BOX(&batched_moe_out));
}

}  // namespace nvfp4
