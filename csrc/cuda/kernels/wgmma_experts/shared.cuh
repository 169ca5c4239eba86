// What the roles of the experts' kernel share: its sizes, parameters and tiles, the ring of stages and the ring of
// tiles.
#pragma once

#include "../../device/decode.cuh"
#include "../../device/ptx/control.cuh"
#include "../../device/ptx/mbarrier.cuh"
#include "../../device/ptx/memory.cuh"
#include "../../device/ragged_tiles.cuh"

namespace nvfp4::cuda::wgmma_experts {

constexpr int kWarpgroup = 128;
constexpr int kGatherWarps = 2;
constexpr int kStageBlocks = 2;  // k-blocks; the last stage of a tile may hold one
constexpr int kGatherLag = 1;    // stages whose gathered tokens may be in flight
constexpr int kMaxStages = 8;
constexpr int kTokenBytes = 128;  // one token's 64 k
constexpr int kPanelBytes = kStageBlocks * kBlockBytes;
constexpr int kSwizzleAtom = 1024;   // a token tile is aligned to it
constexpr int kStagingBytes = 8192;  // for each consumer
constexpr int kTileRing = 4;
constexpr int kClaimAhead = 8;  // stages before the end of a tile's weights at which the next tile is claimed
// racecheck follows only lanes that arrive themselves. A library built for it has all lanes of a warp arrive.
#ifdef NVFP4_RACECHECK
constexpr int kWarpArrivals = kWarp;
#else
constexpr int kWarpArrivals = 1;
#endif

// How a CTA shares its registers between weight rows and tokens. Its threads are launched with 96 or 128 registers,
// which its warpgroups divide.

// 256 rows, up to 112 tokens.
struct Tall {
  static constexpr int kConsumers = 4;
  static constexpr int kConsumerRegisters = 104;
  static constexpr int kProducerRegisters = 64;
  static constexpr int kMaxWidth = 112;
  __host__ __device__ static constexpr int tile_width(int width) { return width; }
};

// 192 rows, up to 192 tokens: an expert of more tokens than Tall takes has its weights decoded once all the same. ptxas
// wants an instruction's registers to fit into the 128 that the kernel is launched with, so no wgmma is wider.
struct Wide {
  static constexpr int kConsumers = 3;
  static constexpr int kConsumerRegisters = 152;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kMaxWidth = 192;
  // Every width is another main loop, and few tokens are rare here.
  __host__ __device__ static constexpr int tile_width(int width) { return width <= 96 ? round_up(width, 32) : width; }
};

template <class S>
constexpr int kConsumerWarps = S::kConsumers * 4;
template <class S>
constexpr int kThreads = (S::kConsumers + 1) * kWarpgroup;
template <class S>
constexpr int kWeightBytes = round_up(S::kConsumers * kPanelBytes, kSwizzleAtom);

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
  // [i % 8][i / 8] of token i: its row's first block of x
  alignas(16) uint32_t x_block[kTokenAtom][round_up(S::kMaxWidth / kTokenAtom, 4)];
  int slot[S::kMaxWidth];
  alignas(8) float scale[S::kMaxWidth];
};

template <class S>
struct Shared {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];  // behind `full`: Ring knows
  uint64_t tile_full[kTileRing];
  uint64_t tile_empty[kTileRing];
  uint64_t claim;
  uint64_t stored;
  Tile<S> tiles[kTileRing];
};

// The tokens of a k-block in a stage. Pairs of atoms, because gathering warps copy two atoms at a time.
__host__ __device__ constexpr int token_block_bytes(int width) { return round_up(width, 2 * kTokenAtom) * kTokenBytes; }
template <class S>
__host__ __device__ constexpr int stage_bytes(int max_width) {
  return kWeightBytes<S> + kStageBlocks * token_block_bytes(max_width);
}
template <class S>
__host__ __device__ constexpr int fixed_bytes(int experts) {
  return S::kConsumers * kStagingBytes + static_cast<int>(sizeof(Shared<S>)) +
         3 * (experts + 1) * static_cast<int>(sizeof(int));
}

// A position in the ring of stages, whose tokens lie behind the weights. The empty barriers lie behind the full ones.
struct Ring {
  uint32_t stage;
  uint32_t barrier;
  uint32_t stage_bytes;
  uint32_t stages;
  uint32_t last_barrier = barrier + (stages - 1) * 8;
  uint32_t parity = 0;

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
template <class S>
struct TileReader {
  Shared<S>& shared;
  int index = 0;

  __device__ __forceinline__ const Tile<S>* next() {
    ptx::mbarrier_wait(ptx::shared_address(&shared.tile_full[index % kTileRing]), index / kTileRing & 1);
    const Tile<S>* tile = &shared.tiles[index % kTileRing];
    return uniform(tile->gemm_index) < 0 ? nullptr : tile;
  }
  // By the whole warp, once all its lanes have read the tile.
  __device__ __forceinline__ void release() {
    __syncwarp();
    warp_arrive(ptx::shared_address(&shared.tile_empty[index % kTileRing]), threadIdx.x % kWarp);
    ++index;
  }
};

}  // namespace nvfp4::cuda::wgmma_experts
