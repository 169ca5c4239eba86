// Derivatives with respect to activations and router weights.
//
// For a slot with token m, expert e and router weight w, from the gradient dY of the result:
//   da = dY[m] W2, dw = <da, a>, dz = w da           what flows into the activation's value a
//   [dg, du] = the activation's derivative times dz  at the forward op's own fp32 pre-activations, made again
//   dx[m] += [dg, du] W13
// Both products with the stored rows read the packed weights block by block, decoded into L1 in fp32. Everything in
// between is fp32; a sum's order depends on nothing but the call's sizes and routing.
#include <algorithm>

#include "product.h"
#include "routing.h"

namespace nvfp4::cpu {
namespace {

// What a thread has for itself beside a Scratch.
struct BackwardScratch {
  float* rows;                 // [panels, count, kPanelRows]: an expert tile's rows of the gradient, scaled
  const ExpertTile* gathered;  // the expert tile whose rows they are
  float* flow;                 // [count, kBlockColumns]: what flows into the activation's values
  float* sums;                 // [tokens, kBlockColumns]: of all slots
};

// One call: what its derivatives are made of.
struct Backward {
  Product product;  // x and w13, or the only weight
  int64_t slots;
  const Gate* gate;         // or null
  const float* slot_scale;  // multiplies products with the product's weight, or null
  const float* out_scale;   // multiplies the results of w2, or null
  const void* grad_out;     // a row per token with w2, else per slot
  const Weight* w2;         // or null
  BackwardScratch* scratch;
  float* partial;  // [units of 64 columns, slots] parts of the gradient of a slot's scale, or null
  float* flow;     // [slots, n], by expert tile [panels, count, kPanelRows]: into products of x and decoded weights

  float* flow_of(const ExpertTile& tile) const { return flow + tile.begin * product.weight.n; }
  int64_t slot(const ExpertTile& tile, int64_t i) const { return product.order[tile.begin + i]; }
};

// Rows of a gradient, one panel's 16 columns after the other, times a scale per row and the weight's global one.
template <class RowOf, class ScaleOf>
void gather_rows(const LevelKernels& kernels, DType dtype, const void* grad, const Weight& weight,
                 const ExpertTile& tile, float* rows, const RowOf& row_of, const ScaleOf& scale_of) {
  for (int64_t panel = 0; panel < weight.n / kPanelRows; ++panel) {
    const int64_t column = panel_first_row(panel, weight.n, weight.gated);
    const float global_scale = panel_scale(weight, tile.expert, panel);
    for (int64_t i = 0; i < tile.count; ++i, rows += kPanelRows) {
      std::fill_n(rows, kPanelRows, 0.0f);
      kernels.accumulate(dtype, at(grad, dtype, row_of(i) * weight.n + column), kPanelRows, scale_of(i) * global_scale,
                         rows);
    }
  }
}

// sums [count, kBlockColumns] = rows times 64 columns of the expert's weight.
void multiply_block_transposed(const LevelKernels& kernels, const Weight& weight, const ExpertTile& tile, int64_t block,
                               const float* rows, float* sums) {
  std::fill_n(sums, tile.count * kBlockColumns, 0.0f);
  kernels.multiply_transposed(weight.packed + tile.expert * weight.expert_bytes + block * kBlockBytes,
                              panel_bytes(weight.k), weight.n / kPanelRows, rows, tile.count, sums);
}

float dot(const float* a, const float* b) {
  float sum = 0.0f;
  for (int i = 0; i < kPanelRows; ++i) sum += a[i] * b[i];
  return sum;
}

// What flows into 64 values of the activation: the gradient times w2, or the gradient itself.
void flow_into_values(const LevelKernels& kernels, const Backward& b, const ExpertTile& tile, int64_t block,
                      BackwardScratch& scratch) {
  const DType dtype = b.product.dtype;
  if (b.w2 != nullptr) {
    if (scratch.gathered != &tile) {
      gather_rows(
          kernels, dtype, b.grad_out, *b.w2, tile, scratch.rows,
          [&](int64_t i) { return b.slot(tile, i) / b.product.slots_per_row; }, [](int64_t) { return 1.0f; });
      scratch.gathered = &tile;
    }
    return multiply_block_transposed(kernels, *b.w2, tile, block, scratch.rows, scratch.flow);
  }
  const int64_t features = b.product.weight.features();
  const int64_t columns = std::min<int64_t>(kBlockColumns, features - block * kBlockColumns);
  std::fill_n(scratch.flow, tile.count * kBlockColumns, 0.0f);
  for (int64_t i = 0; i < tile.count; ++i) {
    kernels.accumulate(dtype, at(b.grad_out, dtype, b.slot(tile, i) * features + block * kBlockColumns), columns, 1.0f,
                       scratch.flow + i * kBlockColumns);
  }
}

// Through the activation of one slot: 16 columns of a gate and an up panel, or of one panel. Returns the part of the
// gradient of the slot's scale.
float activation_backward(const LevelKernels& kernels, const Backward& b, const ExpertTile& tile, int64_t i,
                          int64_t panel, const float* sums, const float* flow) {
  const Weight& weight = b.product.weight;
  const int64_t slot = b.slot(tile, i);
  const float scale = b.slot_scale == nullptr ? 1.0f : b.slot_scale[slot];
  const float out_scale = b.out_scale == nullptr ? 1.0f : b.out_scale[slot];
  const float gate_scale = panel_scale(weight, tile.expert, 0);
  const float up_scale = panel_scale(weight, tile.expert, 1);
  const int64_t row = panel_first_row(panel, weight.n, weight.gated);
  const PanelTerms terms{weight.gated, scale * gate_scale, scale * up_scale, bias_at(weight, tile.expert, row),
                         weight.gated ? bias_at(weight, tile.expert, weight.n / 2 + row) : nullptr};
  PanelBackward back;
  kernels.differentiate_panel(*b.gate, terms, sums, flow, &back);
  float* to_gate = b.flow_of(tile) + (panel * tile.count + i) * kPanelRows;
  for (int r = 0; r < kPanelRows; ++r) to_gate[r] = back.gate[r] * out_scale * terms.gate_scale;
  float* to_up = to_gate + tile.count * kPanelRows;
  for (int r = 0; weight.gated && r < kPanelRows; ++r) to_up[r] = back.up[r] * out_scale * terms.up_scale;
  if (b.slot_scale == nullptr) return dot(flow, back.value);
  const float by_gate = gate_scale * dot(back.gate, sums);
  return weight.gated ? by_gate + up_scale * dot(back.up, sums + kPanelRows) : by_gate;
}

// b.flow and b.partial of a weight with an activation behind it. A task has whole blocks of 64 values of it.
void through_activation(const LevelKernels& kernels, const Backward& b) {
  const Product& product = b.product;
  const Weight& weight = product.weight;
  const int64_t pair_columns = columns_of_pair(weight);
  for_each_tile_and_units(
      product, blocks_of(weight.features()), [&](int64_t thread, const ExpertTile& tile, int64_t first, int64_t last) {
        Scratch& scratch = product.scratch[thread];
        BackwardScratch& own = b.scratch[thread];
        gather_tile(kernels, product, tile, scratch);
        for (int64_t block = first; block < last; ++block) {
          flow_into_values(kernels, b, tile, block, own);
          float* partial = b.partial == nullptr ? nullptr : b.partial + block * b.slots;
          for (int64_t i = 0; partial != nullptr && i < tile.count; ++i) partial[b.slot(tile, i)] = 0.0f;
          const int64_t columns = std::min<int64_t>(kBlockColumns, weight.features() - block * kBlockColumns);
          for (int64_t column = 0; column < columns; column += pair_columns) {
            const int64_t pair = (block * kBlockColumns + column) / pair_columns;
            const int64_t panels = multiply_pair(kernels, weight, tile.expert, pair, scratch.tile, scratch.sums);
            for (int64_t i = 0; i < tile.count; ++i) {
              const float* flow = own.flow + i * kBlockColumns + column;
              const float* sums = scratch.sums + i * 2 * kPanelRows;
              for (int64_t panel = 0; panel < (weight.gated ? 1 : panels); ++panel) {
                const float part = activation_backward(kernels, b, tile, i, 2 * pair + panel, sums + panel * kPanelRows,
                                                       flow + panel * kPanelRows);
                if (partial != nullptr) partial[b.slot(tile, i)] += part;
              }
            }
          }
        }
      });
}

// b.flow of a weight with nothing behind it.
void through_nothing(const LevelKernels& kernels, const Backward& b) {
  for_each_task(b.product.threads, b.product.expert_tile_count, [&](int64_t, int64_t index) {
    const ExpertTile& tile = b.product.expert_tiles[index];
    auto slot_of = [&](int64_t i) { return b.slot(tile, i); };
    gather_rows(kernels, b.product.dtype, b.grad_out, b.product.weight, tile, b.flow_of(tile), slot_of,
                [&](int64_t i) { return b.slot_scale == nullptr ? 1.0f : b.slot_scale[slot_of(i)]; });
  });
}

// b.partial of a weight with nothing behind it, in units of 64 rows: the gradient times what is to be scaled.
void scale_partials(const LevelKernels& kernels, const Backward& b) {
  const Product& product = b.product;
  const Weight& weight = product.weight;
  for_each_tile_and_units(
      product, blocks_of(weight.n), [&](int64_t thread, const ExpertTile& tile, int64_t first, int64_t last) {
        Scratch& scratch = product.scratch[thread];
        gather_tile(kernels, product, tile, scratch);
        for (int64_t unit = first; unit < last; ++unit) {
          float* partial = b.partial + unit * b.slots;
          for (int64_t i = 0; i < tile.count; ++i) partial[b.slot(tile, i)] = 0.0f;
          for (int64_t pair = 2 * unit; pair < std::min(2 * unit + 2, product.pairs()); ++pair) {
            const int64_t panels = multiply_pair(kernels, weight, tile.expert, pair, scratch.tile, scratch.sums);
            for (int64_t i = 0; i < tile.count; ++i) {
              for (int64_t panel = 2 * pair; panel < 2 * pair + panels; ++panel) {
                const int64_t slot = b.slot(tile, i);
                const int64_t row = panel_first_row(panel, weight.n, weight.gated);
                float flow[kPanelRows] = {};
                kernels.accumulate(product.dtype, at(b.grad_out, product.dtype, slot * weight.n + row), kPanelRows,
                                   panel_scale(weight, tile.expert, panel), flow);
                partial[slot] += dot(flow, scratch.sums + (2 * i + panel % 2) * kPanelRows);
              }
            }
          }
        }
      });
}

// <grad_out of the slot's token, the expert's bias of w2>
float bias_part(const LevelKernels& kernels, const Backward& b, int64_t expert, int64_t slot) {
  const Weight& w2 = *b.w2;
  const DType dtype = b.product.dtype;
  float sum = 0.0f;
  for (int64_t column = 0; column < w2.n; column += kPanelRows) {
    float flow[kPanelRows] = {};
    kernels.accumulate(dtype, at(b.grad_out, dtype, slot / b.product.slots_per_row * w2.n + column), kPanelRows, 1.0f,
                       flow);
    sum += dot(flow, bias_at(w2, expert, column));
  }
  return sum;
}

void sum_partials(const LevelKernels& kernels, const Backward& b, int64_t units, float* grad) {
  std::fill_n(grad, b.slots, 0.0f);
  // The bias is scaled with the output, and not with the input.
  const bool biased = b.w2 != nullptr && b.w2->bias != nullptr && b.slot_scale == nullptr;
  for_each_task(b.product.threads, b.product.expert_tile_count, [&](int64_t, int64_t index) {
    const ExpertTile& tile = b.product.expert_tiles[index];
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t slot = b.slot(tile, i);
      float sum = biased ? bias_part(kernels, b, tile.expert, slot) : 0.0f;
      for (int64_t unit = 0; unit < units; ++unit) sum += b.partial[unit * b.slots + slot];
      grad[slot] = sum;
    }
  });
}

// grad_x[row] = the sum over the row's slots of b.flow times the weight. A task has all slots of 64 columns.
void multiply_flow(const LevelKernels& kernels, const Backward& b, int64_t rows, void* grad_x) {
  const Product& product = b.product;
  const Weight& weight = product.weight;
  for_each_task(product.threads, blocks_of(weight.k), [&](int64_t thread, int64_t block) {
    BackwardScratch& own = b.scratch[thread];
    std::fill_n(own.sums, rows * kBlockColumns, 0.0f);
    for (int64_t c = 0; c < product.expert_tile_count; ++c) {
      const ExpertTile& tile = product.expert_tiles[c];
      multiply_block_transposed(kernels, weight, tile, block, b.flow_of(tile), own.flow);
      for (int64_t i = 0; i < tile.count; ++i) {
        kernels.accumulate(DType::fp32, own.flow + i * kBlockColumns, kBlockColumns, 1.0f,
                           own.sums + b.slot(tile, i) / product.slots_per_row * kBlockColumns);
      }
    }
    const int64_t columns = std::min<int64_t>(kBlockColumns, weight.k - block * kBlockColumns);
    for (int64_t row = 0; row < rows; ++row) {
      kernels.store(own.sums + row * kBlockColumns, columns, 1.0f, nullptr, product.dtype,
                    at(grad_x, product.dtype, row * weight.k + block * kBlockColumns));
    }
  });
}

// ---- workspaces

// How many parts the gradient of a slot's scale is summed from.
int64_t partial_units(const Weight& weight, const Gate* gate) {
  return blocks_of(gate == nullptr ? weight.n : weight.features());
}

BackwardScratch* take_backward_scratch(Workspace& space, const Context& context, DType dtype, int64_t slots,
                                       int64_t rows, int64_t grad_columns) {
  const int64_t tokens = std::min(slots, most_tokens(context, dtype));
  auto* scratch = space.take<BackwardScratch>(context.threads);
  for (int thread = 0; thread < context.threads; ++thread) {
    auto* gathered = space.take<float>(tokens * grad_columns);
    auto* flow = space.take<float>(tokens * kBlockColumns);
    auto* sums = space.take<float>(rows * kBlockColumns);
    if (scratch != nullptr) scratch[thread] = {gathered, nullptr, flow, sums};
  }
  return scratch;
}

struct BackwardWorkspace {
  int32_t* expert_of;
  uint8_t* seen;
  int32_t* order;
  int32_t* offsets;
  ExpertTile* expert_tiles;
  Scratch* scratch;
  BackwardScratch* own;
  float* partial;
  float* flow;
};

struct BackwardSize {
  DType dtype;
  int64_t slots;
  int64_t rows;
  bool batch_invariant;
  bool scales;  // whether the gradient of the scales is wanted
};

BackwardWorkspace lay_out(Workspace& space, const Context& context, const Weight& weight, const Gate* gate,
                          int64_t grad_columns, const BackwardSize& size) {
  return {space.take<int32_t>(size.slots),
          space.take<uint8_t>(size.slots),
          space.take<int32_t>(size.slots),
          space.take<int32_t>(weight.experts + 1),
          space.take<ExpertTile>(most_expert_tiles(size.slots, weight.experts)),
          take_scratch(space, context, weight.k, size.slots, form_of(context, size.dtype, size.batch_invariant)),
          take_backward_scratch(space, context, size.dtype, size.slots, size.rows, grad_columns),
          size.scales ? space.take<float>(partial_units(weight, gate) * size.slots) : nullptr,
          space.take<float>(size.slots * weight.n)};
}

BackwardWorkspace lay_out(Workspace& space, const MoeBackwardArgs& args, const Context& context) {
  const MoeArgs& forward = args.forward;
  const int64_t tokens = forward.routing.tokens;
  return lay_out(space, context, forward.w13, &forward.gate, forward.w2.n,
                 {forward.dtype, tokens * forward.routing.top_k, tokens, forward.batch_invariant,
                  args.grad_topk_weights != nullptr});
}

BackwardWorkspace lay_out(Workspace& space, const GroupedGemmBackwardArgs& args, const Context& context) {
  const GroupedGemmArgs& forward = args.forward;
  return lay_out(
      space, context, forward.weight, forward.gate, 0,
      {forward.dtype, forward.slots, forward.rows, forward.batch_invariant, args.grad_slot_scale != nullptr});
}

BackwardWorkspace lay_out(Workspace& space, const LinearBackwardArgs& args, const Context& context) {
  return lay_out(space, context, args.weight, nullptr, 0, {args.dtype, args.rows, args.rows, false, false});
}

template <class Args>
size_t workspace_bytes(const Args& args, const Context& context) {
  Workspace space(nullptr);
  lay_out(space, args, context);
  return space.bytes();
}

}  // namespace

void moe_backward(const MoeBackwardArgs& args, const Context& context) {
  const MoeArgs& forward = args.forward;
  const Routing& routing = forward.routing;
  const int64_t slots = routing.tokens * routing.top_k;
  const LevelKernels& kernels = kernels_of(context);
  Workspace workspace(context.workspace);
  const BackwardWorkspace space = lay_out(workspace, args, context);
  sort_slots(routing, space.expert_of, space.order, space.offsets);
  const int64_t expert_tiles =
      cut_expert_tiles(space.offsets, routing.experts, most_tokens(context, forward.dtype), space.expert_tiles);
  const bool on_input = forward.apply_router_weight_on_input;
  const Backward b{{forward.dtype, forward.hidden_states, std::max<int64_t>(routing.top_k, 1), forward.w13, space.order,
                    space.expert_tiles, expert_tiles, space.scratch, context.threads},
                   slots,
                   &forward.gate,
                   on_input ? forward.topk_weights : nullptr,
                   on_input ? nullptr : forward.topk_weights,
                   args.grad_out,
                   &forward.w2,
                   space.own,
                   space.partial,
                   space.flow};
  through_activation(kernels, b);
  if (args.grad_topk_weights != nullptr) {
    sum_partials(kernels, b, partial_units(forward.w13, &forward.gate), args.grad_topk_weights);
  }
  if (args.grad_hidden_states != nullptr) multiply_flow(kernels, b, routing.tokens, args.grad_hidden_states);
}

void grouped_gemm_backward(const GroupedGemmBackwardArgs& args, const Context& context) {
  const GroupedGemmArgs& forward = args.forward;
  const LevelKernels& kernels = kernels_of(context);
  Workspace workspace(context.workspace);
  const BackwardWorkspace space = lay_out(workspace, args, context);
  copy_routing(forward.gate == nullptr ? "grouped_gemm_backward" : "grouped_gemm_swiglu_backward", forward, space.seen,
               space.order, space.offsets);
  if (forward.slots == 0) {
    if (args.grad_x != nullptr)
      std::fill_n(static_cast<char*>(args.grad_x), forward.rows * forward.weight.k * bytes_of(forward.dtype), char{0});
    return;
  }
  const int64_t expert_tiles =
      cut_expert_tiles(space.offsets, forward.weight.experts, most_tokens(context, forward.dtype), space.expert_tiles);
  const Backward b{{forward.dtype, forward.x, forward.slots / forward.rows, forward.weight, space.order,
                    space.expert_tiles, expert_tiles, space.scratch, context.threads},
                   forward.slots,
                   forward.gate,
                   forward.slot_scale,
                   nullptr,
                   args.grad_out,
                   nullptr,
                   space.own,
                   space.partial,
                   space.flow};
  if (forward.gate != nullptr) {
    through_activation(kernels, b);
  } else {
    if (args.grad_x != nullptr) through_nothing(kernels, b);
    if (args.grad_slot_scale != nullptr) scale_partials(kernels, b);
  }
  if (args.grad_slot_scale != nullptr) {
    sum_partials(kernels, b, partial_units(forward.weight, forward.gate), args.grad_slot_scale);
  }
  if (args.grad_x != nullptr) multiply_flow(kernels, b, forward.rows, args.grad_x);
}

void linear_backward(const LinearBackwardArgs& args, const Context& context) {
  const LevelKernels& kernels = kernels_of(context);
  Workspace workspace(context.workspace);
  const BackwardWorkspace space = lay_out(workspace, args, context);
  for (int64_t row = 0; row < args.rows; ++row) space.order[row] = static_cast<int32_t>(row);
  const int32_t offsets[] = {0, static_cast<int32_t>(args.rows)};
  const int64_t expert_tiles = cut_expert_tiles(offsets, 1, most_tokens(context, args.dtype), space.expert_tiles);
  const Backward b{{args.dtype, nullptr, 1, args.weight, space.order, space.expert_tiles, expert_tiles, space.scratch,
                    context.threads},
                   args.rows,
                   nullptr,
                   nullptr,
                   nullptr,
                   args.grad_out,
                   nullptr,
                   space.own,
                   nullptr,
                   space.flow};
  through_nothing(kernels, b);
  multiply_flow(kernels, b, args.rows, args.grad_x);
}

size_t moe_backward_workspace(const MoeBackwardArgs& args, const Context& context) {
  return workspace_bytes(args, context);
}
size_t grouped_gemm_backward_workspace(const GroupedGemmBackwardArgs& args, const Context& context) {
  return workspace_bytes(args, context);
}
size_t linear_backward_workspace(const LinearBackwardArgs& args, const Context& context) {
  return workspace_bytes(args, context);
}

}  // namespace nvfp4::cpu
