// A warp's arrival at an mbarrier, SM90.
#pragma once

#include "common.cuh"
#include "ptx/mbarrier.cuh"

namespace nvfp4::cuda {

// racecheck follows only lanes that arrive themselves. A library built for it has all lanes of a warp arrive.
#ifdef NVFP4_RACECHECK
constexpr int kWarpArrivals = kWarp;
#else
constexpr int kWarpArrivals = 1;
#endif

// By all lanes of a warp that is converged.
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
  if (kWarpArrivals == kWarp || lane == 0) ptx::mbarrier_arrive(barrier);
}

}  // namespace nvfp4::cuda
