#include <algorithm>

#include "aligned_rows.h"
#include "kernels/combine.h"
#include "kernels/few_slots_mlp/params.h"
#include "kernels/route.h"
#include "kernels/stream_gemm/params.h"
#include "kernels/wgmma_experts/params.h"
#include "select.h"

namespace nvfp4::cuda {

namespace {

// What a call runs and where its intermediates lie; what the chosen kernel has no use for stays null.
struct Plan {
  Choice choice;
  int64_t slots;
  void* aligned_x;   // [tokens, k of w13], for hidden_states that are not
  void* expert_out;  // [slots, n of w2], fp32 with few_slots_mlp
  void* hidden;      // [slots, k of w2], few_slots_mlp and stream_gemm; twice that where it splits tokens
  void* split_x;     // [tokens, 2, k of w13], only there
  int32_t* order;    // these three sort, unless the kernel's CTAs do: wgmma_experts and stream_gemm
  int32_t* offsets;  //
  void* sort;        //
  int4* tile_table;  // stream_gemm unless its CTAs sort
  void* wgmma;       // wgmma_experts
  size_t bytes;
};

bool is_extended(const MoeArgs& args) {
  return nvfp4::cuda::is_extended(args.w13, &args.gate) || nvfp4::cuda::is_extended(args.w2, nullptr);
}

Problem problem_of(const MoeArgs& args) {
  return {.op = Op::moe,
          .dtype = args.dtype,
          .tokens = args.routing.tokens,
          .top_k = args.routing.top_k,
          .experts = args.routing.experts,
          .gemm = {{args.w13.n, args.w13.k}, {args.w2.n, args.w2.k}},
          .wide_gate = has_wide_tiles(args.w13, &args.gate),
          .batch_invariant = args.batch_invariant};
}

ExpertMlpArgs wgmma_args(const MoeArgs& args, const Plan& plan) {
  return {
      .dtype = args.dtype,
      .x = args.hidden_states,
      .rows = args.routing.tokens,
      .slots = plan.slots,
      .w13 = args.w13,
      .w2 = args.w2,
      .order = plan.order,
      .offsets = plan.offsets,
      .slot_scale = args.apply_router_weight_on_input ? args.topk_weights : nullptr,
      .gate = args.gate,
      .out = plan.expert_out,
      .x_is_older = true,
      // Written by combine, after everything else. Tokens cannot be permuted where they lie.
      .x_image = args.out == args.hidden_states ? nullptr : args.out,
      .sorting = plan.choice.wgmma.sorting,
      .routing = args.routing,
  };
}

Plan plan_of(const MoeArgs& args, const Context& context) {
  Plan plan{};
  Workspace workspace(context.workspace);
  plan.slots = args.routing.tokens * args.routing.top_k;
  plan.choice = select(problem_of(args), device(), static_cast<Isa>(context.level));
  plan.aligned_x = take_copy(workspace, args.hidden_states, args.routing.tokens * args.w13.k);
  if (plan.choice.kernel == Kernel::few_slots_mlp) {
    plan.expert_out = workspace.take<float>(plan.slots * args.w2.n);
    plan.hidden = workspace.take<uint16_t>(plan.slots * args.w2.k);
    plan.bytes = workspace.bytes();
    return plan;
  }
  plan.expert_out = workspace.take<uint16_t>(plan.slots * args.w2.n);
  const bool streams = plan.choice.kernel == Kernel::stream_gemm;
  if (streams) {
    const bool splits = plan.choice.stream.tiles == StreamTiles::split;
    plan.hidden = workspace.take<uint16_t>(plan.slots * args.w2.k * (splits ? 2 : 1));
    if (splits) plan.split_x = workspace.take<uint16_t>(args.routing.tokens * args.w13.k * 2);
  }
  if (!(streams ? plan.choice.stream.sorting : plan.choice.wgmma.sorting)) {
    plan.order = workspace.take<int32_t>(plan.slots);
    plan.offsets = workspace.take<int32_t>(args.routing.experts + 1);
    plan.sort = workspace.take<void>(static_cast<int64_t>(sort_workspace(args.routing)));
  }
  if (!streams) {
    plan.wgmma = workspace.take<void>(static_cast<int64_t>(wgmma_expert_mlp_workspace(wgmma_args(args, plan))));
  } else if (!plan.choice.stream.sorting) {
    const int width = tile_width(plan.choice.stream.tiles);
    plan.tile_table = static_cast<int4*>(
        workspace.take<void>(static_cast<int64_t>(tile_table_bytes(plan.slots, args.routing.experts, width))));
  }
  plan.bytes = workspace.bytes();
  return plan;
}

void run_few_slots(const MoeArgs& args, const Plan& plan, void* stream) {
  FewSlotsParams p{};
  const int64_t top_k = std::max<int64_t>(1, args.routing.top_k);
  p.gemm[0] = few_slots_gemm(args.w13, args.hidden_states, args.routing.tokens, top_k);
  p.gemm[1] = few_slots_gemm(args.w2, plan.hidden, plan.slots, 1);
  p.routing = args.routing;
  (args.apply_router_weight_on_input ? p.slot_scale : p.topk_weights) = args.topk_weights;
  p.gate = args.gate;
  p.hidden = plan.hidden;
  p.expert_out = static_cast<float*>(plan.expert_out);
  p.out = args.out;
  p.extended = is_extended(args);
  p.gated = args.w13.gated;
  p.bias[0] = args.w13.bias;
  p.bias[1] = args.w2.bias;
  few_slots_mlp(plan.choice.isa, args.dtype, plan.choice.few_slots, p, stream);
}

void sort(const MoeArgs& args, const Plan& plan, void* stream) {
  const int width = plan.tile_table != nullptr ? tile_width(plan.choice.stream.tiles) : 0;
  sort_slots(args.routing, plan.order, plan.offsets, plan.tile_table, width, plan.sort, stream);
}

void run_stream(const MoeArgs& args, const Plan& plan, void* stream) {
  const StreamPlan& sizes = plan.choice.stream;
  StreamGemmParams gate_up = stream_gemm_params(args.w13, sizes.k_ways[0]);
  gate_up.x = args.hidden_states;
  if (plan.split_x != nullptr) {
    stream_split_rows(args.hidden_states, args.routing.tokens, args.w13.k, plan.split_x, stream);
    gate_up.x = plan.split_x;
    gate_up.plan_is_older = true;
  }
  gate_up.slots_per_row = static_cast<int>(args.routing.top_k);
  gate_up.tile_table = plan.tile_table;
  gate_up.order = plan.order;
  gate_up.sorting = sizes.sorting;
  gate_up.routing = args.routing;
  gate_up.slot_scale = args.apply_router_weight_on_input ? args.topk_weights : nullptr;
  gate_up.has_gate = true;
  gate_up.gate = args.gate;
  gate_up.out = plan.hidden;
  stream_gemm(plan.choice.isa, args.dtype, sizes.tiles, gate_up, stream);

  StreamGemmParams down = stream_gemm_params(args.w2, sizes.k_ways[1]);
  down.x = plan.hidden;
  down.tile_table = plan.tile_table;
  down.order = plan.order;
  down.sorting = sizes.sorting;
  down.routing = args.routing;
  down.plan_is_older = true;
  down.out = plan.expert_out;
  stream_gemm(plan.choice.isa, args.dtype, sizes.tiles, down, stream);
}

void sum(const MoeArgs& args, const Plan& plan, const Context& context) {
  const CombineArgs combined{
      .dtype = args.dtype,
      .x = plan.expert_out,
      .topk_weights = args.apply_router_weight_on_input ? nullptr : args.topk_weights,
      .routing = args.routing,
      .n = args.w2.n,
      .out = args.out,
  };
  combine(combined, /*routing_is_older=*/true, context);
}

}  // namespace

size_t moe_workspace(const MoeArgs& args, const Context& context) { return plan_of(args, context).bytes; }

void moe(const MoeArgs& original, const Context& context) {
  if (original.routing.tokens == 0) return;
  const Plan plan = plan_of(original, context);
  MoeArgs args = original;
  args.hidden_states =
      aligned_rows(args.hidden_states, plan.aligned_x, args.routing.tokens * args.w13.k, context.stream);
  switch (plan.choice.kernel) {
    case Kernel::few_slots_mlp:
      run_few_slots(args, plan, context.stream);
      break;
    case Kernel::wgmma_experts:
      if (!plan.choice.wgmma.sorting) sort(args, plan, context.stream);
      wgmma_expert_mlp(wgmma_args(args, plan), plan.choice.wgmma, plan.wgmma, context.stream);
      sum(args, plan, context);
      break;
    case Kernel::stream_gemm:
      if (!plan.choice.stream.sorting) sort(args, plan, context.stream);
      run_stream(args, plan, context.stream);
      sum(args, plan, context);
      break;
  }
}

}  // namespace nvfp4::cuda
