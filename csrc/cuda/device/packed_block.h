// The packed weight format: sizes and places, in plain C++ so that the host counts with the same numbers.
//
// Weights are the A operand (out^T = W x^T). A block is 64 rows x 64 k in 2304 contiguous bytes: 2048 of codes, then
// 256 of scales. The blocks of a 64-row panel follow one another along k, panels follow one another, so an expert is
// one contiguous stream of ceil(n / 64) * ceil(k / 64) blocks. Rows and k beyond n and k are zero codes with zero
// scales.
//
// Warp tile w holds rows 16w .. 16w+15 of the block. Lane l (r = l / 4, t = l % 4) owns rows r and r + 8 and
// k = 16t .. 16t+15, one scale group of each row:
//   codes  at (w * 32 + l) * 16: words 0, 1 are row r, words 2, 3 row r + 8
//   scales at 2048 + (l * 4 + w) * 2: the raw E4M3 byte of row r, then of row r + 8 (so a lane's four warp tiles are 8
//   bytes)
// In MMA step j = 0..3 the k positions 2t, 2t+1, 2t+8, 2t+9 of quad thread t take k = 16t + 4j + 0..3 of the block. The
// token operand takes the same order, so over a block a thread wants 16 consecutive values of each of its tokens.
//
// Gated weights interleave gate and up by 8: rows r and r + 8 of warp tile w of panel p are the gate and up rows of
// feature 32p + 8w + r. Plain weights: row 64p + 16w + (r or r + 8).
#pragma once

#include "sizes.h"

namespace nvfp4::cuda {

constexpr int kBlockRows = 64;
constexpr int kBlockK = 64;
constexpr int kBlockCodeBytes = kBlockRows * kBlockK / 2;
constexpr int kBlockScaleBytes = kBlockRows * kBlockK / static_cast<int>(kGroupSize);
constexpr int kBlockBytes = kBlockCodeBytes + kBlockScaleBytes;

NVFP4_SHARED_INLINE constexpr int codes_at(int tile, int lane) { return (tile * kWarp + lane) * 16; }
NVFP4_SHARED_INLINE constexpr int scales_at(int tile, int lane) { return kBlockCodeBytes + (lane * 4 + tile) * 2; }

constexpr int panels_of(int64_t n) { return static_cast<int>(ceil_div<int64_t>(n, kBlockRows)); }
constexpr int k_blocks_of(int64_t k) { return static_cast<int>(ceil_div<int64_t>(k, kBlockK)); }

}  // namespace nvfp4::cuda
