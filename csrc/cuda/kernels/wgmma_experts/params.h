// The SM90 path for many tokens per expert: grouped GEMMs on wgmma, alone or as the whole expert MLP in one launch.
//
// Calls enqueue two launches on `stream`, which may begin while the launch before them still runs, and keep no state.
// `workspace` is 256-byte aligned and holds at least the matching *_workspace() bytes. `order` and `offsets` are
// route()'s. x may start at any element; out is 16-byte aligned.
#pragma once

#include "../../../kernels.h"
#include "plan.h"

namespace nvfp4::cuda {

// GEMM1, the gate and GEMM2: out[s] = w2[e] gate(w13[e] x[s / (slots / rows)]), e the expert of slot s.
// out is in slot order; rows of skipped slots are left as they were (combine does not read them).
struct ExpertMlpArgs {
  DType dtype;    // bf16 or fp16
  const void* x;  // [rows, w13.k]
  int64_t rows;
  int64_t slots;  // a multiple of rows
  Weight w13;
  Weight w2;                // k == w13.features()
  const int32_t* order;     // [slots]
  const int32_t* offsets;   // [experts + 1]
  const float* slot_scale;  // [slots] scales the pre-activations, or null
  Gate gate;
  void* out;        // [slots, w2.n]
  bool x_is_older;  // the launch before this call on the stream is route's: x and the workspace are ready before it
  // [rows, w13.k], 16-byte aligned, or null. Where w13.k is a multiple of 128 it holds the permuted tokens, which then
  // take no workspace; like the workspace it is overwritten.
  void* x_image = nullptr;
  bool sorting = false;  // the plan's: x is 16-byte aligned and takes no workspace; no order and no offsets
  Routing routing{};     // if sorting
};

size_t wgmma_expert_mlp_workspace(const ExpertMlpArgs& args);
void wgmma_expert_mlp(const ExpertMlpArgs& args, const WgmmaPlan& plan, void* workspace, void* stream);

// The same launch alone, where somebody else has prepared: tokens are permuted (device/gather.cuh), counters zeroed.
struct PreparedTokens {
  const void* permuted;  // [rows, k_blocks * 64], and wgmma_overrun_bytes() behind
  void* hidden;          // wgmma_hidden_bytes()
  int32_t* control;      // [1 + experts]
};
size_t wgmma_overrun_bytes();
size_t wgmma_hidden_bytes(int64_t slots, int64_t experts, int64_t k_of_w2);
void wgmma_prepared_mlp(const ExpertMlpArgs& args, const WgmmaPlan& plan, const PreparedTokens& tokens, void* stream);

// grouped_gemm() as kernels.h defines it, zero rows of skipped slots included.
size_t wgmma_grouped_gemm_workspace(const GroupedGemmArgs& args);
void wgmma_grouped_gemm(const GroupedGemmArgs& args, const WgmmaPlan& plan, void* workspace, void* stream);

}  // namespace nvfp4::cuda
