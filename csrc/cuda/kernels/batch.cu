#include <stdexcept>
#include <string>

#include "../device/gather.cuh"
#include "../device/ptx/control.cuh"
#include "../device/ragged_tiles.cuh"
#include "../launch.h"
#include "batch.h"
#include "stream_gemm/plan.h"

namespace nvfp4::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kTokenVectors = 8;  // of 16 bytes, in a token's 64 k

// sums[e] = the sum of value(i) over i < e, for e up to `count` itself. By one warp.
template <class Value>
__device__ __forceinline__ void prefix_sums(int count, int* sums, const Value& value) {
  const int lane = threadIdx.x % kWarp;
  const int share = ceil_div(count, kWarp);
  const int first = min(lane * share, count);
  const int last = min(first + share, count);
  int own = 0;
  for (int i = first; i < last; ++i) own += value(i);
  int before = own;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += below;
  }
  if (lane == kWarp - 1) sums[count] = before;
  before -= own;
  for (int i = first; i < last; ++i) {
    sums[i] = before;
    before += value(i);
  }
}

// A CTA's own copy of the counts: somebody may be changing them, and every use must see the same numbers.
struct Batch {
  const int* tokens;   // [experts], within [0, rows_per_expert]
  const int* offsets;  // [experts + 1]
  int path;            // that is taken
};

__device__ __forceinline__ Batch read_batch(const BatchParams& p, int* shared) {
  int* tokens = shared;
  int* offsets = shared + p.experts;
  int active = 0;
  for (int base = 0; base < p.experts; base += kThreads) {
    const int e = base + threadIdx.x;
    const int count = e < p.experts ? min(max(p.expert_num_tokens[e], 0), p.rows_per_expert) : 0;
    if (e < p.experts) tokens[e] = count;
    active += __syncthreads_count(count > 0);
  }
  if (threadIdx.x < kWarp) prefix_sums(p.experts, offsets, [&](int e) { return tokens[e]; });
  __syncthreads();
  int path = 0;
  while (path + 1 < p.paths && offsets[p.experts] > p.path[path].most_per_expert * active) ++path;
  return {tokens, offsets, path};
}

// All tiles, expert after expert; `first_tile` [experts + 1] is shared memory.
__device__ __forceinline__ void write_tiles(const BatchParams& p, const Batch& batch, const BatchPath& path,
                                            int* first_tile) {
  const int width = path.tile_width;
  if (threadIdx.x < kWarp) prefix_sums(p.experts, first_tile, [&](int e) { return ceil_div(batch.tokens[e], width); });
  __syncthreads();
  const int tiles = first_tile[p.experts];
  for (int i = threadIdx.x; i < tiles; i += kThreads) {
    const int e = find_expert(first_tile, p.experts, i);
    const int done = (i - first_tile[e]) * width;
    path.tile_table[1 + i] = make_int4(e, e * p.rows_per_expert + done, min(width, batch.tokens[e] - done), 0);
  }
  if (threadIdx.x == 0) {
    path.tile_table[0] = make_int4(tiles, stream_k_ways(p.k_blocks[0], int64_t{tiles} * p.panels[0], p.multiprocessors),
                                   stream_k_ways(p.k_blocks[1], int64_t{tiles} * p.panels[1], p.multiprocessors), 0);
  }
}

// What launches behind this one may find, by one CTA: their memory is safe because all of it comes from one copy of the
// counts.
__device__ __forceinline__ void write_plan(const BatchParams& p, const Batch& batch, int* shared) {
  for (int i = 0; i < p.paths; ++i) {
    const BatchPath& path = p.path[i];
    const bool taken = i == batch.path;
    if (path.offsets != nullptr) {
      for (int e = threadIdx.x; e <= p.experts; e += kThreads) {
        path.offsets[e] = taken ? batch.offsets[e] : 0;
        path.control[e] = 0;
      }
    } else if (taken) {
      write_tiles(p, batch, path, shared);
    } else if (threadIdx.x == 0) {
      path.tile_table[0] = make_int4(0, 1, 1, 0);  // warps divide by the number of ways
    }
  }
  if (p.path[batch.path].offsets == nullptr) return;
  for (int i = threadIdx.x; i < batch.offsets[p.experts]; i += kThreads) {
    const int e = find_expert(batch.offsets, p.experts, i);
    p.order[i] = e * p.rows_per_expert + i - batch.offsets[e];
  }
}

template <bool kAligned>
__device__ __forceinline__ void permute_batch(const BatchParams& p, const Batch& batch, int64_t warp, int64_t warps) {
  permute_rows<kAligned>(p.x, p.permuted, batch.offsets[p.experts], p.k, warp, warps, [&](int64_t i) {
    const int e = find_expert(batch.offsets, p.experts, static_cast<int>(i));
    return int64_t{e} * p.rows_per_expert + i - batch.offsets[e];
  });
}

// Gathering reads the first block behind a row where the number of blocks is odd: behind an expert's last row nobody
// else may have written one.
__device__ __forceinline__ void write_overrun(const BatchParams& p, const Batch& batch, int64_t cta, int64_t ctas) {
  const int k_blocks = ceil_div(p.k, kGatherBlock);
  if (k_blocks % 2 == 0) return;
  for (int64_t i = cta * kThreads + threadIdx.x; i < int64_t{p.experts} * kTokenVectors; i += ctas * kThreads) {
    const int e = static_cast<int>(i / kTokenVectors);
    const int next = batch.tokens[e] == p.rows_per_expert ? e + 1 : e;
    if (batch.tokens[e] == 0 || (next != e && next < p.experts && batch.tokens[next] > 0)) continue;
    const int64_t row = int64_t{e} * p.rows_per_expert + batch.tokens[e];
    p.permuted[row * k_blocks * kTokenVectors + i % kTokenVectors] = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void clear_rest(const BatchParams& p, const Batch& batch, int64_t cta, int64_t ctas) {
  const int64_t rows = int64_t{p.experts} * p.rows_per_expert;
  for (int64_t row = cta; row < rows; row += ctas) {
    const int e = static_cast<int>(row / p.rows_per_expert);
    if (row - int64_t{e} * p.rows_per_expert < batch.tokens[e]) continue;
    uint4* to = p.out + row * p.row_vectors;
    for (int64_t i = threadIdx.x; i < p.row_vectors; i += kThreads) to[i] = make_uint4(0, 0, 0, 0);
  }
}

// The first CTA writes the plan, the others prepare rows.
__global__ void __launch_bounds__(kThreads) begin_batch_kernel(const __grid_constant__ BatchParams p) {
  extern __shared__ int shared[];
  ptx::dependency_wait();
  ptx::dependency_release();
  const Batch batch = read_batch(p, shared);
  if (blockIdx.x == 0) return write_plan(p, batch, shared + 2 * p.experts + 1);
  const int64_t cta = blockIdx.x - 1;
  const int64_t ctas = gridDim.x - 1;
  if (p.path[batch.path].offsets != nullptr) {
    const int64_t warp = (cta * kThreads + threadIdx.x) / kWarp;
    const int64_t warps = ctas * (kThreads / kWarp);
    if (reinterpret_cast<uintptr_t>(p.x) % sizeof(uint32_t) == 0) {
      permute_batch<true>(p, batch, warp, warps);
    } else {
      permute_batch<false>(p, batch, warp, warps);
    }
    write_overrun(p, batch, cta, ctas);
  }
  if (p.out != nullptr) clear_rest(p, batch, cta, ctas);
}

}  // namespace

void begin_batch(const BatchParams& params, void* stream) {
  if (params.experts > kMaxBatchExperts) {
    throw std::runtime_error("nvfp4::batched_moe: expected at most " + std::to_string(kMaxBatchExperts) +
                             " experts on CUDA, got " + std::to_string(params.experts));
  }
  bool has_rows = params.out != nullptr;
  for (int i = 0; i < params.paths; ++i) has_rows |= params.path[i].offsets != nullptr;
  const int ctas = has_rows ? 1 + device().multiprocessors * 2 : 1;
  const size_t shared = (3 * params.experts + 2) * sizeof(int);  // counts, their sums, the sums of tiles
  launch(begin_batch_kernel, dim3(ctas), kThreads, shared, stream, "begin_batch", params);
}

}  // namespace nvfp4::cuda
