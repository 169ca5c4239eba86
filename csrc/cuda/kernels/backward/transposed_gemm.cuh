// out[row] = y[row] W for a tile of tokens and 128 columns: a sum over the weight's stored rows, 64 at a step.
#pragma once

#include "../../device/epilogue.cuh"
#include "tile.cuh"

namespace nvfp4::cuda {

__device__ __forceinline__ int row_of_y(const TransposedGemmParams& p, int position) {
  return p.slots_per_row == 0 ? position : slot_of(p.rows, position) / p.slots_per_row;
}

template <class T, int kTileM>
struct TransposedGemm {
  static constexpr int kRowWarps = kTileM / kWarpTokens;
  static constexpr int kColumnWarps = kBackwardWarps / kRowWarps;
  static constexpr int kGroups = kTransposedColumns / 8 / kColumnWarps;  // of 8 columns, of each warp
  static constexpr int kBlocks = kTransposedColumns / kBlockK;
  static_assert(kGroups % 2 == 0);

  struct Stage {
    alignas(128) uint8_t y[kTileM * kRowBytes];
    alignas(128) uint8_t packed[kBlocks * kBlockBytes];
  };
  struct Storage {
    Stage stage[kBackwardStages];
    alignas(128) uint8_t decoded[kBlocks * kDecodedBytes];
  };

  static __device__ __forceinline__ void multiply(uint32_t y, uint32_t decoded, int first_row, int first_group,
                                                  float (&sums)[kMmaTiles][kGroups][4]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t a[kMmaTiles][4];
#pragma unroll
      for (int m = 0; m < kMmaTiles; ++m) load_rows(y, first_row + 16 * m, j, a[m]);
#pragma unroll
      for (int i = 0; i < kGroups; i += 2) {
        const int group = first_group + i;
        uint32_t b[4];
        const uint32_t block = decoded + group / 8 * kDecodedBytes;
        ptx::load_transposed_x4(swizzled(block, 16 * j + lane % 16, group % 8 + lane / 16), b);
#pragma unroll
        for (int m = 0; m < kMmaTiles; ++m) {
          ptx::mma_m16n8k16<T>(sums[m][i], a[m], b[0], b[1]);
          ptx::mma_m16n8k16<T>(sums[m][i + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  static __device__ __forceinline__ void finish(const TransposedGemmParams& p, const ExpertTile& tile, int column_tile,
                                                int first_row, int first_group,
                                                const float (&sums)[kMmaTiles][kGroups][4]) {
    const int lane = threadIdx.x % kWarp;
    const float expert_scale = kDecodeFactor * reference_scale(p.weight, tile.expert);
#pragma unroll
    for (int m = 0; m < kMmaTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + 16 * m + 8 * half + lane / 4;
        if (row >= tile.count) continue;
        const int slot = slot_of(p.rows, tile.begin + row);
        const float scale = p.slot_scale == nullptr ? expert_scale : expert_scale * p.slot_scale[slot];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          const int column = column_tile * kTransposedColumns + (first_group + i) * 8 + lane % 4 * 2;
          if (column >= p.weight.k) continue;
          const float2 pair = make_float2(sums[m][i][2 * half] * scale, sums[m][i][2 * half + 1] * scale);
          const int64_t at = static_cast<int64_t>(p.by_position ? tile.begin + row : slot) * p.weight.k + column;
          if (p.out == nullptr) {
            *reinterpret_cast<float2*>(p.out32 + at) = pair;
          } else {
            store_pair<T>(p.out, at, pair);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void load(const TransposedGemmParams& p, const RowLoader<kTileM>& y, int expert,
                                              int column_tile, Stage& stage, int step) {
    y.load(ptx::shared_address(stage.y), step);
    const uint8_t* weight = p.weight.packed + expert * p.weight.expert_bytes;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int k_block = column_tile * kBlocks + i;
      load_block(ptx::shared_address(stage.packed + i * kBlockBytes),
                 weight + (static_cast<int64_t>(step) * p.weight.k_blocks + k_block) * kBlockBytes, weight,
                 k_block < p.weight.k_blocks, threadIdx.x);
    }
  }

  static __device__ __forceinline__ void run(const TransposedGemmParams& p, Storage& storage) {
    const int column_tiles = p.column_tiles();
    const int column_tile = blockIdx.x % column_tiles;
    ptx::dependency_wait();
    const ExpertTile tile = backward_tile<kTileM>(p.rows, blockIdx.x / column_tiles);
    if (tile.count == 0) return;
    const RowLoader<kTileM> y(p.y, p.weight.n, tile.count, [&](int i) { return row_of_y(p, tile.begin + i); });
    const int warp = threadIdx.x / kWarp;
    const int first_row = warp / kColumnWarps * kWarpTokens;
    const int first_group = warp % kColumnWarps * kGroups;
    const int steps = p.weight.panels;
    float sums[kMmaTiles][kGroups][4] = {};
#pragma unroll
    for (int step = 0; step < kBackwardStages - 1; ++step) {
      if (step < steps) load(p, y, tile.expert, column_tile, storage.stage[step], step);
      ptx::cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kBackwardStages - 2>();
      __syncthreads();  // the step's data is there, and all warps are done with the step before
      const int next = step + kBackwardStages - 1;
      if (next < steps) load(p, y, tile.expert, column_tile, storage.stage[next % kBackwardStages], next);
      ptx::cp_async_commit();
      Stage& stage = storage.stage[step % kBackwardStages];
      const uint32_t decoded = ptx::shared_address(storage.decoded);
      decode_blocks<T, kBlocks>(stage.packed, decoded);
      __syncthreads();
      multiply(ptx::shared_address(stage.y), decoded, first_row, first_group, sums);
    }
    finish(p, tile, column_tile, first_row, first_group, sums);
  }
};

}  // namespace nvfp4::cuda
