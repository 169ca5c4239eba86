// What the FP8 GEMMs need before them: rows of E4M3 in the order of k that decode_fp8.cuh's fragments want, each with
// one scale.
//
// Tokens: row / scale, rounded to E4M3, with scale = largest magnitude / 448. `hidden`: GEMM1 writes each 32 of its
// values with a power of two as their scale, 2^e, e a multiple of 8 with the largest below 256, because it does not
// know the rest of the row; settle_rows() then brings a row's values to the row's largest e. It seldom finds any to
// change.
#pragma once

#include "../../device/decode_fp8.cuh"
#include "../../device/ptx/control.cuh"
#include "../../device/ptx/fp8.cuh"
#include "plan.h"
#include "shared.cuh"

namespace nvfp4::cuda::wgmma_fp8 {

// 16 values of quad thread t of a block, as the words t of the block's four 16-byte chunks 2 j + h: four consecutive
// values each (fp8_code).
__device__ __forceinline__ void convert(const float (&v)[16], uint32_t (&word)[4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    static_assert(fp8_code(1, 0, 0) == 8 && fp8_code(0, 1, 3) == 7);
    word[w] = ptx::to_e4m3x2(v[4 * w], v[4 * w + 1]) | ptx::to_e4m3x2(v[4 * w + 2], v[4 * w + 3]) << 16;
  }
}

constexpr int kQuantizeThreads = 256;

struct QuantizeParams {
  const uint16_t* x;  // [rows, k], 16-byte aligned, k a multiple of 16
  int64_t rows;
  int k;
  int top_k;
  float factor;              // what decoding and converting leave out
  const float* slot_weight;  // [rows * top_k], or null: all 1
  uint8_t* out;              // [rows, k_blocks * 64], and 64 bytes behind
  float* slot_scale;         // [rows * top_k]
  bool x_is_older;           // x and the workspace were ready before the launch before this one
  int* control;
  int control_size;
};

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_rows_kernel(const __grid_constant__ QuantizeParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ float warp_largest[2][kQuantizeThreads / kWarp];
  const int thread = threadIdx.x;
  const int lane = thread % kWarp;
  if (!p.x_is_older) ptx::dependency_wait();
  ptx::dependency_release();
  for (int i = blockIdx.x * kQuantizeThreads + thread; i < p.control_size; i += gridDim.x * kQuantizeThreads) {
    p.control[i] = 0;
  }
  const int groups = ceil_div(p.k, kBlockK) * 4;
  // Of an odd number of blocks a stage copies what lies behind the last one too, here behind the last row.
  if (blockIdx.x == 0 && thread < kBlockK / 4) {
    reinterpret_cast<uint32_t*>(p.out + p.rows * groups * 16)[thread] = 0;
  }
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
    const uint16_t* x = p.x + row * p.k;
    const auto load = [&](int group, float (&v)[16]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = group * 16 + half * 8;
        const uint4 eight = k < p.k ? *reinterpret_cast<const uint4*>(x + k) : make_uint4(0, 0, 0, 0);
        const uint32_t pair[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 two = unpack2<T>(pair[i]);
          v[half * 8 + 2 * i] = two.x;
          v[half * 8 + 2 * i + 1] = two.y;
        }
      }
    };
    float v[16];
    float largest = 0;
    for (int group = thread; group < groups; group += kQuantizeThreads) {
      load(group, v);
#pragma unroll
      for (float value : v) largest = fmaxf(largest, fabsf(value));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (lane == 0) warp_largest[turn][thread / kWarp] = largest;
    __syncthreads();
    largest = warp_largest[turn][lane % (kQuantizeThreads / kWarp)];
#pragma unroll
    for (int step = 4; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    // Rows of zeros, and of less than 2^-100, where the reciprocal would overflow: whatever, but finite.
    largest = fmaxf(largest, 7.9e-31f);
    const float inverse = 448.0f / largest;
    for (int j = thread; j < p.top_k; j += kQuantizeThreads) {
      const int64_t slot = row * p.top_k + j;
      p.slot_scale[slot] =
          largest * (1.0f / 448.0f) * p.factor * (p.slot_weight == nullptr ? 1.0f : p.slot_weight[slot]);
    }
    auto* out = reinterpret_cast<uint32_t*>(p.out + row * groups * 16);
    for (int group = thread; group < groups; group += kQuantizeThreads) {
      if (groups > kQuantizeThreads) load(group, v);
#pragma unroll
      for (float& value : v) value *= inverse;
      uint32_t word[4];
      convert(v, word);
#pragma unroll
      for (int w = 0; w < 4; ++w) out[group / 4 * 16 + w * 4 + group % 4] = word[w];
    }
  }
  ptx::dependency_wait();  // whoever waits for this launch may read what the one before wrote
#endif
}

// ---- hidden

// The power of two of 32 values from the bits of the largest magnitude as a bf16: 2^(8 code - 128).
__device__ __forceinline__ uint32_t scale_code(uint32_t largest) { return min(max((largest / 128 + 1) / 8, 1u), 31u); }
__device__ __forceinline__ float scale_of(uint32_t code) { return __uint_as_float((code * 8 - 1) << 23); }
__device__ __forceinline__ float inverse_scale_of(uint32_t code) { return __uint_as_float((255 - code * 8) << 23); }

// Four values times 2^-8.
__device__ __forceinline__ uint32_t divided_by_256(uint32_t word) {
  const auto half = [](uint32_t bytes) { return ptx::to_e4m3x2(ptx::mul_f16x2(ptx::from_e4m3x2(bytes), 0x1C001C00u)); };
  return half(word & 0xFFFF) | half(word >> 16) << 16;
}

struct SettleParams {
  const int* order;  // the first offsets[experts] slots have rows
  const int* offsets;
  int experts;
  HiddenRows hidden;
  float factor;
  float* slot_scale;  // [slots]
};

constexpr int kSettleThreads = 256;
constexpr int kSettleLanes = 8;  // to a row

// Part `part` of a row, 32 values, times 2^(-8 times): 8 bytes in each of the four chunks of its block.
static __device__ __noinline__ void lower_part(const HiddenRows& hidden, int row, int part, uint32_t times) {
  for (int chunk = 0; chunk < 4; ++chunk) {
    auto* at = reinterpret_cast<uint2*>(hidden.chunk_at(row, part / 2, chunk) + part % 2 * 8);
    uint2 v = *at;
    for (uint32_t t = 0; t < min(times, 3u); ++t) v = make_uint2(divided_by_256(v.x), divided_by_256(v.y));
    *at = v;
  }
}

static __global__ void __launch_bounds__(kSettleThreads) settle_rows_kernel(const __grid_constant__ SettleParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  ptx::dependency_wait();
  ptx::dependency_release();
  const int lane = threadIdx.x % kSettleLanes;
  const int used = p.offsets[p.experts];
  const int parts = p.hidden.parts;
  const int rows = gridDim.x * (kSettleThreads / kSettleLanes);
  // Every lane of a warp goes through the same turns.
  const int first = (blockIdx.x * kSettleThreads + threadIdx.x) / kSettleLanes;
  for (int i = first; i - first % 4 < used; i += rows) {
    const int64_t slot = p.order[min(i, used - 1)];
    const auto* codes = reinterpret_cast<const uint2*>(p.hidden.codes + slot * p.hidden.code_bytes);
    uint32_t largest = 0;
    for (int eight = lane; eight * 8 < parts; eight += kSettleLanes) {
      const uint2 v = codes[eight];
      largest = __vmaxu4(largest, __vmaxu4(v.x, v.y));  // zeros beyond the last part
    }
    largest = __vmaxu4(largest, largest >> 16);
    largest = max(largest & 0xFF, largest >> 8 & 0xFF);
#pragma unroll
    for (int step = 1; step < kSettleLanes; step *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    if (i >= used) continue;
    if (lane == 0) p.slot_scale[slot] = scale_of(largest) * p.factor;
    for (int eight = lane; eight * 8 < parts; eight += kSettleLanes) {
      const uint2 v = codes[eight];
      if (v.x == largest * 0x01010101u && v.y == v.x) continue;
      for (int part = eight * 8; part < min(eight * 8 + 8, parts); ++part) {
        const uint32_t code = (part % 8 < 4 ? v.x : v.y) >> part % 4 * 8 & 0xFF;
        if (code != largest) lower_part(p.hidden, p.hidden.row_of_slot[slot], part, largest - code);
      }
    }
  }
#endif
}

}  // namespace nvfp4::cuda::wgmma_fp8
