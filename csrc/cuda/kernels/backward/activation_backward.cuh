// From the gradient of an expert MLP's result, or of its activation's values, to that of its first products: for a tile
// of tokens and 64 features, both products of a step side by side,
//   gate, up += x w13^T    the forward pass's pre-activations, made again
//   flow     += grad w2    what flows into the activation's values
// and the activation's derivative in registers: gate and up rows lie interleaved by 8, so that a lane has gate, up and
// flow of the same features.
#pragma once

#include "../../device/epilogue.cuh"
#include "../../device/gate_backward.cuh"
#include "tile.cuh"

namespace nvfp4::cuda {

template <class T, int kTileM, bool kGated>
struct ActivationBackward {
  static constexpr int kRowWarps = kTileM / kWarpTokens;
  static constexpr int kColumnWarps = kBackwardWarps / kRowWarps;
  static constexpr int kGroups = kFlowFeatures / 8 / kColumnWarps;  // of 8 features, of each warp
  static constexpr int kFirstBlocks = kGated ? 2 : 1;               // of w13; one of w2 follows
  static constexpr int kBlocks = kFirstBlocks + 1;

  struct Stage {
    alignas(128) uint8_t x[kTileM * kRowBytes];
    alignas(128) uint8_t grad[kTileM * kRowBytes];
    alignas(128) uint8_t packed[kBlocks * kBlockBytes];
  };
  struct Storage {
    Stage stage[kBackwardStages];
    alignas(128) uint8_t decoded[kBlocks * kDecodedBytes];
  };

  // Accumulators of a warp.
  struct Sums {
    float gate[kMmaTiles][kGroups][4];
    float up[kMmaTiles][kGroups][4];
    float flow[kMmaTiles][kGroups][4];
  };

  static __device__ __forceinline__ void multiply(uint32_t x, uint32_t grad, uint32_t decoded, bool has_w2,
                                                  int first_row, int first_group, Sums& sums) {
    const int lane = threadIdx.x % kWarp;
    const uint32_t w2 = decoded + kFirstBlocks * kDecodedBytes;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t a[kMmaTiles][4];
#pragma unroll
      for (int m = 0; m < kMmaTiles; ++m) load_rows(x, first_row + 16 * m, j, a[m]);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int group = first_group + i;
        if constexpr (kGated) {
          // 8 gate rows, then the 8 up rows of the same features.
          uint32_t b[4];
          const uint32_t block = decoded + group / 4 * kDecodedBytes;
          ptx::load_matrix_x4(swizzled(block, group % 4 * 16 + lane / 16 * 8 + lane % 8, 2 * j + lane / 8 % 2), b);
#pragma unroll
          for (int m = 0; m < kMmaTiles; ++m) {
            ptx::mma_m16n8k16<T>(sums.gate[m][i], a[m], b[0], b[1]);
            ptx::mma_m16n8k16<T>(sums.up[m][i], a[m], b[2], b[3]);
          }
        } else {
          uint32_t b[2];
          ptx::load_matrix_x2(swizzled(decoded, group * 8 + lane % 8, 2 * j + lane / 8 % 2), b);
#pragma unroll
          for (int m = 0; m < kMmaTiles; ++m) ptx::mma_m16n8k16<T>(sums.gate[m][i], a[m], b[0], b[1]);
        }
      }
      if (!has_w2) continue;
#pragma unroll
      for (int m = 0; m < kMmaTiles; ++m) load_rows(grad, first_row + 16 * m, j, a[m]);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        uint32_t b[2];
        ptx::load_transposed_x2(swizzled(w2, 16 * j + lane % 16, first_group + i), b);
#pragma unroll
        for (int m = 0; m < kMmaTiles; ++m) ptx::mma_m16n8k16<T>(sums.flow[m][i], a[m], b[0], b[1]);
      }
    }
  }

  // Stores the flow of features `feature` and the next of one row; returns their part of the scale's gradient.
  static __device__ __forceinline__ float finish_pair(const ActivationBackwardParams& p, int expert, int position,
                                                      int slot, int feature, const float* gate, const float* up,
                                                      const float* flow) {
    const PackedWeight& w = p.w13;
    const int features = kGated ? w.n / 2 : w.n;
    const float scale = p.slot_scale == nullptr ? 1.0f : p.slot_scale[slot];
    const float out_scale = p.out_scale == nullptr ? 1.0f : p.out_scale[slot];
    const float gate_scale = kDecodeFactor * w.global_scale[kGated ? 2 * expert : expert];
    const float up_scale = kGated ? kDecodeFactor * w.global_scale[2 * expert + 1] : 0.0f;
    const float flow_scale = p.w2.packed == nullptr ? 1.0f : kDecodeFactor * p.w2.global_scale[expert];
    float2 to_gate, to_up;
    float part = 0.0f;
    if (!p.has_gate) {
      const T* into = static_cast<const T*>(p.grad_out) + static_cast<int64_t>(slot) * w.n + feature;
      const float2 to = unpack2<T>(*reinterpret_cast<const uint32_t*>(into));
      to_gate = scaled(to, relative_scale(w, expert, false));
      part = (to.x * gate[0] + to.y * gate[1]) * gate_scale;
      if constexpr (kGated) {
        const float2 too = unpack2<T>(*reinterpret_cast<const uint32_t*>(into + features));
        to_up = scaled(too, relative_scale(w, expert, true));
        part += (too.x * up[0] + too.y * up[1]) * up_scale;
      }
    }
#pragma unroll
    for (int i = 0; i < 2 && p.has_gate; ++i) {
      const float g = gate[i] * (scale * gate_scale) + bias_of(w.bias, expert, w.n, feature + i);
      const float u = kGated ? up[i] * (scale * up_scale) + bias_of(w.bias, expert, w.n, features + feature + i) : 1.0f;
      const float into =
          p.w2.packed != nullptr
              ? flow[i] * flow_scale
              : to_float(static_cast<const T*>(p.grad_out)[static_cast<int64_t>(slot) * features + feature + i]);
      const GateBackward back = gate_backward(p.gate, g, u, into);
      (i == 0 ? to_gate.x : to_gate.y) = back.gate * out_scale * scale * relative_scale(w, expert, false);
      (i == 0 ? to_up.x : to_up.y) = back.up * out_scale * scale * relative_scale(w, expert, true);
      part += p.slot_scale == nullptr
                  ? into * back.value
                  : back.gate * (gate[i] * gate_scale) + (kGated ? back.up * (up[i] * up_scale) : 0.0f);
    }
    if (p.flow == nullptr) return part;
    const int64_t at = static_cast<int64_t>(position) * w.n + (kGated ? feature / 8 * 16 + feature % 8 : feature);
    store_pair<T>(p.flow, at, to_gate);
    if constexpr (kGated) store_pair<T>(p.flow, at + 8, to_up);
    return part;
  }

  static __device__ __forceinline__ void finish(const ActivationBackwardParams& p, const ExpertTile& tile,
                                                int feature_tile, int first_row, int first_group, const Sums& sums) {
    const int lane = threadIdx.x % kWarp;
    const int features = kGated ? p.w13.n / 2 : p.w13.n;
    const int parts = p.feature_tiles() * kColumnWarps;
#pragma unroll
    for (int m = 0; m < kMmaTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + 16 * m + 8 * half + lane / 4;
        const bool used = row < tile.count;
        const int position = tile.begin + row;
        const int slot = used ? slot_of(p.rows, position) : 0;
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          const int feature = feature_tile * kFlowFeatures + (first_group + i) * 8 + lane % 4 * 2;
          if (!used || feature >= features) continue;
          part += finish_pair(p, tile.expert, position, slot, feature, &sums.gate[m][i][2 * half],
                              &sums.up[m][i][2 * half], &sums.flow[m][i][2 * half]);
        }
        part += __shfl_xor_sync(~0u, part, 1);
        part += __shfl_xor_sync(~0u, part, 2);
        if (p.partial != nullptr && used && lane % 4 == 0) {
          const int index = feature_tile * kColumnWarps + first_group / kGroups;
          p.partial[static_cast<int64_t>(position) * parts + index] = part;
        }
      }
    }
  }

  static __device__ __forceinline__ void load(const ActivationBackwardParams& p, const RowLoader<kTileM>& x,
                                              const RowLoader<kTileM>& grad, int expert, int feature_tile, Stage& stage,
                                              int step) {
    x.load(ptx::shared_address(stage.x), step);
    const uint8_t* w13 = p.w13.packed + expert * p.w13.expert_bytes;
#pragma unroll
    for (int i = 0; i < kFirstBlocks; ++i) {
      const int panel = feature_tile * kFirstBlocks + i;
      load_block(ptx::shared_address(stage.packed + i * kBlockBytes),
                 w13 + (static_cast<int64_t>(panel) * p.w13.k_blocks + step) * kBlockBytes, w13, panel < p.w13.panels,
                 threadIdx.x);
    }
    if (p.w2.packed == nullptr) return;
    grad.load(ptx::shared_address(stage.grad), step);
    const uint8_t* w2 = p.w2.packed + expert * p.w2.expert_bytes;
    load_block(ptx::shared_address(stage.packed + kFirstBlocks * kBlockBytes),
               w2 + (static_cast<int64_t>(step) * p.w2.k_blocks + feature_tile) * kBlockBytes, w2, true, threadIdx.x);
  }

  static __device__ __forceinline__ void run(const ActivationBackwardParams& p, Storage& storage) {
    const int feature_tiles = p.feature_tiles();
    const int feature_tile = blockIdx.x % feature_tiles;
    const bool has_w2 = p.w2.packed != nullptr;
    ptx::dependency_wait();
    const ExpertTile tile = backward_tile<kTileM>(p.rows, blockIdx.x / feature_tiles);
    if (tile.count == 0) return;
    const auto row_of = [&](int i) { return slot_of(p.rows, tile.begin + i) / p.slots_per_row; };
    const RowLoader<kTileM> x(p.x, p.w13.k, tile.count, row_of);
    const RowLoader<kTileM> grad(p.grad_out, p.w13.k, has_w2 ? tile.count : 0, row_of);
    const int warp = threadIdx.x / kWarp;
    const int first_row = warp / kColumnWarps * kWarpTokens;
    const int first_group = warp % kColumnWarps * kGroups;
    const int steps = p.w13.k_blocks;
    Sums sums = {};
#pragma unroll
    for (int step = 0; step < kBackwardStages - 1; ++step) {
      if (step < steps) load(p, x, grad, tile.expert, feature_tile, storage.stage[step], step);
      ptx::cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kBackwardStages - 2>();
      __syncthreads();  // the step's data is there, and all warps are done with the step before
      const int next = step + kBackwardStages - 1;
      if (next < steps) load(p, x, grad, tile.expert, feature_tile, storage.stage[next % kBackwardStages], next);
      ptx::cp_async_commit();
      Stage& stage = storage.stage[step % kBackwardStages];
      const uint32_t decoded = ptx::shared_address(storage.decoded);
      decode_blocks<T, kFirstBlocks>(stage.packed, decoded);
      if (has_w2) {
        decode_blocks<T, 1>(stage.packed + kFirstBlocks * kBlockBytes, decoded + kFirstBlocks * kDecodedBytes);
      }
      __syncthreads();
      multiply(ptx::shared_address(stage.x), ptx::shared_address(stage.grad), decoded, has_w2, first_row, first_group,
               sums);
    }
    finish(p, tile, feature_tile, first_row, first_group, sums);
  }
};

}  // namespace nvfp4::cuda
