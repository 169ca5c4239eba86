#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

Tensor combine(const Tensor& x,                          // [M * top_k, N]
               const Tensor& topk_weights,               // [M, top_k]
               const Tensor& topk_ids,                   // [M, top_k]
               const std::optional<Tensor>& expert_map,  // [global experts]
               int64_t num_experts) {
  const char* op = "combine";
  check_activations(op, "x", x, {"M * top_k", "N"});
  check_tensor(op, "topk_weights", topk_weights, "x", x, {ScalarType::Float}, {"M", "top_k"});
  const int64_t tokens = topk_weights.size(0);
  const Routing routing = check_routing(op, topk_ids, expert_map, tokens, topk_weights.size(1), num_experts, "x", x);
  check_num_experts(op, num_experts);
  if (x.size(0) != topk_ids.numel()) {
    fail(op, "x must have M * top_k = ", topk_ids.numel(), " rows, got ", x.size(0));
  }
  Tensor out = empty(op, "out", x, {tokens, x.size(1)}, x.scalar_type());
  if (out.numel() == 0) return out;
  const CombineArgs args{
      .dtype = dtype_of(x),
      .x = x.data_ptr(),
      .topk_weights = static_cast<const float*>(topk_weights.data_ptr()),
      .routing = routing,
      .n = x.size(1),
      .out = out.data_ptr(),
  };
  const Launch launch(op, x);
  backend::combine(args, launch.context());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) { m.impl("combine", TORCH_BOX(&combine)); }

}  // namespace nvfp4
