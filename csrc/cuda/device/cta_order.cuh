// Sorting few slots by expert, by every CTA of wgmma_experts for itself in shared memory: as cta_sort.cuh does it for
// stream_gemm, but for any number of warps, more slots, and a scheduler that cuts the tiles itself. All CTAs must agree
// on which slot is in which tile of an expert, so the sort is stable.
#pragma once

#include "scheduler.cuh"
#include "shared_layout.h"

namespace nvfp4::cuda {

// By kThreads threads of the CTA, of which the first 16 warps sort. Slots in `order` are in the order of experts, and
// experts + 1 `offsets` say where each begins. `scratch` is kOrderScratch bytes. Ends before a barrier.
template <int kThreads>
__device__ __forceinline__ void order_slots(const Routing& routing, int* offsets, uint16_t* order, void* scratch) {
  constexpr int kWarps = kOrderWarps;
  constexpr int kPerLane = kOrderMaxSlots / (kWarps * kWarp);
  auto* count = static_cast<uint32_t (*)[kOrderBins / 2]>(scratch);  // [kWarps], two bins to a word
  auto* warp_sum = reinterpret_cast<uint32_t*>(count + kWarps);
  const int experts = static_cast<int>(routing.experts);
  const int slots = static_cast<int>(routing.tokens * routing.top_k);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const bool sorts = kThreads == kWarps * kWarp || warp < kWarps;
  // Each warp owns a run of neighbouring slots, and the warps behind the last run have none.
  const int run = round_up(ceil_div(slots, kWarps), kWarp);
  const int first = warp * run + lane;
  const int end = sorts ? min(slots, (warp + 1) * run) : 0;
  int bin[kPerLane];
  int rank[kPerLane] = {};  // among the slots of the bin in the run
  find_bins(routing, first, end, bin);
  for (int i = threadIdx.x; i < kWarps * kOrderBins / 2; i += kThreads) static_cast<uint32_t*>(scratch)[i] = 0;
  __syncthreads();
  auto* mine = reinterpret_cast<uint16_t*>(count[sorts ? warp : 0]);
  if (sorts) rank_in_run(bin, warp * run, end, mine, rank);
  __syncthreads();
  // The two halves of a word are two counts that never carry: there are at most kOrderMaxSlots slots.
  uint32_t both = 0;
  uint32_t sum = 0;
  uint32_t own = 0;
  if (sorts) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t c = count[w][threadIdx.x];
      count[w][threadIdx.x] = both;
      both += c;
    }
    own = (both & 0xFFFF) + (both >> 16);
    sum = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t below = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += below;
    }
    if (lane == kWarp - 1) warp_sum[warp] = sum;
  }
  __syncthreads();
  if (sorts) {
    const uint32_t share = lane < kWarps ? warp_sum[lane] : 0;
    const int begin = static_cast<int>(__reduce_add_sync(~0u, lane < warp ? share : 0) + sum - own);
    const int expert = 2 * threadIdx.x;
    if (expert <= experts) offsets[expert] = begin;
    if (expert + 1 <= experts) offsets[expert + 1] = begin + static_cast<int>(both & 0xFFFF);
  }
  __syncthreads();
  if (sorts) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (bin[i] >= 0) order[offsets[bin[i]] + mine[bin[i]] + rank[i]] = static_cast<uint16_t>(first + i * kWarp);
    }
  }
}

}  // namespace nvfp4::cuda
