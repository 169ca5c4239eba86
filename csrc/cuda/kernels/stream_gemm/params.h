// GEMM kernels that stream weights through per-warp rings: the parameters and the launches of both architectures.
#pragma once

#include "../../device/packed_block.h"
#include "../../device_facts.h"
#include "plan.h"

struct int4;

namespace nvfp4::cuda {

struct StreamGemmParams {
  const void* x;      // [rows, k]
  int slots_per_row;  // slot s reads row s / slots_per_row
  const uint8_t* packed;
  int64_t expert_bytes;
  const float* global_scale;
  bool gated;
  int k;
  int n;
  int k_blocks;
  int panels;
  int k_ways;              // StreamPlan::k_ways; not read if `batched`
  const int4* tile_table;  // tiles of at most the kernel's width; null: tiles of `rows` dense rows
  const int32_t* order;    // null: slot = position
  int rows;
  bool sorting;              // SM90, narrow: tiles are those of `routing`, whatever the table; every CTA sorts them
  Routing routing;           // only if sorting
  bool batched;              // the table is begin_batch's, whose head holds the k_ways of both GEMMs
  int gemm_index;            // only if batched
  bool plan_is_older;        // what tiles come from was complete before the previous launch in the stream began
  const float* slot_scale;   // or null
  const void* bias;          // of a dense layer, in the dtype of x, or null
  const float* expert_bias;  // [experts, n] or null
  bool has_gate;
  Gate gate;
  void* out;  // [slots, n], or [slots, features()] with the gate

  bool extended() const {
    return expert_bias != nullptr || (has_gate && (!gated || gate.activation == Activation::situ));
  }
};

// What follows from the weight; rows are slots unless the caller says otherwise.
inline StreamGemmParams stream_gemm_params(const Weight& weight, int k_ways) {
  StreamGemmParams p{};
  p.slots_per_row = 1;
  p.packed = weight.packed;
  p.expert_bytes = weight.expert_bytes;
  p.global_scale = weight.global_scale;
  p.gated = weight.gated;
  p.expert_bias = weight.bias;
  p.k = static_cast<int>(weight.k);
  p.n = static_cast<int>(weight.n);
  p.k_blocks = k_blocks_of(weight.k);
  p.panels = panels_of(weight.n);
  p.k_ways = k_ways;
  return p;
}

void stream_gemm_sm80(DType dtype, StreamTiles tiles, const StreamGemmParams& params, void* stream);
void stream_gemm_sm90(DType dtype, StreamTiles tiles, const StreamGemmParams& params, void* stream);

// Rows of x [rows, k] in fp16 as StreamTiles::split reads them: [rows][2][k] in bf16, the high parts first.
void stream_split_rows(const void* x, int64_t rows, int64_t k, void* split, void* stream);

inline void stream_gemm(Isa isa, DType dtype, StreamTiles tiles, const StreamGemmParams& params, void* stream) {
  (isa == Isa::sm80 ? stream_gemm_sm80 : stream_gemm_sm90)(dtype, tiles, params, stream);
}

}  // namespace nvfp4::cuda
