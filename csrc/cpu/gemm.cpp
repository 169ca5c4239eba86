// grouped_gemm, linear, moe and batched_moe: which thread multiplies which tokens with which panels.
#include <algorithm>
#include <numeric>

#include "product.h"
#include "routing.h"

namespace nvfp4::cpu {
namespace {

// Activates token i's sums of a panel pair; 16 results from `column` of the pair's columns on go to
// row_of(i) + column.
template <class Store>
void activate_pair(const LevelKernels& kernels, const Weight& weight, const Gate& gate, int64_t expert, int64_t pair,
                   int64_t panels, float slot_scale, const float* sums, DType out_dtype, const Store& store_at) {
  const float scale = slot_scale * panel_scale(weight, expert, 0);
  if (weight.gated) {
    const int64_t row = pair * kPanelRows;
    const PanelTerms terms{true, scale, slot_scale * panel_scale(weight, expert, 1), bias_at(weight, expert, row),
                           bias_at(weight, expert, weight.n / 2 + row)};
    return kernels.activate_panel(gate, terms, sums, out_dtype, store_at(0));
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    const PanelTerms terms{false, scale, 0.0f, bias_at(weight, expert, (2 * pair + panel) * kPanelRows), nullptr};
    kernels.activate_panel(gate, terms, sums + panel * kPanelRows, out_dtype, store_at(panel * kPanelRows));
  }
}

// Activates a panel pair's sums of all tokens of an expert tile; column c of the pair's columns of token i goes to
// place_of(i, c), where 16 consecutive ones have room.
template <class PlaceOf>
void activate_tokens(const LevelKernels& kernels, const Product& product, const Gate& gate, const float* slot_scale,
                     const ExpertTile& expert_tile, int64_t pair, const float* tile_sums, DType out_dtype,
                     const PlaceOf& place_of) {
  const Weight& weight = product.weight;
  const int64_t panels = panels_of_pair(weight, pair);
  const float gate_scale = panel_scale(weight, expert_tile.expert, 0);
  const float up_scale = panel_scale(weight, expert_tile.expert, 1);
  for (int64_t i = 0; i < expert_tile.count; ++i) {
    const float scale = slot_scale == nullptr ? 1.0f : slot_scale[product.order[expert_tile.begin + i]];
    const float* sums = tile_sums + i * 2 * kPanelRows;
    if (weight.gated && weight.bias == nullptr) {
      kernels.gate_panel(gate, sums, scale * gate_scale, scale * up_scale, out_dtype, place_of(i, 0));
    } else {
      activate_pair(kernels, weight, gate, expert_tile.expert, pair, panels, scale, sums, out_dtype,
                    [&](int64_t column) { return place_of(i, column); });
    }
  }
}

// out[slot] = gate(x W^T).
void multiply_gated(const LevelKernels& kernels, const Product& product, const Gate& gate, const float* slot_scale,
                    void* out) {
  const int64_t width = product.weight.features();
  const int64_t pair_columns = columns_of_pair(product.weight);
  for_each_tile_and_units(
      product, product.pairs(), [&](int64_t thread, const ExpertTile& expert_tile, int64_t first, int64_t last) {
        Scratch& scratch = product.scratch[thread];
        gather_tile(kernels, product, expert_tile, scratch);
        multiply_pairs(kernels, product.weight, expert_tile.expert, first, last, scratch.tile, scratch.sums,
                       [&](int64_t pair, const float* sums) {
                         activate_tokens(kernels, product, gate, slot_scale, expert_tile, pair, sums, product.dtype,
                                         [&](int64_t i, int64_t column) {
                                           const int64_t slot = product.order[expert_tile.begin + i];
                                           return at(out, product.dtype, slot * width + pair * pair_columns + column);
                                         });
                       });
      });
}

// Scales a panel's sums and adds the expert's bias, which is fp32, before the one rounding.
void store_with_bias(const LevelKernels& kernels, const float* sums, float scale, const float* bias, DType dtype,
                     void* out) {
  float values[kPanelRows];
  std::copy_n(bias, kPanelRows, values);
  kernels.accumulate(DType::fp32, sums, kPanelRows, scale, values);
  kernels.store(values, kPanelRows, 1.0f, nullptr, dtype, out);
}

// out[slot] = x W^T + bias, x what tile_of(expert_tile, scratch) gives; beside the weight's own fp32 bias of each
// expert `bias`, in the dtype of x, is that of a dense layer.
template <class TileOf>
void multiply_plain(const LevelKernels& kernels, const Product& product, const float* slot_scale, const void* bias,
                    void* out, const TileOf& tile_of) {
  const Weight& weight = product.weight;
  for_each_tile_and_units(
      product, product.pairs(), [&](int64_t thread, const ExpertTile& expert_tile, int64_t first, int64_t last) {
        Scratch& scratch = product.scratch[thread];
        const TokenTile tile = tile_of(expert_tile, scratch);
        multiply_pairs(kernels, weight, expert_tile.expert, first, last, tile, scratch.sums,
                       [&](int64_t pair, const float* tile_sums) {
                         const int64_t count = panels_of_pair(weight, pair);
                         for (int64_t panel = 2 * pair; panel < 2 * pair + count; ++panel) {
                           const int64_t row = panel_first_row(panel, weight.n, weight.gated);
                           const void* row_bias =
                               bias == nullptr ? nullptr : at(const_cast<void*>(bias), product.dtype, row);
                           const float* expert_bias = bias_at(weight, expert_tile.expert, row);
                           for (int64_t i = 0; i < expert_tile.count; ++i) {
                             const int64_t slot = product.order[expert_tile.begin + i];
                             const float scale = (slot_scale == nullptr ? 1.0f : slot_scale[slot]) *
                                                 panel_scale(weight, expert_tile.expert, panel);
                             const float* sums = tile_sums + (i * 2 + panel % 2) * kPanelRows;
                             char* to = at(out, product.dtype, slot * weight.n + row);
                             if (expert_bias == nullptr) {
                               kernels.store(sums, kPanelRows, scale, row_bias, product.dtype, to);
                             } else {
                               store_with_bias(kernels, sums, scale, expert_bias, product.dtype, to);
                             }
                           }
                         }
                       });
      });
}

// The same with the product's own x.
void multiply_plain(const LevelKernels& kernels, const Product& product, const float* slot_scale, const void* bias,
                    void* out) {
  multiply_plain(kernels, product, slot_scale, bias, out,
                 [&](const ExpertTile& expert_tile, Scratch& scratch) -> const TokenTile& {
                   gather_tile(kernels, product, expert_tile, scratch);
                   return scratch.tile;
                 });
}

// The activated intermediate of all slots, expert tile after expert tile in the form in which the next product reads
// it.
struct HiddenTiles {
  TokenTile all;  // as if all slots were one tile
  int64_t k;
  int corrections;  // of the level

  TokenTile of(const ExpertTile& expert_tile) const {
    const int64_t first = expert_tile.begin * blocks_of(k);
    TokenTile tile = all;
    tile.count = expert_tile.count;
    tile.blocks = blocks_of(k);
    if (all.exact) {
      tile.values = static_cast<float*>(all.values) + first * kBlockColumns;
    } else {
      tile.values = static_cast<int16_t*>(all.values) + first * all.parts * kBlockColumns;
      tile.scale = all.scale + first;
      tile.corrections = all.corrections + first * corrections;
    }
    return tile;
  }
};

// hidden = gate(x W^T). A task makes whole blocks of the hidden tiles: four panel pairs with a gate are 64 columns, or
// two without.
void multiply_hidden(const LevelKernels& kernels, const Product& product, const Gate& gate, const float* slot_scale,
                     float* const* block_values, const HiddenTiles& hidden) {
  const int64_t pair_columns = columns_of_pair(product.weight);
  const int64_t block_pairs = kBlockColumns / pair_columns;
  for_each_tile_and_units(
      product, blocks_of(hidden.k), [&](int64_t thread, const ExpertTile& expert_tile, int64_t first, int64_t last) {
        Scratch& scratch = product.scratch[thread];
        float* values = block_values[thread];
        TokenTile tile = hidden.of(expert_tile);
        gather_tile(kernels, product, expert_tile, scratch);
        // Stores pair `pair`'s part of a block, and the block when that was its last part.
        auto activate = [&](int64_t pair, const float* sums) {
          const int64_t block = pair / block_pairs;
          const int64_t column = pair % block_pairs * pair_columns;
          activate_tokens(kernels, product, gate, slot_scale, expert_tile, pair, sums, DType::fp32,
                          [&](int64_t i, int64_t more) { return values + i * kBlockColumns + column + more; });
          if (pair % block_pairs != block_pairs - 1 && pair != product.pairs() - 1) return;
          const int64_t made = std::min<int64_t>(hidden.k - block * kBlockColumns, kBlockColumns);
          for (int64_t i = 0; made < kBlockColumns && i < expert_tile.count; ++i) {
            std::fill(values + i * kBlockColumns + made, values + (i + 1) * kBlockColumns, 0.0f);
          }
          kernels.fill_block(values, block, &tile);
        };
        const int64_t end = std::min(last * block_pairs, product.pairs());
        multiply_pairs(kernels, product.weight, expert_tile.expert, first * block_pairs, end, scratch.tile,
                       scratch.sums, activate);
      });
}

// How many panel pairs a task of multiply_combine sums up at once, limited by the memory of its sums. A level that
// multiplies several pairs at a time gets longer tasks.
int64_t combined_pairs(const Context& context, int64_t tokens, int64_t n) {
  const int64_t pairs = ceil_div<int64_t>(n / kPanelRows, 2);
  const bool long_tasks = kernels_of(context).most_pairs > 1 && tokens > 32;
  const int64_t tasks = long_tasks ? kLongTasksPerThread : kTasksPerThread;
  const int64_t wanted = ceil_div(pairs, context.threads * tasks);
  return std::clamp<int64_t>(int64_t{8192} / std::max<int64_t>(tokens, 1), 1, wanted);
}

// out[token] = sum over its slots of slot_weights[slot] * (hidden[slot] W^T + bias). A task has all slots of some
// output rows, so that no two threads write one value.
void multiply_combine(const LevelKernels& kernels, const Product& product, const HiddenTiles& hidden,
                      const float* slot_weights, int64_t tokens, int64_t pairs_per_task, float* const* task_sums,
                      void* out) {
  const Weight& weight = product.weight;
  constexpr int64_t kPairRows = 2 * kPanelRows;
  for_each_task(product.threads, ceil_div(product.pairs(), pairs_per_task), [&](int64_t thread, int64_t task) {
    Scratch& scratch = product.scratch[thread];
    float* sums = task_sums[thread];  // [pairs of the task, tokens, kPairRows]
    const int64_t first = task * pairs_per_task;
    const int64_t last = std::min(first + pairs_per_task, product.pairs());
    std::fill_n(sums, (last - first) * tokens * kPairRows, 0.0f);
    for (int64_t c = 0; c < product.expert_tile_count; ++c) {
      const ExpertTile& expert_tile = product.expert_tiles[c];
      const TokenTile tile = hidden.of(expert_tile);
      multiply_pairs(kernels, weight, expert_tile.expert, first, last, tile, scratch.sums,
                     [&](int64_t pair, const float* tile_sums) {
                       for (int64_t i = 0; i < expert_tile.count; ++i) {
                         const int64_t slot = product.order[expert_tile.begin + i];
                         const float scale = slot_weights == nullptr ? 1.0f : slot_weights[slot];
                         float* to = sums + ((pair - first) * tokens + slot / product.slots_per_row) * kPairRows;
                         kernels.accumulate(DType::fp32, tile_sums + i * kPairRows, kPairRows,
                                            scale * weight.global_scale[expert_tile.expert], to);
                         if (weight.bias == nullptr) continue;
                         kernels.accumulate(DType::fp32, bias_at(weight, expert_tile.expert, pair * kPairRows),
                                            std::min(kPairRows, weight.n - pair * kPairRows), scale, to);
                       }
                     });
    }
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t pair = first; pair < last; ++pair) {
        kernels.store(sums + ((pair - first) * tokens + token) * kPairRows,
                      std::min(kPairRows, weight.n - pair * kPairRows), 1.0f, nullptr, product.dtype,
                      at(out, product.dtype, token * weight.n + pair * kPairRows));
      }
    }
  });
}

struct GroupedGemmWorkspace {
  uint8_t* seen;
  int32_t* order;
  int32_t* offsets;
  ExpertTile* expert_tiles;
  Scratch* scratch;
};

GroupedGemmWorkspace lay_out(Workspace& space, const GroupedGemmArgs& args, const Context& context) {
  return {space.take<uint8_t>(args.slots), space.take<int32_t>(args.slots),
          space.take<int32_t>(args.weight.experts + 1),
          space.take<ExpertTile>(most_expert_tiles(args.slots, args.weight.experts)),
          take_scratch(space, context, args.weight.k, args.slots, form_of(context, args.dtype, args.batch_invariant))};
}

struct LinearWorkspace {
  int32_t* order;
  ExpertTile* expert_tiles;
  Scratch* scratch;
};

LinearWorkspace lay_out(Workspace& space, const LinearArgs& args, const Context& context) {
  return {space.take<int32_t>(args.rows), space.take<ExpertTile>(most_expert_tiles(args.rows, 1)),
          take_scratch(space, context, args.weight.k, args.rows, form_of(context, args.dtype, args.batch_invariant))};
}

struct MoeWorkspace {
  int32_t* expert_of;
  int32_t* order;
  int32_t* offsets;
  ExpertTile* expert_tiles;
  Scratch* scratch;
  HiddenTiles hidden;
  float** block_values;  // of each thread: [kMaxTileTokens, kBlockColumns]
  float** task_sums;     // of each thread: [combined_pairs, tokens, 2 * kPanelRows]
};

// An array of `count` floats for each thread.
float** take_per_thread(Workspace& space, const Context& context, int64_t count) {
  auto** arrays = space.take<float*>(context.threads);
  for (int thread = 0; thread < context.threads; ++thread) {
    auto* array = space.take<float>(count);
    if (arrays != nullptr) arrays[thread] = array;
  }
  return arrays;
}

MoeWorkspace lay_out(Workspace& space, const MoeArgs& args, const Context& context) {
  const int64_t tokens = args.routing.tokens;
  const int64_t slots = tokens * args.routing.top_k;
  const TileForm form = form_of(context, args.dtype, args.batch_invariant);
  const int64_t sums = combined_pairs(context, tokens, args.w2.n) * tokens * 2 * kPanelRows;
  return {space.take<int32_t>(slots),
          space.take<int32_t>(slots),
          space.take<int32_t>(args.routing.experts + 1),
          space.take<ExpertTile>(most_expert_tiles(slots, args.routing.experts)),
          take_scratch(space, context, args.w13.k, slots, form),
          {take_tile(space, args.w2.k, slots, form), args.w2.k, form.corrections},
          take_per_thread(space, context, std::min(slots, most_tokens(context, args.dtype)) * kBlockColumns),
          take_per_thread(space, context, sums)};
}

struct BatchedMoeWorkspace {
  int32_t* order;    // the rows of hidden_states that hold tokens
  int32_t* offsets;  // as RouteArgs has it, of these rows
  ExpertTile* expert_tiles;
  Scratch* scratch;
  HiddenTiles hidden;
  float** block_values;  // as in MoeWorkspace
};

BatchedMoeWorkspace lay_out(Workspace& space, const BatchedMoeArgs& args, const Context& context) {
  const int64_t experts = args.w13.experts;
  const TileForm form = form_of(context, args.dtype, /*batch_invariant=*/false);
  const int64_t tokens = std::accumulate(args.expert_num_tokens, args.expert_num_tokens + experts, int64_t{0});
  return {space.take<int32_t>(tokens),
          space.take<int32_t>(experts + 1),
          space.take<ExpertTile>(most_expert_tiles(tokens, experts)),
          take_scratch(space, context, args.w13.k, tokens, form),
          {take_tile(space, args.w2.k, tokens, form), args.w2.k, form.corrections},
          take_per_thread(space, context, std::min(tokens, most_tokens(context, args.dtype)) * kBlockColumns)};
}

void clear_rest(const BatchedMoeArgs& args, int64_t threads) {
  for_each_task(threads, args.w13.experts, [&](int64_t, int64_t expert) {
    const int64_t first = expert * args.rows_per_expert;
    char* begin = at(args.out, args.dtype, (first + args.expert_num_tokens[expert]) * args.w2.n);
    std::fill(begin, at(args.out, args.dtype, (first + args.rows_per_expert) * args.w2.n), char{0});
  });
}

template <class Args>
size_t workspace_bytes(const Args& args, const Context& context) {
  Workspace space(nullptr);
  lay_out(space, args, context);
  return space.bytes();
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args, const Context& context) {
  const LevelKernels& kernels = kernels_of(context);
  Workspace workspace(context.workspace);
  const GroupedGemmWorkspace space = lay_out(workspace, args, context);
  copy_routing(args.gate == nullptr ? "grouped_gemm" : "grouped_gemm_swiglu", args, space.seen, space.order,
               space.offsets);
  if (args.slots == 0) return;
  const int64_t expert_tiles =
      cut_expert_tiles(space.offsets, args.weight.experts, most_tokens(context, args.dtype), space.expert_tiles);
  const Product product{args.dtype,         args.x,       args.slots / args.rows, args.weight,    space.order,
                        space.expert_tiles, expert_tiles, space.scratch,          context.threads};
  const int64_t width = args.gate == nullptr ? args.weight.n : args.weight.features();
  for (int64_t i = space.offsets[args.weight.experts]; i < args.slots; ++i) {
    char* row = at(args.out, args.dtype, space.order[i] * width);
    std::fill_n(row, width * bytes_of(args.dtype), char{0});
  }
  if (args.gate != nullptr) {
    multiply_gated(kernels, product, *args.gate, args.slot_scale, args.out);
  } else {
    multiply_plain(kernels, product, args.slot_scale, nullptr, args.out);
  }
}

void linear(const LinearArgs& args, const Context& context) {
  if (args.rows == 0) return;
  const LevelKernels& kernels = kernels_of(context);
  Workspace workspace(context.workspace);
  const LinearWorkspace space = lay_out(workspace, args, context);
  for (int64_t row = 0; row < args.rows; ++row) space.order[row] = static_cast<int32_t>(row);
  const int32_t offsets[] = {0, static_cast<int32_t>(args.rows)};
  const int64_t expert_tiles = cut_expert_tiles(offsets, 1, most_tokens(context, args.dtype), space.expert_tiles);
  const Product product{args.dtype,    args.x,         1, args.weight, space.order, space.expert_tiles, expert_tiles,
                        space.scratch, context.threads};
  multiply_plain(kernels, product, nullptr, args.bias, args.out);
}

void moe(const MoeArgs& args, const Context& context) {
  const Routing& routing = args.routing;
  if (routing.tokens == 0) return;
  const LevelKernels& kernels = kernels_of(context);
  Workspace workspace(context.workspace);
  const MoeWorkspace space = lay_out(workspace, args, context);
  sort_slots(routing, space.expert_of, space.order, space.offsets);
  const int64_t expert_tiles =
      cut_expert_tiles(space.offsets, routing.experts, most_tokens(context, args.dtype), space.expert_tiles);
  const float* input_weights = args.apply_router_weight_on_input ? args.topk_weights : nullptr;
  const float* output_weights = args.apply_router_weight_on_input ? nullptr : args.topk_weights;
  Product product{args.dtype,         args.hidden_states, routing.top_k, args.w13,       space.order,
                  space.expert_tiles, expert_tiles,       space.scratch, context.threads};
  multiply_hidden(kernels, product, args.gate, input_weights, space.block_values, space.hidden);
  product.weight = args.w2;
  multiply_combine(kernels, product, space.hidden, output_weights, routing.tokens,
                   combined_pairs(context, routing.tokens, args.w2.n), space.task_sums, args.out);
}

void batched_moe(const BatchedMoeArgs& args, const Context& context) {
  const LevelKernels& kernels = kernels_of(context);
  Workspace workspace(context.workspace);
  const BatchedMoeWorkspace space = lay_out(workspace, args, context);
  const int64_t experts = args.w13.experts;
  if (args.clears_rest) clear_rest(args, context.threads);
  space.offsets[0] = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int32_t begin = space.offsets[expert];
    const int32_t end = space.offsets[expert + 1] = begin + args.expert_num_tokens[expert];
    std::iota(space.order + begin, space.order + end, static_cast<int32_t>(expert * args.rows_per_expert));
  }
  const int64_t expert_tiles =
      cut_expert_tiles(space.offsets, experts, most_tokens(context, args.dtype), space.expert_tiles);
  Product product{args.dtype,    args.hidden_states, 1, args.w13, space.order, space.expert_tiles, expert_tiles,
                  space.scratch, context.threads};
  multiply_hidden(kernels, product, args.gate, nullptr, space.block_values, space.hidden);
  product.weight = args.w2;
  multiply_plain(kernels, product, nullptr, nullptr, args.out,
                 [&](const ExpertTile& expert_tile, Scratch&) { return space.hidden.of(expert_tile); });
}

size_t grouped_gemm_workspace(const GroupedGemmArgs& args, const Context& context) {
  return workspace_bytes(args, context);
}
size_t linear_workspace(const LinearArgs& args, const Context& context) { return workspace_bytes(args, context); }
size_t moe_workspace(const MoeArgs& args, const Context& context) { return workspace_bytes(args, context); }
size_t batched_moe_workspace(const BatchedMoeArgs& args, const Context& context) {
  return workspace_bytes(args, context);
}

}  // namespace nvfp4::cpu
