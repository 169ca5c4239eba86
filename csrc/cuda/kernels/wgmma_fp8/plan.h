// The sizes that wgmma_fp8 runs with, in plain C++. Tiles, rings and tables are those of wgmma_experts.
#pragma once

#include "../wgmma_experts/plan.h"

namespace nvfp4::cuda {

namespace wgmma_fp8 {

using wgmma_experts::kGatherWarps;
using wgmma_experts::kPanelBytes;
using wgmma_experts::kStageBlocks;
using wgmma_experts::kThreads;
using wgmma_experts::kTokenBytes;
using wgmma_experts::kWeightBytes;

// Every second width: half of the code, for 4 columns more than tokens on average.
struct Tall : wgmma_experts::Tall {
  static NVFP4_SHARED_INLINE constexpr int tile_width(int width) { return round_up(width, 2 * kTokenAtom); }
};
struct Wide : wgmma_experts::Wide {
  static NVFP4_SHARED_INLINE constexpr int tile_width(int width) {
    return round_up(width, width <= 96 ? 4 * kTokenAtom : 2 * kTokenAtom);
  }
};

constexpr int kTableBytes = 2048;      // of decode_fp8.cuh
constexpr int kElementsPerScale = 32;  // of `hidden`, before a row has one scale

// A stage's tokens: one row of 128 values for both k-blocks.
NVFP4_SHARED_INLINE constexpr int token_stage_bytes(int width) { return round_up(width, 2 * kTokenAtom) * kTokenBytes; }
template <class S>
NVFP4_SHARED_INLINE constexpr int stage_bytes(int max_width) {
  return kWeightBytes<S> + token_stage_bytes(max_width);
}

template <class S>
WgmmaPlan plan(WgmmaTiles tiles, int max_width, int64_t experts, const Device& device) {
  const int fixed = wgmma_experts::fixed_bytes<S>(static_cast<int>(experts)) + kTableBytes;
  for (int width = max_width; width > 0; width -= kTokenAtom) {
    const int stage = stage_bytes<S>(width);
    const int stages = std::min(wgmma_experts::kMaxStages, (device.shared_memory_per_cta - fixed) / stage);
    if (stages >= wgmma_experts::kMinStages) return {tiles, width, stages, fixed + stages * stage, false, false};
  }
  return {tiles, 0, 0, 0, false, false};
}

}  // namespace wgmma_fp8

inline WgmmaPlan plan_wgmma_fp8(WgmmaTiles tiles, int max_width, int64_t experts, const Device& device) {
  using namespace wgmma_fp8;
  return tiles == WgmmaTiles::tall ? plan<Tall>(tiles, max_width, experts, device)
                                   : plan<Wide>(tiles, max_width, experts, device);
}

}  // namespace nvfp4::cuda
