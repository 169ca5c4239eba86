#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

std::tuple<Tensor, Tensor> route(const Tensor& topk_ids,                   // [M, top_k]
                                 const std::optional<Tensor>& expert_map,  // [global experts]
                                 int64_t num_experts) {
  const char* op = "route";
  const Routing routing = check_routing(op, topk_ids, expert_map, -1, -1, num_experts, "topk_ids", topk_ids);
  check_num_experts(op, num_experts);
  Tensor order = empty(op, "order", topk_ids, {routing.tokens * routing.top_k}, ScalarType::Int);
  Tensor offsets = empty(op, "offsets", topk_ids, {num_experts + 1}, ScalarType::Int);
  const RouteArgs args{
      .routing = routing,
      .order = static_cast<int32_t*>(order.data_ptr()),
      .offsets = static_cast<int32_t*>(offsets.data_ptr()),
  };
  Launch launch(op, topk_ids);
  launch.reserve(backend::route_workspace(args, launch.context()));
  backend::route(args, launch.context());
  return {order, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) { m.impl("route", TORCH_BOX(&route)); }

}  // namespace nvfp4
