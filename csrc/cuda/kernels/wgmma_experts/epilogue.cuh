// The end of a tile: scales, the gate, one rounding, and rows through staging to where the next GEMM or combine reads
// them.
#pragma once

#include "../../device/gate.cuh"
#include "multiply.cuh"

namespace nvfp4::cuda::wgmma_experts {

struct Scales {
  float gate;
  float up;
};

// Gate in registers, then a pair of warpgroups lays 64 features of every token into staging as wgmma will read them:
// warp w of 8 holds features 8 w .. 8 w + 7, of which pair q = 4 w + g / 2 is word q / 8 of chunk q % 8.
template <class T, int N, bool kSilu>
__device__ __forceinline__ void stage_gated(const Params& p, const Tile& tile, const Consumer& c,
                                            const float (&sum)[N / 2], Scales scales, uint32_t staging) {
  const int warp = c.group % 2 * 4 + c.warp;
  const int chunk = warp % 2 * 4 + c.g / 2;
  const int word = warp / 2;
  const bool odd = c.g % 2;
  Gate gate = p.gate;
  if constexpr (kSilu) gate.activation = Activation::silu;
  gate.limit = gate.clamped ? gate.limit : INFINITY;  // instead of a branch for each value
  gate.clamped = true;
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    const int token = i * 8 + 2 * c.t;
    float2 weight = make_float2(1.0f, 1.0f);
    if (p.slot_scale != nullptr) weight = make_float2(tile.scale[token], tile.scale[token + 1]);
    const float low = apply_gate(gate, sum[4 * i] * scales.gate * weight.x, sum[4 * i + 2] * scales.up * weight.x);
    const float high = apply_gate(gate, sum[4 * i + 1] * scales.gate * weight.y, sum[4 * i + 3] * scales.up * weight.y);
    // Lanes of features f and f + 1 swap, so that each has one token's pair.
    const float received = __shfl_xor_sync(~0u, odd ? low : high, 4);
    const uint32_t pair = odd ? pack2<T>(received, high) : pack2<T>(low, received);
    ptx::store_shared_32(staging + swizzled(token + odd, chunk) + word * 4, pair);
  }
}

template <int N>
__device__ __forceinline__ void stage_zeros(const Consumer& c, uint32_t staging) {
  const int warp = c.group % 2 * 4 + c.warp;
  for (int token = c.lane / 4; token < N; token += 8) {
    ptx::store_shared_32(staging + swizzled(token, warp % 2 * 4 + c.lane % 4) + warp / 2 * 4, 0);
  }
}

__device__ __forceinline__ void store_hidden(const Params& p, const Tile& tile, const Consumer& c, uint32_t staging) {
  const int block = tile.row_tile * 2 + c.group / 2;
  if (block >= p.gemm[1].k_blocks) return;
  uint8_t* to = p.hidden + (block * p.hidden_rows + tile.hidden_row) * kTokenBytes;
  const int bytes = round_up(tile.tokens, kTokenAtom) * kTokenBytes;
  for (int i = (c.group % 2 * kWarpgroup + c.thread) * 16; i < bytes; i += 2 * kWarpgroup * 16) {
    *reinterpret_cast<uint4*>(to + i) = ptx::load_shared_128(staging + i);
  }
}

template <class T>
__device__ __forceinline__ void store_gated(const Params& p, const Tile& tile, const Consumer& c, uint32_t staging) {
  const int64_t features = p.gemm[0].n / 2;
  const int piece = c.thread % 8;  // 8 features in natural order: a word of each of 4 chunks
  const int64_t feature = (tile.row_tile * 2 + c.group / 2) * int64_t{64} + piece * 8;
  if (feature >= features) return;
  T* out = static_cast<T*>(p.out) + feature;
  for (int token = (c.group % 2 * kWarpgroup + c.thread) / 8; token < tile.tokens; token += 2 * kWarpgroup / 8) {
    const int chunk = piece % 2 * 4;
    const uint32_t word = staging + piece / 2 * 4;
    uint4 v;
    v.x = ptx::load_shared_32(word + swizzled(token, chunk));
    v.y = ptx::load_shared_32(word + swizzled(token, chunk + 1));
    v.z = ptx::load_shared_32(word + swizzled(token, chunk + 2));
    v.w = ptx::load_shared_32(word + swizzled(token, chunk + 3));
    *reinterpret_cast<uint4*>(out + tile.slot[token] * features) = v;
  }
}

// Rows g and g + 8 of a warp's 16 are chunks 2 w and 2 w + 1 of a token's 64 rows. Lays the 8 tokens of d[0..3], and
// the 8 of d[4..7] if there are two blocks, into staging.
template <class T, int kBlocks>
__device__ __forceinline__ void stage_plain(const float* d, const float* weights, const Consumer& c, Scales scales,
                                            uint32_t address) {
  uint32_t m[4];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    float2 weight = make_float2(1.0f, 1.0f);
    if (weights != nullptr) weight = *reinterpret_cast<const float2*>(weights + i * 8 + 2 * c.t);
    m[2 * i] = pack2<T>(d[4 * i] * scales.gate * weight.x, d[4 * i + 1] * scales.gate * weight.y);
    m[2 * i + 1] = pack2<T>(d[4 * i + 2] * scales.up * weight.x, d[4 * i + 3] * scales.up * weight.y);
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
                                            const Consumer& c, const float (&sum)[N / 2], Scales scales,
                                            bool weighted) {
  constexpr int kRoom = kStagingBytes / kTokenBytes;
  constexpr int kTokens = N - kFirst < kRoom ? N - kFirst : kRoom;
  const uint32_t staging = c.staging + c.group * kStagingBytes;
  ptx::barrier_sync(1 + c.group, kWarpgroup);
  const int matrix = c.lane / 8;
  const uint32_t to = staging + swizzled(matrix / 2 * 8 + c.lane % 8, 2 * c.warp + matrix % 2);
  const float* weights = weighted ? tile.scale + kFirst : nullptr;
#pragma unroll
  for (int i = 0; i + 16 <= kTokens; i += 16) {
    stage_plain<T, 2>(&sum[(kFirst + i) / 2], weighted ? weights + i : nullptr, c, scales, to + i * kTokenBytes);
  }
  if constexpr (kTokens % 16 != 0) {
    constexpr int i = kTokens - 8;
    stage_plain<T, 1>(&sum[(kFirst + i) / 2], weighted ? weights + i : nullptr, c, scales, to + i * kTokenBytes);
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
  if constexpr (kFirst + kTokens < N) store_plain<T, N, kFirst + kTokens>(p, gemm, tile, c, sum, scales, weighted);
}

template <class T, int N, bool kSilu>
__device__ __forceinline__ void finish_tile(const Params& p, Shared& shared, const Tile& tile,
                                            const float (&sum)[N / 2], const Consumer& c, bool active) {
  const ExpertGemm& gemm = p.gemm[tile.gemm];
  const bool first_gemm = tile.gemm == 0;
  const Scales scales{tile.gate_scale, tile.up_scale};
  if (first_gemm && p.gate_applies) {
    const uint32_t barrier = 1 + kConsumers + c.group / 2;
    const uint32_t staging = c.staging + c.group / 2 * 2 * kStagingBytes;
    ptx::barrier_sync(barrier, 2 * kWarpgroup);
    if (active) {
      stage_gated<T, N, kSilu>(p, tile, c, sum, scales, staging);
    } else {
      stage_zeros<N>(c, staging);
    }
    ptx::barrier_sync(barrier, 2 * kWarpgroup);
    if (p.mlp) {
      store_hidden(p, tile, c, staging);
      __syncwarp();
      warp_arrive(ptx::shared_address(&shared.stored), c.lane);
    } else {
      store_gated<T>(p, tile, c, staging);
    }
  } else if (active) {
    store_plain<T, N>(p, gemm, tile, c, sum, scales, first_gemm && p.slot_scale != nullptr);
  }
}

}  // namespace nvfp4::cuda::wgmma_experts
