// GEMM kernels that stream weights through per-warp rings: the parameters and the launches of both architectures.
#pragma once

#include "../../kernels.h"

struct int4;

namespace nvfp4::cuda {

// Instead of leaving rows to be summed by a later launch, let the last warp that finishes a panel sum it. Rows are fp32
// then. Only with StreamTiles::routing.
struct PanelSum {
  int* done;                  // [panels], zeroed by an earlier launch; null: off
  const float* topk_weights;  // null: all 1
  void* out;                  // [tokens, n]
};

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
  bool plan_is_older;  // tile_table, order and routing were complete before the previous launch in the stream began
  Routing routing;     // read with StreamTiles::routing
  const float* slot_scale;  // or null
  const void* bias;         // or null
  bool has_gate;
  Gate gate;
  void* out;  // [slots, n], or [slots, n / 2] with the gate; fp32 with PanelSum
  PanelSum sum;
  int* clear;  // zeroed for a later launch's PanelSum, [clear_size], or null
  int clear_size;
};

// Tokens a tile may have at most, and slots that need no table.
constexpr int kNarrowTile = 16;
constexpr int kWideTile = 32;
constexpr int kInlineSlots = 32;

// Where a kernel gets its token tiles.
enum class StreamTiles {
  narrow,   // table, up to kNarrowTile tokens
  wide,     // table, up to kWideTile tokens
  routing,  // straight from the routing of at most kInlineSlots slots, up to 8 tokens
};

void stream_gemm_sm80(DType dtype, StreamTiles tiles, const StreamGemmParams& params, void* stream);
void stream_gemm_sm90(DType dtype, StreamTiles tiles, const StreamGemmParams& params, void* stream);

}  // namespace nvfp4::cuda
