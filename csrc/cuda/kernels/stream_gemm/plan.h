// The sizes that stream_gemm runs with, in plain C++: no GPU is needed to know them.
#pragma once

namespace nvfp4::cuda {

// How many tokens a tile may have.
constexpr int kNarrowTile = 16;
constexpr int kWideTile = 32;

enum class StreamTiles {
  narrow,  // up to kNarrowTile tokens
  wide,    // up to kWideTile tokens; its registers halve the warps that fit into an SM
};

constexpr int tile_width(StreamTiles tiles) { return tiles == StreamTiles::wide ? kWideTile : kNarrowTile; }

// What a CTA that sorts the slots for itself has room for.
constexpr int kCtaSortSlots = 1024;
constexpr int kCtaSortExperts = 1023;

struct StreamPlan {
  StreamTiles tiles;
  bool sorting;   // every CTA sorts the slots for itself: moe on SM90, narrow tiles
  int k_ways[2];  // of each GEMM: warps that share an item, each with every k_ways-th block; 1, 2, 4 or 8
};

}  // namespace nvfp4::cuda
