// What the experts' kernel needs beside route(): permuted tokens, cleared counters, filled rows of skipped slots.
#pragma once

#include "../../device/gather.cuh"
#include "../../device/ptx/control.cuh"
#include "shared.cuh"

namespace nvfp4::cuda::wgmma_experts {

constexpr int kPrepareThreads = 256;
// What gathering reads behind the permuted tokens where the number of k-blocks is odd.
constexpr int kOverrun = kTokenBytes;

struct PrepareParams {
  const uint16_t* x;
  uint4* permuted;  // [rows, k_blocks * 8], and kOverrun bytes if k_blocks is odd
  int64_t rows;
  int64_t k;
  bool x_is_older;  // than the launch before this one
  int* control;
  int control_size;
  // Rows of skipped slots to fill, with offsets[experts + 1] as in CheckedRouting, or out == null.
  const int* order;
  const int* offsets;
  int experts;
  int64_t slots;
  uint4* out;
  int64_t out_chunks;  // of kChunkBytes per row
};

// All that CTAs which sort for themselves need. A dependent begins when the launch before this one is complete: what
// that wrote may be read without another wait.
static __global__ void __launch_bounds__(kPrepareThreads) clear_kernel(int* control, int control_size) {
  ptx::dependency_wait();
  ptx::dependency_release();
  for (int i = threadIdx.x; i < control_size; i += kPrepareThreads) control[i] = 0;
}

static __global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ PrepareParams p) {
  const int64_t thread = blockIdx.x * int64_t{kPrepareThreads} + threadIdx.x;
  const int64_t threads = gridDim.x * int64_t{kPrepareThreads};
  if (!p.x_is_older) ptx::dependency_wait();
  ptx::dependency_release();
  for (int64_t i = thread; i < p.control_size; i += threads) p.control[i] = 0;
  const int64_t k_blocks = ceil_div<int64_t>(p.k, kBlockK);
  if (k_blocks % kStageBlocks != 0 && thread < kOverrun / kChunkBytes) {
    p.permuted[p.rows * k_blocks * (kTokenBytes / kChunkBytes) + thread] = make_uint4(0, 0, 0, 0);
  }
  if (reinterpret_cast<uintptr_t>(p.x) % sizeof(uint32_t) == 0) {
    permute_rows<true>(p.x, p.permuted, p.rows, p.k, thread / kWarp, threads / kWarp);
  } else {
    permute_rows<false>(p.x, p.permuted, p.rows, p.k, thread / kWarp, threads / kWarp);
  }
  ptx::dependency_wait();
  if (p.out == nullptr) return;
  const uint32_t fill = p.offsets[p.experts + 1];
  for (int64_t s = p.offsets[p.experts] + blockIdx.x; s < p.slots; s += gridDim.x) {
    uint4* row = p.out + p.order[s] * p.out_chunks;
    for (int64_t i = threadIdx.x; i < p.out_chunks; i += kPrepareThreads) row[i] = make_uint4(fill, fill, fill, fill);
  }
}

}  // namespace nvfp4::cuda::wgmma_experts
