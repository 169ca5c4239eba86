#include <algorithm>

#include "aligned_rows.h"
#include "kernels/route.h"
#include "kernels/stream_gemm/params.h"
#include "kernels/wgmma_experts/params.h"
#include "select.h"

namespace nvfp4::cuda {

namespace {

struct Plan {
  Choice choice;
  CheckedRouting routing;
  void* aligned_x;   // for an x that is not
  int4* tile_table;  // stream_gemm
  void* wgmma;       // wgmma_experts
  size_t bytes;
};

Problem problem_of(const GroupedGemmArgs& args) {
  return {.op = Op::grouped_gemm,
          .dtype = args.dtype,
          .tokens = args.rows,
          .top_k = args.slots / args.rows,
          .experts = args.weight.experts,
          .gemm = {{args.weight.n, args.weight.k}, {}},
          .wide_gate = has_wide_tiles(args.weight, args.gate),
          .batch_invariant = args.batch_invariant};
}

Plan plan_of(const GroupedGemmArgs& args, const Context& context) {
  Plan plan{};
  Workspace workspace(context.workspace);
  plan.choice = select(problem_of(args), device(), static_cast<Isa>(context.level));
  plan.routing = {workspace.take<int32_t>(args.slots), workspace.take<int32_t>(args.weight.experts + 2)};
  plan.aligned_x = take_copy(workspace, args.x, args.rows * args.weight.k);
  if (plan.choice.kernel == Kernel::wgmma_experts) {
    plan.wgmma = workspace.take<void>(static_cast<int64_t>(wgmma_grouped_gemm_workspace(args)));
  } else {
    const int width = tile_width(plan.choice.stream.tiles);
    plan.tile_table = static_cast<int4*>(
        workspace.take<void>(static_cast<int64_t>(tile_table_bytes(args.slots, args.weight.experts, width))));
  }
  plan.bytes = workspace.bytes();
  return plan;
}

void stream(const GroupedGemmArgs& args, const Plan& plan, void* stream) {
  const StreamPlan& sizes = plan.choice.stream;
  const int64_t columns = args.gate != nullptr ? args.weight.features() : args.weight.n;
  cut_tiles(args.order, args.offsets, args.slots, args.weight.experts, plan.tile_table, tile_width(sizes.tiles),
            args.out, columns * kElementBytes, stream);
  StreamGemmParams p = stream_gemm_params(args.weight, sizes.k_ways[0]);
  p.x = args.x;
  p.slots_per_row = static_cast<int>(args.slots / args.rows);
  p.tile_table = plan.tile_table;
  p.order = args.order;
  p.slot_scale = args.slot_scale;
  p.has_gate = args.gate != nullptr;
  if (p.has_gate) p.gate = *args.gate;
  p.out = args.out;
  stream_gemm(plan.choice.isa, args.dtype, sizes.tiles, p, stream);
}

}  // namespace

size_t grouped_gemm_workspace(const GroupedGemmArgs& args, const Context& context) {
  return args.slots == 0 ? 0 : plan_of(args, context).bytes;
}

void grouped_gemm(const GroupedGemmArgs& original, const Context& context) {
  if (original.slots == 0) return;
  const Plan plan = plan_of(original, context);
  GroupedGemmArgs args = original;
  args.x = aligned_rows(args.x, plan.aligned_x, args.rows * args.weight.k, context.stream);
  check_routing(args.order, args.offsets, args.slots, args.weight.experts, plan.routing, context.stream);
  args.order = plan.routing.order;
  args.offsets = plan.routing.offsets;
  if (plan.choice.kernel == Kernel::wgmma_experts) {
    wgmma_grouped_gemm(args, plan.choice.wgmma, plan.wgmma, context.stream);
  } else {
    stream(args, plan, context.stream);
  }
}

}  // namespace nvfp4::cuda
