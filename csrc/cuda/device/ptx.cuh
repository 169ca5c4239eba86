// One PTX instruction per function. Nothing here knows what it is used for.
#pragma once

#include "common.cuh"

namespace nvfp4::cuda::ptx {

// ---- integer and packed 16-bit arithmetic

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// a where the mask is set, b elsewhere
__device__ __forceinline__ uint32_t blend(uint32_t a, uint32_t b, uint32_t mask) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}

__device__ __forceinline__ uint32_t rotate_left(uint32_t a, uint32_t n) {
  uint32_t d;
  asm("shf.l.wrap.b32 %0, %1, %1, %2;" : "=r"(d) : "r"(a), "r"(n));
  return d;
}

// Both 16-bit lanes set to a's low or high one; as a pair of moves ptxas can fold it into the instruction that reads
// it.
__device__ __forceinline__ uint32_t broadcast_low(uint32_t a) {
  uint32_t d;
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %1;\n\tmov.b32 %0, {low, low};\n\t}" : "=r"(d) : "r"(a));
  return d;
}
__device__ __forceinline__ uint32_t broadcast_high(uint32_t a) {
  uint32_t d;
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %1;\n\tmov.b32 %0, {high, high};\n\t}" : "=r"(d) : "r"(a));
  return d;
}

// mul.bf16x2 needs SM90; a fused multiply-add of -0 is the same product on SM80, sign of zero included.
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
  return d;
}

__device__ __forceinline__ uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// ---- fp32

// NaN if either is.
__device__ __forceinline__ float min_nan(float a, float b) {
  float d;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

// One instruction each, to about 1e-7; results below 2^-126 are zero.
__device__ __forceinline__ float exp2(float x) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
__device__ __forceinline__ float reciprocal(float x) {
  float d;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

// ---- matrix multiply, SM80

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

// ---- loads

// Leaves the registers as they are if not wanted. Volatile keeps it where it is written: early, while what it feeds
// comes a block later.
__device__ __forceinline__ void load_global_128_if(bool wanted, const void* from, uint32_t& x, uint32_t& y, uint32_t& z,
                                                   uint32_t& w) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
      "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(x), "+r"(y), "+r"(z), "+r"(w)
      : "l"(from), "r"(static_cast<uint32_t>(wanted)));
}

// Words that other blocks write meanwhile: past L1, each time anew.
__device__ __forceinline__ uint4 load_relaxed_128(const void* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_relaxed_64(const void* from) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed_32(void* to, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ __forceinline__ void store_relaxed_64(void* to, uint2 v) {
  asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void load_shared_128_if(bool wanted, uint32_t from, uint32_t& x, uint32_t& y, uint32_t& z,
                                                   uint32_t& w) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
      "@p ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(x), "+r"(y), "+r"(z), "+r"(w)
      : "r"(from), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

// ---- asynchronous copies, SM80

__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
}

// 16 bytes of zeros if not wanted.
__device__ __forceinline__ void cp_async_16_or_zero(void* shared, const void* global, bool wanted) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(wanted ? 16 : 0)
      : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- one lane of a converged warp, SM90; unlike a test of the lane's number, it tells ptxas that it is one

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

// ---- predicated forms of hopper.cuh's, which need no branch around them

__device__ __forceinline__ void mbarrier_arrive_expect_if(bool wanted, uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %2, 0;\n\t"
      "@p mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;\n\t}" ::"r"(barrier),
      "r"(bytes), "r"(static_cast<uint32_t>(wanted))
      : "memory");
#endif
}

__device__ __forceinline__ void bulk_load_if(bool wanted, uint32_t to, const void* from, uint32_t bytes,
                                             uint32_t barrier, uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
      "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
      "%4;\n\t}" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy), "r"(static_cast<uint32_t>(wanted))
      : "memory");
#endif
}

// ---- dependent launches, SM90; on older architectures launches of a stream never overlap

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

// ---- barriers

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace nvfp4::cuda::ptx
