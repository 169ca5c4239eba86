// The warps that fetch tokens: rows of E4M3 from where quantize_rows() or the GEMM before left them.
#pragma once

#include "../wgmma_experts/producers.cuh"
#include "plan.h"
#include "shared.cuh"

namespace nvfp4::cuda::wgmma_fp8 {

using wgmma_experts::Ring;
using wgmma_experts::Shared;
using wgmma_experts::Tile;
using wgmma_experts::TileReader;

// As wgmma_experts::gather_tokens; a row's 128 bytes are both k-blocks of a stage.
template <class S>
__device__ __forceinline__ void gather_tokens(const Params& p, const Tile<S>& tile, Ring& ring, int thread) {
  constexpr int kLag = wgmma_experts::kGatherLag;
  const int chunk = thread % 8;
  const int first = thread / 8;
  const int copies = ceil_div(tile.tokens, kTokenAtom);
  uint32_t block[S::kMaxWidth / kTokenAtom];
#pragma unroll
  for (int i = 0; i < S::kMaxWidth / kTokenAtom; ++i) {
    block[i] = tile.x_block[first * Tile<S>::kAtoms + min(i, copies - 1)];
  }
  const uint32_t offset = wgmma_experts::swizzled(first, chunk);
  const uint8_t* source = p.x + chunk * 16;
  Ring landed = ring;
  const auto announce = [&] {
    ptx::fence_async_proxy_shared();
    __syncwarp();
    wgmma_experts::warp_arrive(landed.full_barrier(), thread % kWarp);
    landed.advance();
  };
  const int stages = ceil_div(p.gemm[0].k_blocks, kStageBlocks);
  for (int s = 0; s < stages; ++s, source += kTokenBytes, ring.advance()) {
    ring.wait_empty();
    const uint32_t to = ring.stage + kWeightBytes<S> + offset;
#pragma unroll
    for (int i = 0; i < S::kMaxWidth / kTokenAtom; i += 2) {
      if (i >= copies) break;
#pragma unroll
      for (int atom = i; atom < i + 2; ++atom) {
        ptx::cp_async_16(to + atom * kTokenAtom * kTokenBytes, source + uint64_t{block[atom]} * kBlockK);
      }
    }
    ptx::cp_async_commit();
    if (s >= kLag) {
      ptx::cp_async_wait<kLag>();
      announce();
    }
  }
  ptx::cp_async_wait<0>();
  for (int s = min(stages, kLag); s > 0; --s) announce();
}

// One thread. It makes the arrivals of all gathering warps. An image's row is both k-blocks of a stage; behind the last
// block of an odd number lie zeros that nobody multiplies.
template <class S>
__device__ __forceinline__ void load_hidden(const Params& p, const Tile<S>& tile, Ring& ring) {
  const uint32_t bytes = round_up(tile.tokens, kTokenAtom) * kTokenBytes;
  const uint8_t* source = p.hidden + static_cast<int64_t>(tile.hidden_row) * kTokenBytes;
  const int stages = ceil_div(p.gemm[0].k_blocks, kStageBlocks);
  for (int s = 0; s < stages; ++s, source += p.hidden_rows * kTokenBytes, ring.advance()) {
    ring.wait_empty();
    ptx::mbarrier_arrive_expect(ring.full_barrier(), bytes);
    ptx::mbarrier_arrive(ring.full_barrier(), kGatherWarps * wgmma_experts::kWarpArrivals - 1);
    ptx::bulk_load(ring.stage + kWeightBytes<S>, source, bytes, ring.full_barrier());
  }
}

// kGated: of GEMM1, whose tokens are gathered; GEMM2's are images that GEMM1 has written.
template <class S, bool kGated>
__device__ __forceinline__ void fetch_tokens(const Params& p, Shared<S>& shared, Ring ring, int thread) {
  TileReader<S> reader{shared};
  if constexpr (!kGated) ptx::fence_async_proxy();
  while (const Tile<S>* tile = reader.next()) {
    if constexpr (kGated) {
      wgmma_fp8::gather_tokens(p, *tile, ring, thread);
    } else if (thread == 0) {
      wgmma_fp8::load_hidden(p, *tile, ring);
    }
    reader.release();
  }
}

}  // namespace nvfp4::cuda::wgmma_fp8
