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

// The tile table of a routing that is already sorted; `out` rows of skipped slots, `row_bytes` each, are zeroed.
void cut_tiles(const int32_t* order, const int32_t* offsets, int64_t slots, int64_t experts, int4* tile_table,
               int tile_width, void* out, int64_t row_bytes, void* stream);

// Bytes of a tile table.
size_t tile_table_bytes(int64_t slots, int64_t experts, int tile_width);

}  // namespace nvfp4::cuda
