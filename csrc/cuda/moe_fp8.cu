// moe with FP8 activations: sort, the expert MLP of wgmma_fp8, combine.
#include "../kernels.h"
#include "aligned_rows.h"
#include "kernels/combine.h"
#include "kernels/route.h"
#include "kernels/wgmma_fp8/params.h"
#include "launch.h"
#include "select.h"

namespace nvfp4::cuda {
namespace {

static_assert(kFp8MaxExperts == kWgmmaMaxExperts, "wgmma_fp8 schedules experts as wgmma_experts does");

struct Plan {
  int64_t slots;
  WgmmaPlan tiles;
  void* aligned_x;
  int32_t* order;
  int32_t* offsets;
  void* sort;
  void* expert_out;
  void* mlp;
  size_t bytes;
};

ExpertMlpArgs mlp_args(const MoeArgs& args, const Plan& plan) {
  return {.dtype = args.dtype,
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
          .x_is_older = true};
}

// Wide tiles decode the weights of more tokens once. Tall ones gain where an expert's tokens fit into one of them, or
// where most would not fit into one wide tile but into two tall ones.
WgmmaPlan plan_tiles(int64_t slots, int64_t experts) {
  constexpr int64_t kWideSlotsPerExpert = 176;
  constexpr int64_t kTallWidth = wgmma_fp8::Tall::kMaxWidth;
  const bool tall =
      slots <= kTallWidth * experts || (slots > kWideSlotsPerExpert * experts && slots <= 2 * kTallWidth * experts);
  const int width = tall ? wgmma_fp8::Tall::kMaxWidth : wgmma_fp8::Wide::kMaxWidth;
  return plan_wgmma_fp8(tall ? WgmmaTiles::tall : WgmmaTiles::wide, width, experts, device());
}

Plan plan_of(const MoeArgs& args, const Context& context) {
  Plan plan{};
  Workspace workspace(context.workspace);
  plan.slots = args.routing.tokens * args.routing.top_k;
  plan.tiles = plan_tiles(plan.slots, args.routing.experts);
  plan.aligned_x = take_copy(workspace, args.hidden_states, args.routing.tokens * args.w13.k);
  plan.order = workspace.take<int32_t>(plan.slots);
  plan.offsets = workspace.take<int32_t>(args.routing.experts + 1);
  plan.sort = workspace.take<void>(static_cast<int64_t>(sort_workspace(args.routing)));
  plan.expert_out = workspace.take<uint16_t>(plan.slots * args.w2.n);
  plan.mlp = workspace.take<void>(static_cast<int64_t>(wgmma_fp8_expert_mlp_workspace(mlp_args(args, plan))));
  plan.bytes = workspace.bytes();
  return plan;
}

}  // namespace

bool runs_fp8(const Context& context) { return static_cast<Isa>(context.level) == Isa::sm90; }

size_t moe_fp8_workspace(const MoeArgs& args, const Context& context) { return plan_of(args, context).bytes; }

void moe_fp8(const MoeArgs& original, const Context& context) {
  if (original.routing.tokens == 0) return;
  const Plan plan = plan_of(original, context);
  MoeArgs args = original;
  args.hidden_states =
      aligned_rows(args.hidden_states, plan.aligned_x, args.routing.tokens * args.w13.k, context.stream);
  sort_slots(args.routing, plan.order, plan.offsets, nullptr, 0, plan.sort, context.stream);
  wgmma_fp8_expert_mlp(mlp_args(args, plan), plan.tiles, plan.mlp, context.stream);
  const CombineArgs combined{.dtype = args.dtype,
                             .x = plan.expert_out,
                             .topk_weights = args.apply_router_weight_on_input ? nullptr : args.topk_weights,
                             .routing = args.routing,
                             .n = args.w2.n,
                             .out = args.out};
  combine(combined, /*routing_is_older=*/true, context);
}

}  // namespace nvfp4::cuda
