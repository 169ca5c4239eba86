// The expert MLP of at most kInlineSlots slots, where nothing counts but that all warps stream weights all the time.
//
// A CTA owns a few whole items of each GEMM. Their weight blocks, one sequence along items and k, are cut into equal
// runs, one per warp: no warp waits for another before the end. Where a run goes over to the next item, and at its end,
// the warp leaves its sums in shared memory, where they meet after the last multiplication. The tokens of all items are
// brought to shared memory before the first multiplication. A warp's ring runs on from w13 to w2, so that memory is
// busy while CTAs finish w13 and wait for one another's results.
//
// What CTAs hand to one another, w13's outputs and the rows to be summed, needs no flags or fences: its memory is full
// of kNotYet before the launch, and a warp that wants a word reads it until it is something else.
#pragma once

#include <type_traits>

#include "../../device/epilogue.cuh"
#include "../../device/mma.cuh"
#include "../../device/pipeline.cuh"
#include "../../device/scheduler.cuh"
#include "../../device/split.cuh"
#include "params.h"

namespace nvfp4::cuda {

// kRowTiles: of a panel's four warp tiles, those of an item. Half panels spread a few large items evenly over the CTAs.
// Of one warp tile in w13, and then of two in w2, they are for batch invariance: a warp multiplies whole items (parts),
// and everything is rounded where stream_gemm, wgmma_experts and combine round it. kExtended: with biases, activations
// without a gate and SiTU.
template <class T, class Ring, int kWarps, int kRowTiles = 4, bool kExtended = false>
class FewSlotsMlp {
  static constexpr bool kHalves = kRowTiles == 2;
  static constexpr bool kParts = kRowTiles == 1;
  static constexpr int kItemRows = 16 * kRowTiles;                      // of w13
  static constexpr int kDownRows = kParts ? 2 * kItemRows : kItemRows;  // of w2
  static_assert(Ring::kStages % kTurnBlocks == 0);
  // fp16 tokens are two columns of bf16: column c holds the high part of the tile's token c, column c + kTokens the low
  // part. In shared memory a row's low parts lie behind its high ones.
  static constexpr bool kSplit = std::is_same_v<T, fp16> && !kParts;
  using Operand = std::conditional_t<kSplit, bf16, T>;
  static constexpr int kTokens = kSplit ? kFewSlotsSplitWidth : kFewSlotsMaxWidth;  // of a column tile

 public:
  static constexpr int kRingBytes = kWarps * sizeof(typename Ring::Storage);

  static __device__ __forceinline__ void run(const FewSlotsParams& p, uint8_t* storage) {
    Ring ring;
    ring.start(reinterpret_cast<typename Ring::Storage*>(storage)[threadIdx.x / kWarp]);
    ptx::dependency_wait();
    const int expert = InlineTiles::expert_of_lane(p.routing);  // copies go out before its value is there
    if (p.gemm[0].all_rows) copy_rows(p.gemm[0], storage + kRingBytes);
    FewSlotsMlp(p, storage, ring, expert).run();
  }

 private:
  // This CTA's part of a GEMM, and this warp's.
  struct Share {
    int first_item;
    int items;
    int run;  // blocks per warp, whole turns of whole blocks; the last warps may have fewer
    int begin;
    int blocks;  // of this warp
  };

  __device__ __forceinline__ FewSlotsMlp(const FewSlotsParams& p, uint8_t* storage, const Ring& ring, int expert)
      : p_(p),
        tokens_(storage + kRingBytes),
        partials_(reinterpret_cast<float*>(storage + kRingBytes + p.token_bytes)),
        lane_(threadIdx.x % kWarp),
        warp_(threadIdx.x / kWarp),
        tiles_(expert, p.width, p.by_width),
        ring_(ring) {}

  __device__ __forceinline__ void run() {
    open(0);
#pragma unroll 1
    for (int stage = 0; stage < Ring::kStages; stage += kTurnBlocks) {
      begin_turn();
#pragma unroll
      for (int i = 0; i < kTurnBlocks; ++i) refill(stage, i);
      end_turn();
    }
    ptx::dependency_release();
    if (tiles_.size() == 0) return write_no_sums();

#pragma unroll 1
    for (int gemm_index = 0; gemm_index < 2; ++gemm_index) {
      const Share s = share(gemm_index);
      if (gemm_index == 0) {
        if (!p_.gemm[0].all_rows) copy_tokens<false>(0, s);
      } else {
        copy_tokens<true>(1, s);
      }
      ptx::cp_async_commit();
      int first = warp_;
      if constexpr (kParts) first = p_.gemm[gemm_index].by_k_blocks.quotient(s.begin);
      Outcome outcome = prepare(gemm_index, s, first);
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (kSplit && gemm_index == 0) {
        split_rows(s);
        __syncthreads();
      }
      if constexpr (kParts) {
        gemm_index == 0 ? multiply_parts<1>(0, s, first, outcome) : multiply_parts<2>(1, s, first, outcome);
        __syncthreads();
        continue;
      }
      const int before = p_.gemm[gemm_index].by_k_blocks.quotient(s.begin);
      int k = s.begin - before * p_.gemm[gemm_index].k_blocks;
      for (int item = before, left = s.blocks; left > 0; ++item, k = 0) {
        const int blocks = min(left, p_.gemm[gemm_index].k_blocks - k);
        multiply_blocks(gemm_index, s, item, k, blocks);
        left -= blocks;
      }
      __syncthreads();
      for (int i = warp_; i < s.items; i += kWarps) {
        finish(gemm_index, s, i, outcome);
        if (i + kWarps < s.items) outcome = prepare(gemm_index, s, i + kWarps);
      }
    }
  }

  __device__ __forceinline__ Share share(int gemm_index) const {
    const FewSlotsGemm& gemm = p_.gemm[gemm_index];
    const int all = tiles_.size() * gemm.items_per_tile;
    const int each = p_.by_grid.quotient(all);
    const int more = all - each * static_cast<int>(gridDim.x);
    const int cta = blockIdx.x;
    Share s;
    s.first_item = cta * each + min(cta, more);
    s.items = each + (cta < more ? 1 : 0);
    const int blocks = s.items * gemm.k_blocks;
    s.run = ceil_div(blocks, kWarps);
    if constexpr (kParts) s.run = ceil_div(s.items, kWarps) * gemm.k_blocks;
    if constexpr (kRowTiles == 4) s.run = round_up(s.run, kTurnBlocks);
    s.begin = min(warp_ * s.run, blocks);
    s.blocks = min(s.run, blocks - s.begin);
    return s;
  }

  // ---- the stream of weight blocks, which runs ahead of the multiplications by the length of the ring

  __device__ __forceinline__ void open(int gemm_index) {
    const Share s = share(gemm_index);
    const int before = p_.gemm[gemm_index].by_k_blocks.quotient(s.begin);
    fill_gemm_ = gemm_index;
    fill_item_ = s.first_item + before;
    fill_k_ = s.begin - before * p_.gemm[gemm_index].k_blocks;
    fill_ahead_ = s.blocks;
  }

  // Before the first refill of a turn.
  __device__ __forceinline__ void begin_turn() {
    if (fill_left_ > 0) return;
    if (fill_ahead_ == 0 && fill_gemm_ == 0) open(1);
    if (fill_ahead_ == 0) return;
    const FewSlotsGemm& gemm = p_.gemm[fill_gemm_];
    const int tile = gemm.by_items_per_tile.quotient(fill_item_);
    int panel = fill_item_ - tile * gemm.items_per_tile;
    if constexpr (kHalves) {
      fill_first_tile_ = panel % 2 * kRowTiles;
      panel /= 2;
    }
    if constexpr (kParts) {
      fill_tiles_ = fill_gemm_ == 0 ? 1 : 2;
      const int parts = 4 / fill_tiles_;
      fill_first_tile_ = panel % parts * fill_tiles_;
      panel /= parts;
    }
    const int64_t block = static_cast<int64_t>(panel) * gemm.k_blocks + fill_k_;
    fill_at_ = gemm.packed + tiles_.tile(tile).expert * gemm.expert_bytes + block * kBlockBytes;
    fill_left_ = min(fill_ahead_, gemm.k_blocks - fill_k_);
    fill_ahead_ -= fill_left_;
    fill_k_ = 0;
    ++fill_item_;
  }

  // The i-th block of the turn.
  __device__ __forceinline__ void refill(int first_stage, int i) {
    if constexpr (kHalves) {
      ring_.fill_half(first_stage + i, i < fill_left_, fill_at_ + i * kBlockBytes, fill_first_tile_);
    } else if constexpr (kParts) {
      ring_.fill_part(first_stage + i, i < fill_left_, fill_at_ + i * kBlockBytes, fill_first_tile_, fill_tiles_);
    } else {
      ring_.fill(first_stage + i, i < fill_left_, fill_at_ + i * kBlockBytes);
    }
  }

  __device__ __forceinline__ void end_turn() {
    fill_at_ += kTurnBlocks * kBlockBytes;
    fill_left_ -= kTurnBlocks;
  }

  // ---- tokens

  // The row of shared memory that holds a token of a tile.
  __device__ __forceinline__ int token_row(int gemm_index, const Share& s, int tile_index, int slot, int token) const {
    const FewSlotsGemm& gemm = p_.gemm[gemm_index];
    if (gemm.all_rows) return gemm.slots_per_row.quotient(slot);
    return (tile_index - gemm.by_items_per_tile.quotient(s.first_item)) * p_.width + token;
  }

  // By all threads of the CTA; k beyond a row's end is zeros.
  static __device__ __forceinline__ void copy_rows(const FewSlotsGemm& gemm, uint8_t* tokens) {
    for (int row = 0; row < gemm.rows; ++row) {
#pragma unroll 1
      for (int i = threadIdx.x; i < gemm.row_chunks; i += kWarps * kWarp) {
        copy_chunk<false>(gemm, row, tokens + row * gemm.row_bytes, i);
      }
    }
  }

  // The tokens of the CTA's own tiles, or all. kHandedOver: other CTAs of this launch write them meanwhile.
  template <bool kHandedOver>
  __device__ __forceinline__ void copy_tokens(int gemm_index, const Share& s) const {
    const FewSlotsGemm& gemm = p_.gemm[gemm_index];
    if (s.items == 0) return;
    int row = lane_;  // the row of x that goes to row `lane` of shared memory, or -1
    int rows = gemm.rows;
    if (gemm.all_rows) {
      if (kHandedOver && (tiles_.used_slots() >> lane_ & 1) == 0) row = -1;  // never written
    } else {
      const int first = gemm.by_items_per_tile.quotient(s.first_item);
      const int last = gemm.by_items_per_tile.quotient(s.first_item + s.items - 1);
      row = -1;
      rows = (last - first + 1) * p_.width;
      for (int i = first; i <= last; ++i) {
        const ExpertTile tile = tiles_.tile(i);
        const int token = lane_ - (i - first) * p_.width;
        const int slot = __shfl_sync(~0u, tiles_.slot(tile), token & (kWarp - 1));
        if (token >= 0 && token < tile.count) row = gemm.slots_per_row.quotient(slot);
      }
    }
    const int chunks = rows * gemm.row_chunks;
#pragma unroll 1
    for (int base = warp_ * kWarp; base < chunks; base += kWarps * kWarp) {
      const int to = gemm.by_row_chunks.quotient(base + lane_);
      const int from = __shfl_sync(~0u, row, to & (kWarp - 1));
      if (base + lane_ < chunks && from >= 0) {
        copy_chunk<kHandedOver>(gemm, from, tokens_ + to * gemm.row_bytes, base + lane_ - to * gemm.row_chunks);
      }
    }
  }

  // The rows of w13's tokens, as they were copied, in place. By all threads of the CTA.
  __device__ __forceinline__ void split_rows(const Share& s) const {
    const FewSlotsGemm& gemm = p_.gemm[0];
    int rows = gemm.rows;
    if (!gemm.all_rows) {
      const int first = gemm.by_items_per_tile.quotient(s.first_item);
      const int last = gemm.by_items_per_tile.quotient(s.first_item + s.items - 1);
      rows = s.items == 0 ? 0 : (last - first + 1) * p_.width;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * gemm.row_chunks; i += kWarps * kWarp) {
      const int row = gemm.by_row_chunks.quotient(i);
      uint8_t* at = tokens_ + row * gemm.row_bytes + (i - row * gemm.row_chunks) * kChunkBytes;
      store_split(*reinterpret_cast<const uint4*>(at), at, at + gemm.row_chunks * kChunkBytes);
    }
  }

  // 16 bytes of a row; zeros beyond its end.
  template <bool kHandedOver>
  static __device__ __forceinline__ void copy_chunk(const FewSlotsGemm& gemm, int from, uint8_t* to, int chunk) {
    const bool inside = chunk * 8 < gemm.k;
    const uint8_t* row = static_cast<const uint8_t*>(gemm.x) + static_cast<int64_t>(from) * gemm.k * kElementBytes;
    if constexpr (kHandedOver) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (inside) {
        do {
          v = ptx::load_relaxed_128(row + chunk * 16);
        } while (v.x == kNotYet || v.y == kNotYet || v.z == kNotYet || v.w == kNotYet);
      }
      if constexpr (kSplit) {
        store_split(v, to + chunk * kChunkBytes, to + (gemm.row_chunks + chunk) * kChunkBytes);
      } else {
        *reinterpret_cast<uint4*>(to + chunk * 16) = v;
      }
    } else {
      ptx::cp_async_16_or_zero(to + chunk * 16, inside ? row + chunk * 16 : row, inside);
    }
  }

  // Where a lane's token of an item is, and which warp tiles of the panel are the item's.
  struct TokenPlace {
    uint32_t at;  // the lane's 16 k of block k
    bool used;    // whether there is such a token
    int first_tile;
  };
  template <int kTiles>
  __device__ __forceinline__ TokenPlace find_token(int gemm_index, const Share& s, int item, int k) const {
    const FewSlotsGemm& gemm = p_.gemm[gemm_index];
    const int tile_index = gemm.by_items_per_tile.quotient(s.first_item + item);
    const ExpertTile tile = tiles_.tile(tile_index);
    const int token = lane_ / 4 % kTokens;
    const bool used = token < tile.count;
    const int row = token_row(gemm_index, s, tile_index, __shfl_sync(~0u, tiles_.slot(tile), token), used ? token : 0);
    uint32_t at = ptx::shared_address(tokens_) + row * gemm.row_bytes + k * (kBlockK * kElementBytes) + lane_ % 4 * 32;
    if (kSplit && lane_ / 4 >= kTokens) at += gemm.row_chunks * kChunkBytes;
    constexpr int kItems = 4 / kTiles;  // of a panel
    const int within = s.first_item + item - tile_index * gemm.items_per_tile;
    return {at, used, kItems == 1 ? 0 : within % kItems * kTiles};
  }

  // ---- an item's blocks k .. k + blocks - 1

  __device__ __forceinline__ void multiply_blocks(int gemm_index, const Share& s, int item, int k, int blocks) {
    const TokenPlace place = find_token<kRowTiles>(gemm_index, s, item, k);
    const bool used = place.used;
    const int first_tile = place.first_tile;
    uint32_t x_at = place.at;
    TokenBlock<1> x = {};
    float sum[kRowTiles][1][4] = {};
    for (int left = blocks; left > 0; left -= kTurnBlocks) {
      begin_turn();
#pragma unroll
      for (int i = 0; i < kTurnBlocks; ++i) {
        const bool here = i == 0 || i < left;
        const uint8_t* block = ring_.wait(stage_ + i, parity_);
        WeightTiles<kRowTiles> w;
        if (here) {
          w = WeightTiles<kRowTiles>::read(block, first_tile);
          x.load_shared_if(used, x_at + i * (kBlockK * kElementBytes));
        }
        if constexpr (Ring::kFillQueues) {
          __syncwarp();
          refill(stage_, i);
        }
        if (here) multiply<Operand>(w, x, sum);
        if constexpr (!Ring::kFillQueues) {  // only now: what has been multiplied has been loaded
          __syncwarp();
          refill(stage_, i);
        }
      }
      end_turn();
      x_at += kTurnBlocks * kBlockK * kElementBytes;
      if ((stage_ += kTurnBlocks) == Ring::kStages) {
        stage_ = 0;
        parity_ ^= 1;
      }
    }
    if constexpr (kSplit) {  // lane (r, t) has columns 2 t and 2 t + 1
#pragma unroll
      for (auto& tile : sum) {
#pragma unroll
        for (float& v : tile[0]) v += __shfl_down_sync(~0u, v, kTokens / 2);
      }
    }
    store_partial(partial(warp_, item), p_.width, sum);
  }

  // Runs and items both go up along the sequence of blocks, so no two pairs (warp, item) that meet have the same sum.
  __device__ __forceinline__ float* partial(int warp, int item) const {
    return partials_ + (warp + item) * p_.width * kPartialRows;
  }

  // A warp has the 4 MMAs of a block to wait for, each for the one before. So weights are read a turn ahead.
  template <int kTiles>
  __device__ __forceinline__ void multiply_part(int gemm_index, const Share& s, int item, float* sums) {
    const FewSlotsGemm& gemm = p_.gemm[gemm_index];
    const TokenPlace place = find_token<kTiles>(gemm_index, s, item, 0);
    uint32_t x_at = place.at;
    TokenBlock<1> x[kTurnBlocks] = {};
    WeightTiles<kTiles> next[kTurnBlocks];
    read_turn(stage_, parity_, place.first_tile, next);
    float sum[kTiles][1][4] = {};
    for (int left = gemm.k_blocks; left > 0; left -= kTurnBlocks) {
      x[0].load_shared_if(place.used, x_at);
      x[1].load_shared_if(place.used && left > 1, x_at + kBlockK * kElementBytes);
      const WeightTiles<kTiles> w[kTurnBlocks] = {next[0], next[1]};
      const int stage = stage_;
      if ((stage_ += kTurnBlocks) == Ring::kStages) {
        stage_ = 0;
        parity_ ^= 1;
      }
      if (left > kTurnBlocks) read_turn(stage_, parity_, place.first_tile, next);
      multiply<Operand>(w[0], x[0], sum);
      if (left > 1) multiply<Operand>(w[1], x[1], sum);
      __syncwarp();
      begin_turn();
#pragma unroll
      for (int i = 0; i < kTurnBlocks; ++i) refill(stage, i);
      end_turn();
      x_at += kTurnBlocks * kBlockK * kElementBytes;
    }
    store_partial(sums, p_.width, sum);
  }

  template <int kTiles>
  __device__ __forceinline__ void read_turn(int stage, uint32_t parity, int first_tile,
                                            WeightTiles<kTiles> (&w)[kTurnBlocks]) {
#pragma unroll
    for (int i = 0; i < kTurnBlocks; ++i) {
      w[i] = WeightTiles<kTiles>::read(ring_.wait(stage + i, parity), first_tile, kTiles * (kBlockCodeBytes / 4));
    }
  }

  // ---- the end of a GEMM

  // What finishing an item takes from global memory.
  struct Outcome {
    ExpertTile tile;
    int tile_index;
    int panel;     // or half a panel: the item's place among those of its tile
    int slot;      // of the tile's token number `lane`
    float upper;   // scale of the rows, or of the gate rows
    float lower;   // scale of the up rows
    float scale;   // of slot `slot`
    float weight;  // of slot number `lane`
  };

  __device__ __forceinline__ Outcome prepare(int gemm_index, const Share& s, int i) const {
    Outcome o = {};
    if (i >= s.items) return o;
    const FewSlotsGemm& gemm = p_.gemm[gemm_index];
    o.tile_index = gemm.by_items_per_tile.quotient(s.first_item + i);
    o.tile = tiles_.tile(o.tile_index);
    o.panel = s.first_item + i - o.tile_index * gemm.items_per_tile;
    o.slot = tiles_.slot(o.tile);
    bool is_plain = false;  // of one scale
    if constexpr (kExtended) is_plain = gemm_index == 0 && !p_.gated;
    if (is_plain) {
      o.upper = gemm.global_scale[o.tile.expert];
    } else {
      o.upper = gemm.global_scale[gemm_index == 0 ? 2 * o.tile.expert : o.tile.expert];
    }
    o.scale = o.weight = 1.0f;
    if (gemm_index == 0) {
      if (!is_plain) o.lower = gemm.global_scale[2 * o.tile.expert + 1];
      if (p_.slot_scale != nullptr) o.scale = p_.slot_scale[o.slot];
    } else if (p_.topk_weights != nullptr && lane_ < p_.gemm[1].rows) {
      o.weight = p_.topk_weights[lane_];
    }
    return o;
  }

  // This warp's items, one after the other.
  template <int kTiles>
  __device__ __forceinline__ void multiply_parts(int gemm_index, const Share& s, int first, Outcome outcome) {
    const FewSlotsGemm& gemm = p_.gemm[gemm_index];
    float* sums = partials_ + warp_ * p_.width * kPartialRows;
    for (int item = first, left = s.blocks; left > 0; ++item, left -= gemm.k_blocks) {
      multiply_part<kTiles>(gemm_index, s, item, sums);
      __syncwarp();
      finish_item(gemm_index, sums, 1, outcome);
      __syncwarp();
      if (left > gemm.k_blocks) outcome = prepare(gemm_index, s, item + 1);
    }
  }

  __device__ __forceinline__ void finish(int gemm_index, const Share& s, int i, const Outcome& o) const {
    // The warps whose runs hold some of the item are consecutive.
    const int k_blocks = p_.gemm[gemm_index].k_blocks;
    const int begin = min(lane_ * s.run, s.items * k_blocks);
    const bool has = lane_ < kWarps && begin < (i + 1) * k_blocks && begin + s.run > i * k_blocks;
    const unsigned runs = __ballot_sync(~0u, has);
    finish_item(gemm_index, partial(__ffs(runs) - 1, i), __popc(runs), o);
  }

  __device__ __forceinline__ void finish_item(int gemm_index, const float* sums, int ways, const Outcome& o) const {
    if constexpr (kExtended) {
      if (gemm_index == 0 && !p_.gated) return write_plain_hidden(sums, ways, o);
    }
    if (gemm_index == 0) {
      write_hidden(sums, ways, o);
    } else {
      write_expert_out(sums, ways, o);
      if (o.tile_index == tiles_.size() - 1) sum_panel(o);
    }
  }

  static __device__ __forceinline__ float2 sum_of(const float* sums, int stride, int ways, int token, int row) {
    if constexpr (kParts) return *reinterpret_cast<const float2*>(sums + token * kPartialRows + row);
    return reduce(sums, stride, ways, token, row);
  }

  static __device__ __forceinline__ float2 scale_sum(float2 sum, float slot_scale, float weight_scale) {
    if constexpr (kParts) return scaled(scaled(sum, slot_scale), weight_scale * kDecodeFactor);
    return scaled(sum, weight_scale * (slot_scale * kDecodeFactor));
  }

  __device__ __forceinline__ void write_hidden(const float* sums, int ways, const Outcome& o) const {
    const int stride = p_.width * kPartialRows;
    const int columns = p_.gemm[1].k;
    constexpr int kFeatures = kItemRows / 2;
    constexpr int kLanes = kFeatures / 2;  // of a token
    const int feature = lane_ % kLanes * 2;
    const int row = feature / 8 * 16 + feature % 8;
    const int column = o.panel * kFeatures + feature;
    for (int base = 0; base < o.tile.count; base += kWarp / kLanes) {
      const int token = base + lane_ / kLanes;
      const int64_t to = __shfl_sync(~0u, o.slot, token % kWarp);
      const float scale = __shfl_sync(~0u, o.scale, token % kWarp);
      if (token >= o.tile.count || column >= columns) continue;
      float2 g = scale_sum(sum_of(sums, stride, ways, token, row), scale, o.upper);
      float2 u = scale_sum(sum_of(sums, stride, ways, token, row + 8), scale, o.lower);
      if constexpr (kExtended) {
        g = with_bias(g, 0, o, column);
        u = with_bias(u, 0, o, columns + column);
      }
      const float2 v = make_float2(apply_gate<kExtended>(p_.gate, g.x, u.x), apply_gate<kExtended>(p_.gate, g.y, u.y));
      ptx::store_relaxed_32(static_cast<T*>(p_.hidden) + to * columns + column, pack2<T>(v.x, v.y));
    }
  }

  // The same of a w13 without gate rows.
  __device__ __forceinline__ void write_plain_hidden(const float* sums, int ways, const Outcome& o) const {
    const int stride = p_.width * kPartialRows;
    const int columns = p_.gemm[1].k;
    constexpr int kLanes = kItemRows / 2;  // of a token
    const int row = lane_ % kLanes * 2;
    const int column = o.panel * kItemRows + row;
    for (int base = 0; base < o.tile.count; base += kWarp / kLanes) {
      const int token = base + lane_ / kLanes;
      const int64_t to = __shfl_sync(~0u, o.slot, token % kWarp);
      const float scale = __shfl_sync(~0u, o.scale, token % kWarp);
      if (token >= o.tile.count || column >= columns) continue;
      const float2 v = with_bias(scale_sum(sum_of(sums, stride, ways, token, row), scale, o.upper), 0, o, column);
      ptx::store_relaxed_32(static_cast<T*>(p_.hidden) + to * columns + column,
                            pack2<T>(apply_activation(p_.gate, v.x), apply_activation(p_.gate, v.y)));
    }
  }

  // Rows `row` and `row + 1` with what the tile's expert adds to them.
  __device__ __forceinline__ float2 with_bias(float2 v, int gemm_index, const Outcome& o, int row) const {
    const int n = p_.gemm[gemm_index].n;
    return make_float2(v.x + bias_of(p_.bias[gemm_index], o.tile.expert, n, row),
                       v.y + bias_of(p_.bias[gemm_index], o.tile.expert, n, row + 1));
  }

  __device__ __forceinline__ void write_expert_out(const float* sums, int ways, const Outcome& o) const {
    const int stride = p_.width * kPartialRows;
    const int n = p_.gemm[1].n;
    constexpr int kLanes = kDownRows / 2;  // of a token
    const int row = lane_ % kLanes * 2;
    const int column = o.panel * kDownRows + row;
    for (int base = 0; base < o.tile.count; base += kWarp / kLanes) {
      const int token = base + lane_ / kLanes;
      const int64_t to = __shfl_sync(~0u, o.slot, token % kWarp);
      if (token >= o.tile.count || column >= n) continue;
      float2 v = scaled(sum_of(sums, stride, ways, token, row), o.upper * kDecodeFactor);
      if constexpr (kExtended) v = with_bias(v, 1, o, column);
      if constexpr (kParts) v = unpack2<T>(pack2<T>(v.x, v.y));
      ptx::store_relaxed_64(p_.expert_out + to * n + column, make_uint2(__float_as_uint(v.x), __float_as_uint(v.y)));
    }
  }

  // The weighted sum of each token's slots, in the order of slots, as the rows come in.
  __device__ __forceinline__ void sum_panel(const Outcome& o) const {
    constexpr int kBatch = 8;
    const int n = p_.gemm[1].n;
    const int slots = p_.gemm[1].rows;
    const unsigned used = tiles_.used_slots();
    const int column = o.panel * kDownRows + 2 * lane_;
    const bool inside = 2 * lane_ < kDownRows && column < n;
    const float* rows = p_.expert_out + column;
    float2 total = make_float2(0.0f, 0.0f);
    int token = 0;
    int left = static_cast<int>(p_.routing.top_k);
    for (int first = 0; first < slots; first += kBatch) {
      uint2 value[kBatch];
      bool missing;
      do {
        missing = false;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int slot = first + i;
          value[i] = make_uint2(0, 0);
          if (inside && slot < slots && (used >> slot & 1) != 0) value[i] = ptx::load_relaxed_64(rows + slot * n);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) missing |= value[i].x == kNotYet || value[i].y == kNotYet;
      } while (missing);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int slot = first + i;
        if (slot >= slots) break;
        const float w = __shfl_sync(~0u, o.weight, slot);
        if ((used >> slot & 1) != 0) {
          total.x += w * __uint_as_float(value[i].x);
          total.y += w * __uint_as_float(value[i].y);
        }
        if (--left == 0) {
          if (inside) store_pair<T>(p_.out, static_cast<int64_t>(token) * n + column, total);
          total = make_float2(0.0f, 0.0f);
          left = static_cast<int>(p_.routing.top_k);
          ++token;
        }
      }
    }
  }

  // No slot has an expert here: no panel will be finished.
  __device__ __forceinline__ void write_no_sums() const {
    const int64_t pairs = p_.routing.tokens * p_.gemm[1].n / 2;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < pairs;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      store_pair<T>(p_.out, 2 * i, make_float2(0.0f, 0.0f));
    }
  }

  const FewSlotsParams& p_;
  uint8_t* tokens_;
  float* partials_;
  const int lane_;
  const int warp_;
  const InlineTiles tiles_;
  Ring ring_;
  const uint8_t* fill_at_ = nullptr;
  int fill_left_ = 0;   // blocks of the item that is being filled
  int fill_ahead_ = 0;  // blocks of the run beyond it
  int fill_gemm_;
  int fill_item_;  // the next item
  int fill_k_;
  int fill_first_tile_ = 0;
  int fill_tiles_ = 0;
  int stage_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace nvfp4::cuda
