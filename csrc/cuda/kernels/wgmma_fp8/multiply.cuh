// A consumer warpgroup's main loop: 64 rows of packed weights, decoded into E4M3 fragments, times a tile of tokens.
#pragma once

#include "../../device/decode_fp8.cuh"
#include "../wgmma_experts/multiply.cuh"
#include "plan.h"

namespace nvfp4::cuda::wgmma_fp8 {

using wgmma_experts::Consumer;
using wgmma_experts::PackedFragment;
using wgmma_experts::PackedReader;
using wgmma_experts::Ring;
using wgmma_experts::WarpRows;

__device__ __forceinline__ void fill_table(uint8_t* table, int thread, int threads) {
  for (int scale = thread; scale < kFp8TableRows; scale += threads) {
    const float s = unpack2<fp16>(ptx::from_e4m3x2(scale)).x;
    const auto values = [&](float low, float high) {
      return ptx::to_e4m3x2(__fdiv_rn(s * low, kFp8DecodeFactor), __fdiv_rn(s * high, kFp8DecodeFactor));
    };
    reinterpret_cast<uint2*>(table)[scale] =
        make_uint2(values(0.0f, 0.5f) | values(1.0f, 1.5f) << 16, values(2.0f, 3.0f) | values(4.0f, 6.0f) << 16);
  }
}

// Starts the two MMA steps of a block of the stage.
template <class S, int N>
__device__ __forceinline__ void start_block(float (&sum)[N / 2], const PackedFragment& packed, uint32_t table,
                                            uint32_t stage, int block, uint32_t (&a)[2][4]) {
  const uint2 upper = ptx::load_shared_64(table + packed.scales % 256 * 8);
  const uint2 lower = ptx::load_shared_64(table + packed.scales / 256 * 8);
  decode_fp8(packed.codes.x, upper, a[0][0], a[0][2]);
  decode_fp8(packed.codes.z, lower, a[0][1], a[0][3]);
  decode_fp8(packed.codes.y, upper, a[1][0], a[1][2]);
  decode_fp8(packed.codes.w, lower, a[1][1], a[1][3]);
  ptx::wgmma_fence();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    ptx::Wgmma<ptx::e4m3, N>::multiply(sum, a[j], ptx::wgmma_descriptor(stage, kWeightBytes<S>, 2 * block + j));
  }
  ptx::wgmma_commit();
}

// A stage's second block is decoded while its first is multiplied. Nothing is in flight from stage to stage: other
// warpgroups multiply meanwhile.
template <class S, int N>
__device__ __forceinline__ void multiply_tile(float (&sum)[N / 2], Ring& ring, const Consumer& c, WarpRows rows,
                                              int k_blocks, uint32_t table) {
  const uint32_t panel = rows.panel * kPanelBytes;
  const PackedReader reader{panel + codes_at(rows.tile, c.lane), panel + scales_at(rows.tile, c.lane)};
  int kb = 0;
  for (; kb + 1 < k_blocks; kb += kStageBlocks, ring.advance()) {
    uint32_t first[2][4];
    uint32_t second[2][4];
    ring.wait_full();
    const PackedFragment packed = reader.load(ring.stage, 0);
    const PackedFragment next = reader.load(ring.stage, 1);
    start_block<S, N>(sum, packed, table, ring.stage, 0, first);
    start_block<S, N>(sum, next, table, ring.stage, 1, second);
    ptx::wgmma_wait<0>();
    wgmma_experts::warp_arrive(ring.empty_barrier(), c.lane);
  }
  if (kb < k_blocks) {
    uint32_t last[2][4];
    ring.wait_full();
    start_block<S, N>(sum, reader.load(ring.stage, 0), table, ring.stage, 0, last);
    ptx::wgmma_wait<0>();
    wgmma_experts::warp_arrive(ring.empty_barrier(), c.lane);
    ring.advance();
  }
}

}  // namespace nvfp4::cuda::wgmma_fp8
