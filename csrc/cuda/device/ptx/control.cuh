// Launches, CTAs, warps and their registers. One PTX instruction per function; nothing here knows what it is used for.
#pragma once

#include "../common.cuh"

namespace nvfp4::cuda::ptx {

// ---- dependent launches, SM90; on older architectures the launches of a stream never overlap

// Until everything before this launch is complete and visible.
__device__ __forceinline__ void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch begin before this one ends.
__device__ __forceinline__ void dependency_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- CTA and warp

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// One lane of a converged warp, SM90. Unlike a test of the lane's number, it tells ptxas that it is only one.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "elect.sync _|p, 0xffffffff;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(elected));
#endif
  return elected != 0;
}

// Volatile, unlike threadIdx: read where it stands, and not kept from one use to the next.
__device__ __forceinline__ int thread_index() {
  int v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v;
}

// ---- registers of a warpgroup, SM90

template <int kRegisters>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace nvfp4::cuda::ptx
