// The streaming GEMM: out[slot] = x[row of slot] W[expert]^T for few tokens per expert.
//
// A warp takes whole 64 x 64 weight blocks, so it loads its tokens once for four warp tiles. The warps that share an
// item, a team, split k; every warp has its own ring of blocks, which runs on across items. A team's sums meet in
// shared memory once per item.
#pragma once

#include <type_traits>

#include "../../device/epilogue.cuh"
#include "../../device/mma.cuh"
#include "../../device/pipeline.cuh"
#include "../../device/scheduler.cuh"
#include "../../device/split.cuh"
#include "params.h"

namespace nvfp4::cuda {

template <class Ring, int kWarps>
struct StreamStorage {
  typename Ring::Storage ring[kWarps];
  PartialSums partial[2][kWarps];
};

// Tiles of a table, once it is there.
template <int kMaxTiles>
__device__ __forceinline__ TileTable table_tiles(const StreamGemmParams& p) {
  if (!p.plan_is_older) ptx::dependency_wait();
  return TileTable(p.tile_table, p.order, p.rows, 8 * kMaxTiles);
}

// Tiles of a batch. The head of their table says too how many warps share an item, which follows from how many tiles
// there are.
class BatchTiles : public TileTable {
 public:
  __device__ __forceinline__ BatchTiles(const int4* table, int k_ways)
      : TileTable(table, nullptr, 0, 0), k_ways_(k_ways) {}

  __device__ __forceinline__ int k_ways() const { return k_ways_; }

 private:
  int k_ways_;
};

__device__ __forceinline__ BatchTiles batch_tiles(const StreamGemmParams& p) {
  if (!p.plan_is_older) ptx::dependency_wait();
  return BatchTiles(p.tile_table, __ldcg(p.gemm_index == 0 ? &p.tile_table->y : &p.tile_table->z));
}

// kExtended: with experts' biases, activations without a gate and SiTU. kSplit: a row of x and of `hidden`, which it
// writes for itself, is two of bf16, the high and the low parts of its fp16 values. Up to 4 tokens have them in columns
// c and c + 4 of one column tile, more in two column tiles.
template <class T, class Ring, class Tiles, int kMaxTiles, int kWarps, bool kExtended, bool kSplit = false>
class StreamGemm {
  static_assert(Ring::kStages % kTurnBlocks == 0);
  using Operand = std::conditional_t<kSplit, bf16, T>;

 public:
  using Storage = StreamStorage<Ring, kWarps>;

  // make_tiles() waits for what the tiles come from, unless that is older than the previous launch.
  template <class MakeTiles>
  static __device__ __forceinline__ void run(const StreamGemmParams& p, Storage& storage, const MakeTiles& make_tiles) {
    if constexpr (kTilesHaveWays) {
      const Tiles tiles = make_tiles();
      const int team = threadIdx.x / kWarp / tiles.k_ways();
      const int item = blockIdx.x + gridDim.x * team;
      StreamGemm(p, storage, tiles, team).run(item, locate(p, item));
    } else {
      const int team = threadIdx.x / kWarp / p.k_ways;
      const int item = blockIdx.x + gridDim.x * team;  // neighbours go to different CTAs: a few items spread evenly
      const Place place = locate(p, item);             // divides while there is time
      StreamGemm(p, storage, make_tiles(), team).run(item, place);
    }
  }

 private:
  static constexpr bool kTilesHaveWays = std::is_same_v<Tiles, BatchTiles>;

  struct Place {
    int tile;
    int panel;
  };

  // How many warps share an item.
  __device__ __forceinline__ int k_ways() const {
    if constexpr (kTilesHaveWays) {
      return tiles_.k_ways();
    } else {
      return p_.k_ways;
    }
  }

  __device__ __forceinline__ StreamGemm(const StreamGemmParams& p, Storage& storage, const Tiles& tiles, int team)
      : p_(p),
        storage_(storage),
        tiles_(tiles),
        lane_(threadIdx.x % kWarp),
        way_(threadIdx.x / kWarp % k_ways()),
        team_(team),
        blocks_(blocks_of_way(p.k_blocks, way_, k_ways())),
        teams_(gridDim.x * (kWarps / k_ways())),
        items_(tiles_.size() * p.panels) {}

  __device__ __forceinline__ void run(int item, Place place) {
    open(item, place);
    ring_.start(storage_.ring[threadIdx.x / kWarp]);
#pragma unroll
    for (int stage = 0; stage < Ring::kStages; stage += kTurnBlocks) {
      begin_turn();
      ring_.fill_turn(stage, fill_left_, fill_at_);
      end_turn();
    }
    if (!p_.plan_is_older) release();
    if (item >= items_) return release_after_wait();

    ExpertTile tile = tiles_.tile(place.tile);
    int slot = tiles_.slot(tile);
    while (true) {
      item += teams_;
      Place next_place = place;
      ExpertTile next_tile = tile;
      if (item < items_) {
        next_place = locate(p_, item);
        next_tile = tiles_.tile(next_place.tile);
      }
      const Scales scales = load_scales(tile, slot);
      int next_slot;
      const auto prepare_next = [&] { next_slot = tiles_.slot(next_tile); };  // by now next_tile has arrived
      switch (ceil_div(tile.count, kSplit ? 4 : 8)) {
        case 1:
          multiply_item<1>(tile, slot, place.panel, scales, prepare_next);
          break;
        case 2:
          if constexpr (kMaxTiles > 1) multiply_item<2>(tile, slot, place.panel, scales, prepare_next);
          break;
        case 3:
          if constexpr (kMaxTiles > 2) multiply_item<3>(tile, slot, place.panel, scales, prepare_next);
          break;
        case 4:
          if constexpr (kMaxTiles > 2) multiply_item<4>(tile, slot, place.panel, scales, prepare_next);
          break;
      }
      if (item >= items_) return;
      place = next_place;
      tile = next_tile;
      slot = next_slot;
    }
  }

  // ---- which items

  static __device__ __forceinline__ Place locate(const StreamGemmParams& p, int item) {
    const int tile = static_cast<int>(static_cast<unsigned>(item) / static_cast<unsigned>(p.panels));
    return {tile, item - tile * p.panels};
  }

  // The previous launch in the stream: waited for at the last moment if the plan is older than it.
  __device__ __forceinline__ void release() {
    ptx::dependency_release();
    waited_ = true;
  }
  __device__ __forceinline__ void release_after_wait() {
    if (waited_) return;
    ptx::dependency_wait();
    release();
  }

  // ---- the stream of weight blocks, which runs ahead of the multiplications by the length of the ring

  __device__ __forceinline__ void open(int item, const Place& place) {
    fill_item_ = item;
    fill_panel_ = place.panel;
    if (item < items_) fill_expert_ = tiles_.tile(place.tile).expert;
  }

  // Before the first refill of a turn.
  __device__ __forceinline__ void begin_turn() {
    if (fill_left_ > 0 || fill_item_ >= items_) return;
    const int64_t first = static_cast<int64_t>(fill_panel_) * p_.k_blocks + kTurnBlocks * way_;
    fill_at_ = p_.packed + fill_expert_ * p_.expert_bytes + first * kBlockBytes;
    fill_left_ = blocks_;
    const int next = fill_item_ + teams_;
    open(next, locate(p_, next));  // what this loads is not waited for before the next item
  }

  // A way has every k_ways-th turn of an item's blocks.
  static __device__ __forceinline__ int blocks_of_way(int k_blocks, int way, int k_ways) {
    const int round = kTurnBlocks * k_ways;
    const int rest = k_blocks % round - kTurnBlocks * way;
    return k_blocks / round * kTurnBlocks + min(max(rest, 0), kTurnBlocks);
  }

  __device__ __forceinline__ void end_turn() {
    fill_at_ += kTurnBlocks * k_ways() * kBlockBytes;
    fill_left_ -= kTurnBlocks;
  }

  // ---- an item

  struct Scales {
    float upper;  // of the rows, or of the gate rows
    float lower;  // of the up rows
    float slot;   // of the slot of the tile's token number `lane`
  };
  __device__ __forceinline__ Scales load_scales(const ExpertTile& tile, int slot) const {
    const float* global = p_.global_scale + (p_.gated ? 2 * tile.expert : tile.expert);
    return {global[0], p_.gated ? global[1] : 0.0f, p_.slot_scale != nullptr ? p_.slot_scale[slot] : 1.0f};
  }

  template <int kTiles, class Prepare>
  __device__ __forceinline__ void multiply_item(const ExpertTile& tile, int slot, int panel, const Scales& scales,
                                                const Prepare& prepare_next) {
    // From a turn's last block to the way's next turn; within a turn it is kBlockK.
    const int to_next_turn = (kTurnBlocks * (k_ways() - 1) + 1) * kBlockK;
    static_assert(kTurnBlocks == 2);
    TokenCursor<kTiles> rows = token_rows<kTiles>(tile, slot);
    TokenBlock<kTiles> x[kTurnBlocks] = {};
    release_after_wait();
    rows.load(x[0], kBlockK);
    float sum[4][kTiles][4] = {};
    for (int left = blocks_; left > 0; left -= kTurnBlocks) {
      begin_turn();
#pragma unroll
      for (int i = 0; i < kTurnBlocks; ++i) {
        const bool here = i == 0 || i < left;
        const uint8_t* block = ring_.wait_in_turn(stage_, i, parity_);
        WeightBlock w;
        if (here) w = WeightBlock::read(block);
        if constexpr (Ring::kFillQueues) {
          __syncwarp();
          ring_.fill(stage_ + i, i < fill_left_, fill_at_ + i * kBlockBytes);
        }
        if (here) {
          rows.load(x[(i + 1) % kTurnBlocks], i == 0 ? to_next_turn : kBlockK);
          multiply<Operand>(w, x[i], sum);
        }
      }
      if constexpr (!Ring::kFillQueues) {  // only now: what has been multiplied has been loaded
        __syncwarp();
        ring_.fill_turn(stage_, fill_left_, fill_at_);
      }
      end_turn();
      if ((stage_ += kTurnBlocks) == Ring::kStages) {
        stage_ = 0;
        parity_ ^= 1;
      }
    }
    prepare_next();
    constexpr int kColumnTiles = kSplit ? 1 : kTiles;
    if constexpr (kSplit) add_low_parts(sum);
#pragma unroll
    for (int column_tile = 0; column_tile < kColumnTiles; ++column_tile) {
      PartialSums* partial = storage_.partial[buffer_] + team_ * k_ways();
      partial[way_].store(sum, column_tile);
      ptx::barrier_sync(team_, k_ways() * kWarp);
      write_tokens(partial, tile, slot, panel, scales, 8 * column_tile);
      buffer_ ^= 1;  // the other buffer is free: everybody has passed the barrier, so has read it
    }
  }

  template <int kTiles>
  __device__ __forceinline__ TokenCursor<kTiles> token_rows(const ExpertTile& tile, int slot) const {
    const int row = slot / p_.slots_per_row;
    const int first_k = way_ * (kTurnBlocks * kBlockK);
    TokenCursor<kTiles> rows;
    if constexpr (kSplit) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int token = kTiles == 1 ? lane_ / 4 % 4 : lane_ / 4;
        const int part = kTiles == 1 ? lane_ / 16 : i;
        const int64_t token_row = 2 * __shfl_sync(~0u, row, token) + part;
        rows.used[i] = token < tile.count;
        rows.at[i] =
            reinterpret_cast<const uint4*>(static_cast<const T*>(p_.x) + token_row * p_.k + first_k + lane_ % 4 * 16);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int64_t token_row = __shfl_sync(~0u, row, 8 * i + lane_ / 4);
        rows.used[i] = 8 * i + lane_ / 4 < tile.count;
        rows.at[i] =
            reinterpret_cast<const uint4*>(static_cast<const T*>(p_.x) + token_row * p_.k + first_k + lane_ % 4 * 16);
      }
    }
    rows.k_left = p_.k - first_k;
    return rows;
  }

  // Lane (r, t) has columns 2 t and 2 t + 1.
  template <int kTiles>
  static __device__ __forceinline__ void add_low_parts(float (&sum)[4][kTiles][4]) {
#pragma unroll
    for (auto& tile_sum : sum) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kTiles == 1) {
          tile_sum[0][i] += __shfl_down_sync(~0u, tile_sum[0][i], 2);
        } else {
          tile_sum[0][i] += tile_sum[1][i];
        }
      }
    }
  }

  // ---- the end of an item

  // Tokens first .. first + 7 of the tile, 64 rows or 32 features of the panel.
  __device__ __forceinline__ void write_tokens(const PartialSums* partial, const ExpertTile& tile, int slot, int panel,
                                               const Scales& scales, int first) const {
    const int tokens = min(8, tile.count - first);
    const int writers = k_ways();
    if (p_.gated) {
      const int feature = lane_ % 16 * 2;
      const int row = feature / 8 * 16 + feature % 8;
      const int column = panel * 32 + feature;
      for (int base = 0; base < tokens; base += 2 * writers) {
        const int token = base + 2 * way_ + lane_ / 16;
        const int source = (first + token) % kWarp;
        const int64_t to = __shfl_sync(~0u, slot, source);
        const float scale = __shfl_sync(~0u, scales.slot, source);
        if (token >= tokens || column >= p_.n / 2) continue;
        float2 g = scaled(reduce(partial, k_ways(), token, row), scale, scales.upper);
        float2 u = scaled(reduce(partial, k_ways(), token, row + 8), scale, scales.lower);
        if constexpr (kExtended) {
          g = with_expert_bias(g, tile, column);
          u = with_expert_bias(u, tile, p_.n / 2 + column);
        }
        if (p_.has_gate) {
          const float2 v =
              make_float2(apply_gate<kExtended>(p_.gate, g.x, u.x), apply_gate<kExtended>(p_.gate, g.y, u.y));
          store_hidden(to, p_.n / 2, column, v);
        } else {
          store_pair<T>(p_.out, to * p_.n + column, with_bias(g, column));
          store_pair<T>(p_.out, to * p_.n + p_.n / 2 + column, with_bias(u, p_.n / 2 + column));
        }
      }
    } else {
      const int column = panel * kBlockRows + 2 * lane_;
      for (int token = way_; token < tokens; token += writers) {
        const int source = first + token;
        const int64_t to = __shfl_sync(~0u, slot, source);
        const float scale = __shfl_sync(~0u, scales.slot, source);
        if (column >= p_.n) continue;
        float2 v = scaled(reduce(partial, k_ways(), token, 2 * lane_), scale, scales.upper);
        if constexpr (kExtended) {
          v = with_expert_bias(v, tile, column);
          if (p_.has_gate) {
            v = make_float2(apply_activation(p_.gate, v.x), apply_activation(p_.gate, v.y));
            store_hidden(to, p_.n, column, v);
            continue;
          }
        }
        store_pair<T>(p_.out, to * p_.n + column, with_bias(v, column));
      }
    }
  }

  __device__ __forceinline__ void store_hidden(int64_t slot, int columns, int column, float2 v) const {
    if constexpr (kSplit) {
      const SplitPair parts = nvfp4::cuda::split(pack2<T>(v.x, v.y));
      uint32_t* at = reinterpret_cast<uint32_t*>(static_cast<T*>(p_.out) + slot * 2 * columns + column);
      at[0] = parts.high;
      at[columns / 2] = parts.low;
    } else {
      store_pair<T>(p_.out, slot * columns + column, v);
    }
  }

  // The slot's scale first, then the weight's, as in wgmma_experts.
  static __device__ __forceinline__ float2 scaled(float2 sum, float slot_scale, float weight_scale) {
    return nvfp4::cuda::scaled(nvfp4::cuda::scaled(sum, slot_scale), weight_scale * kDecodeFactor);
  }

  __device__ __forceinline__ float2 with_expert_bias(float2 v, const ExpertTile& tile, int column) const {
    return make_float2(v.x + bias_of(p_.expert_bias, tile.expert, p_.n, column),
                       v.y + bias_of(p_.expert_bias, tile.expert, p_.n, column + 1));
  }

  __device__ __forceinline__ float2 with_bias(float2 v, int column) const {
    if (p_.bias == nullptr) return v;
    const T* bias = static_cast<const T*>(p_.bias) + column;
    return make_float2(v.x + to_float(bias[0]), v.y + to_float(bias[1]));
  }

  const StreamGemmParams& p_;
  Storage& storage_;
  const Tiles tiles_;
  const int lane_;
  const int way_;
  const int team_;
  const int blocks_;  // of an item, for this warp
  const int teams_;
  const int items_;
  bool waited_ = false;
  const uint8_t* fill_at_ = nullptr;
  int fill_left_ = 0;
  int fill_item_;
  int fill_panel_;
  int fill_expert_ = 0;
  Ring ring_;
  int stage_ = 0;
  uint32_t parity_ = 0;
  int buffer_ = 0;
};

}  // namespace nvfp4::cuda
