// The end of a tile: scales, the gate, one rounding, and rows through staging to where the next GEMM or combine reads
// them. A warpgroup does it alone; staging is there because L2 wants whole sectors, and rather whole lines.
#pragma once

#include "../../device/gate.cuh"
#include "../../device/ptx/mma.cuh"
#include "multiply.cuh"

namespace nvfp4::cuda::wgmma_experts {

// What a lane's rows r and r + 8 of its warp's 16 are multiplied with, and, in extended kernels, what is added then.
struct Scales {
  float gate;
  float up;
  float gate_bias = 0.0f;
  float up_bias = 0.0f;
};

// Not contracted: stream_gemm gives the same bits.
__device__ __forceinline__ float scale_and_add(float sum, float scale, float bias) {
  return __fadd_rn(__fmul_rn(sum, scale), bias);
}

// Multiplies every token by its slot's scale.
template <class S, int N>
__device__ __forceinline__ void scale_slots(const Tile<S>& tile, const Consumer& c, float (&sum)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    const float2 scale = *reinterpret_cast<const float2*>(&tile.scale[i * 8 + 2 * c.t]);
    sum[4 * i] *= scale.x;
    sum[4 * i + 1] *= scale.y;
    sum[4 * i + 2] *= scale.x;
    sum[4 * i + 3] *= scale.y;
  }
}

// Tokens from kFirst on of a tile of N that fit into staging together.
template <int N, int kFirst, int kBytes>
constexpr int kStaged = N - kFirst < kStagingBytes / kBytes ? N - kFirst : kStagingBytes / kBytes;

constexpr int kGatedBytes = 64;  // of a token in a warpgroup's staging

// The gate in registers. Then lane (r, t) lays what it has of token 8 i + r, the pair of features 2 t and 2 t + 1 of
// the warp's 8, into staging at word [warp][token][t]. kTokens of them, from sum[0] on.
template <class T, int kTokens, GateKind kGate, bool kExtended>
__device__ __forceinline__ void stage_gated(const Params& p, const Consumer& c, bool exists, const float* sum,
                                            Scales scales, uint32_t staging) {
  Gate gate = p.gate;
  gate.limit = gate.clamped ? gate.limit : INFINITY;  // instead of a branch for each value
  gate.clamped = true;
  const uint32_t to = staging + c.warp * kTokens * 16 + c.lane * 4;
  const auto stage = [&](const Gate& known) __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      float low, high;
      if constexpr (kExtended) {
        low = apply_gate<true>(known, scale_and_add(sum[4 * i], scales.gate, scales.gate_bias),
                               scale_and_add(sum[4 * i + 2], scales.up, scales.up_bias));
        high = apply_gate<true>(known, scale_and_add(sum[4 * i + 1], scales.gate, scales.gate_bias),
                                scale_and_add(sum[4 * i + 3], scales.up, scales.up_bias));
      } else {
        low = apply_gate(known, sum[4 * i] * scales.gate, sum[4 * i + 2] * scales.up);
        high = apply_gate(known, sum[4 * i + 1] * scales.gate, sum[4 * i + 3] * scales.up);
      }
      const uint32_t pair = ptx::transpose(pack2<T>(low, high));
      ptx::store_shared_32(to + i * 128, exists ? pair : 0);
    }
  };
  if constexpr (kGate == GateKind::other) {
    with_known_activation<false>(gate, stage);
  } else {
    gate.activation = kGate == GateKind::silu ? Activation::silu : Activation::situ;
    stage(gate);
  }
}

// Writes staged tokens, the tile's from `first` on, as wgmma will read them. Of the 64 features of a k-block of GEMM2
// tile w of 8 has 8 w .. 8 w + 7, of which pair q = 4 w + t is word q / 8 of chunk q % 8 of a token.
template <class S, int kTokens>
__device__ __forceinline__ void store_hidden(const Params& p, const Tile<S>& tile, const Consumer& c, int first,
                                             uint32_t staging) {
  const int panel = tile.row_tile * S::kConsumers + c.group;
  const int block = panel / 2;
  if (block >= p.gemm[1].k_blocks) return;
  uint8_t* to = p.hidden + (block * p.hidden_rows + tile.hidden_row + first) * kTokenBytes;
  const int tokens = round_up(tile.tokens, kTokenAtom) - first;
  constexpr bool kWholeChunks = S::kConsumers % 2 == 0;  // of 4 chunks; or 2 words of all 8
  constexpr int kChunks = kWholeChunks ? 4 : 8;
#pragma unroll
  for (int i = 0; i < kTokens; i += kWarpgroup / kChunks) {
    const int token = i + c.thread / kChunks;
    if (token >= min(tokens, kTokens)) break;
    if constexpr (kWholeChunks) {
      const uint32_t from = staging + i * 16 + c.thread * 4;
      uint4 v;
      v.x = ptx::load_shared_32(from);
      v.y = ptx::load_shared_32(from + kTokens * 16);
      v.z = ptx::load_shared_32(from + 2 * kTokens * 16);
      v.w = ptx::load_shared_32(from + 3 * kTokens * 16);
      *reinterpret_cast<uint4*>(to + swizzled(token, panel % 2 * 4 + c.thread % 4)) = v;
    } else {
      const int chunk = c.thread % 8;
      const uint32_t from = staging + (chunk / 4 * kTokens + token) * 16 + chunk % 4 * 4;
      uint2 v;
      v.x = ptx::load_shared_32(from);
      v.y = ptx::load_shared_32(from + 2 * kTokens * 16);
      *reinterpret_cast<uint2*>(to + swizzled(token, chunk) + panel % 2 * 8) = v;
    }
  }
}

// The same in rows of features.
template <class S, class T, int kTokens>
__device__ __forceinline__ void store_gated(const Params& p, const Tile<S>& tile, const Consumer& c, int first,
                                            uint32_t staging) {
  const int64_t features = p.gemm[0].n / 2;
  const int warp = c.thread % 4;
  const WarpRows rows = warp_rows<S>(c.group, warp, true);
  const int64_t feature = ((tile.row_tile * S::kConsumers + rows.panel) * 4 + rows.tile) * int64_t{8};
  if (feature >= features) return;
  T* out = static_cast<T*>(p.out) + feature;
  for (int token = c.thread / 4; token < min(tile.tokens - first, kTokens); token += kWarpgroup / 4) {
    *reinterpret_cast<uint4*>(out + tile.slot[first + token] * features) =
        ptx::load_shared_128(staging + (warp * kTokens + token) * 16);
  }
}

template <class S, class T, int N, GateKind kGate, int kFirst = 0>
__device__ __forceinline__ void finish_gated(const Params& p, const Tile<S>& tile, const Consumer& c,
                                             const float (&sum)[N / 2], Scales scales) {
  constexpr int kTokens = kStaged<N, kFirst, kGatedBytes>;
  const uint32_t staging = c.staging + c.group * kStagingBytes;
  const bool exists = tile.row_tile * S::kConsumers + warp_rows<S>(c.group, c.warp, true).panel < p.gemm[0].panels;
  ptx::barrier_sync(1 + c.group, kWarpgroup);
  stage_gated<T, kTokens, kGate, S::kExtended>(p, c, exists, &sum[kFirst / 2], scales, staging);
  ptx::barrier_sync(1 + c.group, kWarpgroup);
  if (p.mlp) {
    store_hidden<S, kTokens>(p, tile, c, kFirst, staging);
  } else {
    store_gated<S, T, kTokens>(p, tile, c, kFirst, staging);
  }
  if constexpr (kFirst + kTokens < N) finish_gated<S, T, N, kGate, kFirst + kTokens>(p, tile, c, sum, scales);
}

// Rows r and r + 8 of a warp's 16 are chunks 2 w and 2 w + 1 of a token's 64 rows. Lays the 8 tokens of d[0..3], and
// the 8 of d[4..7] if there are two blocks, into staging.
template <class T, int kBlocks, bool kExtended>
__device__ __forceinline__ void stage_plain(const Gate* gate, const float* d, Scales scales, uint32_t address) {
  const auto end = [&](float sum, float scale, float bias) {
    if constexpr (kExtended) {
      const float v = scale_and_add(sum, scale, bias);
      return gate != nullptr ? apply_activation(*gate, v) : v;
    } else {
      return sum * scale;
    }
  };
  uint32_t m[4];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    m[2 * i] = pack2<T>(end(d[4 * i], scales.gate, scales.gate_bias), end(d[4 * i + 1], scales.gate, scales.gate_bias));
    m[2 * i + 1] = pack2<T>(end(d[4 * i + 2], scales.up, scales.up_bias), end(d[4 * i + 3], scales.up, scales.up_bias));
  }
  if constexpr (kBlocks == 2) {
    ptx::store_transposed_x4(address, m[0], m[1], m[2], m[3]);
  } else {
    ptx::store_transposed_x2(address, m[0], m[1]);
  }
}

// store_hidden() of a weight without gate rows, whose staging holds features in their order: pair q of a token's 64 is
// word q % 4 of chunk q / 4 there.
template <class S, int kTokens>
__device__ __forceinline__ void store_plain_hidden(const Params& p, const Tile<S>& tile, const Consumer& c, int first,
                                                   uint32_t staging) {
  const int block = tile.row_tile * S::kConsumers + c.group;
  if (block >= p.gemm[1].k_blocks) return;
  uint8_t* to = p.hidden + (block * p.hidden_rows + tile.hidden_row + first) * kTokenBytes;
  const int tokens = min(round_up(tile.tokens, kTokenAtom) - first, kTokens);
  const int chunk = c.thread % 8;
  for (int token = c.thread / 8; token < tokens; token += kWarpgroup / 8) {
    const auto pair = [&](int i) {
      return ptx::load_shared_32(staging + swizzled(token, chunk / 4 + 2 * i) + chunk % 4 * 4);
    };
    *reinterpret_cast<uint4*>(to + swizzled(token, chunk)) = make_uint4(pair(0), pair(1), pair(2), pair(3));
  }
}

// Writes the tile's tokens to their slots, as many at a time as staging holds. In extended kernels `activates`: what
// the activation makes of them, to where GEMM2 reads it if there is one.
template <class S, class T, int N, GateKind kGate, int kFirst = 0>
__device__ __forceinline__ void store_plain(const Params& p, const ExpertGemm& gemm, const Tile<S>& tile,
                                            const Consumer& c, const float (&sum)[N / 2], Scales scales,
                                            bool activates) {
  constexpr int kTokens = kStaged<N, kFirst, kTokenBytes>;
  const uint32_t staging = c.staging + c.group * kStagingBytes;
  ptx::barrier_sync(1 + c.group, kWarpgroup);
  const int matrix = c.lane / 8;
  const uint32_t to = staging + swizzled(matrix / 2 * 8 + c.lane % 8, 2 * c.warp + matrix % 2);
  const auto stage = [&](const Gate* gate) __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i + 16 <= kTokens; i += 16) {
      stage_plain<T, 2, S::kExtended>(gate, &sum[(kFirst + i) / 2], scales, to + i * kTokenBytes);
    }
    if constexpr (kTokens % 16 != 0) {
      constexpr int i = kTokens - 8;
      stage_plain<T, 1, S::kExtended>(gate, &sum[(kFirst + i) / 2], scales, to + i * kTokenBytes);
    }
  };
  constexpr bool kActivates = S::kExtended && kGate == GateKind::other;
  if (kActivates && activates) {
    with_known_activation<true>(p.gate, [&](const Gate& known) __attribute__((always_inline)) { stage(&known); });
  } else {
    stage(nullptr);
  }
  ptx::barrier_sync(1 + c.group, kWarpgroup);
  const int panel = tile.row_tile * S::kConsumers + c.group;
  const int chunk = c.thread % 8;
  const int64_t feature = gemm.gated ? panel * int64_t{32} + chunk / 2 * 8 : panel * int64_t{64} + chunk * 8;
  if (kActivates && activates && p.mlp) {
    store_plain_hidden<S, kTokens>(p, tile, c, kFirst, staging);
  } else if (feature < (gemm.gated ? gemm.n / 2 : gemm.n)) {
    T* out = static_cast<T*>(p.out) + feature + (gemm.gated ? chunk % 2 * (gemm.n / 2) : 0);
    for (int i = c.thread / 8; i < min(kTokens, tile.tokens - kFirst); i += kWarpgroup / 8) {
      *reinterpret_cast<uint4*>(out + tile.slot[kFirst + i] * gemm.n) =
          ptx::load_shared_128(staging + swizzled(i, chunk));
    }
  }
  if constexpr (kFirst + kTokens < N) {
    store_plain<S, T, N, kGate, kFirst + kTokens>(p, gemm, tile, c, sum, scales, activates);
  }
}

// The biases of a lane's two rows: in the gated layout a feature's gate and up, else two features. They are asked for
// before the tile is multiplied.
template <class S>
__device__ __forceinline__ Scales tile_biases(const ExpertGemm& gemm, const float* bias, const Tile<S>& tile,
                                              const Consumer& c, bool gate_applies) {
  Scales scales{};
  const WarpRows rows = warp_rows<S>(c.group, c.warp, gate_applies);
  const int64_t panel = tile.row_tile * S::kConsumers + rows.panel;
  const int64_t half = gemm.gated ? gemm.n / 2 : 0;
  const int64_t row = gemm.gated ? panel * 32 + rows.tile * 8 + c.r : panel * 64 + rows.tile * 16 + c.r;
  const int64_t second = gemm.gated ? half + row : row + 8;
  if (row < (gemm.gated ? half : gemm.n)) scales.gate_bias = bias_of(bias, tile.expert, gemm.n, row);
  if (row < half || (!gemm.gated && second < gemm.n)) {
    scales.up_bias = bias_of(bias, tile.expert, gemm.n, second);
  }
  return scales;
}

template <class S, class T, int N, GateKind kGate>
__device__ __forceinline__ void finish_tile(const Params& p, Shared<S>& shared, const Tile<S>& tile,
                                            float (&sum)[N / 2], const Consumer& c, Scales scales, bool active) {
  const bool first_gemm = tile.gemm_index == 0;
  scales.gate = tile.gate_scale;
  scales.up = tile.up_scale;
  const bool activates = S::kExtended && kGate == GateKind::other && first_gemm && p.activates;
  if (first_gemm && p.slot_scale != nullptr) scale_slots<S, N>(tile, c, sum);
  if (first_gemm && p.gate_applies) {
    finish_gated<S, T, N, kGate>(p, tile, c, sum, scales);
    if (p.mlp) {
      __syncwarp();
      warp_arrive(ptx::shared_address(&shared.stored), c.lane);
    }
  } else if (active) {
    store_plain<S, T, N, kGate>(p, p.gemm[tile.gemm_index], tile, c, sum, scales, activates);
  }
  if (S::kExtended && activates && p.mlp) {
    __syncwarp();
    warp_arrive(ptx::shared_address(&shared.stored), c.lane);
  }
}

}  // namespace nvfp4::cuda::wgmma_experts
