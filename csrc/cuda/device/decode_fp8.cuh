// Decoding weights into A fragments of FP8 MMAs (m64nNk32, E4M3), and the order of their codes that makes it cheap.
//
// A value is code * block scale / 6, rounded to E4M3, to nearest even. So the largest, 6 * 448, is E4M3's 448 and
// nothing saturates; and the codes 1.5, 3 and 6, which have most of a weight's energy, are exact: their quotients need
// the scale's 4 significant bits. Those of 0.5, 1, 2 and 4 are rounded, where a power of two would have rounded the
// others: the error of normally distributed weights is 1.4 % instead of 2.1 %. Scales below 0.19 make subnormal values.
//
// A table in shared memory has a row for each scale byte, of the 8 values that a code's magnitude selects: so one byte
// permutation turns four magnitudes into four values, and signs are laid over them.
//
// The packed format (packed_block.h) has its codes where 16-bit lanes want them. Cutting selectors for byte
// permutations out of it takes 58 instructions of the ALU pipe per block and lane, more than the tensor cores leave
// time for. So weights for FP8 are blocks of the same places and scales, with the 16 codes of a lane's row in another
// order: of word w (0 or 1), nibble i has in its low three bits the magnitude of code 8 w + i, and the signs of codes 8
// w .. 8 w + 3 are at bits {7, 15, 23, 31}, those of codes 8 w + 4 .. 8 w + 7 at bits {3, 11, 19, 27}: 24 instructions.
#pragma once

#include "common.cuh"
#include "packed_block.h"
#include "ptx/arithmetic.cuh"

namespace nvfp4::cuda {

constexpr float kFp8DecodeFactor = 6.0f;  // for the epilogue

constexpr int kFp8TableRows = 256;  // of 8 bytes

// In MMA step j a quad thread t has k = 16 t + 8 j + 4 h + i of the block at k positions 16 h + 4 t + i. A token's 64
// values lie accordingly: byte 32 j + 16 h + 4 t + i is that of this k.
NVFP4_SHARED_INLINE constexpr int fp8_code(int j, int h, int i) { return 8 * j + 4 * h + i; }

// Bit of the sign of code i of a word.
NVFP4_SHARED_INLINE constexpr int fp8_sign_bit(int i) { return i % 4 * 8 + (i < 4 ? 7 : 3); }

// Four values: the magnitudes that the low half of `selector` names, with the signs at the bytes' highest bits.
__device__ __forceinline__ uint32_t fp8_values(uint2 row, uint32_t selector, uint32_t signs) {
  return ptx::permute(row.x, row.y, selector) ^ (signs & 0x80808080u);
}

// A word's codes 0..3 and 4..7.
__device__ __forceinline__ void decode_fp8(uint32_t word, uint2 row, uint32_t& low, uint32_t& high) {
  const uint32_t magnitudes = word & 0x77777777u;
  low = fp8_values(row, magnitudes, word);
  high = fp8_values(row, magnitudes >> 16, word << 4);
}

}  // namespace nvfp4::cuda
