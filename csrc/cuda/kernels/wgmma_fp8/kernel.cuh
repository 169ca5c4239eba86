// Grouped GEMM on wgmma of E4M3: packed NVFP4 weights, decoded to scaled E4M3 in registers, times rows of E4M3 with a
// scale each. A persistent kernel as wgmma_experts: its scheduler, its rings, its weight stream.
#pragma once

#include "../wgmma_experts/kernel.cuh"
#include "epilogue.cuh"
#include "multiply.cuh"
#include "producers.cuh"

namespace nvfp4::cuda::wgmma_fp8 {

template <class S, class T, int N, bool kGated>
__device__ __forceinline__ void consume_tile(const Fp8Params& fp8, Shared<S>& shared, const Tile<S>& tile, Ring& ring,
                                             uint32_t staging, uint32_t table) {
  const Params& p = fp8.base;
  float sum[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
  const Consumer c = wgmma_experts::current_consumer(staging);
  const int k_blocks = p.gemm[0].k_blocks;
  const int panel = wgmma_experts::uniform(tile.row_tile) * S::kConsumers + wgmma_experts::uniform(c.group);
  const bool active = panel < p.gemm[0].panels;
  if (active) {
    multiply_tile<S, N>(sum, ring, c, {c.group, c.warp}, k_blocks, table);
  } else {
    wgmma_experts::skip_tile(ring, c, k_blocks);
  }
  const Consumer after = wgmma_experts::current_consumer(staging);
  wgmma_experts::scale_slots<S, N>(tile, after, sum);
  const Scales scales{tile.gate_scale, tile.up_scale};
  if constexpr (kGated) {
    finish_gated<S, N>(p, fp8.hidden, tile, after, sum, scales);
  } else if (active) {
    wgmma_experts::store_plain<S, T, N, wgmma_experts::GateKind::silu>(p, p.gemm[0], tile, after, sum, scales, false);
  }
}

template <class S, class T, bool kGated>
__device__ __forceinline__ void consume_tiles(const Fp8Params& p, Shared<S>& shared, Ring ring, uint32_t staging,
                                              uint32_t table) {
  TileReader<S> reader{shared};
  while (const Tile<S>* tile = reader.next()) {
    switch (wgmma_experts::uniform(tile->width) / kTokenAtom) {
#define NVFP4_WIDTH(N)                                                       \
  case N / kTokenAtom:                                                       \
    if constexpr (N <= S::kMaxWidth && S::tile_width(N) == N) {              \
      consume_tile<S, T, N, kGated>(p, shared, *tile, ring, staging, table); \
    }                                                                        \
    break;
      NVFP4_WIDTH(16)
      NVFP4_WIDTH(32)
      NVFP4_WIDTH(48)
      NVFP4_WIDTH(64)
      NVFP4_WIDTH(80)
      NVFP4_WIDTH(96)
      NVFP4_WIDTH(112)
      NVFP4_WIDTH(128)
      NVFP4_WIDTH(144)
      NVFP4_WIDTH(160)
      NVFP4_WIDTH(176)
      NVFP4_WIDTH(192)
#undef NVFP4_WIDTH
    }
    reader.release();
  }
}

template <class S, class T, bool kGated>
__global__ void __launch_bounds__(kThreads<S>, 1) gemm_kernel(const __grid_constant__ Fp8Params fp8) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const Params& p = fp8.base;
  extern __shared__ __align__(1024) uint8_t memory[];
  constexpr int kConsumerWarps = wgmma_experts::kConsumerWarps<S>;
  constexpr int kArrivals = wgmma_experts::kWarpArrivals;
  uint8_t* staging = memory + p.stages * stage_bytes<S>(p.max_width);
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(staging + S::kConsumers * wgmma_experts::kStagingBytes);
  uint8_t* table = reinterpret_cast<uint8_t*>(&shared + 1);
  int* offsets = reinterpret_cast<int*>(table + kTableBytes);
  int* tiles = offsets + p.experts + 1;
  int* rows = tiles + p.experts + 1;

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&shared.full[i]), 1 + kGatherWarps * kArrivals);
      ptx::mbarrier_init(ptx::shared_address(&shared.empty[i]), kConsumerWarps * kArrivals);
    }
    for (int i = 0; i < wgmma_experts::kTileRing; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&shared.claim[i]), 1);
      ptx::mbarrier_init(ptx::shared_address(&shared.tile_full[i]), kWarp);
      ptx::mbarrier_init(ptx::shared_address(&shared.tile_empty[i]), (kConsumerWarps + 1 + kGatherWarps) * kArrivals);
    }
    ptx::mbarrier_init(ptx::shared_address(&shared.stored), kConsumerWarps * kArrivals);
    ptx::fence_mbarrier_init();
  }
  fill_table(table, threadIdx.x, kThreads<S>);
  ptx::dependency_wait();
  ptx::dependency_release();
  for (int i = threadIdx.x; i <= p.experts; i += kThreads<S>) offsets[i] = p.offsets[i];
  __syncthreads();

  const Ring ring{ptx::shared_address(memory), ptx::shared_address(shared.full),
                  static_cast<uint32_t>(stage_bytes<S>(p.max_width)), static_cast<uint32_t>(p.stages)};
  const int warp = threadIdx.x / kWarp;
  if (warp < kConsumerWarps) {
    ptx::registers_raise<S::kConsumerRegisters>();
    consume_tiles<S, T, kGated>(fp8, shared, ring, ptx::shared_address(staging), ptx::shared_address(table));
  } else {
    ptx::registers_lower<S::kProducerRegisters>();
    if (warp == kConsumerWarps) {
      wgmma_experts::stream_weights(p, shared, ring);
    } else if (warp <= kConsumerWarps + kGatherWarps) {
      wgmma_fp8::fetch_tokens<S, kGated>(p, shared, ring, threadIdx.x - (kConsumerWarps + 1) * kWarp);
    } else {
      wgmma_experts::schedule_tiles(p, shared, offsets, nullptr, tiles, rows);
    }
  }
#endif
}

}  // namespace nvfp4::cuda::wgmma_fp8
