// The end of a tile: scales, the gate, one rounding, and rows through staging to where the next GEMM or combine reads
// them. Every warpgroup does it alone. Staging is there because L2 wants whole sectors, and rather whole lines.
#pragma once

#include "../../device/gate.cuh"
#include "multiply.cuh"

namespace nvfp4::cuda::wgmma_experts {

struct Scales {
  float gate;
  float up;
};

// Multiplies every token by its slot's scale.
template <int N>
__device__ __forceinline__ void scale_slots(const Tile& tile, const Consumer& c, float (&sum)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    const float2 scale = *reinterpret_cast<const float2*>(&tile.scale[i * 8 + 2 * c.t]);
    sum[4 * i] *= scale.x;
    sum[4 * i + 1] *= scale.y;
    sum[4 * i + 2] *= scale.x;
    sum[4 * i + 3] *= scale.y;
  }
}

// The gate in registers. Then lane (g, t) lays what it has of token 8 i + g, the pair of features 2 t and 2 t + 1 of
// the warp's 8, into staging at word [warp][token][t].
template <class T, int N, bool kSilu>
__device__ __forceinline__ void stage_gated(const Params& p, const Consumer& c, bool exists, const float (&sum)[N / 2],
                                            Scales scales, uint32_t staging) {
  Gate gate = p.gate;
  if constexpr (kSilu) gate.activation = Activation::silu;
  gate.limit = gate.clamped ? gate.limit : INFINITY;  // instead of a branch for each value
  gate.clamped = true;
  const uint32_t to = staging + c.warp * N * 16 + c.lane * 4;
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    const float low = apply_gate(gate, sum[4 * i] * scales.gate, sum[4 * i + 2] * scales.up);
    const float high = apply_gate(gate, sum[4 * i + 1] * scales.gate, sum[4 * i + 3] * scales.up);
    const uint32_t pair = ptx::transpose(pack2<T>(low, high));
    ptx::store_shared_32(to + i * 128, exists ? pair : 0);
  }
}

// Of the 64 features of a k-block of GEMM2 warp w of a warpgroup and its neighbour's hold 8 (2 w + h) .. + 7, h the
// parity of the warpgroup: word w of chunk 4 h + t of a token, as wgmma will read it.
template <int N>
__device__ __forceinline__ void store_hidden(const Params& p, const Tile& tile, const Consumer& c, uint32_t staging) {
  const int block = tile.row_tile * (kConsumers / 2) + c.group / 2;
  if (block >= p.gemm[1].k_blocks) return;
  uint8_t* to = p.hidden + (block * p.hidden_rows + tile.hidden_row) * kTokenBytes;
  const int chunk = c.group % 2 * 4 + c.thread % 4;
  const int tokens = round_up(tile.tokens, kTokenAtom);
#pragma unroll
  for (int first = 0; first < N; first += kWarpgroup / 4) {
    const int token = first + c.thread / 4;
    if (token >= tokens) break;
    const uint32_t from = staging + first * 16 + c.thread * 4;
    uint4 v;
    v.x = ptx::load_shared_32(from);
    v.y = ptx::load_shared_32(from + N * 16);
    v.z = ptx::load_shared_32(from + 2 * N * 16);
    v.w = ptx::load_shared_32(from + 3 * N * 16);
    *reinterpret_cast<uint4*>(to + swizzled(token, chunk)) = v;
  }
}

template <class T, int N>
__device__ __forceinline__ void store_gated(const Params& p, const Tile& tile, const Consumer& c, uint32_t staging) {
  const int64_t features = p.gemm[0].n / 2;
  const int warp = c.thread % 4;
  const int64_t feature = (tile.row_tile * (kConsumers / 2) + c.group / 2) * int64_t{64} + warp * 16 + c.group % 2 * 8;
  if (feature >= features) return;
  T* out = static_cast<T*>(p.out) + feature;
  for (int token = c.thread / 4; token < tile.tokens; token += kWarpgroup / 4) {
    *reinterpret_cast<uint4*>(out + tile.slot[token] * features) =
        ptx::load_shared_128(staging + (warp * N + token) * 16);
  }
}

// Rows g and g + 8 of a warp's 16 are chunks 2 w and 2 w + 1 of a token's 64 rows. Lays the 8 tokens of d[0..3], and
// the 8 of d[4..7] if there are two blocks, into staging.
template <class T, int kBlocks>
__device__ __forceinline__ void stage_plain(const float* d, Scales scales, uint32_t address) {
  uint32_t m[4];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    m[2 * i] = pack2<T>(d[4 * i] * scales.gate, d[4 * i + 1] * scales.gate);
    m[2 * i + 1] = pack2<T>(d[4 * i + 2] * scales.up, d[4 * i + 3] * scales.up);
  }
  if constexpr (kBlocks == 2) {
    ptx::store_transposed_x4(address, m[0], m[1], m[2], m[3]);
  } else {
    ptx::store_transposed_x2(address, m[0], m[1]);
  }
}

// Writes the tile's tokens to their slots, as many at a time as staging holds.
template <class T, int N, int kFirst = 0>
__device__ __forceinline__ void store_plain(const Params& p, const ExpertGemm& gemm, const Tile& tile,
                                            const Consumer& c, const float (&sum)[N / 2], Scales scales) {
  constexpr int kRoom = kStagingBytes / kTokenBytes;
  constexpr int kTokens = N - kFirst < kRoom ? N - kFirst : kRoom;
  const uint32_t staging = c.staging + c.group * kStagingBytes;
  ptx::barrier_sync(1 + c.group, kWarpgroup);
  const int matrix = c.lane / 8;
  const uint32_t to = staging + swizzled(matrix / 2 * 8 + c.lane % 8, 2 * c.warp + matrix % 2);
#pragma unroll
  for (int i = 0; i + 16 <= kTokens; i += 16) {
    stage_plain<T, 2>(&sum[(kFirst + i) / 2], scales, to + i * kTokenBytes);
  }
  if constexpr (kTokens % 16 != 0) {
    constexpr int i = kTokens - 8;
    stage_plain<T, 1>(&sum[(kFirst + i) / 2], scales, to + i * kTokenBytes);
  }
  ptx::barrier_sync(1 + c.group, kWarpgroup);
  const int panel = tile.row_tile * kConsumers + c.group;
  const int chunk = c.thread % 8;
  const int64_t feature = gemm.gated ? panel * int64_t{32} + chunk / 2 * 8 : panel * int64_t{64} + chunk * 8;
  if (feature < (gemm.gated ? gemm.n / 2 : gemm.n)) {
    T* out = static_cast<T*>(p.out) + feature + (gemm.gated ? chunk % 2 * (gemm.n / 2) : 0);
    for (int i = c.thread / 8; i < min(kTokens, tile.tokens - kFirst); i += kWarpgroup / 8) {
      *reinterpret_cast<uint4*>(out + tile.slot[kFirst + i] * gemm.n) =
          ptx::load_shared_128(staging + swizzled(i, chunk));
    }
  }
  if constexpr (kFirst + kTokens < N) store_plain<T, N, kFirst + kTokens>(p, gemm, tile, c, sum, scales);
}

template <class T, int N, bool kSilu>
__device__ __forceinline__ void finish_tile(const Params& p, Shared& shared, const Tile& tile, float (&sum)[N / 2],
                                            const Consumer& c, bool active) {
  const ExpertGemm& gemm = p.gemm[tile.gemm];
  const bool first_gemm = tile.gemm == 0;
  const Scales scales{tile.gate_scale, tile.up_scale};
  if (first_gemm && p.slot_scale != nullptr) scale_slots<N>(tile, c, sum);
  if (first_gemm && p.gate_applies) {
    const uint32_t staging = c.staging + c.group * kStagingBytes;
    const bool exists = tile.row_tile * kConsumers + warp_rows(c, true).panel < gemm.panels;
    ptx::barrier_sync(1 + c.group, kWarpgroup);
    stage_gated<T, N, kSilu>(p, c, exists, sum, scales, staging);
    ptx::barrier_sync(1 + c.group, kWarpgroup);
    if (p.mlp) {
      store_hidden<N>(p, tile, c, staging);
      __syncwarp();
      warp_arrive(ptx::shared_address(&shared.stored), c.lane);
    } else {
      store_gated<T, N>(p, tile, c, staging);
    }
  } else if (active) {
    store_plain<T, N>(p, gemm, tile, c, sum, scales);
  }
}

}  // namespace nvfp4::cuda::wgmma_experts
