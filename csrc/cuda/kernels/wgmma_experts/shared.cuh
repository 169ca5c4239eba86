// What the roles of the experts' kernel share: its sizes, parameters and tiles, the ring of stages and the ring of
// tiles.
#pragma once

#include "../../../kernels.h"
#include "../../device/decode.cuh"
#include "../../device/hopper.cuh"
#include "../../device/ragged_tiles.cuh"

namespace nvfp4::cuda::wgmma_experts {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 4;
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerRegisters = 104;
constexpr int kProducerRegisters = 64;
constexpr int kGatherWarps = 2;
constexpr int kStageBlocks = 2;  // k-blocks; the last stage of a tile may hold one
constexpr int kGatherLag = 1;    // stages whose gathered tokens may be in flight
constexpr int kMaxWidth = 112;
constexpr int kMaxStages = 8;
constexpr int kTokenBytes = 128;  // one token's 64 k
constexpr int kPanelBytes = kStageBlocks * kBlockBytes;
constexpr int kWeightBytes = kConsumers * kPanelBytes;
constexpr int kStagingBytes = 8192;  // for each consumer
constexpr int kTileRing = 4;
constexpr int kClaimAhead = 8;  // stages before the end of a tile's weights at which the next tile is claimed
// racecheck follows only lanes that arrive themselves. A library built for it has all lanes of a warp arrive.
#ifdef NVFP4_RACECHECK
constexpr int kWarpArrivals = kWarp;
#else
constexpr int kWarpArrivals = 1;
#endif
static_assert(kWeightBytes % 1024 == 0, "the token tile behind the weights must be aligned to swizzle atoms");

struct ExpertGemm {
  const uint8_t* weight;  // [experts][panels][k_blocks][kBlockBytes]
  int64_t expert_bytes;
  const float* global_scale;
  int64_t n;
  bool gated;
  int panels;
  int row_tiles;
  int k_blocks;
};

struct Params {
  ExpertGemm gemm[2];
  bool mlp;           // two GEMMs, `hidden` between them
  bool gate_applies;  // gemm[0] applies the gate
  Gate gate;
  const uint8_t* x;  // [rows, gemm[0].k_blocks * 64], each block in permute_rows()'s order
  int slots_per_row;
  const int* order;    // [slots]
  const int* offsets;  // [experts + 1]
  int experts;
  const float* slot_scale;  // [slots] or null; applies to gemm[0]
  uint8_t* hidden;          // [gemm[1].k_blocks][hidden_rows][kTokenBytes], images of shared-memory token tiles
  int64_t hidden_rows;
  void* out;     // [slots, n]
  int* control;  // zeroed: [0] the next tile, [1 + e] finished GEMM1 tiles of expert e
  int max_width;
  int stages;
};

struct Tile {
  int gemm;  // -1: no more tiles
  int expert;
  int row_tile;
  int width;
  int tokens;
  int hidden_row;
  float gate_scale;                              // of rows g of a warp's 16, and
  float up_scale;                                // of rows g + 8, what decoding leaves out included
  int prerequisites;                             // finished GEMM1 tiles of the expert that a GEMM2 tile waits for
  alignas(16) uint32_t x_block[kTokenAtom][16];  // [i % 8][i / 8] of token i: its row's first block of x
  int slot[kMaxWidth];
  alignas(8) float scale[kMaxWidth];
};

struct Shared {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];  // behind `full`: Ring knows
  uint64_t tile_full[kTileRing];
  uint64_t tile_empty[kTileRing];
  uint64_t claim;
  uint64_t stored;
  Tile tiles[kTileRing];
};

// The tokens of a k-block in a stage. Pairs of atoms, because gathering warps copy two atoms at a time.
__host__ __device__ constexpr int token_block_bytes(int width) { return round_up(width, 2 * kTokenAtom) * kTokenBytes; }
__host__ __device__ constexpr int stage_bytes(int max_width) {
  return kWeightBytes + kStageBlocks * token_block_bytes(max_width);
}
__host__ __device__ constexpr int fixed_bytes(int experts) {
  return kConsumers * kStagingBytes + static_cast<int>(sizeof(Shared)) +
         3 * (experts + 1) * static_cast<int>(sizeof(int));
}

// A position in the ring of stages. The empty barriers lie behind the full ones.
struct Ring {
  uint32_t stage;
  uint32_t barrier;
  uint32_t stage_bytes;
  uint32_t stages;
  uint32_t last_barrier = barrier + (stages - 1) * 8;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t weights() const { return stage; }
  __device__ __forceinline__ uint32_t tokens() const { return stage + kWeightBytes; }
  __device__ __forceinline__ uint32_t full_barrier() const { return barrier; }
  __device__ __forceinline__ uint32_t empty_barrier() const { return barrier + kMaxStages * 8; }
  __device__ __forceinline__ void wait_full() const { ptx::mbarrier_wait(full_barrier(), parity); }
  __device__ __forceinline__ void wait_empty() const { ptx::mbarrier_wait(empty_barrier(), parity ^ 1); }
  __device__ __forceinline__ void advance() {
    const bool wrap = barrier == last_barrier;
    stage += wrap ? -(stages - 1) * stage_bytes : stage_bytes;
    barrier += wrap ? -(stages - 1) * 8 : 8;
    parity ^= wrap;
  }
};

// Where a chunk of 16 bytes of a token lies in a tile of 128-byte rows, as wgmma's 128-byte swizzle has it.
__device__ __forceinline__ uint32_t swizzled(int token, int chunk) {
  return token * kTokenBytes + ((chunk ^ (token % 8)) << 4);
}

// The same value, known to the compiler to be the same in all lanes: what derives from it goes to the uniform datapath.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(~0u, v, 0); }

// By all lanes of a warp that is converged.
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
  if (kWarpArrivals == kWarp || lane == 0) ptx::mbarrier_arrive(barrier);
}

// The ring of published tiles, as one role walks it.
struct TileReader {
  Shared& shared;
  int index = 0;

  __device__ __forceinline__ const Tile* next() {
    ptx::mbarrier_wait(ptx::shared_address(&shared.tile_full[index % kTileRing]), index / kTileRing & 1);
    const Tile* tile = &shared.tiles[index % kTileRing];
    return uniform(tile->gemm) < 0 ? nullptr : tile;
  }
  // By the whole warp, once all its lanes have read the tile.
  __device__ __forceinline__ void release() {
    __syncwarp();
    warp_arrive(ptx::shared_address(&shared.tile_empty[index % kTileRing]), threadIdx.x % kWarp);
    ++index;
  }
};

}  // namespace nvfp4::cuda::wgmma_experts
