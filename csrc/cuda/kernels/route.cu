#include <algorithm>

#include "../../common.h"
#include "../device/ptx/control.cuh"
#include "../device/scheduler.cuh"
#include "../launch.h"
#include "route.h"

namespace nvfp4::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr uint32_t kNanPair = 0xFFFFFFFFu;  // two values of either 16-bit type
constexpr int kBatch = 4;                   // ids a lane loads before it looks at the first

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

// The bin of a slot: its local expert, or the last bin.
__device__ __forceinline__ int bin_of(const Routing& routing, int64_t slot, int bins) {
  const int expert = local_expert(routing, slot);
  return expert < 0 ? bins - 1 : expert;
}

struct Span {
  int begin;
  int end;
};

// The `part`-th of pieces of `length`, cut short at the end.
__device__ __forceinline__ Span span_of(int part, int length, Span whole) {
  const int begin = min(whole.begin + part * length, whole.end);
  return {begin, min(begin + length, whole.end)};
}

// What a slot's bin is kept in between the passes: an id that somebody changes meanwhile counts as one of its values.
using Bin = uint16_t;

// bin_of_slot[s] = the bin of slot s; counts[b] = how many slots of block b's span fall into each bin.
__global__ void __launch_bounds__(kMaxThreads, 1)
    count_slots_kernel(Routing routing, int span, Bin* bin_of_slot, int32_t* counts) {
  extern __shared__ int shared[];
  const int bins = static_cast<int>(routing.experts) + 1;
  const int slots = static_cast<int>(routing.tokens * routing.top_k);
  const Span mine = span_of(blockIdx.x, span, {0, slots});
  for (int i = threadIdx.x; i < bins; i += blockDim.x) shared[i] = 0;
  ptx::dependency_wait();
  ptx::dependency_release();
  __syncthreads();
  for (int slot = mine.begin + threadIdx.x; slot < mine.end; slot += blockDim.x) {
    const int bin = bin_of(routing, slot, bins);
    bin_of_slot[slot] = static_cast<Bin>(bin);
    atomicAdd(&shared[bin], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) counts[blockIdx.x * bins + i] = shared[i];
}

struct SortParams {
  Routing routing;
  int warps;              // that sort, of each block
  int span;               // slots of each block
  Bin* bin_of_slot;       // [slots]; from count_slots_kernel, or made here if there is one block
  const int32_t* counts;  // [blocks, bins] from count_slots_kernel; null: there is one block
  int32_t* order;
  int32_t* offsets;
  int4* tile_table;  // or null
  int tile_width;
};

// A stable counting sort. Block b owns the b-th span of slots, its warp w the span's w-th run and row w of `before`.
// Counting is atomic, placing is not, so the order is the slots' own.
__global__ void __launch_bounds__(kMaxThreads, 1) sort_slots_kernel(const __grid_constant__ SortParams p) {
  extern __shared__ int shared[];
  const int bins = static_cast<int>(p.routing.experts) + 1;  // the last is for skipped slots
  int* first = shared;                                       // [bins] where this block's slots of a bin begin in order
  int* before = shared + bins;  // [warps, bins] slots of the warp; then: of the warps before it, and as it places them
  const int slots = static_cast<int>(p.routing.tokens * p.routing.top_k);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const Span block = span_of(blockIdx.x, p.span, {0, slots});
  const Span run = span_of(warp, round_up(ceil_div(p.span, p.warps), kWarp), block);
  int* mine = before + warp * bins;

  for (int i = threadIdx.x; i < p.warps * bins; i += blockDim.x) before[i] = 0;
  ptx::dependency_wait();
  ptx::dependency_release();
  __syncthreads();
  for (int slot = run.begin + lane; slot < run.end; slot += kWarp) {
    int bin;
    if (p.counts != nullptr) {
      bin = p.bin_of_slot[slot];
    } else {
      bin = bin_of(p.routing, slot, bins);
      p.bin_of_slot[slot] = static_cast<Bin>(bin);  // the same thread reads it
    }
    atomicAdd(&mine[bin], 1);
  }
  __syncthreads();

  int sorted = 0;
  for (int base = 0; base < bins; base += blockDim.x) {
    const int bin = base + threadIdx.x;
    int own = 0;
    int earlier = 0;  // in blocks before this one
    int all = 0;
    if (bin < bins) {
      for (int w = 0; w < p.warps; ++w) {
        const int c = before[w * bins + bin];
        before[w * bins + bin] = own;
        own += c;
      }
      all = own;
      if (p.counts != nullptr) {
        all = 0;
        for (int b = 0; b < gridDim.x; ++b) {
          const int c = p.counts[b * bins + bin];
          if (b < blockIdx.x) earlier += c;
          all += c;
        }
      }
    }
    int total;
    const int at = sorted + exclusive_sum(all, total);
    if (bin < bins) {
      first[bin] = at + earlier;
      if (blockIdx.x == 0) p.offsets[bin] = at;  // bins - 1 == experts: where the skipped begin
    }
    sorted += total;
  }
  __syncthreads();

  for (int base = run.begin; base < run.end; base += kBatch * kWarp) {
    int bin[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int slot = base + i * kWarp + lane;
      bin[i] = slot < run.end ? p.bin_of_slot[slot] : -1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const unsigned peers = __match_any_sync(~0u, bin[i]);
      const int rank = __popc(peers & ((1u << lane) - 1));
      if (bin[i] >= 0) p.order[first[bin[i]] + mine[bin[i]] + rank] = base + i * kWarp + lane;
      __syncwarp();
      if (bin[i] >= 0 && rank == 0) mine[bin[i]] += __popc(peers);
      __syncwarp();
    }
  }
  if (p.tile_table != nullptr && blockIdx.x == 0) {
    write_tiles(bins - 1, p.tile_width, p.tile_table, [&](int e) { return first[e]; });
  }
}

constexpr int kSeenWords = 10 * 1024;  // of shared memory, a bit per slot

// Copies a routing that came from anywhere, reading every entry once, and checks the copy: every slot once in order;
// offsets begin with 0, do not decrease and do not exceed the slots. If it fails the copy becomes one in which no slot
// has an expert. One block.
__global__ void __launch_bounds__(kMaxThreads, 1)
    check_routing_kernel(const int32_t* order, const int32_t* offsets, int slots, int experts, int32_t* checked_order,
                         int32_t* checked_offsets) {
  __shared__ uint32_t seen[kSeenWords];
  ptx::dependency_wait();
  ptx::dependency_release();
  bool bad = false;
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) checked_offsets[e] = offsets[e];
  for (int i = threadIdx.x; i < slots; i += blockDim.x) checked_order[i] = order[i];
  __syncthreads();
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) {
    const int before = e == 0 ? 0 : checked_offsets[e - 1];
    bad |= checked_offsets[e] < before || checked_offsets[e] > (e == 0 ? 0 : slots);
  }
  for (int64_t base = 0; base < slots; base += kSeenWords * 32) {
    const int words = static_cast<int>(min(int64_t{kSeenWords}, ceil_div<int64_t>(slots - base, 32)));
    for (int i = threadIdx.x; i < words; i += blockDim.x) seen[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < slots; i += blockDim.x) {
      const int64_t slot = checked_order[i] - base;
      if (slot < 0 || slot >= int64_t{words} * 32) continue;  // another round's
      const uint32_t bit = 1u << (slot % 32);
      bad |= (atomicOr(&seen[slot / 32], bit) & bit) != 0;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < slots; i += blockDim.x) bad |= checked_order[i] < 0 || checked_order[i] >= slots;
  bad = __syncthreads_or(bad);
  if (bad) {
    for (int e = threadIdx.x; e <= experts; e += blockDim.x) checked_offsets[e] = 0;
    for (int i = threadIdx.x; i < slots; i += blockDim.x) checked_order[i] = i;
  }
  if (threadIdx.x == 0) checked_offsets[experts + 1] = bad ? kNanPair : 0;
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
  const uint32_t fill = offsets[experts + 1];
  for (int64_t i = offsets[experts] + blockIdx.x - 1; i < slots; i += gridDim.x - 1) {
    uint4* row = out + order[i] * row_vectors;
    for (int64_t v = threadIdx.x; v < row_vectors; v += blockDim.x) row[v] = make_uint4(fill, fill, fill, fill);
  }
}

// One block's matching of lanes is what takes time, so many slots go to many blocks.
int64_t sort_blocks(const Routing& routing) {
  constexpr int64_t kSpan = 2048;
  constexpr int64_t kMaxBlocks = 64;
  return std::clamp<int64_t>(ceil_div<int64_t>(routing.tokens * routing.top_k, kSpan), 1, kMaxBlocks);
}

struct SortWorkspace {
  Bin* bin_of_slot;
  int32_t* counts;
};

SortWorkspace lay_out(Workspace& workspace, const Routing& routing) {
  const int64_t blocks = sort_blocks(routing);
  Bin* bin_of_slot = workspace.take<Bin>(routing.tokens * routing.top_k);
  return {bin_of_slot, blocks > 1 ? workspace.take<int32_t>(blocks * (routing.experts + 1)) : nullptr};
}

}  // namespace

size_t sort_workspace(const Routing& routing) {
  Workspace workspace(nullptr);
  lay_out(workspace, routing);
  return workspace.bytes();
}

void sort_slots(const Routing& routing, int32_t* order, int32_t* offsets, int4* tile_table, int tile_width,
                void* workspace, void* stream) {
  const int64_t bins = routing.experts + 1;
  const int64_t room = 48 * 1024 / sizeof(int) - kMaxWarps - bins;
  const int64_t slots = routing.tokens * routing.top_k;
  const int64_t blocks = sort_blocks(routing);
  const int64_t span = ceil_div(slots, blocks);
  const int64_t warps =
      std::min({std::max<int64_t>(ceil_div<int64_t>(span, kWarp), 1), room / bins, int64_t{kMaxWarps}});
  if (warps < 1) {
    throw std::runtime_error("nvfp4::route: expected at most 6000 experts on CUDA, got " +
                             std::to_string(routing.experts));
  }
  Workspace arrays(workspace);
  const SortWorkspace space = lay_out(arrays, routing);
  if (space.counts != nullptr) {
    launch(count_slots_kernel, dim3(static_cast<unsigned>(blocks)), kMaxThreads, bins * sizeof(int), stream,
           "route: count", routing, static_cast<int>(span), space.bin_of_slot, space.counts);
  }
  const SortParams params{
      .routing = routing,
      .warps = static_cast<int>(warps),
      .span = static_cast<int>(span),
      .bin_of_slot = space.bin_of_slot,
      .counts = space.counts,
      .order = order,
      .offsets = offsets,
      .tile_table = tile_table,
      .tile_width = tile_width,
  };
  const int threads = warps <= 16 ? kMaxThreads / 2 : kMaxThreads;
  launch(sort_slots_kernel, dim3(static_cast<unsigned>(blocks)), threads, (1 + warps) * bins * sizeof(int), stream,
         "route", params);
}

void check_routing(const int32_t* order, const int32_t* offsets, int64_t slots, int64_t experts,
                   const CheckedRouting& checked, void* stream) {
  launch(check_routing_kernel, dim3(1), kMaxThreads, 0, stream, "check_routing", order, offsets,
         static_cast<int>(slots), static_cast<int>(experts), checked.order, checked.offsets);
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
