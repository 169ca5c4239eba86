// Rings of weight blocks in shared memory, one ring per warp: a warp fills its own stages and is the only one to read
// them, so nothing but the warp itself is ever synchronised. Stages are filled and read in the same order.
//
//   start(storage)              once, by the whole warp
//   fill(stage, wanted, block)  starts the copy of one block; if not wanted, only the order of stages is kept
//   wait(stage, parity)         until the stage's copy has landed; `parity` is 0 on the first pass through the ring,
//                               1 on the second, and so on in turn
//
// or, for blocks that lie one behind the other, a turn of kTurnBlocks stages at a time:
//
//   fill_turn(stage, count, first_block)  at most `count` of the turn's blocks
//   wait_in_turn(stage, i, parity)        until the turn's i-th block has landed; those before it come first
//
//   kFillQueues                 whether a copy queues behind the warp's earlier loads from shared memory. If not, it
//                               may overtake them, and a stage may be filled only once the values of its old block are
//                               in registers
#pragma once

#include "common.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/control.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "shared_layout.h"

namespace nvfp4::cuda {

constexpr int kTurnBlocks = 2;  // blocks per turn of a main loop; every item begins with a new turn

// SM80: every lane copies 16 bytes at a time.
template <int kStages_>
class CpAsyncRing {
 public:
  static constexpr int kStages = kStages_;
  static constexpr bool kFillQueues = true;
  using Storage = CpAsyncStorage<kStages>;

  __device__ __forceinline__ void start(Storage& storage) { storage_ = &storage; }

  __device__ __forceinline__ void fill(int stage, bool wanted, const uint8_t* block) {
    constexpr int kChunks = kBlockBytes / 16;
    if (wanted) {
      const int lane = threadIdx.x % kWarp;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += kWarp) {
        if (chunk + kWarp <= kChunks || chunk + lane < kChunks) {
          ptx::cp_async_16(storage_->block[stage] + (chunk + lane) * 16, block + (chunk + lane) * 16);
        }
      }
    }
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ const uint8_t* wait(int stage, uint32_t) {
    ptx::cp_async_wait<kStages - 1>();
    __syncwarp();
    return storage_->block[stage];
  }

  __device__ __forceinline__ void fill_turn(int stage, int count, const uint8_t* first_block) {
#pragma unroll
    for (int i = 0; i < kTurnBlocks; ++i) fill(stage + i, i < count, first_block + i * kBlockBytes);
  }

  __device__ __forceinline__ const uint8_t* wait_in_turn(int stage, int i, uint32_t parity) {
    return wait(stage + i, parity);
  }

 private:
  Storage* storage_;
};

// SM90: one lane starts a bulk copy that completes on the stage's mbarrier.
template <int kStages_, int kStageBytes = kBlockBytes>
class BulkRing {
 public:
  static constexpr int kStages = kStages_;
  static constexpr bool kFillQueues = false;
  using Storage = BulkStorage<kStages, kStageBytes>;

  __device__ __forceinline__ void start(Storage& storage) {
    storage_ = &storage;
    blocks_ = ptx::shared_address(storage.block);
    landed_ = ptx::shared_address(storage.landed);
    policy_ = ptx::policy_evict_first();
    if (ptx::elect_one()) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) ptx::mbarrier_init(landed_ + stage * 8, 1);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
  }

  __device__ __forceinline__ void fill(int stage, bool wanted, const uint8_t* block) {
    const bool elected = ptx::elect_one();
    ptx::mbarrier_arrive_expect_if(elected, landed_ + stage * 8, wanted ? kBlockBytes : 0);
    ptx::bulk_load_if(elected && wanted, blocks_ + stage * kBlockBytes, block, kBlockBytes, landed_ + stage * 8,
                      policy_);
  }

  // The two warp tiles from first_tile on, and the scales of all four.
  __device__ __forceinline__ void fill_half(int stage, bool wanted, const uint8_t* block, int first_tile) {
    constexpr int kCodes = kBlockCodeBytes / 2;
    const bool elected = ptx::elect_one();
    const uint32_t to = blocks_ + stage * kBlockBytes;
    ptx::mbarrier_arrive_expect_if(elected, landed_ + stage * 8, wanted ? kCodes + kBlockScaleBytes : 0);
    ptx::bulk_load_if(elected && wanted, to, block + codes_at(first_tile, 0), kCodes, landed_ + stage * 8, policy_);
    ptx::bulk_load_if(elected && wanted, to + kBlockCodeBytes, block + kBlockCodeBytes, kBlockScaleBytes,
                      landed_ + stage * 8, policy_);
  }

  // So many warp tiles from first_tile on, and right behind their codes the scales of all four.
  __device__ __forceinline__ void fill_part(int stage, bool wanted, const uint8_t* block, int first_tile, int tiles) {
    const int codes = tiles * (kBlockCodeBytes / 4);
    const bool elected = ptx::elect_one();
    const uint32_t to = blocks_ + stage * kStageBytes;
    ptx::mbarrier_arrive_expect_if(elected, landed_ + stage * 8, wanted ? codes + kBlockScaleBytes : 0);
    ptx::bulk_load_if(elected && wanted, to, block + codes_at(first_tile, 0), codes, landed_ + stage * 8, policy_);
    ptx::bulk_load_if(elected && wanted, to + codes, block + kBlockCodeBytes, kBlockScaleBytes, landed_ + stage * 8,
                      policy_);
  }

  __device__ __forceinline__ const uint8_t* wait(int stage, uint32_t parity) {
    ptx::mbarrier_wait(landed_ + stage * 8, parity & 1);
    return storage_->block[stage];
  }

  // One copy, so memory is asked half as often for twice as much.
  __device__ __forceinline__ void fill_turn(int stage, int count, const uint8_t* first_block) {
    static_assert(kStageBytes == kBlockBytes && kTurnBlocks == 2);
    const bool elected = ptx::elect_one();
    const uint32_t bytes = count > 1 ? 2 * kBlockBytes : count > 0 ? kBlockBytes : 0;
    ptx::mbarrier_arrive_expect_if(elected, landed_ + stage * 8, bytes);
    ptx::bulk_load_if(elected && count > 0, blocks_ + stage * kBlockBytes, first_block, bytes, landed_ + stage * 8,
                      policy_);
  }

  __device__ __forceinline__ const uint8_t* wait_in_turn(int stage, int i, uint32_t parity) {
    return i == 0 ? wait(stage, parity) : storage_->block[stage + i];
  }

 private:
  Storage* storage_;
  uint32_t blocks_;
  uint32_t landed_;
  uint64_t policy_;
};

}  // namespace nvfp4::cuda
