#include "launch.cuh"
#include "params.h"

namespace nvfp4::cuda {
namespace {

using namespace wgmma_experts;

// x_image where it has room: no padding of k, no overrun.
void* usable_x_image(const ExpertMlpArgs& args) {
  return args.w13.k % (kStageBlocks * kBlockK) == 0 ? args.x_image : nullptr;
}

Layout layout_of(const ExpertMlpArgs& args, void* workspace) {
  return lay_out(workspace, args.w13, &args.w2, args.rows, args.slots,
                 !args.sorting && usable_x_image(args) == nullptr);
}

Layout layout_of(const GroupedGemmArgs& args, void* workspace) {
  return lay_out(workspace, args.weight, nullptr, args.rows, args.slots, true);
}

Params params_of(const ExpertMlpArgs& args) {
  return {.gemm = {expert_gemm(args.w13), expert_gemm(args.w2)},
          .mlp = true,
          .gate_applies = args.w13.gated,
          .gate = args.gate,
          .slots_per_row = static_cast<int>(args.slots / args.rows),
          .order = args.order,
          .offsets = args.offsets,
          .experts = static_cast<int>(args.w13.experts),
          .slot_scale = args.slot_scale,
          .out = args.out,
          .routing = args.routing,
          .activates = !args.w13.gated,
          .bias = {args.w13.bias, args.w2.bias}};
}

}  // namespace

size_t wgmma_expert_mlp_workspace(const ExpertMlpArgs& args) { return layout_of(args, nullptr).bytes; }

void wgmma_expert_mlp(const ExpertMlpArgs& args, const WgmmaPlan& plan, void* workspace, void* stream) {
  if (args.slots == 0) return;
  Params params = params_of(args);
  PrepareParams prepare{
      .x = static_cast<const uint16_t*>(args.x), .rows = args.rows, .k = args.w13.k, .x_is_older = args.x_is_older};
  run(args.dtype, params, prepare, args.slots, usable_x_image(args), layout_of(args, workspace), plan, stream);
}

size_t wgmma_overrun_bytes() { return kOverrun; }

size_t wgmma_hidden_bytes(int64_t slots, int64_t experts, int64_t k_of_w2) {
  return static_cast<size_t>(padded_rows(slots, experts) * k_blocks_of(k_of_w2) * kTokenBytes);
}

void wgmma_prepared_mlp(const ExpertMlpArgs& args, const WgmmaPlan& plan, const PreparedTokens& tokens, void* stream) {
  if (args.slots == 0) return;
  Params params = params_of(args);
  params.x = static_cast<const uint8_t*>(tokens.permuted);
  params.control = tokens.control;
  params.hidden = static_cast<uint8_t*>(tokens.hidden);
  params.hidden_rows = padded_rows(args.slots, params.experts);
  args.dtype == DType::bf16 ? launch_experts<bf16>(params, plan, stream) : launch_experts<fp16>(params, plan, stream);
}

size_t wgmma_grouped_gemm_workspace(const GroupedGemmArgs& args) { return layout_of(args, nullptr).bytes; }

void wgmma_grouped_gemm(const GroupedGemmArgs& args, const WgmmaPlan& plan, void* workspace, void* stream) {
  if (args.slots == 0) return;
  Params params{.gemm = {expert_gemm(args.weight), {}},
                .mlp = false,
                .gate_applies = args.gate != nullptr && args.weight.gated,
                .gate = args.gate != nullptr ? *args.gate : Gate{},
                .slots_per_row = static_cast<int>(args.slots / args.rows),
                .order = args.order,
                .offsets = args.offsets,
                .experts = static_cast<int>(args.weight.experts),
                .slot_scale = args.slot_scale,
                .out = args.out,
                .activates = args.gate != nullptr && !args.weight.gated,
                .bias = {args.weight.bias, nullptr}};
  const int64_t columns = args.gate != nullptr ? args.weight.features() : args.weight.n;
  PrepareParams prepare{.x = static_cast<const uint16_t*>(args.x),
                        .rows = args.rows,
                        .k = args.weight.k,
                        .order = args.order,
                        .offsets = args.offsets,
                        .experts = static_cast<int>(args.weight.experts),
                        .slots = args.slots,
                        .out = static_cast<uint4*>(args.out),
                        .out_chunks = columns * kElementBytes / kChunkBytes};
  run(args.dtype, params, prepare, args.slots, nullptr, layout_of(args, workspace), plan, stream);
}

}  // namespace nvfp4::cuda
