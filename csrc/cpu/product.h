// A matrix product of routed tokens with their experts' packed weights: what all ops that multiply share.
#pragma once

#include <algorithm>

#include "../common.h"
#include "layout.h"
#include "level_kernels.h"
#include "schedule.h"

namespace nvfp4::cpu {

constexpr int64_t kTasksPerThread = 24;  // so that the last one to end is not long waited for
constexpr int64_t kLongTasksPerThread = 4;

// Whether activations of a dtype are multiplied in fp32.
inline bool multiplies_exactly(const Context& context, DType dtype) {
  return dtype == DType::fp32 || kernels_of(context).always_exact;
}

// How many tokens of an expert are multiplied at a time.
inline int64_t most_tokens(const Context& context, DType dtype) {
  return multiplies_exactly(context, dtype) ? kMaxTileTokens : kernels_of(context).most_tokens;
}

// Some tokens of one expert: the slots order[begin .. begin + count).
struct ExpertTile {
  int64_t expert;
  int64_t begin;
  int64_t count;
};

// What a thread writes while it multiplies.
struct Scratch {
  TokenTile tile;
  const ExpertTile* gathered;  // the expert tile whose tokens are in the tile
  int32_t* rows;               // [most_tokens]
  float* sums;                 // of the level's most pairs: [most_pairs, pair_sums(most_tokens)]
};

// A matrix product of gathered rows with one expert each: the common part of all ops that multiply.
struct Product {
  DType dtype;  // of x and of the output
  const void* x;
  int64_t slots_per_row;
  Weight weight;
  const int32_t* order;
  const ExpertTile* expert_tiles;
  int64_t expert_tile_count;
  Scratch* scratch;  // of each thread
  int64_t threads;

  int64_t panels() const { return weight.n / kPanelRows; }
  int64_t pairs() const { return ceil_div<int64_t>(panels(), 2); }
};

inline int64_t most_expert_tiles(int64_t slots, int64_t experts) {
  return std::min(slots, experts) + slots / kMaxTileTokens;
}

// Splits each expert's slots into expert tiles of equal size, at most most_tokens. Returns their number.
inline int64_t cut_expert_tiles(const int32_t* offsets, int64_t experts, int64_t most_tokens,
                                ExpertTile* expert_tiles) {
  int64_t made = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t begin = offsets[expert];
    const int64_t count = offsets[expert + 1] - begin;
    const int64_t parts = ceil_div(count, most_tokens);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = begin + count * part / parts;
      expert_tiles[made++] = {expert, first, begin + count * (part + 1) / parts - first};
    }
  }
  return made;
}

// How large a call's token tiles are and how its activations lie in them: see TokenTile.
struct TileForm {
  int64_t most_tokens;
  bool exact;
  bool batch_invariant;
  int parts;
  int corrections;
};

inline TileForm form_of(const Context& context, DType dtype, bool batch_invariant) {
  const bool split = dtype == DType::fp16 && kernels_of(context).splits_fp16;
  return {most_tokens(context, dtype), multiplies_exactly(context, dtype), batch_invariant, split ? 2 : 1,
          kernels_of(context).corrections};
}

// A tile of up to k columns and `tokens` tokens.
inline TokenTile take_tile(Workspace& space, int64_t k, int64_t tokens, const TileForm& form) {
  const int64_t rows = blocks_of(k) * tokens;
  TokenTile tile{0, 0, form.exact, form.batch_invariant, form.parts, nullptr, nullptr, nullptr};
  if (form.exact) {
    tile.values = space.take<float>((rows + kTileSlack) * kBlockColumns);
    return tile;
  }
  tile.values = space.take<int16_t>((rows * form.parts + kTileSlack) * kBlockColumns);
  tile.scale = space.take<float>(rows);
  tile.corrections = space.take<int32_t>(rows * form.corrections);
  return tile;
}

// A Scratch for each thread, for expert tiles of up to `slots` slots.
inline Scratch* take_scratch(Workspace& space, const Context& context, int64_t k, int64_t slots, const TileForm& form) {
  const int64_t tokens = std::min(slots, form.most_tokens);
  auto* scratch = space.take<Scratch>(context.threads);
  for (int thread = 0; thread < context.threads; ++thread) {
    const TokenTile tile = take_tile(space, k, tokens, form);
    auto* rows = space.take<int32_t>(tokens);
    auto* sums = space.take<float>(kernels_of(context).most_pairs * pair_sums(tokens));
    if (scratch != nullptr) scratch[thread] = {tile, nullptr, rows, sums};
  }
  return scratch;
}

inline void gather_tile(const LevelKernels& kernels, const Product& product, const ExpertTile& expert_tile,
                        Scratch& scratch) {
  if (scratch.gathered == &expert_tile) return;
  for (int64_t i = 0; i < expert_tile.count; ++i) {
    scratch.rows[i] = static_cast<int32_t>(product.order[expert_tile.begin + i] / product.slots_per_row);
  }
  scratch.tile.count = expert_tile.count;
  scratch.tile.blocks = blocks_of(product.weight.k);
  kernels.gather({product.dtype, product.x, product.weight.k, scratch.rows}, &scratch.tile);
  scratch.gathered = &expert_tile;
}

// How many panels pair `pair` has: the last one may have no second panel.
inline int64_t panels_of_pair(const Weight& weight, int64_t pair) {
  return std::min<int64_t>(2, weight.n / kPanelRows - 2 * pair);
}

// Multiplies panel pairs first .. last with a tile, as many at a time as the level takes, and calls body(pair, sums)
// for each.
template <class Body>
inline void multiply_pairs(const LevelKernels& kernels, const Weight& weight, int64_t expert, int64_t first,
                           int64_t last, const TokenTile& tile, float* sums, const Body& body) {
  const uint8_t* packed = weight.packed + expert * weight.expert_bytes;
  for (int64_t begin = first; begin < last; begin += kernels.most_pairs) {
    const int64_t end = std::min(begin + kernels.most_pairs, last);
    const int64_t panels = 2 * (end - 1 - begin) + panels_of_pair(weight, end - 1);
    kernels.multiply(packed + 2 * begin * panel_bytes(weight.k), panels, tile, sums);
    for (int64_t pair = begin; pair < end; ++pair) body(pair, sums + (pair - begin) * pair_sums(tile.count));
  }
}

// Multiplies one pair. Returns how many panels it has.
inline int64_t multiply_pair(const LevelKernels& kernels, const Weight& weight, int64_t expert, int64_t pair,
                             const TokenTile& tile, float* sums) {
  const int64_t panels = panels_of_pair(weight, pair);
  kernels.multiply(weight.packed + expert * weight.expert_bytes + 2 * pair * panel_bytes(weight.k), panels, tile, sums);
  return panels;
}

// The global scale of a panel: up panels of a gated weight are the odd ones.
inline float panel_scale(const Weight& weight, int64_t expert, int64_t panel) {
  return weight.gated ? weight.global_scale[2 * expert + panel % 2] : weight.global_scale[expert];
}

// Calls body(thread, expert_tile, first, last) until every expert_tile has met all of its panels, counted in `units` of
// equal size, in tasks of similar cost. A thread stays with an expert tile, whose tokens it has gathered, for as long
// as it can.
template <class Body>
inline void for_each_tile_and_units(const Product& product, int64_t units, const Body& body) {
  // Reading the weights costs about as much as multiplying them with four tokens.
  auto cost = [&](const ExpertTile& expert_tile) { return std::max<int64_t>(expert_tile.count, 4) * units; };
  int64_t total = 0;
  for (int64_t c = 0; c < product.expert_tile_count; ++c) total += cost(product.expert_tiles[c]);
  const int64_t wanted = std::max<int64_t>(total / (product.threads * kTasksPerThread), 1);
  auto tasks_of = [&](const ExpertTile& expert_tile) { return std::min(units, ceil_div(cost(expert_tile), wanted)); };
  int64_t tasks = 0;
  for (int64_t c = 0; c < product.expert_tile_count; ++c) tasks += tasks_of(product.expert_tiles[c]);
  for_each_task_in_ranges(product.threads, tasks, [&](int64_t thread, int64_t task) {
    const ExpertTile* expert_tile = product.expert_tiles;
    for (; task >= tasks_of(*expert_tile); ++expert_tile) task -= tasks_of(*expert_tile);
    const int64_t parts = tasks_of(*expert_tile);
    body(thread, *expert_tile, units * task / parts, units * (task + 1) / parts);
  });
}

// Where the bias of an expert's row is, or null.
inline const float* bias_at(const Weight& weight, int64_t expert, int64_t row) {
  return weight.bias == nullptr ? nullptr : weight.bias + expert * weight.n + row;
}

// What the activation makes of a panel pair: a gate and an up panel, or two panels of a weight without a gate.
inline int64_t columns_of_pair(const Weight& weight) { return weight.gated ? kPanelRows : 2 * kPanelRows; }

}  // namespace nvfp4::cpu
