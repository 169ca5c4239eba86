// The sizes that few_slots_mlp runs with, in plain C++: no GPU is needed to know them.
#pragma once

#include <algorithm>

#include "../../device/shared_layout.h"
#include "../../device_facts.h"
#include "../../problem.h"

namespace nvfp4::cuda {

constexpr int kInlineSlots = 32;  // which need no sorting: one per lane of a warp
constexpr int kFewSlotsWarps = 16;
constexpr int kFewSlotsStagesSm80 = 2;  // of a warp's ring
constexpr int kFewSlotsStagesSm90 = 4;
constexpr int kFewSlotsPartStages = 6;
constexpr int kFewSlotsBarrierBytes = 16;  // of an mbarrier, behind the rings
constexpr int kFewSlotsPartBytes = part_bytes(2);
constexpr int kFewSlotsMaxWidth = 8;    // one column tile
constexpr int kFewSlotsSplitWidth = 4;  // of fp16 tokens, which are two columns each (device/split.cuh)
// So that divisions by multiplication (Divider) are exact: 32 tiles of 8192 panels, times 8192, stay below 2^32.
constexpr int kFewSlotsMaxPanels = 8192;

constexpr int few_slots_ring_bytes(Isa isa) {
  return kFewSlotsWarps * static_cast<int>(isa == Isa::sm80 ? sizeof(CpAsyncStorage<kFewSlotsStagesSm80>)
                                                            : sizeof(BulkStorage<kFewSlotsStagesSm90>));
}
constexpr int few_slots_part_ring_bytes() {
  return kFewSlotsWarps * static_cast<int>(sizeof(BulkStorage<kFewSlotsPartStages, kFewSlotsPartBytes>));
}

// What an item has of a panel. `parts` are multiplied along all of k by one warp each, so that a row's bits do not
// depend on how many items there are: strips of 16 rows in w13, halves in w2, whose k is shorter.
enum class FewSlotsItems { panels, halves, parts };
constexpr int items_per_panel(FewSlotsItems items, int gemm_index) {
  return items == FewSlotsItems::panels ? 1 : items == FewSlotsItems::halves || gemm_index == 1 ? 2 : 4;
}

struct FewSlotsPlan {
  struct Gemm {
    int items_per_tile;
    bool all_rows;   // every row goes to shared memory; else those of a CTA's own tiles, `width` rows per tile
    int row_chunks;  // a row's chunks of kChunkBytes
    int row_bytes;   // in shared memory, from one row to the next
  };
  FewSlotsItems items;
  int width;        // tokens per tile, at most; 0: a CTA's shared memory has no room for the tokens, or too many parts
  int token_bytes;  // of shared memory
  int shared_bytes;
  Gemm gemm[2];
};

// With tiles of at most `width` tokens. Where a warp would have more than two parts of w13 or one of w2, stream_gemm,
// whose CTAs do not wait for one another, is ahead.
inline FewSlotsPlan plan_few_slots(const Problem& problem, const Device& device, Isa isa, int width,
                                   FewSlotsItems kind) {
  const bool parts_of_panels = kind == FewSlotsItems::parts;
  const int64_t slots = problem.slots();
  const int64_t tiles = std::min(slots, problem.experts + slots / width);
  const int64_t grid = device.multiprocessors;
  FewSlotsPlan plan{};
  plan.items = kind;
  int64_t token_bytes = 0;
  int64_t most_items = 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t rows = i == 0 ? problem.tokens : slots;
    const int64_t panels = std::max(1, panels_of(problem.gemm[i].n)) * items_per_panel(kind, i);
    const int64_t items = ceil_div(tiles * panels, grid);
    const int64_t cta_tiles = std::min(tiles, ceil_div(items - 1, panels) + 1);
    const int64_t tile_rows = cta_tiles * width;
    const int64_t row_chunks = k_blocks_of(problem.gemm[i].k) * int64_t{kBlockK * kElementBytes / kChunkBytes};
    const int64_t parts = problem.dtype == DType::fp16 && !parts_of_panels ? 2 : 1;
    // One chunk more, so that neighbouring rows differ in banks.
    const int64_t row_bytes = (parts * row_chunks + 1) * kChunkBytes;
    plan.gemm[i] = {static_cast<int>(panels), rows <= tile_rows, static_cast<int>(row_chunks),
                    static_cast<int>(row_bytes)};
    token_bytes = std::max(token_bytes, std::min(rows, tile_rows) * row_bytes);
    most_items = std::max(most_items, items);
    if (parts_of_panels && items > (i == 0 ? 2 : 1) * kFewSlotsWarps) return plan;
  }
  const int64_t partials = (parts_of_panels ? kFewSlotsWarps : kFewSlotsWarps + most_items - 1) * width;
  const int64_t shared = (parts_of_panels ? few_slots_part_ring_bytes() : few_slots_ring_bytes(isa)) +
                         kFewSlotsBarrierBytes + token_bytes + partials * kPartialRows * int64_t{sizeof(float)};
  if (shared > device.shared_memory_per_cta) return plan;
  plan.width = width;
  plan.token_bytes = static_cast<int>(token_bytes);
  plan.shared_bytes = static_cast<int>(shared);
  return plan;
}

// Whether half panels give the busiest warp less to do. A warp takes whole turns of blocks, and a half block takes
// somewhat more than half a block's time.
inline bool halves_spread_better(const Problem& problem, const Device& device, int width) {
  constexpr int64_t kPercent = 60;
  const int64_t tiles = std::min(problem.slots(), problem.experts + problem.slots() / width);
  int64_t whole = 0;
  int64_t half = 0;
  for (const GemmSize& gemm : problem.gemm) {
    const auto turns = [&](int64_t items) {
      return ceil_div<int64_t>(ceil_div<int64_t>(items, device.multiprocessors) * k_blocks_of(gemm.k),
                               kFewSlotsWarps * 2);
    };
    if (panels_of(gemm.n) * 2 > kFewSlotsMaxPanels) return false;
    whole += turns(tiles * panels_of(gemm.n));
    half += turns(2 * tiles * panels_of(gemm.n));
  }
  return half * kPercent < whole * 100;
}

// With tiles as wide as fit.
inline FewSlotsPlan plan_few_slots(const Problem& problem, const Device& device, Isa isa) {
  const bool parts = problem.batch_invariant;
  const int most_panels = kFewSlotsMaxPanels / (parts ? items_per_panel(FewSlotsItems::parts, 0) : 1);
  if (std::max(panels_of(problem.gemm[0].n), panels_of(problem.gemm[1].n)) > most_panels) return {};
  const int64_t most = problem.dtype == DType::fp16 && !parts ? kFewSlotsSplitWidth : kFewSlotsMaxWidth;
  for (int64_t width = std::min(problem.tokens, most); width > 0; width /= 2) {
    const bool halves = isa == Isa::sm90 && halves_spread_better(problem, device, static_cast<int>(width));
    const FewSlotsItems kind = parts ? FewSlotsItems::parts : halves ? FewSlotsItems::halves : FewSlotsItems::panels;
    const FewSlotsPlan plan = plan_few_slots(problem, device, isa, static_cast<int>(width), kind);
    if (plan.width > 0) return plan;
  }
  return {};
}

}  // namespace nvfp4::cuda
