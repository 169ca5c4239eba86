// The host side: the workspace, and the four launches.
#pragma once

#include "../../launch.h"
#include "../wgmma_experts/gemm.cuh"
#include "params.h"
#include "prepare.cuh"
#include "shared.cuh"

namespace nvfp4::cuda::wgmma_fp8 {

constexpr float kFactor = kFp8DecodeFactor / kDecodeFactor;  // a tile's scales have decode.cuh's factor

struct Layout {
  int* control;  // a tile counter of each GEMM
  uint8_t* x;
  float* x_scale;  // [slots]
  HiddenRows hidden;
  float* hidden_scale;  // [slots]
  size_t bytes;
};

inline Layout lay_out(void* base, const ExpertMlpArgs& args) {
  Workspace workspace(base);
  Layout layout{};
  layout.control = workspace.take<int>(2);
  layout.x = workspace.take<uint8_t>(args.rows * k_blocks_of(args.w13.k) * kBlockK + kBlockK);
  layout.x_scale = workspace.take<float>(args.slots);
  const int blocks = k_blocks_of(args.w2.k);
  layout.hidden.rows = padded_rows(args.slots, args.w13.experts);
  layout.hidden.images = workspace.take<uint8_t>(ceil_div(blocks, kStageBlocks) * layout.hidden.rows * kTokenBytes);
  layout.hidden.row_of_slot = workspace.take<int>(args.slots);
  layout.hidden.parts = blocks * (kBlockK / kElementsPerScale);
  layout.hidden.code_bytes = round_up<int64_t>(layout.hidden.parts, 8);
  layout.hidden.codes = workspace.take<uint8_t>(args.slots * layout.hidden.code_bytes);
  layout.hidden_scale = workspace.take<float>(args.slots);
  layout.bytes = workspace.bytes();
  return layout;
}

// Defined in gemm.cuh, and instantiated in files of their own. With a gate T means nothing, and is bf16.
template <class S, class T, bool kGated>
void launch_gemm(Fp8Params params, const WgmmaPlan& plan, void* stream);

template <class T>
void run(const ExpertMlpArgs& args, const WgmmaPlan& plan, void* memory, void* stream) {
  const Layout layout = lay_out(memory, args);
  const QuantizeParams quantize{.x = static_cast<const uint16_t*>(args.x),
                                .rows = args.rows,
                                .k = static_cast<int>(args.w13.k),
                                .top_k = static_cast<int>(args.slots / args.rows),
                                .factor = kFactor,
                                .slot_weight = args.slot_scale,
                                .out = layout.x,
                                .slot_scale = layout.x_scale,
                                .x_is_older = args.x_is_older,
                                .control = layout.control,
                                .control_size = 2};
  launch(quantize_rows_kernel<T>, dim3(device().multiprocessors * 8), kQuantizeThreads, 0, stream, "quantize tokens",
         quantize);
  Fp8Params first{};
  first.base = {.gemm = {wgmma_experts::expert_gemm(args.w13), {}},
                .gate_applies = true,
                .gate = args.gate,
                .x = layout.x,
                .slots_per_row = static_cast<int>(args.slots / args.rows),
                .order = args.order,
                .offsets = args.offsets,
                .experts = static_cast<int>(args.w13.experts),
                .slot_scale = layout.x_scale,
                .control = layout.control};
  first.hidden = layout.hidden;
  const bool wide = plan.tiles == WgmmaTiles::wide;
  wide ? launch_gemm<Wide, bf16, true>(first, plan, stream) : launch_gemm<Tall, bf16, true>(first, plan, stream);
  const SettleParams settle{.order = args.order,
                            .offsets = args.offsets,
                            .experts = first.base.experts,
                            .hidden = layout.hidden,
                            .factor = kFactor,
                            .slot_scale = layout.hidden_scale};
  launch(settle_rows_kernel, dim3(device().multiprocessors * 8), kSettleThreads, 0, stream, "settle hidden", settle);
  Fp8Params second{};
  second.base = first.base;
  second.base.gemm[0] = wgmma_experts::expert_gemm(args.w2);
  second.base.gate_applies = false;
  second.base.hidden = layout.hidden.images;
  second.base.hidden_rows = layout.hidden.rows;
  second.base.slots_per_row = 1;
  second.base.slot_scale = layout.hidden_scale;
  second.base.out = args.out;
  second.base.control = layout.control + 1;
  wide ? launch_gemm<Wide, T, false>(second, plan, stream) : launch_gemm<Tall, T, false>(second, plan, stream);
}

}  // namespace nvfp4::cuda::wgmma_fp8
