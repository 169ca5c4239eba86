// Both GEMMs of the derivatives on wgmma: a CTA takes a tile of up to 128 tokens and four panels, or four blocks of 64
// columns of the transpose, whose sums it leaves in shared memory; the rest is a loop over them, a warp per token.
#include "../../device/epilogue.cuh"
#include "../../device/gate_backward.cuh"
#include "../../launch.h"
#include "wgmma_tile.cuh"

namespace nvfp4::cuda {
namespace {

namespace tall = wgmma_backward;

constexpr int kPermuteThreads = 256;

__global__ void __launch_bounds__(kPermuteThreads)
    permute_kernel(const uint16_t* x, uint4* image, int64_t rows, int64_t k) {
  ptx::dependency_wait();
  const int64_t warp = (blockIdx.x * int64_t{kPermuteThreads} + threadIdx.x) / kWarp;
  permute_rows<true>(x, image, rows, k, warp, gridDim.x * int64_t{kPermuteThreads / kWarp});
}

// ---- the transpose

template <class T>
__device__ __forceinline__ void store_token(const TransposedGemmParams& p, int position, const float* sums, int column,
                                            float expert_scale) {
  const int slot = slot_of(p.rows, position);
  const float scale = p.slot_scale == nullptr ? expert_scale : expert_scale * p.slot_scale[slot];
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < tall::kTileRows / (4 * kWarp); ++i) {
    const int local = (i * kWarp + lane) * 4;
    const int k = column + local;
    if (k >= p.weight.k) continue;
    const float* at = sums + local / kBlockK * kBlockK + tall::first_row(local % kBlockK);
    const float2 low = *reinterpret_cast<const float2*>(at);
    const float2 high = *reinterpret_cast<const float2*>(at + 8);
    const int64_t to = static_cast<int64_t>(p.by_position ? position : slot) * p.weight.k + k;
    if (p.out == nullptr) {
      *reinterpret_cast<float4*>(p.out32 + to) =
          make_float4(low.x * scale, low.y * scale, high.x * scale, high.y * scale);
    } else {
      *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + to) =
          make_uint2(pack2<T>(low.x * scale, low.y * scale), pack2<T>(high.x * scale, high.y * scale));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(tall::kThreads, 1)
    transposed_gemm_sm90_kernel(const __grid_constant__ TransposedGemmParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory[];
  const PackedWeight& w = p.weight;
  const int column_tiles = ceil_div(w.k, tall::kTileRows);
  const int column_tile = blockIdx.x % column_tiles;
  ptx::dependency_wait();
  const ExpertTile tile = backward_tile<tall::kTokens>(p.rows, blockIdx.x / column_tiles);
  if (tile.count == 0) return;
  const tall::TokenLoader tokens(p.y, w.n, tile.count, [&](int i) {
    return p.slots_per_row == 0 ? tile.begin + i : slot_of(p.rows, tile.begin + i) / p.slots_per_row;
  });
  const int k_block = column_tile * tall::kGroups;
  const tall::BlockLoader blocks(w.packed + tile.expert * w.expert_bytes, int64_t{k_block} * kBlockBytes, kBlockBytes,
                                 int64_t{w.k_blocks} * kBlockBytes, w.k_blocks - k_block);
  const auto load = [&](uint32_t to_tokens, uint32_t to_blocks, int step) {
    tokens.load(to_tokens, step);
    blocks.load(to_blocks, step);
  };
  const auto* sums = reinterpret_cast<float*>(memory);
  tall::multiply_tokens<T, true>(tile.count, reinterpret_cast<float*>(memory), ptx::shared_address(memory), w.panels,
                                 load);
  const float expert_scale = kDecodeFactor * reference_scale(w, tile.expert);
  for (int token = threadIdx.x / kWarp; token < tile.count; token += tall::kWarps) {
    store_token<T>(p, tile.begin + token, sums + token * tall::kSumStride, column_tile * tall::kTileRows, expert_scale);
  }
#endif
}

// ---- the activation

// What a token's features of one CTA need, once per tile.
template <bool kGated>
struct ActivationScales {
  float gate;
  float up;
  float relative_gate;
  float relative_up;

  __device__ __forceinline__ ActivationScales(const PackedWeight& w, int expert)
      : gate(kDecodeFactor * w.global_scale[kGated ? 2 * expert : expert]),
        up(kGated ? kDecodeFactor * w.global_scale[2 * expert + 1] : 0.0f),
        relative_gate(relative_scale(w, expert, false)),
        relative_up(relative_scale(w, expert, true)) {}
};

// The same as finish_features with nothing behind the products.
template <class T, bool kGated>
__device__ __forceinline__ float finish_products(const ActivationBackwardParams& p,
                                                 const ActivationScales<kGated>& scales, int64_t flow_at, int slot,
                                                 int feature, const float* sums) {
  const PackedWeight& w = p.w13;
  const T* grad = static_cast<const T*>(p.grad_out) + static_cast<int64_t>(slot) * w.n + feature;
  const tall::Four to_gate = tall::load_four(grad);
  const tall::Four to_up = kGated ? tall::load_four(grad + w.n / 2) : tall::Four{};
  if (p.flow != nullptr) {
    tall::store_four<T>(p.flow, flow_at, to_gate, scales.relative_gate);
    if constexpr (kGated) tall::store_four<T>(p.flow, flow_at + 8, to_up, scales.relative_up);
  }
  const float part = tall::dot(to_gate, tall::load_four(sums)) * scales.gate;
  return kGated ? part + tall::dot(to_up, tall::load_four(sums + 8)) * scales.up : part;
}

// Four features of a token from `feature` on, whose gate's sums are at `sums` and up's 8 behind; returns their part of
// the gradient of the slot's scale.
template <class T, bool kGated>
__device__ __forceinline__ float finish_features(const ActivationBackwardParams& p,
                                                 const ActivationScales<kGated>& scales, int expert, int position,
                                                 int slot, int feature, const float* sums) {
  const PackedWeight& w = p.w13;
  const int features = kGated ? w.n / 2 : w.n;
  const int64_t flow_at = static_cast<int64_t>(position) * w.n + (kGated ? feature / 8 * 16 + feature % 8 : feature);
  if (!p.has_gate) return finish_products<T, kGated>(p, scales, flow_at, slot, feature, sums);
  const float scale = p.slot_scale == nullptr ? 1.0f : p.slot_scale[slot];
  const float out_scale = p.out_scale == nullptr ? 1.0f : p.out_scale[slot];
  const tall::Four g_sum = tall::load_four(sums);
  const tall::Four u_sum = kGated ? tall::load_four(sums + 8) : tall::Four{};
  const tall::Four into =
      p.into != nullptr
          ? tall::load_four(p.into + static_cast<int64_t>(position) * features + feature)
          : tall::load_four(static_cast<const T*>(p.grad_out) + static_cast<int64_t>(slot) * features + feature);
  tall::Four to_gate;
  tall::Four to_up;
  float part = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float g = g_sum.v[i] * (scale * scales.gate) + bias_of(w.bias, expert, w.n, feature + i);
    const float u =
        kGated ? u_sum.v[i] * (scale * scales.up) + bias_of(w.bias, expert, w.n, features + feature + i) : 1.0f;
    const GateBackward back = gate_backward(p.gate, g, u, into.v[i]);
    to_gate.v[i] = back.gate * out_scale * scale;
    to_up.v[i] = back.up * out_scale * scale;
    part += p.slot_scale == nullptr
                ? into.v[i] * back.value
                : back.gate * (g_sum.v[i] * scales.gate) + (kGated ? back.up * (u_sum.v[i] * scales.up) : 0.0f);
  }
  tall::store_four<T>(p.flow, flow_at, to_gate, scales.relative_gate);
  if constexpr (kGated) tall::store_four<T>(p.flow, flow_at + 8, to_up, scales.relative_up);
  return part;
}

NVFP4_SHARED_INLINE constexpr int feature_tile(bool gated) { return gated ? tall::kTileRows / 2 : tall::kTileRows; }

template <class T, bool kGated>
__global__ void __launch_bounds__(tall::kThreads, 1)
    activation_backward_sm90_kernel(const __grid_constant__ ActivationBackwardParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory[];
  constexpr int kFeatures = feature_tile(kGated);
  const PackedWeight& w = p.w13;
  const int features = kGated ? w.n / 2 : w.n;
  const int row_tiles = ceil_div(features, kFeatures);
  const int row_tile = blockIdx.x % row_tiles;
  ptx::dependency_wait();
  const ExpertTile tile = backward_tile<tall::kTokens>(p.rows, blockIdx.x / row_tiles);
  if (tile.count == 0) return;
  const tall::TokenLoader tokens(p.x_image, w.k_blocks * kBlockK, tile.count,
                                 [&](int i) { return slot_of(p.rows, tile.begin + i) / p.slots_per_row; });
  const int panel = row_tile * tall::kGroups;
  const int64_t panel_bytes = int64_t{w.k_blocks} * kBlockBytes;
  const tall::BlockLoader blocks(w.packed + tile.expert * w.expert_bytes, panel * panel_bytes, panel_bytes, kBlockBytes,
                                 w.panels - panel);
  const auto load = [&](uint32_t to_tokens, uint32_t to_blocks, int step) {
    tokens.load(to_tokens, step);
    blocks.load(to_blocks, step);
  };
  const auto* sums = reinterpret_cast<float*>(memory);
  tall::multiply_tokens<T, false>(tile.count, reinterpret_cast<float*>(memory), ptx::shared_address(memory), w.k_blocks,
                                  load);
  const int lane = threadIdx.x % kWarp;
  const ActivationScales<kGated> scales(w, tile.expert);
  for (int token = threadIdx.x / kWarp; token < tile.count; token += tall::kWarps) {
    const int position = tile.begin + token;
    const int slot = slot_of(p.rows, position);
    float part = 0.0f;
    for (int local = lane * 4; local < kFeatures; local += kWarp * 4) {
      const int feature = row_tile * kFeatures + local;
      if (feature >= features) break;
      const float* at = sums + token * tall::kSumStride + (kGated ? local / 8 * 16 + local % 8 : local);
      part += finish_features<T, kGated>(p, scales, tile.expert, position, slot, feature, at);
    }
    if (p.partial == nullptr) continue;
    part = warp_sum(part);
    if (lane == 0) p.partial[static_cast<int64_t>(position) * row_tiles + row_tile] = part;
  }
#endif
}

template <class Params>
void run(void (*kernel)(Params), int64_t ctas, const char* name, const Params& params, void* stream) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel));
  launch(kernel, dim3(static_cast<unsigned>(ctas)), tall::kThreads, tall::kRingBytes, stream, name, params);
}

template <class T>
void run_activation(const ActivationBackwardParams& p, void* stream) {
  const int64_t ctas = int64_t{p.rows.max_tiles} * tall_parts(p);
  run(p.w13.gated ? activation_backward_sm90_kernel<T, true> : activation_backward_sm90_kernel<T, false>, ctas,
      "activation_backward", p, stream);
}

}  // namespace

int tall_parts(const ActivationBackwardParams& p) {
  return ceil_div(p.w13.gated ? p.w13.n / 2 : p.w13.n, feature_tile(p.w13.gated));
}

void activation_backward_sm90(DType dtype, const ActivationBackwardParams& p, void* stream) {
  launch(permute_kernel, dim3(device().multiprocessors * 8), kPermuteThreads, 0, stream, "backward permute",
         static_cast<const uint16_t*>(p.x), static_cast<uint4*>(p.x_image), p.x_rows, int64_t{p.w13.k});
  (dtype == DType::bf16 ? run_activation<bf16> : run_activation<fp16>)(p, stream);
}

void transposed_gemm_sm90(DType dtype, const TransposedGemmParams& p, void* stream) {
  const int64_t ctas = int64_t{p.rows.max_tiles} * ceil_div(p.weight.k, tall::kTileRows);
  run(dtype == DType::bf16 ? transposed_gemm_sm90_kernel<bf16> : transposed_gemm_sm90_kernel<fp16>, ctas,
      "transposed_gemm", p, stream);
}

}  // namespace nvfp4::cuda
