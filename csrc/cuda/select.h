// The one heuristic table: which kernel, tile and split a size runs with.
#pragma once

#include <cstdint>

#include "kernels/stream_gemm/params.h"

namespace nvfp4::cuda {

enum class Path {
  stream_sm80,  // cp.async rings, mma.sync
  stream_sm90,  // bulk-copy rings, mma.sync
  wgmma,        // SM90a, many tokens per expert
};

struct Choice {
  Path path;
  StreamTiles tiles;  // stream paths
};

// `slots` rows spread over at most `experts` experts. TORCH_NVFP4_ARCH=80 in the environment takes the SM80 path on any
// device.
Choice select(int64_t slots, int64_t experts);

// Warps that share an item of the stream paths, splitting its k; `items` is an estimate.
int select_k_ways(int64_t k_blocks, int64_t items);

}  // namespace nvfp4::cuda
