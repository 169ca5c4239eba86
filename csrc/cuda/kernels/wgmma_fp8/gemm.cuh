// The launch of the grouped GEMM.
#pragma once

#include "kernel.cuh"
#include "launch.cuh"

namespace nvfp4::cuda::wgmma_fp8 {

template <class S, class T, bool kGated>
void launch_gemm(Fp8Params params, const WgmmaPlan& plan, void* stream) {
  const auto kernel = gemm_kernel<S, T, kGated>;
  params.base.gemm[0].row_tiles = wgmma_experts::row_tiles<S>(params.base.gemm[0]);
  params.base.max_width = plan.max_width;
  params.base.stages = plan.stages;
  params.base.weights_leave_first = plan.weights_leave_first;
  params.base.extra_claims = wgmma_experts::is_short(params.base.gemm[0].k_blocks) ? 1 : 0;
  allow_shared_memory(reinterpret_cast<const void*>(kernel));
  launch(kernel, dim3(device().multiprocessors), kThreads<S>, plan.shared_bytes, stream, "wgmma fp8", params);
}

}  // namespace nvfp4::cuda::wgmma_fp8
