// What both GEMMs of the derivatives are made of: token tiles and decoded weight blocks in shared memory, in rows of 64
// values whose eight 16-byte chunks are swizzled by the row, so that ldmatrix reads them along rows and along columns
// without bank conflicts. Weights are decoded once per CTA and step, and then are an ordinary 16-bit operand.
#pragma once

#include "../../device/decode.cuh"
#include "../../device/ptx/async_copy.cuh"
#include "../../device/ptx/control.cuh"
#include "../../device/ptx/memory.cuh"
#include "../../device/ptx/mma.cuh"
#include "../../device/scheduler.cuh"
#include "params.h"

namespace nvfp4::cuda {

constexpr int kBackwardThreads = 256;
constexpr int kBackwardWarps = kBackwardThreads / kWarp;
constexpr int kBackwardStages = 3;
constexpr int kRowBytes = kBlockK * kElementBytes;      // 64 values
constexpr int kChunksPerRow = kRowBytes / kChunkBytes;  // 8
constexpr int kDecodedBytes = kBlockRows * kRowBytes;   // of a decoded block
constexpr int kShares = 4 * kWarp;                      // lanes' shares of a packed block
constexpr int kWarpTokens = 32;                         // rows of one warp: two MMA tiles of 16
constexpr int kMmaTiles = kWarpTokens / 16;

__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int row, int chunk) {
  return tile + row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

// The tile of this CTA's `index`; count 0 if there are fewer.
template <int kTileM>
__device__ __forceinline__ ExpertTile backward_tile(const BackwardRows& rows, int index) {
  const TileTable table(rows.tile_table, rows.order, rows.rows, kTileM);
  if (index >= table.size()) return {0, 0, 0};
  return table.tile(index);
}

__device__ __forceinline__ int slot_of(const BackwardRows& rows, int position) {
  return rows.order == nullptr ? position : rows.order[position];
}

__device__ __forceinline__ float reference_scale(const PackedWeight& w, int expert) {
  if (!w.gated) return w.global_scale[expert];
  return ptx::max_nan(fabsf(w.global_scale[2 * expert]), fabsf(w.global_scale[2 * expert + 1]));
}

// What a gate's or an up row's flow is multiplied with, because the sum over both has one scale.
__device__ __forceinline__ float relative_scale(const PackedWeight& w, int expert, bool up) {
  if (!w.gated) return 1.0f;
  const float reference = reference_scale(w, expert);
  return reference == 0.0f ? 0.0f : w.global_scale[2 * expert + up] / reference;
}

// Loads steps of 64 columns of a tile's rows. Every thread has one chunk of every 32nd row.
template <int kTileM>
class RowLoader {
 public:
  static constexpr int kRows = kTileM * kChunksPerRow / kBackwardThreads;

  // row_of(i): where row i of the tile is in x [any, columns]; only for i below count.
  template <class RowOf>
  __device__ __forceinline__ RowLoader(const void* x, int columns, int count, const RowOf& row_of) : columns_(columns) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = threadIdx.x / kChunksPerRow + i * (kBackwardThreads / kChunksPerRow);
      used_[i] = row < count;
      at_[i] = static_cast<const uint16_t*>(x) + (used_[i] ? static_cast<int64_t>(row_of(row)) * columns : 0);
    }
  }

  __device__ __forceinline__ void load(uint32_t tile, int step) const {
    const int chunk = threadIdx.x % kChunksPerRow;
    const int column = step * kBlockK + chunk * (kChunkBytes / kElementBytes);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = threadIdx.x / kChunksPerRow + i * (kBackwardThreads / kChunksPerRow);
      const bool wanted = used_[i] && column < columns_;
      ptx::cp_async_16_or_zero(swizzled(tile, row, chunk), wanted ? at_[i] + column : at_[i], wanted);
    }
  }

 private:
  int columns_;
  const uint16_t* at_[kRows];
  bool used_[kRows];
};

// One packed block; zeros if it is not wanted, which decode to zeros. `first` is the first thread of those that copy.
__device__ __forceinline__ void load_block(uint32_t to, const uint8_t* block, const uint8_t* somewhere, bool wanted,
                                           int thread) {
  constexpr int kChunks = kBlockBytes / kChunkBytes;
  static_assert(kChunks <= kBackwardThreads);
  if (thread < kChunks) {
    ptx::cp_async_16_or_zero(to + thread * kChunkBytes, wanted ? block + thread * kChunkBytes : somewhere, wanted);
  }
}

// `count` packed blocks side by side to as many decoded tiles, each a row per weight row; weight * scale * 2^-8.
template <class T, int kCount>
__device__ __forceinline__ void decode_blocks(const uint8_t* packed, uint32_t decoded) {
#pragma unroll
  for (int first = 0; first < kCount * kShares; first += kBackwardThreads) {
    const int share = first + threadIdx.x;
    if (share >= kCount * kShares) break;
    const int block = share / kShares;
    const int tile = share % kShares / kWarp;
    const int lane = share % kWarp;
    const uint8_t* from = packed + block * kBlockBytes;
    const uint4 codes = *reinterpret_cast<const uint4*>(from + codes_at(tile, lane));
    const uint32_t scales = *reinterpret_cast<const uint16_t*>(from + scales_at(tile, lane));
    uint32_t a[4][4];
    decode<T>(codes, scales, a);
    const uint32_t to = decoded + block * kDecodedBytes;
    const int chunk = lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * tile + lane / 4 + 8 * half;
      ptx::store_shared_128(swizzled(to, row, chunk),
                            make_uint4(a[0][half], a[0][2 + half], a[1][half], a[1][2 + half]));
      ptx::store_shared_128(swizzled(to, row, chunk + 1),
                            make_uint4(a[2][half], a[2][2 + half], a[3][half], a[3][2 + half]));
    }
  }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// A fragments of 16 rows of a token tile from `row` on, at MMA step j of four.
__device__ __forceinline__ void load_rows(uint32_t tile, int row, int j, uint32_t (&a)[4]) {
  const int lane = threadIdx.x % kWarp;
  ptx::load_matrix_x4(swizzled(tile, row + lane % 16, 2 * j + lane / 16), a);
}

}  // namespace nvfp4::cuda
