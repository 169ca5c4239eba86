// The sizes that wgmma_experts runs with and what its CTAs keep in shared memory, in plain C++: no GPU is needed to
// know them.
#pragma once

#include <algorithm>

#include "../../device/shared_layout.h"
#include "../../device_facts.h"

namespace nvfp4::cuda {

// The most experts that one launch schedules: shared memory holds three numbers for each.
constexpr int64_t kWgmmaMaxExperts = 2048;

enum class WgmmaTiles {
  tall,  // 256 weight rows, up to 112 tokens
  wide,  // 192 weight rows, up to 192 tokens
};

struct WgmmaPlan {
  WgmmaTiles tiles;
  int max_width;  // tokens per tile, at most
  int stages;
  int shared_bytes;
  bool weights_leave_first;  // L2, before the results, which combine reads next
  bool sorting;              // CTAs sort for themselves, and gather tokens that nobody has permuted
};

namespace wgmma_experts {

constexpr int kWarpgroup = 128;
constexpr int kGatherWarps = 2;
constexpr int kStageBlocks = 2;  // k-blocks; the last stage of a tile may hold one
constexpr int kGatherLag = 1;    // stages whose gathered tokens may be in flight
constexpr int kMaxStages = 8;
// The tokens of a stage are announced once those of kGatherLag more stages are asked for, and consumers free a stage
// when they have the next one. With fewer stages each would wait for the other for ever.
constexpr int kMinStages = kGatherLag + 2;
constexpr int kTokenBytes = 128;  // one token's 64 k
constexpr int kPanelBytes = kStageBlocks * kBlockBytes;
constexpr int kSwizzleAtom = 1024;   // a token tile is aligned to it
constexpr int kStagingBytes = 8192;  // for each consumer
constexpr int kTileRing = 4;
constexpr int kOrderBytes = kOrderMaxSlots * static_cast<int>(sizeof(uint16_t));  // of CTAs that sort
constexpr int kClaimAhead = 8;  // stages before the end of a tile's weights at which the next tile is claimed
// A tile of w2 that is shorter than that: its claim comes with its first stage, too late for the next tile's weights to
// be there in time. So another tile is claimed ahead.
constexpr bool is_short(int k_blocks) { return k_blocks < kClaimAhead * kStageBlocks; }

// How a CTA shares its registers between weight rows and tokens. Its threads are launched with 96 or 128 registers,
// which its warpgroups divide.

// What is known of the gate when a kernel is compiled.
enum class GateKind { silu, situ, other };

// 256 rows, up to 112 tokens.
struct Tall {
  static constexpr bool kByBlocks = true;  // the main loop: multiply_by_blocks(), else multiply_by_steps()
  static constexpr int kConsumers = 4;
  static constexpr int kConsumerRegisters = 104;
  static constexpr int kProducerRegisters = 64;
  static constexpr int kMaxWidth = 112;
  static constexpr bool kExtended = false;
  static NVFP4_SHARED_INLINE constexpr int tile_width(int width) { return width; }
};

// With biases and SiTU in the epilogue.
struct TallExtended : Tall {
  static constexpr bool kExtended = true;
};

// And with all other activations, gated or not: several times the code for each width.
struct TallOther : TallExtended {
  static NVFP4_SHARED_INLINE constexpr int tile_width(int width) { return round_up(width, 2 * kTokenAtom); }
};

// 192 rows, up to 192 tokens: an expert of more tokens than Tall takes has its weights decoded once all the same. ptxas
// wants an instruction's registers to fit into the 128 that the kernel is launched with, so no wgmma is wider.
struct Wide {
  static constexpr bool kByBlocks = false;  // its three warpgroups keep the tensor cores less busy
  static constexpr int kConsumers = 3;
  static constexpr int kConsumerRegisters = 152;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kMaxWidth = 192;
  static constexpr bool kExtended = false;
  // Every width is another main loop, and few tokens are rare here.
  static NVFP4_SHARED_INLINE constexpr int tile_width(int width) { return width <= 96 ? round_up(width, 32) : width; }
};

struct WideExtended : Wide {
  static constexpr bool kExtended = true;
};

template <class S>
constexpr int kConsumerWarps = S::kConsumers * 4;
template <class S>
constexpr int kThreads = (S::kConsumers + 1) * kWarpgroup;
template <class S>
constexpr int kWeightBytes = round_up(S::kConsumers * kPanelBytes, kSwizzleAtom);

template <class S>
struct Tile {
  int gemm_index;  // -1: no more tiles
  int expert;
  int row_tile;
  int width;
  int tokens;
  int hidden_row;
  float gate_scale;   // of rows r of a warp's 16, and
  float up_scale;     // of rows r + 8, what decoding leaves out included
  int prerequisites;  // finished GEMM1 tiles of the expert that a GEMM2 tile waits for
  // Of token i, its row's first block of x: at [i % 8 * kAtoms + i / 8], or at [i] if CTAs sort.
  static constexpr int kAtoms = round_up(S::kMaxWidth / kTokenAtom, 4);
  alignas(16) uint32_t x_block[kTokenAtom * kAtoms];
  int slot[S::kMaxWidth];
  alignas(8) float scale[S::kMaxWidth];
};

template <class S>
struct Shared {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];  // behind `full`: Ring knows
  uint64_t tile_full[kTileRing];
  uint64_t tile_empty[kTileRing];
  uint64_t claim[kTileRing];
  uint64_t stored;
  Tile<S> tiles[kTileRing];
};

// The tokens of a k-block in a stage. Pairs of atoms, because gathering warps copy two atoms at a time.
NVFP4_SHARED_INLINE constexpr int token_block_bytes(int width) { return round_up(width, 2 * kTokenAtom) * kTokenBytes; }
template <class S>
NVFP4_SHARED_INLINE constexpr int stage_bytes(int max_width) {
  return kWeightBytes<S> + kStageBlocks * token_block_bytes(max_width);
}
template <class S>
NVFP4_SHARED_INLINE constexpr int fixed_bytes(int experts) {
  return S::kConsumers * kStagingBytes + static_cast<int>(sizeof(Shared<S>)) +
         3 * (experts + 1) * static_cast<int>(sizeof(int));
}

// Tiles of at most max_width tokens; of fewer where the tables of many experts leave no room for kMinStages such
// stages. No stages if no width leaves it.
template <class S>
WgmmaPlan plan(WgmmaTiles tiles, int max_width, int64_t experts, const Device& device, bool sorting) {
  const int fixed = fixed_bytes<S>(static_cast<int>(experts)) + (sorting ? kOrderBytes : 0);
  for (int width = max_width; width > 0; width -= kTokenAtom) {
    const int stage = stage_bytes<S>(width);
    const int stages = std::min(kMaxStages, (device.shared_memory_per_cta - fixed) / stage);
    if (stages >= kMinStages) return {tiles, width, stages, fixed + stages * stage, false, sorting};
  }
  return {tiles, 0, 0, 0, false, sorting};
}

}  // namespace wgmma_experts

inline WgmmaPlan plan_wgmma(WgmmaTiles tiles, int max_width, int64_t experts, const Device& device,
                            bool sorting = false) {
  using namespace wgmma_experts;
  return tiles == WgmmaTiles::tall ? plan<Tall>(tiles, max_width, experts, device, sorting)
                                   : plan<Wide>(tiles, max_width, experts, device, sorting);
}

}  // namespace nvfp4::cuda
