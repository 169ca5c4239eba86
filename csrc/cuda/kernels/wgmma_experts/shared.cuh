// What the roles of the experts' kernel share beside the sizes and the shared memory of plan.h: parameters, the ring of
// stages and the ring of tiles.
#pragma once

#include "../../device/decode.cuh"
#include "../../device/ptx/control.cuh"
#include "../../device/ptx/mbarrier.cuh"
#include "../../device/ptx/memory.cuh"
#include "../../device/ragged_tiles.cuh"
#include "../../device/warp_arrive.cuh"
#include "plan.h"

namespace nvfp4::cuda::wgmma_experts {

using cuda::kWarpArrivals;
using cuda::warp_arrive;

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
  bool gate_applies;  // gemm[0] applies the gate, to gate and up rows
  Gate gate;
  const uint8_t* x;  // [rows, gemm[0].k_blocks * 64], each block in permute_rows()'s order; if sorting, in that of k
  int slots_per_row;
  const int* order;    // [slots], and
  const int* offsets;  // [experts + 1], unless sorting
  int experts;
  const float* slot_scale;  // [slots] or null; applies to gemm[0]
  uint8_t* hidden;          // [gemm[1].k_blocks][hidden_rows][kTokenBytes], images of shared-memory token tiles
  int64_t hidden_rows;
  void* out;     // [slots, n]
  int* control;  // zeroed: [0] the next tile, [1 + e] finished GEMM1 tiles of expert e
  int max_width;
  int stages;
  bool weights_leave_first;  // L2, before the results that they make
  int extra_claims;          // tiles of the last GEMM that are claimed before their turn
  bool sorting;
  Routing routing;  // if sorting
  // Of extended kernels alone, and behind the rest: the others' code does not change with them.
  bool activates;        // gemm[0] applies its activation, to rows without a gate
  const float* bias[2];  // of both GEMMs, [experts, n] or null
};

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
