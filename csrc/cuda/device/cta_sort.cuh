// Sorting few slots by expert, and cutting experts into tiles, by every CTA for itself in shared memory: there is no
// launch before that sorts, and no table to wait for.
#pragma once

#include "scheduler.cuh"

namespace nvfp4::cuda {

// Tiles of at most kMaxSlots slots, sorted by kWarps warps. They have size(), tile() and slot() as scheduler.cuh
// describes them. The sort is stable: all CTAs must agree on which slot is in which tile of an expert.
template <int kWarps>
class CtaSortedTiles {
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBins = 2 * kThreads;  // experts, and behind the last of them the skipped slots

 public:
  static constexpr int kMaxSlots = 1024;
  static constexpr int kMaxTiles = 1152;
  static constexpr int kMaxExperts = kBins - 1;

  struct Storage {
    uint16_t order[kMaxSlots];
    uint32_t tile[kMaxTiles];
  };
  // Only while it sorts.
  struct Scratch {
    // Slots of each bin in a warp's run; then where the next of them goes. A thread has two neighbouring bins.
    uint32_t count[kWarps][kBins / 2];
    uint32_t warp_sum[kWarps];
  };

  // By all threads of the CTA. `ready` waits until the routing may be read.
  template <class Ready>
  __device__ __forceinline__ CtaSortedTiles(const Routing& routing, int width, Storage& storage, Scratch& scratch,
                                            const Ready& ready)
      : storage_(storage) {
    const int experts = static_cast<int>(routing.experts);
    const int slots = static_cast<int>(routing.tokens * routing.top_k);
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    // Each warp owns a run of neighbouring slots, and the warps behind the last run have none.
    const int run = round_up(ceil_div(slots, kWarps), kWarp);
    const int runs = ceil_div(slots, run);
    const int first = warp * run + lane;
    const int end = min(slots, (warp + 1) * run);

    const bool has_bins = 2 * threadIdx.x <= experts;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (has_bins && w < runs) scratch.count[w][threadIdx.x] = 0;
    }
    ready();
    int bin[kPerLane];
    int rank[kPerLane];  // among the slots of the bin in the run
    find_bins(routing, first, end, bin);
    __syncthreads();
    auto* mine = reinterpret_cast<uint16_t*>(scratch.count[warp]);
    rank_in_run(bin, warp * run, end, mine, rank);
    __syncthreads();

    // The two halves of a word, here and below, are two counts that never carry: there are at most kMaxSlots slots.
    uint32_t count[kWarps];
    uint32_t both = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      count[w] = has_bins && w < runs ? scratch.count[w][threadIdx.x] : 0;
      both += count[w];
    }
    const int expert = 2 * threadIdx.x;  // and the next one
    const int low = static_cast<int>(both & 0xFFFF);
    const int high = static_cast<int>(both >> 16);
    const int low_tiles = expert < experts ? ceil_div(low, width) : 0;
    const int high_tiles = expert + 1 < experts ? ceil_div(high, width) : 0;
    const uint32_t own = static_cast<uint32_t>(low + high) | static_cast<uint32_t>(low_tiles + high_tiles) << 16;
    uint32_t sum = own;  // slots and tiles of the bins up to this thread's
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t below = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += below;
    }
    if (lane == kWarp - 1) scratch.warp_sum[warp] = sum;
    __syncthreads();
    const uint32_t share = lane < kWarps ? scratch.warp_sum[lane] : 0;
    const uint32_t before = __reduce_add_sync(~0u, lane < warp ? share : 0) + sum - own;
    const int begin = static_cast<int>(before & 0xFFFF);
    if (has_bins) {
      uint32_t next = static_cast<uint32_t>(begin) | static_cast<uint32_t>(begin + low) << 16;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < runs) scratch.count[w][threadIdx.x] = next;
        next += count[w];
      }
      int tile = static_cast<int>(before >> 16);
      const auto cut = [&](int e, int from, int tokens) {
        for (int done = 0; done < tokens; done += width) {
          storage.tile[tile++] = static_cast<uint32_t>(e) << kExpertShift |
                                 static_cast<uint32_t>(from + done) << kBeginShift |
                                 static_cast<uint32_t>(min(width, tokens - done));
        }
      };
      if (expert < experts) cut(expert, begin, low);
      if (expert + 1 < experts) cut(expert + 1, begin + low, high);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (bin[i] >= 0) storage.order[mine[bin[i]] + rank[i]] = static_cast<uint16_t>(first + i * kWarp);
    }
    size_ = static_cast<int>(__reduce_add_sync(~0u, share) >> 16);
    __syncthreads();
  }

  __device__ __forceinline__ int size() const { return size_; }

  __device__ __forceinline__ ExpertTile tile(int i) const {
    const uint32_t v = storage_.tile[i];
    constexpr uint32_t kBegin = (1 << (kExpertShift - kBeginShift)) - 1;
    constexpr uint32_t kCount = (1 << kBeginShift) - 1;
    return {static_cast<int>(v >> kExpertShift), static_cast<int>(v >> kBeginShift & kBegin),
            static_cast<int>(v & kCount)};
  }

  __device__ __forceinline__ int slot(const ExpertTile& tile) const {
    return storage_.order[tile.begin + min(static_cast<int>(threadIdx.x % kWarp), tile.count - 1)];
  }

 private:
  static constexpr int kPerLane = kMaxSlots / kThreads;

  // Expert, begin and count of a tile in one word.
  static constexpr int kExpertShift = 17;
  static constexpr int kBeginShift = 6;
  static_assert(kMaxSlots <= 1 << (kExpertShift - kBeginShift));
  static_assert(kMaxExperts < 1 << (32 - kExpertShift));

  const Storage& storage_;
  int size_;
};

}  // namespace nvfp4::cuda
