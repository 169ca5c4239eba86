// Derivatives with respect to activations and router weights: what a call launches, and where its intermediates lie.
//
// The flow into the first products (kernels/backward/params.h), rounded to 16 bits, is multiplied with the first weight
// into a row per slot, and these are summed per token. No weight is written in another form: its blocks are decoded
// into shared memory.
#include <algorithm>

#include "aligned_rows.h"
#include "kernels/backward/params.h"
#include "kernels/route.h"

namespace nvfp4::cuda {
namespace {

PackedWeight packed_weight(const Weight& w) {
  return {.packed = w.packed,
          .expert_bytes = w.expert_bytes,
          .global_scale = w.global_scale,
          .bias = w.bias,
          .gated = w.gated,
          .n = static_cast<int>(w.n),
          .k = static_cast<int>(w.k),
          .panels = panels_of(w.n),
          .k_blocks = k_blocks_of(w.k)};
}

// At most so many tiles, whatever the routing.
int most_tiles(int64_t slots, int64_t experts, BackwardTile tile) {
  return static_cast<int>(std::min(slots, experts) + slots / static_cast<int>(tile));
}

// Tall tiles where they are for half of the SMs; a wide tile decodes a weight for twice as many tokens as a narrow one.
BackwardTile tile_for(const Context& context, int64_t slots, int64_t experts, int64_t columns) {
  constexpr int64_t kTallColumns = 256;
  const int64_t tall = most_tiles(slots, experts, BackwardTile::tall) * ceil_div(columns, kTallColumns);
  if (static_cast<Isa>(context.level) == Isa::sm90 && 2 * tall >= device().multiprocessors) return BackwardTile::tall;
  return slots > experts * static_cast<int>(BackwardTile::narrow) ? BackwardTile::wide : BackwardTile::narrow;
}

// Room for x with its k permuted, which tall tiles take.
void* take_image(Workspace& workspace, BackwardTile tile, int64_t rows, int64_t k) {
  return tile == BackwardTile::tall ? workspace.take<uint16_t>(rows * k_blocks_of(k) * kBlockK) : nullptr;
}

void clear(void* out, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(out, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing a gradient");
}

// ---- moe

struct MoePlan {
  BackwardTile tile;
  int64_t slots;
  void* aligned_x;
  void* aligned_grad;
  float* into;    // with tall tiles: [slots, k of w2]
  void* x_image;  // with tall tiles
  int32_t* order;
  int32_t* offsets;
  void* sort;
  int4* tile_table;
  void* flow;        // [slots, n of w13]
  float* slot_rows;  // [slots, k of w13], if the gradient of hidden_states is wanted
  float* partial;    // if that of topk_weights is
  size_t bytes;
};

ActivationBackwardParams activation_params(const MoeBackwardArgs& args, const MoePlan& plan) {
  const MoeArgs& f = args.forward;
  return {
      .rows = {.tile_table = plan.tile_table,
               .order = plan.order,
               .rows = 0,
               .max_tiles = most_tiles(plan.slots, f.w13.experts, plan.tile)},
      .slots_per_row = static_cast<int>(f.routing.top_k),
      .x = f.hidden_states,
      .grad_out = args.grad_out,
      .into = plan.into,
      .x_image = plan.x_image,
      .x_rows = f.routing.tokens,
      .w13 = packed_weight(f.w13),
      .w2 = packed_weight(f.w2),
      .has_gate = true,
      .gate = f.gate,
      .slot_scale = f.apply_router_weight_on_input ? f.topk_weights : nullptr,
      .out_scale = f.apply_router_weight_on_input ? nullptr : f.topk_weights,
      .flow = plan.flow,
      .partial = plan.partial,
  };
}

MoePlan plan_of(const MoeBackwardArgs& args, const Context& context) {
  const MoeArgs& f = args.forward;
  MoePlan plan{};
  Workspace workspace(context.workspace);
  plan.slots = f.routing.tokens * f.routing.top_k;
  plan.tile = tile_for(context, plan.slots, f.w13.experts, f.w13.k);
  plan.aligned_x = take_copy(workspace, f.hidden_states, f.routing.tokens * f.w13.k);
  plan.aligned_grad = take_copy(workspace, args.grad_out, f.routing.tokens * f.w13.k);
  plan.x_image = take_image(workspace, plan.tile, f.routing.tokens, f.w13.k);
  if (plan.tile == BackwardTile::tall) plan.into = workspace.take<float>(plan.slots * f.w2.k);
  plan.order = workspace.take<int32_t>(plan.slots);
  plan.offsets = workspace.take<int32_t>(f.routing.experts + 1);
  plan.sort = workspace.take<void>(static_cast<int64_t>(sort_workspace(f.routing)));
  plan.tile_table = static_cast<int4*>(workspace.take<void>(
      static_cast<int64_t>(tile_table_bytes(plan.slots, f.routing.experts, static_cast<int>(plan.tile)))));
  plan.flow = workspace.take<uint16_t>(plan.slots * f.w13.n);
  if (args.grad_hidden_states != nullptr) plan.slot_rows = workspace.take<float>(plan.slots * f.w13.k);
  if (args.grad_topk_weights != nullptr) {
    plan.partial = workspace.take<float>(plan.slots * scale_parts(activation_params(args, plan), plan.tile));
  }
  plan.bytes = workspace.bytes();
  return plan;
}

void moe_scale_grad(const MoeBackwardArgs& args, const MoePlan& plan, const ActivationBackwardParams& activation,
                    void* stream) {
  const MoeArgs& f = args.forward;
  scale_grad(f.dtype,
             {
                 .order = plan.order,
                 .offsets = plan.offsets,
                 .checked = false,
                 .experts = static_cast<int>(f.w13.experts),
                 .slots = static_cast<int>(plan.slots),
                 .partial = plan.partial,
                 .parts = scale_parts(activation, plan.tile),
                 .grad_out = activation.grad_out,
                 // The bias is scaled with the output, and not with the input.
                 .bias = f.apply_router_weight_on_input ? nullptr : f.w2.bias,
                 .routing = f.routing,
                 .slots_per_row = static_cast<int>(f.routing.top_k),
                 .columns = static_cast<int>(f.w2.n),
                 .grad = args.grad_topk_weights,
             },
             stream);
}

// ---- grouped_gemm

struct GroupedPlan {
  BackwardTile tile;
  CheckedRouting routing;
  void* aligned_x;
  void* aligned_grad;
  void* x_image;  // with tall tiles, for the pre-activations or the products that scales multiply
  int4* tile_table;
  void* flow;        // [slots, n], unless the gradient itself is multiplied
  float* slot_rows;  // [slots, k], if several slots share a row of x
  float* partial;    // if the gradient of the scales is wanted
  size_t bytes;
};

// Whether products with the weight are made again: for an activation's derivative, or for the scales'.
bool multiplies_again(const GroupedGemmBackwardArgs& args) {
  return args.forward.gate != nullptr || args.grad_slot_scale != nullptr;
}

bool multiplies_gradient_itself(const GroupedGemmArgs& f) { return f.gate == nullptr && !f.weight.gated; }

BackwardRows rows_of(const GroupedGemmArgs& f, const GroupedPlan& plan) {
  return {.tile_table = plan.tile_table,
          .order = plan.routing.order,
          .rows = 0,
          .max_tiles = most_tiles(f.slots, f.weight.experts, plan.tile)};
}

ActivationBackwardParams activation_params(const GroupedGemmBackwardArgs& args, const GroupedPlan& plan) {
  const GroupedGemmArgs& f = args.forward;
  return {
      .rows = rows_of(f, plan),
      .slots_per_row = static_cast<int>(f.slots / f.rows),
      .x = f.x,
      .grad_out = args.grad_out,
      .into = nullptr,
      .x_image = plan.x_image,
      .x_rows = f.rows,
      .w13 = packed_weight(f.weight),
      .w2 = {},
      .has_gate = f.gate != nullptr,
      .gate = f.gate != nullptr ? *f.gate : Gate{},
      .slot_scale = f.slot_scale,
      .out_scale = nullptr,
      .flow = plan.flow,
      .partial = plan.partial,
  };
}

GroupedPlan plan_of(const GroupedGemmBackwardArgs& args, const Context& context) {
  const GroupedGemmArgs& f = args.forward;
  GroupedPlan plan{};
  Workspace workspace(context.workspace);
  plan.tile = tile_for(context, f.slots, f.weight.experts, f.weight.k);
  plan.routing = {workspace.take<int32_t>(f.slots), workspace.take<int32_t>(f.weight.experts + 2)};
  plan.aligned_x = take_copy(workspace, f.x, f.rows * f.weight.k);
  const int64_t grad_columns = f.gate == nullptr ? f.weight.n : f.weight.features();
  plan.aligned_grad = take_copy(workspace, args.grad_out, f.slots * grad_columns);
  if (multiplies_again(args)) plan.x_image = take_image(workspace, plan.tile, f.rows, f.weight.k);
  plan.tile_table = static_cast<int4*>(workspace.take<void>(
      static_cast<int64_t>(tile_table_bytes(f.slots, f.weight.experts, static_cast<int>(plan.tile)))));
  if (!multiplies_gradient_itself(f)) plan.flow = workspace.take<uint16_t>(f.slots * f.weight.n);
  if (f.slots != f.rows && args.grad_x != nullptr) plan.slot_rows = workspace.take<float>(f.slots * f.weight.k);
  if (args.grad_slot_scale != nullptr) {
    plan.partial = workspace.take<float>(f.slots * scale_parts(activation_params(args, plan), plan.tile));
  }
  plan.bytes = workspace.bytes();
  return plan;
}

void grouped_scale_grad(const GroupedGemmBackwardArgs& args, const GroupedPlan& plan, void* stream) {
  const GroupedGemmArgs& f = args.forward;
  scale_grad(f.dtype,
             {
                 .order = plan.routing.order,
                 .offsets = plan.routing.offsets,
                 .checked = true,
                 .experts = static_cast<int>(f.weight.experts),
                 .slots = static_cast<int>(f.slots),
                 .partial = plan.partial,
                 .parts = scale_parts(activation_params(args, plan), plan.tile),
                 .grad_out = args.grad_out,
                 .bias = nullptr,
                 .routing = {},
                 .slots_per_row = 1,
                 .columns = static_cast<int>(f.weight.n),
                 .grad = args.grad_slot_scale,
             },
             stream);
}

// The gradient of x from the flow, or from the gradient itself.
void grouped_grad_x(const GroupedGemmBackwardArgs& args, const GroupedPlan& plan, void* stream) {
  const GroupedGemmArgs& f = args.forward;
  const bool itself = multiplies_gradient_itself(f);
  if (!itself && !multiplies_again(args)) {
    gated_flow(
        f.dtype, plan.tile,
        {.rows = rows_of(f, plan), .grad_out = args.grad_out, .weight = packed_weight(f.weight), .flow = plan.flow},
        stream);
  }
  transposed_gemm(f.dtype, plan.tile,
                  {.rows = rows_of(f, plan),
                   .y = itself ? args.grad_out : plan.flow,
                   .slots_per_row = itself ? 1 : 0,
                   .weight = packed_weight(f.weight),
                   // With a gate the flow has it already.
                   .slot_scale = f.gate == nullptr ? f.slot_scale : nullptr,
                   .out = plan.slot_rows == nullptr ? args.grad_x : nullptr,
                   .out32 = plan.slot_rows,
                   .by_position = false},
                  stream);
  if (plan.slot_rows == nullptr) return;
  sum_rows(f.dtype,
           {.x = plan.slot_rows,
            .has_routing = false,
            .routing = {},
            .rows = f.rows,
            .slots_per_row = static_cast<int>(f.slots / f.rows),
            .columns = static_cast<int>(f.weight.k),
            .out = args.grad_x},
           stream);
}

// ---- linear

struct LinearPlan {
  BackwardTile tile;
  void* aligned_grad;
  void* flow;  // [rows, n] of a gated weight
  size_t bytes;
};

LinearPlan plan_of(const LinearBackwardArgs& args, const Context& context) {
  LinearPlan plan{};
  Workspace workspace(context.workspace);
  plan.tile = tile_for(context, args.rows, 1, args.weight.k);
  plan.aligned_grad = take_copy(workspace, args.grad_out, args.rows * args.weight.n);
  if (args.weight.gated) plan.flow = workspace.take<uint16_t>(args.rows * args.weight.n);
  plan.bytes = workspace.bytes();
  return plan;
}

}  // namespace

size_t moe_backward_workspace(const MoeBackwardArgs& args, const Context& context) {
  return plan_of(args, context).bytes;
}

void moe_backward(const MoeBackwardArgs& original, const Context& context) {
  const MoePlan plan = plan_of(original, context);
  MoeBackwardArgs args = original;
  MoeArgs& f = args.forward;
  const int64_t values = f.routing.tokens * f.w13.k;
  if (plan.slots == 0) return clear(args.grad_hidden_states, values * kElementBytes, context.stream);
  f.hidden_states = aligned_rows(f.hidden_states, plan.aligned_x, values, context.stream);
  args.grad_out = aligned_rows(args.grad_out, plan.aligned_grad, values, context.stream);
  sort_slots(f.routing, plan.order, plan.offsets, plan.tile_table, static_cast<int>(plan.tile), plan.sort,
             context.stream);
  const ActivationBackwardParams activation = activation_params(args, plan);
  if (plan.tile == BackwardTile::tall) {
    transposed_gemm(f.dtype, plan.tile,
                    {.rows = activation.rows,
                     .y = args.grad_out,
                     .slots_per_row = activation.slots_per_row,
                     .weight = activation.w2,
                     .slot_scale = nullptr,
                     .out = nullptr,
                     .out32 = plan.into,
                     .by_position = true},
                    context.stream);
  }
  activation_backward(f.dtype, plan.tile, activation, context.stream);
  if (args.grad_topk_weights != nullptr) moe_scale_grad(args, plan, activation, context.stream);
  if (args.grad_hidden_states == nullptr) return;
  transposed_gemm(f.dtype, plan.tile,
                  {.rows = activation.rows,
                   .y = plan.flow,
                   .slots_per_row = 0,
                   .weight = activation.w13,
                   .slot_scale = nullptr,
                   .out = nullptr,
                   .out32 = plan.slot_rows,
                   .by_position = false},
                  context.stream);
  sum_rows(f.dtype,
           {.x = plan.slot_rows,
            .has_routing = true,
            .routing = f.routing,
            .rows = f.routing.tokens,
            .slots_per_row = static_cast<int>(f.routing.top_k),
            .columns = static_cast<int>(f.w13.k),
            .out = args.grad_hidden_states},
           context.stream);
}

size_t grouped_gemm_backward_workspace(const GroupedGemmBackwardArgs& args, const Context& context) {
  return args.forward.slots == 0 ? 0 : plan_of(args, context).bytes;
}

void grouped_gemm_backward(const GroupedGemmBackwardArgs& original, const Context& context) {
  GroupedGemmBackwardArgs args = original;
  GroupedGemmArgs& f = args.forward;
  if (f.slots == 0) {
    if (args.grad_x != nullptr) clear(args.grad_x, f.rows * f.weight.k * kElementBytes, context.stream);
    return;
  }
  const GroupedPlan plan = plan_of(original, context);
  const int64_t grad_columns = f.gate == nullptr ? f.weight.n : f.weight.features();
  f.x = aligned_rows(f.x, plan.aligned_x, f.rows * f.weight.k, context.stream);
  args.grad_out = aligned_rows(args.grad_out, plan.aligned_grad, f.slots * grad_columns, context.stream);
  check_routing(f.order, f.offsets, f.slots, f.weight.experts, plan.routing, context.stream);
  f.order = plan.routing.order;
  f.offsets = plan.routing.offsets;
  // Rows of slots without an expert are zero, or NaN where order and offsets are no routing.
  const bool shares = plan.slot_rows != nullptr;
  void* rows = shares ? plan.slot_rows : args.grad_x;
  cut_tiles(f.order, f.offsets, f.slots, f.weight.experts, plan.tile_table, static_cast<int>(plan.tile), rows,
            rows == nullptr ? 0 : f.weight.k * (shares ? int64_t{sizeof(float)} : kElementBytes), context.stream);
  if (multiplies_again(args)) activation_backward(f.dtype, plan.tile, activation_params(args, plan), context.stream);
  if (args.grad_slot_scale != nullptr) grouped_scale_grad(args, plan, context.stream);
  if (args.grad_x != nullptr) grouped_grad_x(args, plan, context.stream);
}

size_t linear_backward_workspace(const LinearBackwardArgs& args, const Context& context) {
  return plan_of(args, context).bytes;
}

void linear_backward(const LinearBackwardArgs& args, const Context& context) {
  const LinearPlan plan = plan_of(args, context);
  const void* grad = aligned_rows(args.grad_out, plan.aligned_grad, args.rows * args.weight.n, context.stream);
  const BackwardRows rows{.tile_table = nullptr,
                          .order = nullptr,
                          .rows = static_cast<int>(args.rows),
                          .max_tiles = static_cast<int>(ceil_div<int64_t>(args.rows, static_cast<int>(plan.tile)))};
  const PackedWeight weight = packed_weight(args.weight);
  if (weight.gated) {
    gated_flow(args.dtype, plan.tile, {.rows = rows, .grad_out = grad, .weight = weight, .flow = plan.flow},
               context.stream);
  }
  transposed_gemm(args.dtype, plan.tile,
                  {.rows = rows,
                   .y = weight.gated ? plan.flow : grad,
                   .slots_per_row = 0,
                   .weight = weight,
                   .slot_scale = nullptr,
                   .out = args.grad_x,
                   .out32 = nullptr,
                   .by_position = false},
                  context.stream);
}

}  // namespace nvfp4::cuda
