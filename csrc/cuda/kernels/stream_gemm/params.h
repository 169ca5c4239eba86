// GEMM kernels that stream weights through per-warp rings: the parameters and the launches of both architectures.
#pragma once

#include "../../../kernels.h"

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
  int k_ways;              // warps that share an item, each with every k_ways-th block: 1, 2, 4 or 8
  const int4* tile_table;  // tiles of at most the kernel's width; null: tiles of `rows` dense rows
  const int32_t* order;    // null: slot = position
  int rows;
  bool plan_is_older;       // tile_table and order were complete before the previous launch in the stream began
  const float* slot_scale;  // or null
  const void* bias;         // or null
  bool has_gate;
  Gate gate;
  void* out;  // [slots, n], or [slots, n / 2] with the gate
};

// How many tokens a tile may have.
constexpr int kNarrowTile = 16;
constexpr int kWideTile = 32;

enum class StreamTiles {
  narrow,  // up to kNarrowTile tokens
  wide,    // up to kWideTile tokens
};

void stream_gemm_sm80(DType dtype, StreamTiles tiles, const StreamGemmParams& params, void* stream);
void stream_gemm_sm90(DType dtype, StreamTiles tiles, const StreamGemmParams& params, void* stream);

}  // namespace nvfp4::cuda
