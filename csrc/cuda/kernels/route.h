// Sorting token slots by expert, and cutting the experts' tokens into tiles.
#pragma once

#include "../../kernels.h"

struct int4;

namespace nvfp4::cuda {

// order, offsets: as RouteArgs. tile_table: null, or where tiles of `tile_width` tokens go (device/scheduler.cuh).
// workspace: sort_workspace() bytes.
void sort_slots(const Routing& routing, int32_t* order, int32_t* offsets, int4* tile_table, int tile_width,
                void* workspace, void* stream);
size_t sort_workspace(const Routing& routing);

// The order and offsets of a grouped_gemm, which anybody may have made, copied and made sure of: where they are not
// what route makes, no slot has an expert, and rows of skipped slots are filled with NaN instead of zeros.
struct CheckedRouting {
  int32_t* order;    // [slots]
  int32_t* offsets;  // [experts + 2]; the last is the word that fills rows of skipped slots
};
void check_routing(const int32_t* order, const int32_t* offsets, int64_t slots, int64_t experts,
                   const CheckedRouting& checked, void* stream);

// The tile table of a checked routing; fills the rows of `out` of skipped slots, `row_bytes` each.
void cut_tiles(const int32_t* order, const int32_t* offsets, int64_t slots, int64_t experts, int4* tile_table,
               int tile_width, void* out, int64_t row_bytes, void* stream);

// Bytes of a tile table.
size_t tile_table_bytes(int64_t slots, int64_t experts, int tile_width);

}  // namespace nvfp4::cuda
