#include <algorithm>

#include "../device/ptx.cuh"
#include "../device/scheduler.cuh"
#include "../launch.h"
#include "route.h"

namespace nvfp4::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kBatch = 4;  // ids a lane loads before it looks at the first

// Sum of `value` over the threads before this one; the block's sum in `total`. All threads of the block call it.
__device__ __forceinline__ int exclusive_sum(int value, int& total) {
  __shared__ int warp_sum[kMaxWarps];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += below;
  }
  __syncthreads();  // the previous call's warp_sum has been read
  if (lane == kWarp - 1) warp_sum[warp] = sum;
  __syncthreads();
  const int share = lane < blockDim.x / kWarp ? warp_sum[lane] : 0;
  total = __reduce_add_sync(~0u, share);
  return __reduce_add_sync(~0u, lane < warp ? share : 0) + sum - value;
}

// Tiles of all experts, in order of experts; begin(e) is the first place of expert e in order.
template <class Begin>
__device__ __forceinline__ void write_tiles(int experts, int width, int4* table, const Begin& begin) {
  int tiles = 0;
  for (int base = 0; base < experts; base += blockDim.x) {
    const int e = base + threadIdx.x;
    const int first = e < experts ? begin(e) : 0;
    const int count = e < experts ? begin(e + 1) - first : 0;
    int total;
    int at = tiles + exclusive_sum(ceil_div(count, width), total);
    for (int done = 0; done < count; done += width)
      table[1 + at++] = make_int4(e, first + done, min(width, count - done), 0);
    tiles += total;
  }
  if (threadIdx.x == 0) table[0] = make_int4(tiles, 0, 0, 0);
}

// A stable counting sort by one block. Warp w owns the w-th run of slots and row w of `count`, so nothing is atomic and
// the order is the slots' own.
__global__ void __launch_bounds__(kMaxThreads, 1)
    sort_slots_kernel(Routing routing, int warps, int32_t* order, int32_t* offsets, int4* tile_table, int tile_width) {
  extern __shared__ int shared[];
  const int bins = static_cast<int>(routing.experts) + 1;  // the last is for skipped slots
  int* first = shared;                                     // [bins + 1] where a bin begins in order
  int* count = shared + bins + 1;  // [warps, bins] slots of the warp; then: of the warps before it
  const int slots = static_cast<int>(routing.tokens * routing.top_k);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int run = round_up(ceil_div(slots, warps), kWarp);
  const int run_begin = min(warp * run, slots);
  const int run_end = warp < warps ? min(run_begin + run, slots) : run_begin;

  for (int i = threadIdx.x; i < warps * bins; i += blockDim.x) count[i] = 0;
  ptx::dependency_wait();
  ptx::dependency_release();
  __syncthreads();

  const unsigned below = (1u << lane) - 1;
  int* mine = count + warp * bins;
  // Calls visit(slot, bin, rank) for the run in order, bin -1 beyond its end; `rank` counts the lanes below that have
  // the same bin. Then adds the slots to the warp's counts.
  const auto for_each = [&](const auto& visit) {
    for (int base = run_begin; base < run_end; base += kBatch * kWarp) {
      int bin[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int slot = base + i * kWarp + lane;
        bin[i] = -1;
        if (slot < run_end) {
          const int expert = local_expert(routing, slot);
          bin[i] = expert < 0 ? bins - 1 : expert;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const unsigned peers = __match_any_sync(~0u, bin[i]);
        const bool is_first = (peers & below) == 0;
        visit(base + i * kWarp + lane, bin[i], __popc(peers & below));
        __syncwarp();
        if (bin[i] >= 0 && is_first) mine[bin[i]] += __popc(peers);
        __syncwarp();
      }
    }
  };
  for_each([](int, int, int) {});
  __syncthreads();

  int sorted = 0;
  for (int base = 0; base < bins; base += blockDim.x) {
    const int bin = base + threadIdx.x;
    int sum = 0;
    if (bin < bins) {
      for (int w = 0; w < warps; ++w) {
        const int c = count[w * bins + bin];
        count[w * bins + bin] = sum;
        sum += c;
      }
    }
    int total;
    const int at = sorted + exclusive_sum(sum, total);
    if (bin < bins) {
      first[bin] = at;
      offsets[bin] = at;  // bins - 1 == experts: where the skipped begin
    }
    sorted += total;
  }
  __syncthreads();

  for_each([&](int slot, int bin, int rank) {
    if (bin >= 0) order[first[bin] + mine[bin] + rank] = slot;
  });
  if (tile_table != nullptr) {
    write_tiles(bins - 1, tile_width, tile_table, [&](int e) { return first[e]; });
  }
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    cut_tiles_kernel(const int32_t* order, const int32_t* offsets, int slots, int experts, int4* tile_table,
                     int tile_width, uint4* out, int64_t row_vectors) {
  ptx::dependency_wait();
  ptx::dependency_release();
  if (blockIdx.x == 0) {
    if (tile_table != nullptr) write_tiles(experts, tile_width, tile_table, [&](int e) { return offsets[e]; });
    return;
  }
  for (int64_t i = offsets[experts] + blockIdx.x - 1; i < slots; i += gridDim.x - 1) {
    uint4* row = out + order[i] * row_vectors;
    for (int64_t v = threadIdx.x; v < row_vectors; v += blockDim.x) row[v] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace

void sort_slots(const Routing& routing, int32_t* order, int32_t* offsets, int4* tile_table, int tile_width,
                void* stream) {
  const int64_t bins = routing.experts + 1;
  const int64_t room = 48 * 1024 / sizeof(int) - kMaxWarps - (bins + 1);
  const int64_t slots = routing.tokens * routing.top_k;
  const int64_t warps =
      std::min({std::max<int64_t>(ceil_div<int64_t>(slots, kWarp), 1), room / bins, int64_t{kMaxWarps}});
  if (warps < 1) {
    throw std::runtime_error("nvfp4::route: expected at most 6000 experts on CUDA, got " +
                             std::to_string(routing.experts));
  }
  const int threads = warps <= 16 ? kMaxThreads / 2 : kMaxThreads;
  const size_t shared = (bins + 1 + warps * bins) * sizeof(int);
  launch(sort_slots_kernel, dim3(1), threads, shared, stream, "route", routing, static_cast<int>(warps), order, offsets,
         tile_table, tile_width);
}

void cut_tiles(const int32_t* order, const int32_t* offsets, int64_t slots, int64_t experts, int4* tile_table,
               int tile_width, void* out, int64_t row_bytes, void* stream) {
  launch(cut_tiles_kernel, dim3(device().multiprocessors), kMaxThreads, 0, stream, "cut_tiles", order, offsets,
         static_cast<int>(slots), static_cast<int>(experts), tile_table, tile_width, static_cast<uint4*>(out),
         row_bytes / 16);
}

size_t tile_table_bytes(int64_t slots, int64_t experts, int tile_width) {
  return tile_table_entries(slots, experts, tile_width) * sizeof(int4);
}

}  // namespace nvfp4::cuda
