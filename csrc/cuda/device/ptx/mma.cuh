// Matrix instructions of one warp, SM80. One PTX instruction per function; nothing here knows what it is used for.
#pragma once

#include "../common.cuh"

namespace nvfp4::cuda::ptx {

// d[16, 8] += a[16, 16] * b[16, 8]. Lane l (r = l / 4, t = l % 4) holds a = rows r, r+8, r, r+8 at k positions 2t, 2t,
// 2t+8, 2t+8 (and the next); b = k positions 2t, 2t+8 of column r; d = rows r, r, r+8, r+8 of columns 2t, 2t+1, 2t,
// 2t+1.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The 8x8 matrix of 16-bit values that a warp holds as fragments, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t m) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(m));
  return d;
}

}  // namespace nvfp4::cuda::ptx
