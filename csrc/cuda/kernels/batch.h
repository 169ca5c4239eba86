// The beginning of batched_moe: what the counts, which only the device knows, mean for the launches behind it.
#pragma once

#include "../../kernels.h"

struct int4;
struct uint4;

namespace nvfp4::cuda {

// One way through the MLPs, enqueued in any case: the device takes one of them, and the others find no tile to do.
struct BatchPath {
  int64_t most_per_expert;  // tokens per expert that has any, up to which it is taken; the last path takes more too
  // For stream_gemm: a table of tiles of `tile_width` tokens, whose slots are rows, and in its head the k_ways; or
  // null.
  int4* tile_table;
  int tile_width;
  int32_t*
      offsets;   // for wgmma_experts: [experts + 1], none of its experts having tokens where it is not taken; or null
  int* control;  // for wgmma_experts: [1 + experts] counters, to be zeroed
};

constexpr int kMaxBatchPaths = 3;

struct BatchParams {
  const int32_t* expert_num_tokens;  // [experts], any numbers
  int experts;
  int rows_per_expert;
  int paths;
  BatchPath path[kMaxBatchPaths];
  // For stream_gemm: of w13 and of w2.
  int multiprocessors;
  int k_blocks[2];
  int panels[2];
  // For wgmma_experts.
  int32_t* order;     // [experts * rows_per_expert] rows that hold tokens, expert after expert
  const uint16_t* x;  // [experts, rows_per_expert, k]
  int k;
  uint4* permuted;  // [experts, rows_per_expert, k_blocks * 8], and what gathering overruns where k_blocks is odd
  // To clear the rows behind an expert's tokens, or null.
  uint4* out;
  int64_t row_vectors;  // of 16 bytes
};

// The most experts whose numbers fit into a CTA's shared memory.
constexpr int64_t kMaxBatchExperts = 4000;

void begin_batch(const BatchParams& params, void* stream);

}  // namespace nvfp4::cuda
