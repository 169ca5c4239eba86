// The warps that feed the consumers: one claims and describes tiles, one streams weights, two fetch tokens.
#pragma once

#include "../../device/ptx/async_copy.cuh"
#include "shared.cuh"

namespace nvfp4::cuda::wgmma_experts {

// ---- the last warp

template <class S>
__device__ __forceinline__ void describe_tile(const Params& p, const int* offsets, const uint16_t* order,
                                              const int* tiles, const int* rows, int claimed, Tile<S>& tile) {
  const int lane = threadIdx.x % kWarp;
  const int column_tiles = tiles[p.experts];
  int gemm_index = 0;
  if (p.mlp && claimed >= column_tiles * p.gemm[0].row_tiles) {
    claimed -= column_tiles * p.gemm[0].row_tiles;
    gemm_index = 1;
  }
  const int row_tiles = p.gemm[gemm_index].row_tiles;
  if (claimed >= column_tiles * row_tiles) {
    if (lane == 0) tile.gemm_index = -1;
    return;
  }
  const int expert = find_expert(tiles, p.experts, claimed / row_tiles);
  const int within = claimed - tiles[expert] * row_tiles;
  const int first_slot = offsets[expert];
  const int expert_tokens = offsets[expert + 1] - first_slot;
  const TokenCut cut = cut_tokens(expert_tokens, p.max_width);
  const int row_tile = within / cut.tiles;  // token tiles vary fastest: they share the weights
  const int first_token = (within - row_tile * cut.tiles) * cut.width;
  const int tokens = min(cut.width, expert_tokens - first_token);
  const float* scales = p.gemm[gemm_index].global_scale;
  const float gate_scale = scales[p.gemm[gemm_index].gated ? 2 * expert : expert];
  const float up_scale = p.gemm[gemm_index].gated ? scales[2 * expert + 1] : gate_scale;
  // All slots are asked for before the first is used, and all scales before the first is stored: each takes 1500 cycles
  // while weights stream, and short tiles would wait for their descriptions.
  constexpr int kRounds = ceil_div(S::kMaxWidth, kWarp);
  int slot[kRounds];
  float scale[kRounds] = {};
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int at = first_slot + first_token + min(r * kWarp + lane, tokens - 1);
    slot[r] = p.sorting ? order[at] : p.order[at];
  }
  if (p.slot_scale != nullptr) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) scale[r] = p.slot_scale[slot[r]];
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int i = r * kWarp + lane;
    if (i >= round_up(tokens, kTokenAtom)) break;
    const uint32_t block = slot[r] / p.slots_per_row * p.gemm[0].k_blocks;
    tile.slot[i] = slot[r];
    tile.x_block[p.sorting ? i : i % kTokenAtom * Tile<S>::kAtoms + i / kTokenAtom] = block;
    tile.scale[i] = scale[r];
  }
  if (lane == 0) {
    tile.gemm_index = gemm_index;
    tile.expert = expert;
    tile.gate_scale = gate_scale * kDecodeFactor;
    tile.up_scale = up_scale * kDecodeFactor;
    tile.row_tile = row_tile;
    tile.width = S::tile_width(round_up(tokens, kTokenAtom));  // the last of an expert may be narrower than the cut
    tile.tokens = tokens;
    tile.hidden_row = rows[expert] + first_token;
    tile.prerequisites = cut.tiles * p.gemm[0].row_tiles;
  }
}

template <class S>
__device__ __forceinline__ void schedule_tiles(const Params& p, Shared<S>& shared, const int* offsets,
                                               const uint16_t* order, int* tiles, int* rows) {
  const int lane = threadIdx.x % kWarp;
  sum_tiles(offsets, p.experts, p.max_width, tiles, rows);
  if (p.sorting) ptx::dependency_wait();  // for the counters
  int stored = 0;
  int previous_expert = -1;  // of a GEMM1 tile whose end is not published yet
  for (int i = 0;; ++i) {
    Tile<S>& tile = shared.tiles[i % kTileRing];
    ptx::mbarrier_wait(ptx::shared_address(&shared.tile_empty[i % kTileRing]), i / kTileRing & 1 ^ 1);
    int claimed = 0;
    if (lane == 0) claimed = atomicAdd(p.control, 1);
    claimed = __shfl_sync(~0u, claimed, 0);
    describe_tile(p, offsets, order, tiles, rows, claimed, tile);
    __syncwarp();
    const int gemm_index = tile.gemm_index;
    const int expert = tile.expert;
    ptx::mbarrier_arrive(ptx::shared_address(&shared.tile_full[i % kTileRing]));
    if (previous_expert >= 0) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.stored), stored++ & 1);
      if (lane == 0) ptx::add_release(p.control + 1 + previous_expert, 1);
    }
    if (gemm_index < 0) break;
    previous_expert = p.mlp && gemm_index == 0 ? expert : -1;
    const int due = gemm_index == 0 && p.mlp ? i : i - p.extra_claims;
    if (due >= 0) ptx::mbarrier_wait(ptx::shared_address(&shared.claim[due % kTileRing]), due / kTileRing & 1);
  }
}

// ---- the first: lane i streams panel i of the tile

template <class S>
__device__ __forceinline__ void stream_weights(const Params& p, Shared<S>& shared, Ring ring) {
  const int lane = threadIdx.x % kWarp;
  TileReader<S> reader{shared};
  const uint64_t policy = ptx::policy_evict_first();
  while (const Tile<S>* tile = reader.next()) {
    const ExpertGemm& gemm = p.gemm[tile->gemm_index];
    const int panel = tile->row_tile * S::kConsumers + lane;
    const int k_blocks = gemm.k_blocks;
    const bool inside = lane < S::kConsumers && panel < gemm.panels;
    const uint32_t panels = __popc(__ballot_sync(~0u, inside));
    const uint8_t* source =
        gemm.weight + tile->expert * gemm.expert_bytes + static_cast<int64_t>(panel) * k_blocks * kBlockBytes;
    const int stages = ceil_div(k_blocks, kStageBlocks);
    const int claim_at = max(0, stages - kClaimAhead);
    for (int s = 0; s < stages; ++s, source += kPanelBytes, ring.advance()) {
      const uint32_t blocks = min(kStageBlocks, k_blocks - s * kStageBlocks);
      ring.wait_empty();
      if (lane == 0) {
        ptx::mbarrier_arrive_expect(ring.full_barrier(), panels * blocks * kBlockBytes);
        if (s == claim_at) ptx::mbarrier_arrive(ptx::shared_address(&shared.claim[reader.index % kTileRing]));
      }
      __syncwarp();
      if (p.weights_leave_first) {
        ptx::bulk_load_if(inside, ring.stage + lane * kPanelBytes, source, blocks * kBlockBytes, ring.full_barrier(),
                          policy);
      } else if (inside) {
        ptx::bulk_load(ring.stage + lane * kPanelBytes, source, blocks * kBlockBytes, ring.full_barrier());
      }
    }
    reader.release();
  }
}

// ---- the two between them

// Every warp announces its stages once their copies have landed and are visible to wgmma, kGatherLag stages behind the
// one it is filling.
template <class S>
__device__ __forceinline__ void gather_tokens(const Params& p, const Tile<S>& tile, Ring& ring, int thread) {
  const int chunk = thread % 8;
  const int first = thread / 8;  // every 8th token: the swizzle is the same for all
  const int k_blocks = p.gemm[0].k_blocks;
  const int copies = ceil_div(tile.tokens, kTokenAtom);
  uint32_t block[S::kMaxWidth / kTokenAtom];
#pragma unroll
  for (int i = 0; i < S::kMaxWidth / kTokenAtom; ++i)
    block[i] = tile.x_block[first * Tile<S>::kAtoms + min(i, copies - 1)];
  const uint32_t offset = swizzled(first, chunk);
  const uint8_t* source = p.x + chunk * 16;
  Ring landed = ring;
  const auto announce = [&] {
    ptx::fence_async_proxy_shared();
    __syncwarp();
    warp_arrive(landed.full_barrier(), thread % kWarp);
    landed.advance();
  };
  const int stages = ceil_div(k_blocks, kStageBlocks);
  const uint32_t second = token_block_bytes(tile.width);
  for (int s = 0; s < stages; ++s, source += kStageBlocks * kTokenBytes, ring.advance()) {
    ring.wait_empty();
    const uint32_t to = ring.stage + kWeightBytes<S> + offset;
    // One address for both k-blocks of a row; what the last stage may lack is copied all the same. Batches, all but the
    // last unconditional, so that addresses do not wait for the copy before to have read its own.
#pragma unroll
    for (int i = 0; i < S::kMaxWidth / kTokenAtom; i += 2) {
      if (i >= copies) break;
#pragma unroll
      for (int atom = i; atom < i + 2; ++atom) {
        const uint8_t* from = source + uint64_t{block[atom]} * kTokenBytes;
        ptx::cp_async_16(to + atom * kTokenAtom * kTokenBytes, from);
        ptx::cp_async_16(to + second + atom * kTokenAtom * kTokenBytes, from + kTokenBytes);
      }
    }
    ptx::cp_async_commit();
    if (s >= kGatherLag) {
      ptx::cp_async_wait<kGatherLag>();
      announce();
    }
  }
  ptx::cp_async_wait<0>();
  for (int s = min(stages, kGatherLag); s > 0; --s) announce();
}

// The same from rows whose blocks are in the order of k: a lane copies one word of each block to where permute_rows()
// would have it.
template <class S>
__device__ __forceinline__ void gather_rows(const Params& p, const Tile<S>& tile, Ring& ring, int thread) {
  constexpr int kTokens = kTokenAtom / kGatherWarps;  // of each atom, for a warp
  const int lane = thread % kWarp;
  const int first = thread / kWarp * kTokens;
  const int chunk = lane % 8;
  uint32_t at[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) at[i] = swizzled(first + i, chunk) + lane / 8 * 4;
  const int stages = ceil_div(p.gemm[0].k_blocks, kStageBlocks);
  const int atoms = ceil_div(tile.tokens, kTokenAtom);
  const uint32_t second = token_block_bytes(tile.width);
  const uint32_t* rows = tile.x_block + first;
  const uint8_t* source = p.x + lane * 4;
  Ring landed = ring;
  const auto announce = [&] {
    ptx::fence_async_proxy_shared();
    __syncwarp();
    warp_arrive(landed.full_barrier(), lane);
    landed.advance();
  };
  for (int s = 0; s < stages; ++s, source += kStageBlocks * kTokenBytes, ring.advance()) {
    ring.wait_empty();
    uint32_t to = ring.stage + kWeightBytes<S>;
#pragma unroll 2
    for (int atom = 0; atom < atoms; ++atom, to += kTokenAtom * kTokenBytes) {
      uint32_t block[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) block[i] = rows[atom * kTokenAtom + i];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const uint8_t* from = source + uint64_t{block[i]} * kTokenBytes;
        ptx::cp_async_4(to + at[i], from);
        ptx::cp_async_4(to + at[i] + second, from + kTokenBytes);
      }
    }
    ptx::cp_async_commit();
    if (s >= kGatherLag) {
      ptx::cp_async_wait<kGatherLag>();
      announce();
    }
  }
  ptx::cp_async_wait<0>();
  for (int s = min(stages, kGatherLag); s > 0; --s) announce();
}

// One thread. It makes the arrivals of all gathering warps.
template <class S>
__device__ __forceinline__ void load_hidden(const Params& p, const Tile<S>& tile, Ring& ring) {
  while (ptx::load_acquire(p.control + 1 + tile.expert) < tile.prerequisites) __nanosleep(64);
  ptx::fence_async_proxy();
  const uint32_t bytes = round_up(tile.tokens, kTokenAtom) * kTokenBytes;
  const int k_blocks = p.gemm[1].k_blocks;
  const uint8_t* source = p.hidden + static_cast<int64_t>(tile.hidden_row) * kTokenBytes;
  for (int kb = 0; kb < k_blocks; kb += kStageBlocks, ring.advance()) {
    const int blocks = min(kStageBlocks, k_blocks - kb);
    ring.wait_empty();
    ptx::mbarrier_arrive_expect(ring.full_barrier(), blocks * bytes);
    ptx::mbarrier_arrive(ring.full_barrier(), kGatherWarps * kWarpArrivals - 1);
    for (int b = 0; b < blocks; ++b, source += p.hidden_rows * kTokenBytes) {
      ptx::bulk_load(ring.stage + kWeightBytes<S> + b * token_block_bytes(tile.width), source, bytes,
                     ring.full_barrier());
    }
  }
}

template <class S>
__device__ __forceinline__ void fetch_tokens(const Params& p, Shared<S>& shared, Ring ring, int thread) {
  TileReader<S> reader{shared};
  while (const Tile<S>* tile = reader.next()) {
    if (tile->gemm_index == 0) {
      p.sorting ? gather_rows(p, *tile, ring, thread) : gather_tokens(p, *tile, ring, thread);
    } else if (thread == 0) {
      load_hidden(p, *tile, ring);
    }
    reader.release();
  }
}

}  // namespace nvfp4::cuda::wgmma_experts
