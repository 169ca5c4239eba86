// Ragged work: every expert's tokens are cut into tiles, and an item is one token tile times one 64-row weight panel.
// Items are ordered tile-major, so that neighbours in time stream neighbouring panels of one expert.
//
// Two sources of tiles, with the same functions, all called by whole warps:
//   size()       how many tiles there are
//   tile(i)      the i-th
//   slot(tile)   in lane i, the slot of the tile's i-th token; the last one's beyond the count
#pragma once

#include "common.cuh"

namespace nvfp4::cuda {

// A token tile: some of the tokens of one expert.
struct ExpertTile {
  int expert;
  int begin;  // where its first token stands: a position in `order`, a row, or a lane
  int count;
};

// The local expert of a slot, or -1.
__device__ __forceinline__ int local_expert(const Routing& routing, int64_t slot) {
  int64_t id = routing.ids_are_int64 ? static_cast<const int64_t*>(routing.topk_ids)[slot]
                                     : static_cast<const int32_t*>(routing.topk_ids)[slot];
  if (routing.expert_map != nullptr) {
    if (id < 0 || id >= routing.expert_map_size) return -1;
    id = routing.expert_map[id];
  }
  return id >= 0 && id < routing.experts ? static_cast<int>(id) : -1;
}

// A warp sorts a run of neighbouring slots, of which a lane has every 32nd from `first` on: the bin of each of them,
// its expert, the one behind the last expert where the slot is skipped, or -1 from `end` on.
template <int kPerLane>
__device__ __forceinline__ void find_bins(const Routing& routing, int first, int end, int (&bin)[kPerLane]) {
  const int experts = static_cast<int>(routing.experts);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int slot = first + i * kWarp;
    const int expert = slot < end ? local_expert(routing, slot) : 0;
    bin[i] = slot >= end ? -1 : expert < 0 ? experts : expert;
  }
}

// The rank of each of these slots among those of its bin in the run from `begin` on, and the slots of each bin, which
// are added to `count`, the warp's own.
template <int kPerLane>
__device__ __forceinline__ void rank_in_run(const int (&bin)[kPerLane], int begin, int end, uint16_t* count,
                                            int (&rank)[kPerLane]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (begin + i * kWarp >= end) break;
    const unsigned peers = __match_any_sync(~0u, bin[i]);
    const int before = bin[i] >= 0 ? count[bin[i]] : 0;
    rank[i] = before + __popc(peers & ((1u << lane) - 1));
    __syncwarp();
    if (bin[i] >= 0 && rank[i] == before) count[bin[i]] = static_cast<uint16_t>(before + __popc(peers));
    __syncwarp();
  }
}

// Tiles from the table that route's kernel left in the workspace: entry 0 holds their number in x, the others are
// tiles. Without a table (a dense layer) they are cut from `rows` and belong to expert 0, and slots are rows.
class TileTable {
 public:
  __device__ __forceinline__ TileTable(const int4* table, const int32_t* order, int rows, int width)
      : table_(table), order_(order), rows_(rows), width_(width) {}

  __device__ __forceinline__ int size() const {
    return table_ != nullptr ? __ldcg(&table_->x) : ceil_div(rows_, width_);
  }

  __device__ __forceinline__ ExpertTile tile(int i) const {
    if (table_ == nullptr) return {0, i * width_, min(width_, rows_ - i * width_)};
    const int4 entry = __ldcg(table_ + 1 + i);
    return {entry.x, entry.y, entry.z};
  }

  __device__ __forceinline__ int slot(const ExpertTile& tile) const {
    const int at = tile.begin + min(static_cast<int>(threadIdx.x % kWarp), tile.count - 1);
    return order_ != nullptr ? __ldcg(order_ + at) : at;
  }

 private:
  const int4* table_;
  const int32_t* order_;
  int rows_;
  int width_;
};

// How many entries the table for tiles of `width` tokens has at most.
__host__ __device__ constexpr int64_t tile_table_entries(int64_t slots, int64_t experts, int64_t width) {
  return 1 + (experts < slots ? experts : slots) + slots / width;
}

// At most 32 slots need no sorting: every warp keeps them all, one per lane, and finds the tiles by voting. A tile
// begins at its first slot's lane.
class InlineTiles {
 public:
  // Of slot `lane`, or -1.
  static __device__ __forceinline__ int expert_of_lane(const Routing& routing) {
    const int lane = threadIdx.x % kWarp;
    return lane < static_cast<int>(routing.tokens * routing.top_k) ? local_expert(routing, lane) : -1;
  }

  InlineTiles() = default;
  __device__ __forceinline__ InlineTiles(int expert_of_lane, int width, const Divider& by_width)
      : width_(width), expert_(expert_of_lane) {
    const int lane = threadIdx.x % kWarp;
    peers_ = __match_any_sync(~0u, expert_);
    rank_ = __popc(peers_ & ((1u << lane) - 1));
    first_ = __ballot_sync(~0u, expert_ >= 0 && by_width.quotient(rank_) * width_ == rank_);
  }

  __device__ __forceinline__ int size() const { return __popc(first_); }

  // Its expert, or -1.
  __device__ __forceinline__ int expert_of_slot(int slot) const { return __shfl_sync(~0u, expert_, slot); }

  // Bit i: slot i has an expert here.
  __device__ __forceinline__ unsigned used_slots() const { return __ballot_sync(~0u, expert_ >= 0); }

  __device__ __forceinline__ ExpertTile tile(int i) const {
    const int lane = threadIdx.x % kWarp;
    const bool is_it = (first_ >> lane & 1) != 0 && __popc(first_ & ((1u << lane) - 1)) == i;
    const int begin = __ffs(__ballot_sync(~0u, is_it)) - 1;
    return {__shfl_sync(~0u, expert_, begin), begin, __shfl_sync(~0u, min(width_, __popc(peers_) - rank_), begin)};
  }

  __device__ __forceinline__ int slot(const ExpertTile& tile) const {
    if (tile.count == 1) return tile.begin;
    const int lane = threadIdx.x % kWarp;
    unsigned members = __shfl_sync(~0u, peers_, tile.begin) & (~0u << tile.begin);
    int slot = 0;
#pragma unroll 1
    for (int i = 0; i < tile.count; ++i) {
      if (lane >= i) slot = __ffs(members) - 1;
      members &= members - 1;
    }
    return slot;
  }

 private:
  int width_;
  int expert_;
  unsigned peers_;
  int rank_;        // among the slots of the same expert
  unsigned first_;  // lanes whose slot is the first of a tile
};

}  // namespace nvfp4::cuda
