// The whole expert MLP of at most kInlineSlots slots in one launch: parameters, and the launches of both architectures.
#pragma once

#include "../../device/common.cuh"

namespace nvfp4::cuda {

constexpr int kInlineSlots = 32;  // which need no sorting

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
  int panels;
  Divider by_k_blocks;
  Divider by_panels;
  // Set by the launch.
  bool all_rows;   // every row goes to shared memory; else those of a CTA's own tiles, `width` rows per tile
  int row_bytes;   // in shared memory, from one row to the next
  int row_chunks;  // a row's chunks of kChunkBytes
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
  // Set by the launch.
  int width;        // tokens per tile, at most
  int token_bytes;  // of shared memory
  Divider by_width;
  Divider by_grid;
};

// A word of `hidden` or `expert_out` that is not written yet: a NaN that no instruction makes.
constexpr uint32_t kNotYet = 0xFFFFFFFFu;

// Whether a CTA's shared memory has room for the tokens.
bool few_slots_fit_sm80(const FewSlotsParams& params);
bool few_slots_fit_sm90(const FewSlotsParams& params);

void few_slots_mlp_sm80(DType dtype, const FewSlotsParams& params, void* stream);
void few_slots_mlp_sm90(DType dtype, const FewSlotsParams& params, void* stream);

}  // namespace nvfp4::cuda
