// The host side that both architectures' instantiations share.
#pragma once

#include "../../launch.h"
#include "kernel.cuh"

namespace nvfp4::cuda {

using FewSlotsKernel = void (*)(FewSlotsParams);

// So few threads that their CTAs fit beside one of few_slots_mlp, whose end they wait for.
constexpr int kFillThreads = 128;
// Of a thread of few_slots_mlp on SM90, for the same reason: of an SM's 65536, 512 times 120 leave room for 128 times
// 24. With more, fill would begin only when few_slots_mlp has ended.
constexpr int kFewSlotsMaxRegisters = 120;

// Sizes are in units of 16 bytes.
static __global__ void __launch_bounds__(kFillThreads) fill_not_yet_kernel(uint4* a, int a_size, uint4* b, int b_size) {
  ptx::dependency_release();
  ptx::dependency_wait();
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int threads = gridDim.x * blockDim.x;
  const uint4 v = make_uint4(kNotYet, kNotYet, kNotYet, kNotYet);
  for (int i = thread; i < a_size; i += threads) a[i] = v;
  for (int i = thread; i < b_size; i += threads) b[i] = v;
}

// Fills in what params.h leaves to the launch.
inline void apply_plan(const FewSlotsPlan& plan, FewSlotsParams& p) {
  p.width = plan.width;
  p.token_bytes = plan.token_bytes;
  p.by_width = Divider(plan.width);
  p.by_grid = Divider(device().multiprocessors);
  for (int i = 0; i < 2; ++i) {
    p.gemm[i].items_per_tile = plan.gemm[i].items_per_tile;
    p.gemm[i].by_items_per_tile = Divider(plan.gemm[i].items_per_tile);
    p.gemm[i].all_rows = plan.gemm[i].all_rows;
    p.gemm[i].row_bytes = plan.gemm[i].row_bytes;
    p.gemm[i].row_chunks = plan.gemm[i].row_chunks;
    p.gemm[i].by_row_chunks = Divider(plan.gemm[i].row_chunks);
  }
}

inline void launch_few_slots(FewSlotsKernel kernel, const FewSlotsPlan& plan, FewSlotsParams p, void* stream) {
  apply_plan(plan, p);
  const int slots = p.gemm[1].rows;
  const dim3 grid(device().multiprocessors);
  allow_shared_memory(reinterpret_cast<const void*>(kernel));
  launch(fill_not_yet_kernel, grid, kFillThreads, 0, stream, "fill_not_yet", static_cast<uint4*>(p.hidden),
         slots * p.gemm[1].k / 8, reinterpret_cast<uint4*>(p.expert_out), slots * p.gemm[1].n / 4);
  launch_together(kernel, grid, kFewSlotsWarps * kWarp, plan.shared_bytes, stream, "few_slots_mlp", p);
}

}  // namespace nvfp4::cuda
