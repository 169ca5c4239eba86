// The whole expert MLP of at most kInlineSlots slots in one launch: parameters, and the launches of both architectures.
#pragma once

#include "../../device/common.cuh"
#include "plan.h"

namespace nvfp4::cuda {

struct FewSlotsGemm {
  const void* x;  // [rows, k]
  int rows;
  Divider slots_per_row;  // slot s reads row s / slots_per_row
  const uint8_t* packed;
  int64_t expert_bytes;
  const float* global_scale;
  int k;
  int n;
  int k_blocks;
  Divider by_k_blocks;
  // Set by the launch: FewSlotsPlan::Gemm.
  int items_per_tile;
  Divider by_items_per_tile;
  bool all_rows;
  int row_bytes;
  int row_chunks;
  Divider by_row_chunks;
};

struct FewSlotsParams {
  FewSlotsGemm gemm[2];  // w13 and w2
  Routing routing;
  const float* slot_scale;  // of w13's outputs, or null
  Gate gate;
  void* hidden;               // [slots, k of w2], what the gate makes of w13's outputs
  float* expert_out;          // [slots, n of w2]
  const float* topk_weights;  // null: all 1
  void* out;                  // [tokens, n of w2]
  // Set by the launch: FewSlotsPlan.
  int width;
  int token_bytes;
  Divider by_width;
  Divider by_grid;
  // Of extended kernels alone, and behind the rest: the others' code does not change with them.
  bool extended;         // is_extended() of either GEMM
  bool gated;            // w13 has gate and up rows
  const float* bias[2];  // of w13 and w2, [experts, n] or null
};

// What follows from the weight and from x [rows, k], of which slot s reads row s / slots_per_row.
inline FewSlotsGemm few_slots_gemm(const Weight& weight, const void* x, int64_t rows, int64_t slots_per_row) {
  FewSlotsGemm gemm{};
  gemm.x = x;
  gemm.rows = static_cast<int>(rows);
  gemm.slots_per_row = Divider(static_cast<uint32_t>(slots_per_row));
  gemm.packed = weight.packed;
  gemm.expert_bytes = weight.expert_bytes;
  gemm.global_scale = weight.global_scale;
  gemm.k = static_cast<int>(weight.k);
  gemm.n = static_cast<int>(weight.n);
  gemm.k_blocks = k_blocks_of(weight.k);
  gemm.by_k_blocks = Divider(gemm.k_blocks);
  return gemm;
}

// A word of `hidden` or `expert_out` that is not written yet: a NaN that no instruction makes.
constexpr uint32_t kNotYet = 0xFFFFFFFFu;

void few_slots_mlp_sm80(DType dtype, const FewSlotsPlan& plan, const FewSlotsParams& params, void* stream);
void few_slots_mlp_sm90(DType dtype, const FewSlotsPlan& plan, const FewSlotsParams& params, void* stream);

inline void few_slots_mlp(Isa isa, DType dtype, const FewSlotsPlan& plan, const FewSlotsParams& params, void* stream) {
  (isa == Isa::sm80 ? few_slots_mlp_sm80 : few_slots_mlp_sm90)(dtype, plan, params, stream);
}

}  // namespace nvfp4::cuda
