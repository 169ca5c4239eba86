// Cuts every expert's tokens into tiles of one width, a multiple of 8 up to `max_width`: as few tiles as possible,
// since each reads and decodes the expert's weights once, and as equal as possible, since the tail of a tile is
// padding.
//
// Between the GEMMs of an expert MLP tokens lie sorted by expert, every expert's rows padded to 8, so that tiles are
// aligned to the 8-row atoms of wgmma's swizzle.
#pragma once

#include "common.cuh"
#include "shared_layout.h"

namespace nvfp4::cuda {

// Rows of the padded order, whatever the routing.
__host__ __device__ constexpr int64_t padded_rows(int64_t slots, int64_t experts) {
  return round_up<int64_t>(slots + (kTokenAtom - 1) * (experts < slots ? experts : slots), kTokenAtom);
}

struct TokenCut {
  int tiles;
  int width;
};
__device__ __forceinline__ TokenCut cut_tokens(int tokens, int max_width) {
  if (tokens == 0) return {0, 0};
  const int tiles = ceil_div(tokens, max_width);
  return {tiles, round_up(ceil_div(tokens, tiles), kTokenAtom)};
}

// Exclusive prefix sums over experts of token tiles and of padded rows, by one warp; `offsets` and the results hold
// experts + 1 entries.
__device__ __forceinline__ void sum_tiles(const int* offsets, int experts, int max_width, int* tiles, int* rows) {
  const int lane = threadIdx.x % kWarp;
  const int share = ceil_div(experts, kWarp);
  const int first = min(lane * share, experts);
  const int last = min(first + share, experts);
  int tile_sum = 0;
  int row_sum = 0;
  for (int e = first; e < last; ++e) {
    const int tokens = offsets[e + 1] - offsets[e];
    tile_sum += cut_tokens(tokens, max_width).tiles;
    row_sum += round_up(tokens, kTokenAtom);
  }
  int tile_base = tile_sum;
  int row_base = row_sum;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int tile_below = __shfl_up_sync(~0u, tile_base, step);
    const int row_below = __shfl_up_sync(~0u, row_base, step);
    if (lane >= step) {
      tile_base += tile_below;
      row_base += row_below;
    }
  }
  if (lane == kWarp - 1) {
    tiles[experts] = tile_base;
    rows[experts] = row_base;
  }
  tile_base -= tile_sum;
  row_base -= row_sum;
  for (int e = first; e < last; ++e) {
    const int tokens = offsets[e + 1] - offsets[e];
    tiles[e] = tile_base;
    rows[e] = row_base;
    tile_base += cut_tokens(tokens, max_width).tiles;
    row_base += round_up(tokens, kTokenAtom);
  }
  __syncwarp();
}

// The expert whose tiles hold `tile`: the last e with tiles[e] <= tile.
__device__ __forceinline__ int find_expert(const int* tiles, int experts, int tile) {
  int low = 0;
  int high = experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (tiles[middle] <= tile ? low : high) = middle;
  }
  return low;
}

}  // namespace nvfp4::cuda
