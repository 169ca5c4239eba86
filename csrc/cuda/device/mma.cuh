// Token operands in registers, and the multiplication of one weight block by them.
//
// Over a block a thread needs 16 consecutive k of each of its tokens (decode.cuh), so it loads them straight from
// memory, 32 bytes per token: no ldmatrix, no permutation.
#pragma once

#include "common.cuh"
#include "decode.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"

namespace nvfp4::cuda {

// One lane's part of the tokens of kTiles column tiles of 8, at one 64-k block.
template <int kTiles>
struct TokenBlock {
  uint32_t value[kTiles][8];

  // The lane's 16 k of its token of the first column tile; nothing changes if not wanted.
  __device__ __forceinline__ void load_shared_if(bool wanted, uint32_t at) {
    uint32_t (&v)[8] = value[0];
    ptx::load_shared_128_if(wanted, at, v[0], v[1], v[2], v[3]);
    ptx::load_shared_128_if(wanted, at + 16, v[4], v[5], v[6], v[7]);
  }
};

// Walks along the rows of a tile's tokens, block by block. Columns without a token are never loaded: the caller zeroes
// the blocks once, and multiplying by zeros takes less power than by anything else.
template <int kTiles>
struct TokenCursor {
  const uint4* at[kTiles];  // lane's 16 k of the current block, of token lane / 4 of each column tile
  bool used[kTiles];        // whether there is such a token
  int k_left;               // from the current block to the end of the row; <= 0: beyond it

  __device__ __forceinline__ void load(TokenBlock<kTiles>& block, int step_k) {
    if (k_left < kBlockK) {
      block = {};
      if (k_left > static_cast<int>(threadIdx.x % 4 * 16)) read(block);
    } else {
      read(block);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) at[i] += step_k / 8;
    k_left -= step_k;
  }

 private:
  __device__ __forceinline__ void read(TokenBlock<kTiles>& block) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint32_t (&v)[8] = block.value[i];
      ptx::load_global_128_if(used[i], at[i], v[0], v[1], v[2], v[3]);
      ptx::load_global_128_if(used[i], at[i] + 1, v[4], v[5], v[6], v[7]);
    }
  }
};

// One warp's codes and scales of kRowTiles warp tiles of a block, in registers, so that the shared memory can be
// refilled early.
template <int kRowTiles>
struct WeightTiles {
  static_assert(kRowTiles == 1 || kRowTiles == 2 || kRowTiles == 4);
  uint4 codes[kRowTiles];
  uint32_t scales[ceil_div(kRowTiles, 2)];

  // Warp tiles first_tile and on. The codes lie at the beginning of `block`, the scales where those of a whole block
  // do, or behind so many bytes.
  static __device__ __forceinline__ WeightTiles read(const uint8_t* block, int first_tile = 0,
                                                     int scales_from = kBlockCodeBytes) {
    const int lane = threadIdx.x % kWarp;
    WeightTiles w;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      w.codes[tile] = *reinterpret_cast<const uint4*>(block + codes_at(tile, lane));
    }
    if constexpr (kRowTiles == 4) {
      const uint2 scales = *reinterpret_cast<const uint2*>(block + scales_at(0, lane));
      w.scales[0] = scales.x;
      w.scales[1] = scales.y;
    } else if constexpr (kRowTiles == 1) {
      w.scales[0] =
          *reinterpret_cast<const uint16_t*>(block + scales_at(first_tile, lane) - kBlockCodeBytes + scales_from);
    } else {
      w.scales[0] =
          *reinterpret_cast<const uint32_t*>(block + scales_at(first_tile, lane) - kBlockCodeBytes + scales_from);
    }
    return w;
  }
};

using WeightBlock = WeightTiles<4>;

// sum[tile][i] += warp tile `tile` of those read, which is 16 rows, times column tile i.
template <class T, int kTiles, int kRowTiles>
__device__ __forceinline__ void multiply(const WeightTiles<kRowTiles>& w, const TokenBlock<kTiles>& x,
                                         float (&sum)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
    uint32_t a[4][4];
    const uint32_t scales = w.scales[tile / 2];
    tile % 2 ? decode<T, true>(w.codes[tile], scales, a) : decode<T, false>(w.codes[tile], scales, a);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        ptx::mma_m16n8k16<T>(sum[tile][i], a[j], x.value[i][2 * j], x.value[i][2 * j + 1]);
      }
    }
  }
}

}  // namespace nvfp4::cuda
