// Kernels of the derivatives: the parameters and the launches.
//
// A *position* is a place in `order`: slots sorted by expert. The *flow* of a position is the gradient of its slot's
// products with a weight, in the order of the packed rows (gate and up by 8) and divided by the expert's reference
// scale, the larger magnitude of its global scales.
#pragma once

#include "../../device/packed_block.h"

struct int4;

namespace nvfp4::cuda {

// Rows are split into tiles of this many.
enum class BackwardTile : int { narrow = 32, wide = 64, tall = 128 };  // tall: wgmma, SM90

constexpr int kFlowFeatures = 64;        // features of one CTA of activation_backward
constexpr int kTransposedColumns = 128;  // columns of one CTA of transposed_gemm

struct PackedWeight {
  const uint8_t* packed;  // null: no such weight
  int64_t expert_bytes;
  const float* global_scale;
  const float* bias;  // [experts, n] or null
  bool gated;
  int n;
  int k;
  int panels;
  int k_blocks;
};

// Which rows a launch works on: a table of token tiles (device/scheduler.cuh), or `rows` rows of expert 0.
struct BackwardRows {
  const int4* tile_table;  // or null
  const int32_t* order;    // or null: slot = position
  int rows;
  int max_tiles;
};

// flow and partial of a weight with an activation behind it, or with nothing.
struct ActivationBackwardParams {
  BackwardRows rows;
  int slots_per_row;
  const void* x;         // [rows, k of w13]
  const void* grad_out;  // with w2 [rows, n of w2], else [slots, features]
  const float* into;     // of tall tiles with w2: [slots, features] by position, what flows into the values
  void* x_image;         // of tall tiles: [rows, k of w13 in whole blocks] for the permuted x
  int64_t x_rows;        // rows of x
  PackedWeight w13;
  PackedWeight w2;  // what the activation's values are multiplied with, or nothing
  // Nothing: grad_out is [slots, n], and no flow is stored where it is null.
  bool has_gate;
  Gate gate;
  const float* slot_scale;  // multiplies products with w13, or null
  const float* out_scale;   // multiplies results of w2, or null
  void* flow;               // [slots, n of w13] by position
  float* partial;           // [slots, parts()] by position: parts of the gradient of a slot's scale; or null

  NVFP4_SHARED_INLINE int feature_tiles() const { return ceil_div(w13.gated ? w13.n / 2 : w13.n, kFlowFeatures); }
};
int scale_parts(const ActivationBackwardParams& params, BackwardTile tile);

// out[slot] = y W times the expert's reference scale and the slot's scale.
struct TransposedGemmParams {
  BackwardRows rows;
  const void* y;      // [slots, n] by position, or
  int slots_per_row;  // not 0: [slots / slots_per_row, n]
  PackedWeight weight;
  const float* slot_scale;  // [slots] or null
  void* out;                // [slots, k] by slot, or null: fp32
  float* out32;             // by slot, or
  bool by_position;         // by position

  NVFP4_SHARED_INLINE int column_tiles() const { return ceil_div(weight.k, kTransposedColumns); }
};

// flow of a gated weight with nothing behind it.
struct GatedFlowParams {
  BackwardRows rows;
  const void* grad_out;  // [slots, n] by slot, gate columns first
  PackedWeight weight;
  void* flow;  // [slots, n] by position
};

// grad[slot] = the sum of its partials, plus the products of bias and gradient; zero, or what stands in
// offsets[experts + 1] if there is one, for slots without an expert.
struct ScaleGradParams {
  const int32_t* order;
  const int32_t* offsets;  // [experts + 1], or [experts + 2] of a checked routing
  bool checked;
  int experts;
  int slots;
  const float* partial;  // [slots, parts] by position, or null
  int parts;
  const void* grad_out;  // only with bias: [slots / slots_per_row, columns]
  const float* bias;     // null, or [experts, columns]: its product with the slot's row of grad_out is added
  Routing routing;       // only with bias
  int slots_per_row;
  int columns;
  float* grad;  // [slots]
};

// Calls with tall tiles go to these. `into` and `x_image` are set.
void activation_backward_sm90(DType dtype, const ActivationBackwardParams& params, void* stream);
void transposed_gemm_sm90(DType dtype, const TransposedGemmParams& params, void* stream);
int tall_parts(const ActivationBackwardParams& params);  // what scale_parts() is

void activation_backward(DType dtype, BackwardTile tile, const ActivationBackwardParams& params, void* stream);
void transposed_gemm(DType dtype, BackwardTile tile, const TransposedGemmParams& params, void* stream);
void gated_flow(DType dtype, BackwardTile tile, const GatedFlowParams& params, void* stream);
void scale_grad(DType dtype, const ScaleGradParams& params, void* stream);
// out[row] = the sum of its slots' rows of x, of those alone that have an expert if there is a routing.
struct SumRowsParams {
  const float* x;  // [rows * slots_per_row, columns]
  bool has_routing;
  Routing routing;
  int64_t rows;
  int slots_per_row;
  int columns;
  void* out;  // [rows, columns]
};

void sum_rows(DType dtype, const SumRowsParams& params, void* stream);

}  // namespace nvfp4::cuda
