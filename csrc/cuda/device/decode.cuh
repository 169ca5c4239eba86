// Decoding the packed weight format (packed_block.h) into MMA A fragments.
//
// The two words (q0, q1) of one row hold 16 codes as 8 pairs of consecutive k. A pair's spread form has, in each 16-bit
// lane (low lane = lower k), the code's sign at bit 15 and its magnitude at bits 8..6: as bf16 that is e2m1 * 2^-126.
// Translates of the pattern {15, 8, 7, 6} fill a lane three times and leave bits {14, 13, 5, 4}, from which no fourth
// can be cut by one rotation; but the leftovers of two words, one rotated by 2, hold exactly two more. So 16 codes cost
// 16 instructions:
//   pair 0 (4) = q0 (q1), pair 1 (5) = rotr(q, 4), pair 2 (6) = q << 6,
//   pair 3 = z << 2, pair 7 = rotr(z, 8), with z = (q0 & leftover) | (rotl(q1, 2) & ~leftover), each masked by the
//   pattern.
#pragma once

#include "common.cuh"
#include "packed_block.h"
#include "ptx/arithmetic.cuh"

namespace nvfp4::cuda {

// decode() yields weight * block scale * 2^-8, exact in bf16 and fp16; the epilogue multiplies by this times
// global_scale.
constexpr float kDecodeFactor = 256.0f;

constexpr uint32_t kPairMask = 0x81C081C0u;
constexpr uint32_t kLeftoverMask = 0x60306030u;

// The 16 codes of one row and scale group -> 8 pairs where their spread form has them, beside bits of others.
__device__ __forceinline__ void place_codes(uint32_t q0, uint32_t q1, uint32_t (&pair)[8]) {
  const uint32_t z = ptx::blend(q0, ptx::rotate_left(q1, 2), kLeftoverMask);
  pair[0] = q0;
  pair[1] = ptx::rotate_left(q0, 28);
  pair[2] = q0 << 6;
  pair[3] = z << 2;
  pair[4] = q1;
  pair[5] = ptx::rotate_left(q1, 28);
  pair[6] = q1 << 6;
  pair[7] = ptx::rotate_left(z, 24);
}

// The same in spread form.
__device__ __forceinline__ void spread_codes(uint32_t q0, uint32_t q1, uint32_t (&pair)[8]) {
  place_codes(q0, q1, pair);
#pragma unroll
  for (uint32_t& p : pair) p &= kPairMask;
}

// The inverse of spread_codes.
__device__ __forceinline__ uint2 gather_codes(const uint32_t (&pair)[8]) {
  const uint32_t z = (pair[3] >> 2) | ptx::rotate_left(pair[7], 8);
  const uint32_t q0 = pair[0] | ptx::rotate_left(pair[1], 4) | (pair[2] >> 6) | (z & kLeftoverMask);
  const uint32_t q1 =
      pair[4] | ptx::rotate_left(pair[5], 4) | (pair[6] >> 6) | ptx::rotate_left(z & ~kLeftoverMask, 30);
  return make_uint2(q0, q1);
}

// The spread form of two canonical codes, and back.
__device__ __forceinline__ uint32_t spread_pair(uint32_t low, uint32_t high) {
  const uint32_t codes = low | (high << 16);
  return ((codes & 0x00080008u) << 12) | ((codes & 0x00070007u) << 6);
}
__device__ __forceinline__ uint32_t pair_code(uint32_t pair, int lane) {
  const uint32_t bits = pair >> (16 * lane);
  return ((bits >> 12) & 8) | ((bits >> 6) & 7);
}

// What a 16-bit type needs to turn codes and raw E4M3 bytes into numbers. E4M3 bits moved to the top of the mantissa
// are the scale times a small power of two, subnormal scales included; the multiplications that follow are exact.
template <class T>
struct Decode;

template <>
struct Decode<bf16> {
  static __device__ __forceinline__ uint32_t codes(uint32_t placed) { return placed & kPairMask; }  // e2m1 * 2^-126
  static __device__ __forceinline__ uint32_t scales(uint32_t bytes) {                               // E4M3 * 2^118
    const uint32_t raw = (bytes << 4) & 0x87F087F0u;                                                // E4M3 * 2^-120
    return multiply(multiply(raw, 0x7B807B80u), 0x7A807A80u);                                       // * 2^120 * 2^118
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) { return ptx::mul_bf16x2(a, b); }
};

template <>
struct Decode<fp16> {
  // e2m1 * 2^-14: the magnitude three bits higher, by a multiplication, which the busy ALU pipe does not see.
  static __device__ __forceinline__ uint32_t codes(uint32_t placed) {
    return ptx::multiply_add(placed & 0x01C001C0u, 8, placed & 0x80008000u);
  }
  static __device__ __forceinline__ uint32_t scales(uint32_t bytes) {  // E4M3 * 2^6
    return multiply((bytes << 7) & 0xBF80BF80u, 0x74007400u);          // E4M3 * 2^-8 * 2^14
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) { return ptx::mul_f16x2(a, b); }
};

// One lane's share of a warp tile -> the A fragments of its four MMA steps. `scales` holds the lane's two scale bytes
// in its low half, or in its high half if kHigh. a[j] = {row r, row r+8, row r, row r+8} at k positions {2t, 2t, 2t+8,
// 2t+8}.
template <class T, bool kHigh = false>
__device__ __forceinline__ void decode(uint4 codes, uint32_t scales, uint32_t (&a)[4][4]) {
  using D = Decode<T>;
  // Each byte to the low byte of a lane, its sign replicated above it, so that one shift puts sign and magnitude apart.
  const uint32_t both = D::scales(ptx::permute(scales, 0, kHigh ? 0xB3A2 : 0x9180));
  const uint32_t upper = ptx::broadcast_low(both);
  const uint32_t lower = ptx::broadcast_high(both);
  uint32_t pair[8];
  place_codes(codes.x, codes.y, pair);
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i / 2][i % 2 * 2] = D::multiply(D::codes(pair[i]), upper);
  place_codes(codes.z, codes.w, pair);
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i / 2][i % 2 * 2 + 1] = D::multiply(D::codes(pair[i]), lower);
}

}  // namespace nvfp4::cuda
