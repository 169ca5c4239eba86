// The sizes that stream_gemm runs with, in plain C++: no GPU is needed to know them.
#pragma once

#include "../../../common.h"

namespace nvfp4::cuda {

// How many tokens a tile may have.
constexpr int kNarrowTile = 16;
constexpr int kWideTile = 32;
constexpr int kSplitTile = 8;

enum class StreamTiles {
  narrow,  // up to kNarrowTile tokens
  wide,    // up to kWideTile tokens; its registers halve the warps that fit into an SM
  split,   // up to kSplitTile tokens in fp16, each of them two columns of bf16 (device/split.cuh); moe on SM90
};

constexpr int tile_width(StreamTiles tiles) {
  return tiles == StreamTiles::wide ? kWideTile : tiles == StreamTiles::split ? kSplitTile : kNarrowTile;
}

// How many warps share an item: the fewer, the rarer are reductions; but some warps should be left to find work, and a
// warp that shares an item should find more than a few blocks of it.
NVFP4_SHARED_INLINE constexpr int stream_k_ways(int64_t k_blocks, int64_t items, int multiprocessors) {
  const int64_t warps = int64_t{multiprocessors} * 16;
  int ways = 8;
  if (items * 8 > warps) ways = 4;
  if (items * 4 > warps) ways = 2;
  while (ways > 2 && k_blocks < 4 * ways) ways /= 2;
  if (ways == 2 && k_blocks < 6 * ways) ways = 1;
  return ways;
}

// What a CTA that sorts the slots for itself has room for.
constexpr int kCtaSortSlots = 1024;
constexpr int kCtaSortExperts = 1023;

struct StreamPlan {
  StreamTiles tiles;
  bool sorting;   // every CTA sorts the slots for itself: moe on SM90, narrow tiles
  int k_ways[2];  // of each GEMM: warps that share an item, each with every k_ways-th turn; 1, 2, 4 or 8
};

}  // namespace nvfp4::cuda
