// A weight as the kernels see it.
#pragma once

#include "shared.cuh"

namespace nvfp4::cuda::wgmma_experts {

inline ExpertGemm expert_gemm(const Weight& weight) {
  return {.weight = weight.packed,
          .expert_bytes = weight.expert_bytes,
          .global_scale = weight.global_scale,
          .n = weight.n,
          .gated = weight.gated,
          .panels = panels_of(weight.n),
          .row_tiles = 0,  // set by the launch
          .k_blocks = k_blocks_of(weight.k)};
}

// Panels come in pairs where the gate applies: a pair's features are a k-block of the next GEMM, zeros included.
template <class S>
int row_tiles(const ExpertGemm& gemm) {
  return ceil_div(gemm.gated ? round_up(gemm.panels, 2) : gemm.panels, S::kConsumers);
}

}  // namespace nvfp4::cuda::wgmma_experts
