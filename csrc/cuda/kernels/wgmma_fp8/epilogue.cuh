// The end of a tile: the gate, and rows of E4M3 for the next GEMM. Rows without a gate are wgmma_experts'.
#pragma once

#include "../wgmma_experts/epilogue.cuh"
#include "prepare.cuh"
#include "producers.cuh"
#include "shared.cuh"

namespace nvfp4::cuda::wgmma_fp8 {

using wgmma_experts::Consumer;
using wgmma_experts::Scales;

// Writes staged tokens (wgmma_experts::stage_gated, in bf16, whose range E4M3 and a scale have too), the tile's from
// `first` on. A warpgroup has 32 features of each token, half of a k-block, and a thread 16 of them.
template <class S, int kTokens>
__device__ __forceinline__ void store_hidden(const HiddenRows& hidden, const Tile<S>& tile, const Consumer& c,
                                             int first, uint32_t staging) {
  const int panel = tile.row_tile * S::kConsumers + c.group;
  const bool inside = panel < hidden.parts;
  // Of the last stage of an odd number of blocks GEMM2 copies the second block too, though it does not multiply it.
  const bool lacks_pair = panel / 2 % kStageBlocks == 0 && panel / 2 == hidden.parts / 2 - 1;
  const int half = c.thread % 2;
  // Padding to 8 tokens is written too: GEMM2 reads it.
  const int tokens = min(round_up(tile.tokens, kTokenAtom) - first, kTokens);
#pragma unroll
  for (int i = 0; i < kTokens; i += wgmma_experts::kWarpgroup / 2) {
    const int token = i + c.thread / 2;
    const uint32_t from = staging + (2 * half * kTokens + min(token, kTokens - 1)) * 16;
    const uint4 low = ptx::load_shared_128(from);
    const uint4 high = ptx::load_shared_128(from + kTokens * 16);
    const uint32_t pair[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    uint32_t largest = 0;  // two of them
#pragma unroll
    for (uint32_t v : pair) largest = ptx::max_bf16x2(largest, v & 0x7FFF7FFFu);
    largest = max(largest & 0xFFFF, largest >> 16);
    largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
    const uint32_t code = scale_code(largest);
    const float factor = inverse_scale_of(code);
    float v[16];
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      v[2 * q] = __uint_as_float(pair[q] << 16) * factor;
      v[2 * q + 1] = __uint_as_float(pair[q] & 0xFFFF0000u) * factor;
    }
    uint32_t word[4];
    convert(v, word);
    // Of a step's two chunks the two threads of a token each write 8 bytes.
    const int row = tile.hidden_row + first + token;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t other = __shfl_xor_sync(~0u, half ? word[h] : word[2 + h], 1);
      const uint32_t mine = half ? word[2 + h] : word[h];
      if (inside && token < tokens) {
        uint8_t* to = hidden.chunk_at(row, panel / 2, 2 * half + h) + panel % 2 * 8;
        *reinterpret_cast<uint2*>(to) = half ? make_uint2(other, mine) : make_uint2(mine, other);
        if (lacks_pair) {
          to = hidden.chunk_at(row, panel / 2 + 1, 2 * half + h) + panel % 2 * 8;
          *reinterpret_cast<uint2*>(to) = make_uint2(0, 0);
        }
      }
    }
    if (inside && token < min(tokens, tile.tokens - first) && half == 0) {
      const int slot = tile.slot[first + token];
      uint8_t* codes = hidden.codes + slot * hidden.code_bytes;
      codes[panel] = code;
      if (panel == 0) hidden.row_of_slot[slot] = row;
      if (panel == hidden.parts - 1) {  // settle_rows() reads eight at a time
        for (int more = hidden.parts; more < hidden.code_bytes; ++more) codes[more] = 0;
      }
    }
  }
}

template <class S, int N, int kFirst = 0>
__device__ __forceinline__ void finish_gated(const Params& p, const HiddenRows& hidden, const Tile<S>& tile,
                                             const Consumer& c, const float (&sum)[N / 2], Scales scales) {
  constexpr int kTokens = wgmma_experts::kStaged<N, kFirst, wgmma_experts::kGatedBytes>;
  const uint32_t staging = c.staging + c.group * wgmma_experts::kStagingBytes;
  const bool exists = tile.row_tile * S::kConsumers + c.group < p.gemm[0].panels;
  ptx::barrier_sync(1 + c.group, wgmma_experts::kWarpgroup);
  wgmma_experts::stage_gated<bf16, kTokens, wgmma_experts::GateKind::silu, false>(p, c, exists, &sum[kFirst / 2],
                                                                                  scales, staging);
  ptx::barrier_sync(1 + c.group, wgmma_experts::kWarpgroup);
  store_hidden<S, kTokens>(hidden, tile, c, kFirst, staging);
  if constexpr (kFirst + kTokens < N) finish_gated<S, N, kFirst + kTokens>(p, hidden, tile, c, sum, scales);
}

}  // namespace nvfp4::cuda::wgmma_fp8
