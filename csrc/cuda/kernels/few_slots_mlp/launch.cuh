// The host side that both architectures' instantiations share.
#pragma once

#include <algorithm>

#include "../../launch.h"
#include "kernel.cuh"

namespace nvfp4::cuda {

using FewSlotsKernel = void (*)(FewSlotsParams);

struct FewSlotsLaunch {
  FewSlotsKernel kernel;
  int warps;
  int ring_bytes;
};

// Lays out shared memory for tiles of at most `width` tokens; returns its bytes.
inline int lay_out(const FewSlotsLaunch& l, int width, FewSlotsParams& p) {
  const int grid = device().multiprocessors;
  const int64_t slots = p.routing.tokens * p.routing.top_k;
  const int tiles = static_cast<int>(std::min(slots, p.routing.experts + slots / width));
  int most_items = 0;
  p.width = width;
  p.by_width = Divider(width);
  p.by_grid = Divider(grid);
  p.token_bytes = 0;
  for (FewSlotsGemm& gemm : p.gemm) {
    const int items = ceil_div(tiles * gemm.panels, grid);
    const int cta_tiles = std::min(tiles, ceil_div(items - 1, gemm.panels) + 1);
    const int tile_rows = cta_tiles * width;
    gemm.all_rows = gemm.rows <= tile_rows;
    gemm.row_chunks = gemm.k_blocks * (kBlockK * kElementBytes / kChunkBytes);
    gemm.by_row_chunks = Divider(gemm.row_chunks);
    gemm.row_bytes = (gemm.row_chunks + 1) * kChunkBytes;  // one more, so that neighbouring rows differ in their banks
    p.token_bytes = std::max(p.token_bytes, std::min(gemm.rows, tile_rows) * gemm.row_bytes);
    most_items = std::max(most_items, items);
  }
  const int partials = (l.warps + most_items - 1) * width;
  return l.ring_bytes + p.token_bytes + partials * kPartialRows * static_cast<int>(sizeof(float));
}

// With tiles as wide as fit; returns 0 if none do.
inline int lay_out(const FewSlotsLaunch& l, FewSlotsParams& p) {
  constexpr int kMaxPanels = 8192;  // Divider
  if (std::max(p.gemm[0].panels, p.gemm[1].panels) > kMaxPanels) return 0;
  for (int width = static_cast<int>(std::min<int64_t>(p.routing.tokens, 8)); width > 0; width /= 2) {
    const int shared = lay_out(l, width, p);
    if (shared <= device().shared_memory_per_block) return shared;
  }
  return 0;
}

// So few threads that their CTAs fit beside one of few_slots_mlp, whose end they wait for.
constexpr int kFillThreads = 128;

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

inline bool few_slots_fit(const FewSlotsLaunch& l, FewSlotsParams p) { return lay_out(l, p) > 0; }

inline void launch_few_slots(const FewSlotsLaunch& l, FewSlotsParams p, void* stream) {
  const int shared = lay_out(l, p);
  const int slots = p.gemm[1].rows;
  const dim3 grid(device().multiprocessors);
  allow_shared_memory(reinterpret_cast<const void*>(l.kernel));
  launch(fill_not_yet_kernel, grid, kFillThreads, 0, stream, "fill_not_yet", static_cast<uint4*>(p.hidden),
         slots * p.gemm[1].k / 8, reinterpret_cast<uint4*>(p.expert_out), slots * p.gemm[1].n / 4);
  launch_together(l.kernel, grid, l.warps * kWarp, shared, stream, "few_slots_mlp", p);
}

}  // namespace nvfp4::cuda
