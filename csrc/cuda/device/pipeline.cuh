// Rings of weight blocks in shared memory, one ring per warp: a warp fills its own slots and is the only one to read
// them, so nothing but the warp itself is ever synchronised. Slots are filled and read in the same order.
//
//   start(storage)            once, by the whole warp
//   fill(slot, wanted, block) starts the copy of one block; if not wanted only the order of slots is kept
//   wait(slot, round)         until the slot's copy of an even or odd round has landed
//   kFillQueues               whether a copy queues behind the warp's earlier loads from shared memory. If not it may
//                             overtake them, and a slot may be filled only once the values of its old block are there
#pragma once

#include "common.cuh"
#include "decode.cuh"
#include "hopper.cuh"
#include "ptx.cuh"

namespace nvfp4::cuda {

constexpr int kRound = 2;  // blocks of one turn of a main loop; an item begins with a new turn

// SM80: every lane copies 16 bytes at a time.
template <int kSlots_>
class CpAsyncRing {
 public:
  static constexpr int kSlots = kSlots_;
  static constexpr bool kFillQueues = true;
  struct Storage {
    alignas(128) uint8_t block[kSlots][kBlockBytes];
  };

  __device__ __forceinline__ void start(Storage& storage) { storage_ = &storage; }

  __device__ __forceinline__ void fill(int slot, bool wanted, const uint8_t* block) {
    constexpr int kChunks = kBlockBytes / 16;
    if (wanted) {
      const int lane = threadIdx.x % kWarp;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += kWarp) {
        if (chunk + kWarp <= kChunks || chunk + lane < kChunks) {
          ptx::cp_async_16(storage_->block[slot] + (chunk + lane) * 16, block + (chunk + lane) * 16);
        }
      }
    }
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ const uint8_t* wait(int slot, uint32_t) {
    ptx::cp_async_wait<kSlots - 1>();
    __syncwarp();
    return storage_->block[slot];
  }

 private:
  Storage* storage_;
};

// SM90: one lane starts a bulk copy that completes on the slot's mbarrier.
template <int kSlots_>
class BulkRing {
 public:
  static constexpr int kSlots = kSlots_;
  static constexpr bool kFillQueues = false;
  struct Storage {
    alignas(128) uint8_t block[kSlots][kBlockBytes];
    alignas(8) uint64_t landed[kSlots];
  };

  __device__ __forceinline__ void start(Storage& storage) {
    storage_ = &storage;
    blocks_ = ptx::shared_address(storage.block);
    landed_ = ptx::shared_address(storage.landed);
    policy_ = ptx::policy_evict_first();
    if (ptx::elect_one()) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) ptx::mbarrier_init(landed_ + slot * 8, 1);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
  }

  __device__ __forceinline__ void fill(int slot, bool wanted, const uint8_t* block) {
    const bool elected = ptx::elect_one();
    ptx::mbarrier_arrive_expect_if(elected, landed_ + slot * 8, wanted ? kBlockBytes : 0);
    ptx::bulk_load_if(elected && wanted, blocks_ + slot * kBlockBytes, block, kBlockBytes, landed_ + slot * 8, policy_);
  }

  __device__ __forceinline__ const uint8_t* wait(int slot, uint32_t round) {
    ptx::mbarrier_wait(landed_ + slot * 8, round & 1);
    return storage_->block[slot];
  }

 private:
  Storage* storage_;
  uint32_t blocks_;
  uint32_t landed_;
  uint64_t policy_;
};

}  // namespace nvfp4::cuda
