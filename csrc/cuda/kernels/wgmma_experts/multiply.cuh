// A consumer warpgroup's main loop: 64 rows of packed weights, decoded into register fragments, times a tile of tokens.
#pragma once

#include "../../device/ptx/wgmma.cuh"
#include "shared.cuh"

namespace nvfp4::cuda::wgmma_experts {

struct Consumer {
  int group;
  int thread;  // 0..127
  int warp;    // 0..3
  int lane;
  int r;
  int t;
  uint32_t staging;  // of all consumers
};

// Read anew for each use: what the compiler derived from values that live across tiles it would keep in registers, for
// every tile width at once.
__device__ __forceinline__ Consumer current_consumer(uint32_t staging) {
  const int thread = ptx::thread_index();
  const int lane = thread % kWarp;
  return {thread / kWarpgroup, thread % kWarpgroup, thread % kWarpgroup / kWarp, lane, lane / 4, lane % 4, staging};
}

// The 16 rows of a warp: tile `tile` of the stage's panel `panel`.
struct WarpRows {
  int panel;
  int tile;
};

// A warpgroup takes a panel. Where the gate applies and warpgroups are even, two of them take the 8 tiles of two panels
// in turns: then each holds whole chunks of a token for the next GEMM.
template <class S>
__device__ __forceinline__ WarpRows warp_rows(int group, int warp, bool gated) {
  if (S::kConsumers % 2 == 0 && gated) return {group / 2 * 2 + warp / 2, warp % 2 * 2 + group % 2};
  return {group, warp};
}

struct PackedFragment {
  uint4 codes;
  uint32_t scales;
};

// decode() for one MMA step. The compiler shares what the steps have in common and drops the pairs of other steps.
template <class T>
__device__ __forceinline__ void decode_step(uint4 codes, uint32_t scales, int j, uint32_t (&a)[4]) {
  uint32_t all[4][4];
  decode<T>(codes, scales, all);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = all[j][i];
}

// Reads this thread's share of a block from a stage. Both places count from the start of the stage.
struct PackedReader {
  uint32_t codes;
  uint32_t scales;

  __device__ __forceinline__ PackedFragment load(uint32_t stage, int block) const {
    return {ptx::load_shared_128(stage + codes + block * kBlockBytes),
            ptx::load_shared_16(stage + scales + block * kBlockBytes)};
  }
};

// Starts MMA step j of a block of the stage.
template <class S, class T, int N>
__device__ __forceinline__ void start_step(float (&sum)[N / 2], const PackedFragment& packed, uint32_t (&a)[4],
                                           uint32_t stage, int block, int j) {
  decode_step<T>(packed.codes, packed.scales, j, a);
  ptx::wgmma_fence();
  ptx::Wgmma<T, N>::multiply(sum, a, ptx::wgmma_descriptor(stage, kWeightBytes<S> + block * token_block_bytes(N), j));
  ptx::wgmma_commit();
}

// Starts the four MMA steps of a block of the stage.
template <class S, class T, int N>
__device__ __forceinline__ void start_block(float (&sum)[N / 2], const PackedFragment& packed, uint32_t (&a)[4][4],
                                            uint32_t stage, int block) {
  decode<T>(packed.codes, packed.scales, a);
  ptx::wgmma_fence();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    ptx::Wgmma<T, N>::multiply(sum, a[j],
                               ptx::wgmma_descriptor(stage, kWeightBytes<S> + block * token_block_bytes(N), j));
  }
  ptx::wgmma_commit();
}

// Of four warpgroups, one decodes a block while the others keep the tensor cores busy. The next block's packed weights
// are read while this one's MMA steps run.
template <class S, class T, int N>
__device__ __forceinline__ void multiply_by_blocks(float (&sum)[N / 2], Ring& ring, const Consumer& c, WarpRows rows,
                                                   int k_blocks) {
  uint32_t a[4][4];
  const uint32_t panel = rows.panel * kPanelBytes;
  const PackedReader reader{panel + codes_at(rows.tile, c.lane), panel + scales_at(rows.tile, c.lane)};
  ring.wait_full();
  PackedFragment packed = reader.load(ring.stage, 0);
  for (int kb = kStageBlocks; kb < k_blocks; kb += kStageBlocks) {
    start_block<S, T, N>(sum, packed, a, ring.stage, 0);
    packed = reader.load(ring.stage, 1);
    ptx::wgmma_wait<0>();
    start_block<S, T, N>(sum, packed, a, ring.stage, 1);
    const uint32_t previous_empty = ring.empty_barrier();
    ring.advance();
    ring.wait_full();
    packed = reader.load(ring.stage, 0);
    ptx::wgmma_wait<0>();
    warp_arrive(previous_empty, c.lane);
  }
  start_block<S, T, N>(sum, packed, a, ring.stage, 0);
  if (k_blocks % kStageBlocks == 0) {
    packed = reader.load(ring.stage, 1);
    ptx::wgmma_wait<0>();
    start_block<S, T, N>(sum, packed, a, ring.stage, 1);
  }
  ptx::wgmma_wait<0>();
  warp_arrive(ring.empty_barrier(), c.lane);
  ring.advance();
}

// Four steps are in flight: as soon as the oldest is done, the next block's fragments of that step are decoded into its
// registers while the tensor cores work on the other three. The loop takes the second block of one stage and the first
// of the next: with the first stage's first block before it, four steps are in flight wherever it is entered.
template <class S, class T, int N>
__device__ __forceinline__ void multiply_by_steps(float (&sum)[N / 2], Ring& ring, const Consumer& c, WarpRows rows,
                                                  int k_blocks) {
  uint32_t a[4][4];
  const uint32_t panel = rows.panel * kPanelBytes;
  const PackedReader reader{panel + codes_at(rows.tile, c.lane), panel + scales_at(rows.tile, c.lane)};
  ring.wait_full();
  PackedFragment packed = reader.load(ring.stage, 0);
#pragma unroll
  for (int j = 0; j < 4; ++j) start_step<S, T, N>(sum, packed, a[j], ring.stage, 0, j);
  for (int kb = kStageBlocks; kb < k_blocks; kb += kStageBlocks) {
    packed = reader.load(ring.stage, 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::wgmma_wait<3>();
      start_step<S, T, N>(sum, packed, a[j], ring.stage, 1, j);
    }
    const uint32_t previous_empty = ring.empty_barrier();
    ring.advance();
    ring.wait_full();
    packed = reader.load(ring.stage, 0);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::wgmma_wait<3>();
      if (j == 3) warp_arrive(previous_empty, c.lane);
      start_step<S, T, N>(sum, packed, a[j], ring.stage, 0, j);
    }
  }
  if (k_blocks % kStageBlocks == 0) {
    packed = reader.load(ring.stage, 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::wgmma_wait<3>();
      start_step<S, T, N>(sum, packed, a[j], ring.stage, 1, j);
    }
  }
  ptx::wgmma_wait<0>();
  warp_arrive(ring.empty_barrier(), c.lane);
  ring.advance();
}

template <class S, class T, int N>
__device__ __forceinline__ void multiply_tile(float (&sum)[N / 2], Ring& ring, const Consumer& c, WarpRows rows,
                                              int k_blocks) {
  if constexpr (S::kByBlocks) {
    multiply_by_blocks<S, T, N>(sum, ring, c, rows, k_blocks);
  } else {
    multiply_by_steps<S, T, N>(sum, ring, c, rows, k_blocks);
  }
}

// A warpgroup beyond the last panel frees the stages it has no use for.
__device__ __forceinline__ void skip_tile(Ring& ring, const Consumer& c, int k_blocks) {
  for (int kb = 0; kb < k_blocks; kb += kStageBlocks, ring.advance()) {
    ring.wait_full();
    warp_arrive(ring.empty_barrier(), c.lane);
  }
}

}  // namespace nvfp4::cuda::wgmma_experts
