// Persistent grouped GEMM on wgmma for many tokens per expert; with two GEMMs, the whole expert MLP.
//
// A tile is 256 or 192 weight rows (64-row panels, one for each consumer warpgroup) by the tokens of cut_tokens(), all
// of k. Weights stream through shared memory packed and are decoded into register A fragments; tokens are the B
// operand. 192 rows or more, and not 128, because every row of warpgroups re-reads the tokens from L2: at 128 that
// traffic alone exceeds what L2 delivers at the full rate of the tensor cores. Warpgroups of 64 rows, and not of 128,
// so that one decodes while others multiply without double buffering.
//
// Tiles are claimed in order from a counter, GEMM2's after GEMM1's, so GEMM2 starts while the last tiles of GEMM1 run;
// a GEMM2 tile waits for its expert's `ready` count. No order of CTAs can deadlock: whatever a tile waits for was
// claimed earlier, by a CTA that is running.
//
// Behind the consumers one warp streams weights, two fetch tokens, and the last claims tiles and publishes finished
// ones.
#pragma once

#include "../../device/cta_order.cuh"
#include "epilogue.cuh"
#include "multiply.cuh"
#include "producers.cuh"
#include "shared.cuh"

namespace nvfp4::cuda::wgmma_experts {

template <class S, class T, int N, GateKind kGate>
__device__ __forceinline__ void consume_tile(const Params& p, Shared<S>& shared, const Tile<S>& tile, Ring& ring,
                                             uint32_t staging) {
  float sum[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
  const Consumer c = current_consumer(staging);
  const ExpertGemm& gemm = p.gemm[uniform(tile.gemm_index)];
  const int k_blocks = gemm.k_blocks;
  const bool gated = p.gate_applies && uniform(tile.gemm_index) == 0;
  const int first_panel = uniform(tile.row_tile) * S::kConsumers + warp_rows<S>(uniform(c.group), 0, gated).panel;
  const bool active = first_panel < gemm.panels;
  Scales scales{};
  if constexpr (S::kExtended) scales = tile_biases(gemm, p.bias[uniform(tile.gemm_index)], tile, c, gated);
  if (active) {
    multiply_tile<S, T, N>(sum, ring, c, warp_rows<S>(c.group, c.warp, gated), k_blocks);
  } else {
    skip_tile(ring, c, k_blocks);
  }
  finish_tile<S, T, N, kGate>(p, shared, tile, sum, current_consumer(staging), scales, active);
}

template <class S, class T, GateKind kGate>
__device__ __forceinline__ void consume_tiles(const Params& p, Shared<S>& shared, Ring ring, uint32_t staging) {
  TileReader<S> reader{shared};
  while (const Tile<S>* tile = reader.next()) {
    switch (uniform(tile->width) / kTokenAtom) {
#define NVFP4_WIDTH(N)                                               \
  case N / kTokenAtom:                                               \
    if constexpr (N <= S::kMaxWidth && S::tile_width(N) == N) {      \
      consume_tile<S, T, N, kGate>(p, shared, *tile, ring, staging); \
    }                                                                \
    break;
      NVFP4_WIDTH(8)
      NVFP4_WIDTH(16)
      NVFP4_WIDTH(24)
      NVFP4_WIDTH(32)
      NVFP4_WIDTH(40)
      NVFP4_WIDTH(48)
      NVFP4_WIDTH(56)
      NVFP4_WIDTH(64)
      NVFP4_WIDTH(72)
      NVFP4_WIDTH(80)
      NVFP4_WIDTH(88)
      NVFP4_WIDTH(96)
      NVFP4_WIDTH(104)
      NVFP4_WIDTH(112)
      NVFP4_WIDTH(120)
      NVFP4_WIDTH(128)
      NVFP4_WIDTH(136)
      NVFP4_WIDTH(144)
      NVFP4_WIDTH(152)
      NVFP4_WIDTH(160)
      NVFP4_WIDTH(168)
      NVFP4_WIDTH(176)
      NVFP4_WIDTH(184)
      NVFP4_WIDTH(192)
#undef NVFP4_WIDTH
    }
    reader.release();
  }
}

template <class S, class T, GateKind kGate>
__global__ void __launch_bounds__(kThreads<S>, 1) expert_kernel(const __grid_constant__ Params p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory[];
  uint8_t* staging = memory + p.stages * stage_bytes<S>(p.max_width);
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(staging + S::kConsumers * kStagingBytes);
  int* offsets = reinterpret_cast<int*>(&shared + 1);
  int* tiles = offsets + p.experts + 1;
  int* rows = tiles + p.experts + 1;
  auto* order = reinterpret_cast<uint16_t*>(rows + p.experts + 1);

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&shared.full[i]), 1 + kGatherWarps * kWarpArrivals);
      ptx::mbarrier_init(ptx::shared_address(&shared.empty[i]), kConsumerWarps<S> * kWarpArrivals);
    }
    for (int i = 0; i < kTileRing; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&shared.claim[i]), 1);
      ptx::mbarrier_init(ptx::shared_address(&shared.tile_full[i]), kWarp);
      ptx::mbarrier_init(ptx::shared_address(&shared.tile_empty[i]),
                         (kConsumerWarps<S> + 1 + kGatherWarps) * kWarpArrivals);
    }
    ptx::mbarrier_init(ptx::shared_address(&shared.stored), kConsumerWarps<S> * kWarpArrivals);
    ptx::fence_mbarrier_init();
  }
  if (p.sorting) {
    // The launch before, clear_kernel, began when the routing and x were there: the scheduler alone waits for it.
    static_assert(kMinStages * stage_bytes<S>(kTokenAtom) >= kOrderScratch, "it sorts where the ring will be");
    ptx::dependency_release();
    order_slots<kThreads<S>>(p.routing, offsets, order, memory);
    ptx::fence_async_proxy_shared();
  } else {
    ptx::dependency_wait();
    ptx::dependency_release();
    for (int i = threadIdx.x; i <= p.experts; i += kThreads<S>) offsets[i] = p.offsets[i];
  }
  __syncthreads();

  const Ring ring{ptx::shared_address(memory), ptx::shared_address(shared.full),
                  static_cast<uint32_t>(stage_bytes<S>(p.max_width)), static_cast<uint32_t>(p.stages)};
  const int warp = threadIdx.x / kWarp;
  if (warp < kConsumerWarps<S>) {
    ptx::registers_raise<S::kConsumerRegisters>();
    consume_tiles<S, T, kGate>(p, shared, ring, ptx::shared_address(staging));
  } else {
    ptx::registers_lower<S::kProducerRegisters>();
    if (warp == kConsumerWarps<S>) {
      stream_weights(p, shared, ring);
    } else if (warp <= kConsumerWarps<S> + kGatherWarps) {
      fetch_tokens(p, shared, ring, threadIdx.x - (kConsumerWarps<S> + 1) * kWarp);
    } else {
      schedule_tiles(p, shared, offsets, order, tiles, rows);
    }
  }
#endif
}

}  // namespace nvfp4::cuda::wgmma_experts
