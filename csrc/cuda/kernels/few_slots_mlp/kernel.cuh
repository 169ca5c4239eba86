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
#include "../../device/warp_arrive.cuh"
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
    FewSlotsMlp mlp(p, storage);
    const int tile = mlp.expect();
    ptx::dependency_wait();
    const int expert = InlineTiles::expert_of_lane(p.routing);  // copies go out before its value is there
    if (p.gemm[0].all_rows) copy_rows(p.gemm[0], mlp.tokens_);
    mlp.tiles_ = InlineTiles(expert, p.width, p.by_width);
    mlp.start(tile);
    mlp.run();
  }

 private:
  // This CTA's part of a GEMM, and this warp's.
  struct Share {
    int first_item;
    int items;
    int each;    // units per warp, which are whole turns of whole blocks, or half blocks
    int more;    // so many warps, the first ones, have one unit more
    int begin;   // of this warp
    int blocks;  // of this warp
  };

  // Where a lane's token of an item is, and which warp tiles of the panel are the item's.
  struct TokenPlace {
    uint32_t at;  // the lane's 16 k of block k
    bool used;    // whether there is such a token
    int first_tile;
  };

  // What finishing an item takes from global memory.
  struct Outcome {
    ExpertTile tile;
    int tile_index;
    int panel;       // or half a panel: the item's place among those of its tile
    int slot;        // of the tile's token number `lane`
    float upper;     // scale of the rows, or of the gate rows
    float lower;     // scale of the up rows
    float scale;     // of slot `slot`
    float weight;    // of slot number `lane`
    int first_warp;  // of those whose runs hold some of the item, which are consecutive
    int warps;
  };

  static constexpr int kUnit = kRowTiles == 4 ? kTurnBlocks : 1;  // blocks

  // The first block of a warp's run.
  __device__ __forceinline__ int begin_of_run(int gemm_index, const Share& s, int warp) const {
    const int k_blocks = p_.gemm[gemm_index].k_blocks;
    int run = (warp * s.each + min(warp, s.more)) * kUnit;
    if constexpr (kParts) run = warp * s.each * k_blocks;
    return min(run, s.items * k_blocks);
  }

  __device__ __forceinline__ FewSlotsMlp(const FewSlotsParams& p, uint8_t* storage)
      : p_(p),
        arrived_(ptx::shared_address(storage + kRingBytes)),
        tokens_(storage + kRingBytes + kFewSlotsBarrierBytes),
        partials_(reinterpret_cast<float*>(storage + kRingBytes + kFewSlotsBarrierBytes + p.token_bytes)),
        lane_(threadIdx.x % kWarp),
        warp_(threadIdx.x / kWarp) {
    ring_.start(reinterpret_cast<typename Ring::Storage*>(storage)[warp_]);
    if (!Ring::kFillQueues && threadIdx.x == 0) ptx::mbarrier_init(arrived_, kWarps * kWarpArrivals);
  }

  // Before routing is known: opens w13 as if each slot had an expert, and none the same. Returns the first item's tile.
  __device__ __forceinline__ int expect() {
    open(0, static_cast<int>(p_.routing.tokens * p_.routing.top_k));
    return fill_ahead_ > 0 ? next_item() : 0;
  }

  // Fills the ring for the first time.
  __device__ __forceinline__ void start(int expected_tile) {
    if (tiles_.size() == static_cast<int>(p_.routing.tokens * p_.routing.top_k)) {
      fill_at_ += tiles_.expert_of_slot(expected_tile) * p_.gemm[0].expert_bytes;
    } else {
      fill_left_ = 0;
      open(0, tiles_.size());
    }
#pragma unroll 1
    for (int stage = 0; stage < Ring::kStages; stage += kTurnBlocks) {
      begin_turn();
#pragma unroll
      for (int i = 0; i < kTurnBlocks; ++i) refill(stage, i);
      end_turn();
    }
  }

  __device__ __forceinline__ void run() {
    ptx::dependency_release();
    if (tiles_.size() == 0) return write_no_sums();

#pragma unroll 1
    for (int gemm_index = 0; gemm_index < 2; ++gemm_index) {
      const Share s = share(gemm_index, tiles_.size());
      const int first = p_.gemm[gemm_index].by_k_blocks.quotient(s.begin);
      const int k = s.begin - first * p_.gemm[gemm_index].k_blocks;
      TokenPlace place = {};
      Outcome outcome = await_tokens(gemm_index, s, first, k, place);
      if constexpr (kParts) {
        gemm_index == 0 ? multiply_parts<1>(0, s, first, outcome) : multiply_parts<2>(1, s, first, outcome);
        __syncthreads();
      } else {
        multiply_run(gemm_index, s, first, k, place);
        __syncthreads();
        for (int i = warp_; i < s.items; i += kWarps) {
          finish_item(gemm_index, partial(outcome.first_warp, i), outcome.warps, outcome);
          if (i + kWarps < s.items) outcome = prepare(gemm_index, s, i + kWarps);
        }
      }
    }
  }

  // Until the tokens of a GEMM are in shared memory. Meanwhile finds what the warp's first item needs, whose first
  // block of the run is block `k`, and what it finishes first. A warp with nothing to copy arrives before all that.
  __device__ __forceinline__ Outcome await_tokens(int gemm_index, const Share& s, int item, int k, TokenPlace& place) {
    const bool copies = gemm_index == 1 && copies_tokens(s);
    if (gemm_index == 1 && !copies) arrive();
    if (!kParts && s.blocks > 0) place = find_token<kRowTiles>(gemm_index, s, item, k);
    if (gemm_index == 0) {
      if (!p_.gemm[0].all_rows) copy_tokens<false>(0, s);
      ptx::cp_async_commit();
    } else if (copies) {
      copy_tokens<true>(1, s);
      arrive();
    }
    // Only now: ptxas would wait for what this loads before it asks for tokens.
    const Outcome outcome = prepare(gemm_index, s, kParts ? item : warp_);
    if (gemm_index == 1) {
      wait_for_all();
      return outcome;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kSplit) {
      split_rows(s);
      __syncthreads();
    }
    return outcome;
  }

  // Once per launch: the warp has read w13's sums, and its part of w2's tokens is in shared memory.
  __device__ __forceinline__ void arrive() const {
    if constexpr (Ring::kFillQueues) return;
    __syncwarp();
    warp_arrive(arrived_, lane_);
  }

  __device__ __forceinline__ void wait_for_all() const {
    if constexpr (Ring::kFillQueues) {
      __syncthreads();
    } else {
      ptx::mbarrier_wait(arrived_, 0);
    }
  }

  __device__ __forceinline__ Share share(int gemm_index, int tiles) const {
    const FewSlotsGemm& gemm = p_.gemm[gemm_index];
    const int all = tiles * gemm.items_per_tile;
    const int each = p_.by_grid.quotient(all);
    const int more = all - each * static_cast<int>(gridDim.x);
    const int cta = blockIdx.x;
    Share s;
    s.first_item = cta * each + min(cta, more);
    s.items = each + (cta < more ? 1 : 0);
    const int units = ceil_div(s.items * gemm.k_blocks, kUnit);
    s.each = kParts ? ceil_div(s.items, kWarps) : units / kWarps;
    s.more = kParts ? 0 : units % kWarps;
    s.begin = begin_of_run(gemm_index, s, warp_);
    s.blocks = begin_of_run(gemm_index, s, warp_ + 1) - s.begin;
    return s;
  }

  // ---- the stream of weight blocks, which runs ahead of the multiplications by the length of the ring

  __device__ __forceinline__ void open(int gemm_index, int tiles) {
    const Share s = share(gemm_index, tiles);
    const int before = p_.gemm[gemm_index].by_k_blocks.quotient(s.begin);
    fill_gemm_ = gemm_index;
    fill_item_ = s.first_item + before;
    fill_k_ = s.begin - before * p_.gemm[gemm_index].k_blocks;
    fill_ahead_ = s.blocks;
  }

  // Before the first refill of a turn.
  __device__ __forceinline__ void begin_turn() {
    if (fill_left_ > 0) return;
    if (fill_ahead_ == 0 && fill_gemm_ == 0) open(1, tiles_.size());
    if (fill_ahead_ == 0) return;
    const int tile = next_item();
    fill_at_ += tiles_.tile(tile).expert * p_.gemm[fill_gemm_].expert_bytes;
  }

  // Goes to the next item's blocks, but for where its expert is. Returns its tile.
  __device__ __forceinline__ int next_item() {
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
    fill_at_ = gemm.packed + block * kBlockBytes;
    fill_left_ = min(fill_ahead_, gemm.k_blocks - fill_k_);
    fill_ahead_ -= fill_left_;
    fill_k_ = 0;
    ++fill_item_;
    return tile;
  }

  // The i-th block of the turn. A turn that nothing is left for will not be waited for.
  __device__ __forceinline__ void refill(int first_stage, int i) {
    if (!Ring::kFillQueues && fill_left_ <= 0) return;
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

  // Whether the warp has some of w2's tokens to copy. The first warps finish items of w13, so the last ones copy.
  __device__ __forceinline__ bool copies_tokens(const Share& s) const {
    const FewSlotsGemm& gemm = p_.gemm[1];
    if (s.items == 0) return false;
    int rows = gemm.rows;
    if (!gemm.all_rows) {
      const int first = gemm.by_items_per_tile.quotient(s.first_item);
      rows = (gemm.by_items_per_tile.quotient(s.first_item + s.items - 1) - first + 1) * p_.width;
    }
    return (kWarps - 1 - warp_) * kWarp < rows * gemm.row_chunks;
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
    const int first_warp = kHandedOver ? kWarps - 1 - warp_ : warp_;  // the first warps finish items of w13
#pragma unroll 1
    for (int base = first_warp * kWarp; base < chunks; base += kWarps * kWarp) {
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

  // ---- multiplication

  // The warp's run: from block `k` of item number `item` on, which is where `place` is.
  __device__ __forceinline__ void multiply_run(int gemm_index, const Share& s, int item, int k, TokenPlace place) {
    const int k_blocks = p_.gemm[gemm_index].k_blocks;
    int blocks = k_blocks - k;
    for (int left = s.blocks; left > 0;) {
      blocks = min(left, blocks);
      multiply_blocks(place, item, blocks);
      left -= blocks;
      if (left == 0) break;
      ++item;
      blocks = k_blocks;
      place = find_token<kRowTiles>(gemm_index, s, item, 0);
    }
  }

  // So many blocks of an item, from `place` on.
  __device__ __forceinline__ void multiply_blocks(const TokenPlace& place, int item, int blocks) {
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

  __device__ __forceinline__ Outcome prepare(int gemm_index, const Share& s, int i) const {
    Outcome o = {};
    if (i >= s.items) return o;
    const FewSlotsGemm& gemm = p_.gemm[gemm_index];
    o.tile_index = gemm.by_items_per_tile.quotient(s.first_item + i);
    o.tile = tiles_.tile(o.tile_index);
    o.panel = s.first_item + i - o.tile_index * gemm.items_per_tile;
    o.slot = tiles_.slot(o.tile);
    if constexpr (!kParts) {
      const int begin = begin_of_run(gemm_index, s, lane_);
      const int end = begin_of_run(gemm_index, s, lane_ + 1);
      const bool has = lane_ < kWarps && begin < end && begin < (i + 1) * gemm.k_blocks && end > i * gemm.k_blocks;
      const unsigned warps = __ballot_sync(~0u, has);
      o.first_warp = __ffs(warps) - 1;
      o.warps = __popc(warps);
    }
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
    constexpr int kLanes = kItemRows / 2;  // of a token
    // A lane has two gate rows, and the lane four further on has the up rows of these features.
    const int row = lane_ % kLanes * 2;
    const bool is_up = (row & 8) != 0;
    const int column = o.panel * (kItemRows / 2) + row / 16 * 8 + row % 8;
    for (int base = 0; base < o.tile.count; base += kWarp / kLanes) {
      const int token = base + lane_ / kLanes;
      const int64_t to = __shfl_sync(~0u, o.slot, token % kWarp);
      const float scale = __shfl_sync(~0u, o.scale, token % kWarp);
      const bool used = token < o.tile.count && column < columns;
      float2 own = make_float2(0.0f, 0.0f);
      if (used) {
        own = scale_sum(sum_of(sums, stride, ways, token, row), scale, is_up ? o.lower : o.upper);
        if constexpr (kExtended) own = with_bias(own, 0, o, is_up ? columns + column : column);
      }
      // Each of the two lanes applies the gate to one of the two features.
      const float other = __shfl_xor_sync(~0u, is_up ? own.x : own.y, 4);
      const float v = apply_gate<kExtended>(p_.gate, is_up ? other : own.x, is_up ? own.y : other);
      const float next = __shfl_down_sync(~0u, v, 4);
      if (!used || is_up) continue;
      ptx::store_relaxed_32(static_cast<T*>(p_.hidden) + to * columns + column, pack2<T>(v, next));
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
    constexpr int kMost = kExtended ? 8 : 16;  // more would spill
    p_.gemm[1].rows > 8 ? sum_panel_by<kMost>(o) : sum_panel_by<8>(o);
  }

  // So many slots at a time.
  template <int kBatch>
  __device__ __forceinline__ void sum_panel_by(const Outcome& o) const {
    const int n = p_.gemm[1].n;
    const int slots = p_.gemm[1].rows;
    const int top_k = static_cast<int>(p_.routing.top_k);
    const bool ends_token = p_.gemm[0].slots_per_row.quotient(lane_ + 1) * top_k == lane_ + 1;
    const unsigned ends = __ballot_sync(~0u, ends_token && lane_ < slots);
    const int column = o.panel * kDownRows + 2 * lane_;
    const bool inside = 2 * lane_ < kDownRows && column < n;
    const unsigned used = tiles_.used_slots();
    const unsigned wanted = inside ? used : 0;
    int64_t to = column;
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 1
    for (int first = 0; first < slots; first += kBatch) {
      uint2 value[kBatch];
      bool missing;
      do {
        missing = false;
        const float* from = p_.expert_out + first * n + column;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          value[i] = make_uint2(0, 0);
          if ((wanted >> (first + i) & 1) != 0) value[i] = ptx::load_relaxed_64(from);
          from += n;
          asm volatile("" : "+l"(from));  // one address at a time: all of them would be too many registers
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) missing |= value[i].x == kNotYet || value[i].y == kNotYet;
      } while (missing);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float w = __shfl_sync(~0u, o.weight, first + i);
        if ((used >> (first + i) & 1) != 0) {
          total.x += w * __uint_as_float(value[i].x);
          total.y += w * __uint_as_float(value[i].y);
        }
        if ((ends >> (first + i) & 1) != 0) {
          if (inside) store_pair<T>(p_.out, to, total);
          to += n;
          total = make_float2(0.0f, 0.0f);
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
  const uint32_t arrived_;  // an mbarrier
  uint8_t* tokens_;
  float* partials_;
  const int lane_;
  const int warp_;
  InlineTiles tiles_;
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
