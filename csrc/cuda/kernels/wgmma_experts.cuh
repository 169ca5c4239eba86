// Persistent grouped GEMM on wgmma for many tokens per expert; with two GEMMs, the whole expert MLP.
//
// A tile is 256 weight rows (four 64-row panels, one for each consumer warpgroup) by the tokens of cut_tokens(), all of
// k. Weights stream through shared memory packed and are decoded into register A fragments; tokens are the B operand.
// 256 rows, and not 128, because every row of warpgroups re-reads the tokens from L2: at 128 that traffic alone exceeds
// what L2 delivers at the full rate of the tensor cores. Four warpgroups of 64 rows, and not two of 128, so that one
// decodes while others multiply without double buffering.
//
// Tiles are claimed in order from a counter, GEMM2's after GEMM1's, so GEMM2 starts while the last tiles of GEMM1 run;
// a GEMM2 tile waits for its expert's `ready` count. No order of CTAs can deadlock: whatever a tile waits for was
// claimed earlier, by a CTA that is running.
//
// Warps 0-15 consume. Warp 16 streams weights, warps 17 and 18 fetch tokens, warp 19 claims tiles and publishes
// finished ones.
#pragma once

#include "../../kernels.h"
#include "../device/decode.cuh"
#include "../device/gate.cuh"
#include "../device/hopper.cuh"
#include "../device/ptx.cuh"
#include "../device/ragged_tiles.cuh"
#include "../device/wgmma.cuh"

namespace nvfp4::cuda::wgmma_experts {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 4;
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerRegisters = 104;
constexpr int kProducerRegisters = 64;
constexpr int kGatherWarps = 2;
constexpr int kStageBlocks = 2;  // k-blocks; the last stage of a tile may hold one
constexpr int kGatherLag = 1;    // stages whose gathered tokens may be in flight
constexpr int kMaxWidth = 112;
constexpr int kMaxStages = 8;
constexpr int kTokenBytes = 128;  // one token's 64 k
constexpr int kPanelBytes = kStageBlocks * kBlockBytes;
constexpr int kWeightBytes = kConsumers * kPanelBytes;
constexpr int kStagingBytes = 8192;  // for each consumer
constexpr int kTileRing = 4;
constexpr int kClaimAhead = 8;  // stages before the end of a tile's weights at which the next tile is claimed
// racecheck follows only lanes that arrive themselves. A library built for it has all lanes of a warp arrive.
#ifdef NVFP4_RACECHECK
constexpr int kWarpArrivals = kWarp;
#else
constexpr int kWarpArrivals = 1;
#endif
static_assert(kWeightBytes % 1024 == 0, "the token tile behind the weights must be aligned to swizzle atoms");

struct ExpertGemm {
  const uint8_t* weight;  // [experts][panels][k_blocks][kBlockBytes]
  int64_t expert_bytes;
  const float* global_scale;
  int64_t n;
  bool gated;
  int panels;
  int row_tiles;
  int k_blocks;
};

struct Params {
  ExpertGemm gemm[2];
  bool mlp;           // two GEMMs, `hidden` between them
  bool gate_applies;  // gemm[0] applies the gate
  Gate gate;
  const uint8_t* x;  // [rows, gemm[0].k_blocks * 64], each block in permute_rows()'s order
  int slots_per_row;
  const int* order;    // [slots]
  const int* offsets;  // [experts + 1]
  int experts;
  const float* slot_scale;  // [slots] or null; applies to gemm[0]
  uint8_t* hidden;          // [gemm[1].k_blocks][hidden_rows][kTokenBytes], images of shared-memory token tiles
  int64_t hidden_rows;
  void* out;     // [slots, n]
  int* control;  // zeroed: [0] the next tile, [1 + e] finished GEMM1 tiles of expert e
  int max_width;
  int stages;
};

struct Tile {
  int gemm;  // -1: no more tiles
  int expert;
  int row_tile;
  int width;
  int tokens;
  int hidden_row;
  float gate_scale;                              // of rows g of a warp's 16, and
  float up_scale;                                // of rows g + 8, what decoding leaves out included
  int prerequisites;                             // finished GEMM1 tiles of the expert that a GEMM2 tile waits for
  alignas(16) uint32_t x_block[kTokenAtom][16];  // [i % 8][i / 8] of token i: its row's first block of x
  int slot[kMaxWidth];
  alignas(8) float scale[kMaxWidth];
};

struct Shared {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];  // behind `full`: Ring knows
  uint64_t tile_full[kTileRing];
  uint64_t tile_empty[kTileRing];
  uint64_t claim;
  uint64_t stored;
  Tile tiles[kTileRing];
};

// The tokens of a k-block in a stage. Pairs of atoms, because gathering warps copy two atoms at a time.
__host__ __device__ constexpr int token_block_bytes(int width) { return round_up(width, 2 * kTokenAtom) * kTokenBytes; }
__host__ __device__ constexpr int stage_bytes(int max_width) {
  return kWeightBytes + kStageBlocks * token_block_bytes(max_width);
}
__host__ __device__ constexpr int fixed_bytes(int experts) {
  return kConsumers * kStagingBytes + static_cast<int>(sizeof(Shared)) +
         3 * (experts + 1) * static_cast<int>(sizeof(int));
}

// A position in the ring of stages. The empty barriers lie behind the full ones.
struct Ring {
  uint32_t stage;
  uint32_t barrier;
  uint32_t stage_bytes;
  uint32_t stages;
  uint32_t last_barrier = barrier + (stages - 1) * 8;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t weights() const { return stage; }
  __device__ __forceinline__ uint32_t tokens() const { return stage + kWeightBytes; }
  __device__ __forceinline__ uint32_t full_barrier() const { return barrier; }
  __device__ __forceinline__ uint32_t empty_barrier() const { return barrier + kMaxStages * 8; }
  __device__ __forceinline__ void wait_full() const { ptx::mbarrier_wait(full_barrier(), parity); }
  __device__ __forceinline__ void wait_empty() const { ptx::mbarrier_wait(empty_barrier(), parity ^ 1); }
  __device__ __forceinline__ void advance() {
    const bool wrap = barrier == last_barrier;
    stage += wrap ? -(stages - 1) * stage_bytes : stage_bytes;
    barrier += wrap ? -(stages - 1) * 8 : 8;
    parity ^= wrap;
  }
};

// Where a chunk of 16 bytes of a token lies in a tile of 128-byte rows, as wgmma's 128-byte swizzle has it.
__device__ __forceinline__ uint32_t swizzled(int token, int chunk) {
  return token * kTokenBytes + ((chunk ^ (token % 8)) << 4);
}

// The same value, known to the compiler to be the same in all lanes: what derives from it goes to the uniform datapath.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(~0u, v, 0); }

// By all lanes of a warp that is converged.
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
  if (kWarpArrivals == kWarp || lane == 0) ptx::mbarrier_arrive(barrier);
}

// The ring of published tiles, as one role walks it.
struct TileReader {
  Shared& shared;
  int index = 0;

  __device__ __forceinline__ const Tile* next() {
    ptx::mbarrier_wait(ptx::shared_address(&shared.tile_full[index % kTileRing]), index / kTileRing & 1);
    const Tile* tile = &shared.tiles[index % kTileRing];
    return uniform(tile->gemm) < 0 ? nullptr : tile;
  }
  // By the whole warp, once all its lanes have read the tile.
  __device__ __forceinline__ void release() {
    __syncwarp();
    warp_arrive(ptx::shared_address(&shared.tile_empty[index % kTileRing]), threadIdx.x % kWarp);
    ++index;
  }
};

// ---- warp 19

__device__ __forceinline__ void describe_tile(const Params& p, const int* offsets, const int* tiles, const int* rows,
                                              int claimed, Tile& tile) {
  const int lane = threadIdx.x % kWarp;
  const int column_tiles = tiles[p.experts];
  int gemm = 0;
  if (p.mlp && claimed >= column_tiles * p.gemm[0].row_tiles) {
    claimed -= column_tiles * p.gemm[0].row_tiles;
    gemm = 1;
  }
  const int row_tiles = p.gemm[gemm].row_tiles;
  if (claimed >= column_tiles * row_tiles) {
    if (lane == 0) tile.gemm = -1;
    return;
  }
  const int expert = find_expert(tiles, p.experts, claimed / row_tiles);
  const int within = claimed - tiles[expert] * row_tiles;
  const int first_slot = offsets[expert];
  const int expert_tokens = offsets[expert + 1] - first_slot;
  const TokenTiles cut = cut_tokens(expert_tokens, p.max_width);
  const int row_tile = within / cut.tiles;  // token tiles vary fastest: they share the weights
  const int first_token = (within - row_tile * cut.tiles) * cut.width;
  const int tokens = min(cut.width, expert_tokens - first_token);
  const float* scales = p.gemm[gemm].global_scale;
  const float gate_scale = scales[p.gemm[gemm].gated ? 2 * expert : expert];
  const float up_scale = p.gemm[gemm].gated ? scales[2 * expert + 1] : gate_scale;
  for (int i = lane; i < round_up(tokens, kTokenAtom); i += kWarp) {
    const int slot = p.order[first_slot + first_token + min(i, tokens - 1)];
    tile.slot[i] = slot;
    tile.x_block[i % kTokenAtom][i / kTokenAtom] = slot / p.slots_per_row * p.gemm[0].k_blocks;
    if (p.slot_scale != nullptr) tile.scale[i] = p.slot_scale[slot];
  }
  if (lane == 0) {
    tile.gemm = gemm;
    tile.expert = expert;
    tile.gate_scale = gate_scale * kDecodeFactor;
    tile.up_scale = up_scale * kDecodeFactor;
    tile.row_tile = row_tile;
    tile.width = cut.width;
    tile.tokens = tokens;
    tile.hidden_row = rows[expert] + first_token;
    tile.prerequisites = cut.tiles * p.gemm[0].row_tiles;
  }
}

__device__ __forceinline__ void schedule_tiles(const Params& p, Shared& shared, const int* offsets, int* tiles,
                                               int* rows) {
  const int lane = threadIdx.x % kWarp;
  sum_tiles(offsets, p.experts, p.max_width, tiles, rows);
  int stored = 0;
  int previous_expert = -1;  // of a GEMM1 tile whose end is not published yet
  for (int i = 0;; ++i) {
    Tile& tile = shared.tiles[i % kTileRing];
    ptx::mbarrier_wait(ptx::shared_address(&shared.tile_empty[i % kTileRing]), i / kTileRing & 1 ^ 1);
    int claimed = 0;
    if (lane == 0) claimed = atomicAdd(p.control, 1);
    claimed = __shfl_sync(~0u, claimed, 0);
    describe_tile(p, offsets, tiles, rows, claimed, tile);
    __syncwarp();
    const int gemm = tile.gemm;
    const int expert = tile.expert;
    ptx::mbarrier_arrive(ptx::shared_address(&shared.tile_full[i % kTileRing]));
    if (previous_expert >= 0) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.stored), stored++ & 1);
      if (lane == 0) ptx::add_release(p.control + 1 + previous_expert, 1);
    }
    if (gemm < 0) break;
    previous_expert = p.mlp && gemm == 0 ? expert : -1;
    ptx::mbarrier_wait(ptx::shared_address(&shared.claim), i & 1);
  }
}

// ---- warp 16: lane i < 4 streams panel i of the tile

__device__ __forceinline__ void stream_weights(const Params& p, Shared& shared, Ring ring) {
  const int lane = threadIdx.x % kWarp;
  TileReader reader{shared};
  while (const Tile* tile = reader.next()) {
    const ExpertGemm& gemm = p.gemm[tile->gemm];
    const int panel = tile->row_tile * kConsumers + lane;
    const int k_blocks = gemm.k_blocks;
    const bool inside = lane < kConsumers && panel < gemm.panels;
    const uint32_t panels = __popc(__ballot_sync(~0u, inside));
    const uint8_t* source =
        gemm.weight + tile->expert * gemm.expert_bytes + static_cast<int64_t>(panel) * k_blocks * kBlockBytes;
    const int stages = ceil_div(k_blocks, kStageBlocks);
    const int claim_at = max(0, stages - kClaimAhead);
    for (int s = 0; s < stages; ++s, source += kPanelBytes, ring.advance()) {
      const uint32_t blocks = min(kStageBlocks, k_blocks - s * kStageBlocks);
      ring.wait_empty();
      if (lane == 0) {
        ptx::mbarrier_arrive_expect(ring.full_barrier(), panels * blocks * kBlockBytes);
        if (s == claim_at) ptx::mbarrier_arrive(ptx::shared_address(&shared.claim));
      }
      __syncwarp();
      if (inside) {
        ptx::bulk_load(ring.weights() + lane * kPanelBytes, source, blocks * kBlockBytes, ring.full_barrier());
      }
    }
    reader.release();
  }
}

// ---- warps 17 and 18

// Every warp announces its stages once their copies have landed and are visible to wgmma, kGatherLag stages behind the
// one it is filling.
__device__ __forceinline__ void gather_tokens(const Params& p, const Tile& tile, Ring& ring, int thread) {
  const int chunk = thread % 8;
  const int first = thread / 8;  // every 8th token: the swizzle is the same for all
  const int k_blocks = p.gemm[0].k_blocks;
  const int copies = ceil_div(tile.tokens, kTokenAtom);
  uint32_t block[kMaxWidth / kTokenAtom];
#pragma unroll
  for (int i = 0; i < kMaxWidth / kTokenAtom; ++i) block[i] = tile.x_block[first][min(i, copies - 1)];
  const uint32_t offset = swizzled(first, chunk);
  const uint8_t* source = p.x + chunk * 16;
  Ring landed = ring;
  const auto announce = [&] {
    ptx::fence_async_proxy_shared();
    __syncwarp();
    warp_arrive(landed.full_barrier(), thread % kWarp);
    landed.advance();
  };
  const int stages = ceil_div(k_blocks, kStageBlocks);
  const uint32_t second = token_block_bytes(tile.width);
  for (int s = 0; s < stages; ++s, source += kStageBlocks * kTokenBytes, ring.advance()) {
    ring.wait_empty();
    const uint32_t to = ring.tokens() + offset;
    // One address for both k-blocks of a row; what the last stage may lack is copied all the same. Batches, all but the
    // last unconditional, so that addresses do not wait for the copy before to have read its own.
#pragma unroll
    for (int i = 0; i < kMaxWidth / kTokenAtom; i += 2) {
      if (i >= copies) break;
#pragma unroll
      for (int atom = i; atom < i + 2; ++atom) {
        const uint8_t* from = source + uint64_t{block[atom]} * kTokenBytes;
        ptx::copy_async_16(to + atom * kTokenAtom * kTokenBytes, from);
        ptx::copy_async_16(to + second + atom * kTokenAtom * kTokenBytes, from + kTokenBytes);
      }
    }
    ptx::cp_async_commit();
    if (s >= kGatherLag) {
      ptx::cp_async_wait<kGatherLag>();
      announce();
    }
  }
  ptx::cp_async_wait<0>();
  for (int s = min(stages, kGatherLag); s > 0; --s) announce();
}

// One thread. It makes the arrivals of all gathering warps.
__device__ __forceinline__ void load_hidden(const Params& p, const Tile& tile, Ring& ring) {
  while (ptx::load_acquire(p.control + 1 + tile.expert) < tile.prerequisites) __nanosleep(64);
  ptx::fence_async_proxy();
  const uint32_t bytes = round_up(tile.tokens, kTokenAtom) * kTokenBytes;
  const int k_blocks = p.gemm[1].k_blocks;
  const uint8_t* source = p.hidden + static_cast<int64_t>(tile.hidden_row) * kTokenBytes;
  for (int kb = 0; kb < k_blocks; kb += kStageBlocks, ring.advance()) {
    const int blocks = min(kStageBlocks, k_blocks - kb);
    ring.wait_empty();
    ptx::mbarrier_arrive_expect(ring.full_barrier(), blocks * bytes);
    ptx::mbarrier_arrive(ring.full_barrier(), kGatherWarps * kWarpArrivals - 1);
    for (int b = 0; b < blocks; ++b, source += p.hidden_rows * kTokenBytes) {
      ptx::bulk_load(ring.tokens() + b * token_block_bytes(tile.width), source, bytes, ring.full_barrier());
    }
  }
}

__device__ __forceinline__ void fetch_tokens(const Params& p, Shared& shared, Ring ring, int thread) {
  TileReader reader{shared};
  while (const Tile* tile = reader.next()) {
    if (tile->gemm == 0) {
      gather_tokens(p, *tile, ring, thread);
    } else if (thread == 0) {
      load_hidden(p, *tile, ring);
    }
    reader.release();
  }
}

// ---- warps 0-15

struct Consumer {
  int group;   // 0..3
  int thread;  // 0..127
  int warp;    // 0..3
  int lane;
  int g;
  int t;
  uint32_t staging;  // of all consumers
};

// Read anew for each use: what the compiler derived from values that live across tiles it would keep in registers, for
// every tile width at once.
__device__ __forceinline__ Consumer current_consumer(uint32_t staging) {
  const int thread = ptx::thread_index();
  const int lane = thread % kWarp;
  return {thread / kWarpgroup, thread % kWarpgroup, thread % kWarpgroup / kWarp, lane, lane / 4, lane % 4, staging};
}

struct PackedFragment {
  uint4 codes;
  uint32_t scales;
};

// decode() for one MMA step. The compiler shares what the steps have in common and drops the pairs of other steps.
template <class T>
__device__ __forceinline__ void decode_step(uint4 codes, uint32_t scales, int j, uint32_t (&a)[4]) {
  uint32_t all[4][4];
  decode<T>(codes, scales, all);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = all[j][i];
}

// Reads this thread's share of a block from a stage. Both places count from the start of the stage.
struct PackedReader {
  uint32_t codes;
  uint32_t scales;

  __device__ __forceinline__ PackedFragment load(uint32_t stage, int block) const {
    return {ptx::load_shared_128(stage + codes + block * kBlockBytes),
            ptx::load_shared_16(stage + scales + block * kBlockBytes)};
  }
};

// Starts MMA step j of a block of the stage.
template <class T, int N>
__device__ __forceinline__ void start_step(float (&sum)[N / 2], const PackedFragment& packed, uint32_t (&a)[4],
                                           uint32_t stage, int block, int j) {
  decode_step<T>(packed.codes, packed.scales, j, a);
  ptx::wgmma_fence();
  ptx::Wgmma<T, N>::multiply(sum, a, ptx::wgmma_descriptor(stage, kWeightBytes + block * token_block_bytes(N), j));
  ptx::wgmma_commit();
}

// Four steps are in flight: as soon as the oldest is done, the next block's fragments of that step are decoded into its
// registers while the tensor cores work on the other three. The loop takes the second block of one stage and the first
// of the next: with the first stage's first block before it, four steps are in flight wherever it is entered.
template <class T, int N>
__device__ __forceinline__ void multiply_tile(float (&sum)[N / 2], Ring& ring, const Consumer& c, int k_blocks) {
  uint32_t a[4][4];
  const uint32_t panel = c.group * kPanelBytes;
  const PackedReader reader{panel + c.thread * 16, panel + scales_at(c.warp, c.lane)};
  ring.wait_full();
  PackedFragment packed = reader.load(ring.stage, 0);
#pragma unroll
  for (int j = 0; j < 4; ++j) start_step<T, N>(sum, packed, a[j], ring.stage, 0, j);
  for (int kb = kStageBlocks; kb < k_blocks; kb += kStageBlocks) {
    packed = reader.load(ring.stage, 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::wgmma_wait<3>();
      start_step<T, N>(sum, packed, a[j], ring.stage, 1, j);
    }
    const uint32_t previous_empty = ring.empty_barrier();
    ring.advance();
    ring.wait_full();
    packed = reader.load(ring.stage, 0);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::wgmma_wait<3>();
      if (j == 3) warp_arrive(previous_empty, c.lane);
      start_step<T, N>(sum, packed, a[j], ring.stage, 0, j);
    }
  }
  if (k_blocks % kStageBlocks == 0) {
    packed = reader.load(ring.stage, 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::wgmma_wait<3>();
      start_step<T, N>(sum, packed, a[j], ring.stage, 1, j);
    }
  }
  ptx::wgmma_wait<0>();
  warp_arrive(ring.empty_barrier(), c.lane);
  ring.advance();
}

// A warpgroup beyond the last panel frees the stages it has no use for.
__device__ __forceinline__ void skip_tile(Ring& ring, const Consumer& c, int k_blocks) {
  for (int kb = 0; kb < k_blocks; kb += kStageBlocks, ring.advance()) {
    ring.wait_full();
    warp_arrive(ring.empty_barrier(), c.lane);
  }
}

struct Scales {
  float gate;
  float up;
};

// Gate in registers, then a pair of warpgroups lays 64 features of every token into staging as wgmma will read them:
// warp w of 8 holds features 8 w .. 8 w + 7, of which pair q = 4 w + g / 2 is word q / 8 of chunk q % 8.
template <class T, int N, bool kSilu>
__device__ __forceinline__ void stage_gated(const Params& p, const Tile& tile, const Consumer& c,
                                            const float (&sum)[N / 2], Scales scales, uint32_t staging) {
  const int warp = c.group % 2 * 4 + c.warp;
  const int chunk = warp % 2 * 4 + c.g / 2;
  const int word = warp / 2;
  const bool odd = c.g % 2;
  Gate gate = p.gate;
  if constexpr (kSilu) gate.activation = Activation::silu;
  gate.limit = gate.clamped ? gate.limit : INFINITY;  // instead of a branch for each value
  gate.clamped = true;
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    const int token = i * 8 + 2 * c.t;
    float2 weight = make_float2(1.0f, 1.0f);
    if (p.slot_scale != nullptr) weight = make_float2(tile.scale[token], tile.scale[token + 1]);
    const float low = apply_gate(gate, sum[4 * i] * scales.gate * weight.x, sum[4 * i + 2] * scales.up * weight.x);
    const float high = apply_gate(gate, sum[4 * i + 1] * scales.gate * weight.y, sum[4 * i + 3] * scales.up * weight.y);
    // Lanes of features f and f + 1 swap, so that each has one token's pair.
    const float received = __shfl_xor_sync(~0u, odd ? low : high, 4);
    const uint32_t pair = odd ? pack2<T>(received, high) : pack2<T>(low, received);
    ptx::store_shared_32(staging + swizzled(token + odd, chunk) + word * 4, pair);
  }
}

template <int N>
__device__ __forceinline__ void stage_zeros(const Consumer& c, uint32_t staging) {
  const int warp = c.group % 2 * 4 + c.warp;
  for (int token = c.lane / 4; token < N; token += 8) {
    ptx::store_shared_32(staging + swizzled(token, warp % 2 * 4 + c.lane % 4) + warp / 2 * 4, 0);
  }
}

__device__ __forceinline__ void store_hidden(const Params& p, const Tile& tile, const Consumer& c, uint32_t staging) {
  const int block = tile.row_tile * 2 + c.group / 2;
  if (block >= p.gemm[1].k_blocks) return;
  uint8_t* to = p.hidden + (block * p.hidden_rows + tile.hidden_row) * kTokenBytes;
  const int bytes = round_up(tile.tokens, kTokenAtom) * kTokenBytes;
  for (int i = (c.group % 2 * kWarpgroup + c.thread) * 16; i < bytes; i += 2 * kWarpgroup * 16) {
    *reinterpret_cast<uint4*>(to + i) = ptx::load_shared_128(staging + i);
  }
}

template <class T>
__device__ __forceinline__ void store_gated(const Params& p, const Tile& tile, const Consumer& c, uint32_t staging) {
  const int64_t features = p.gemm[0].n / 2;
  const int piece = c.thread % 8;  // 8 features in natural order: a word of each of 4 chunks
  const int64_t feature = (tile.row_tile * 2 + c.group / 2) * int64_t{64} + piece * 8;
  if (feature >= features) return;
  T* out = static_cast<T*>(p.out) + feature;
  for (int token = (c.group % 2 * kWarpgroup + c.thread) / 8; token < tile.tokens; token += 2 * kWarpgroup / 8) {
    const int chunk = piece % 2 * 4;
    const uint32_t word = staging + piece / 2 * 4;
    uint4 v;
    v.x = ptx::load_shared_32(word + swizzled(token, chunk));
    v.y = ptx::load_shared_32(word + swizzled(token, chunk + 1));
    v.z = ptx::load_shared_32(word + swizzled(token, chunk + 2));
    v.w = ptx::load_shared_32(word + swizzled(token, chunk + 3));
    *reinterpret_cast<uint4*>(out + tile.slot[token] * features) = v;
  }
}

// Rows g and g + 8 of a warp's 16 are chunks 2 w and 2 w + 1 of a token's 64 rows. Lays the 8 tokens of d[0..3], and
// the 8 of d[4..7] if there are two blocks, into staging.
template <class T, int kBlocks>
__device__ __forceinline__ void stage_plain(const float* d, const float* weights, const Consumer& c, Scales scales,
                                            uint32_t address) {
  uint32_t m[4];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    float2 weight = make_float2(1.0f, 1.0f);
    if (weights != nullptr) weight = *reinterpret_cast<const float2*>(weights + i * 8 + 2 * c.t);
    m[2 * i] = pack2<T>(d[4 * i] * scales.gate * weight.x, d[4 * i + 1] * scales.gate * weight.y);
    m[2 * i + 1] = pack2<T>(d[4 * i + 2] * scales.up * weight.x, d[4 * i + 3] * scales.up * weight.y);
  }
  if constexpr (kBlocks == 2) {
    ptx::store_transposed_x4(address, m[0], m[1], m[2], m[3]);
  } else {
    ptx::store_transposed_x2(address, m[0], m[1]);
  }
}

// Writes the tile's tokens to their slots, as many at a time as staging holds.
template <class T, int N, int kFirst = 0>
__device__ __forceinline__ void store_plain(const Params& p, const ExpertGemm& gemm, const Tile& tile,
                                            const Consumer& c, const float (&sum)[N / 2], Scales scales,
                                            bool weighted) {
  constexpr int kRoom = kStagingBytes / kTokenBytes;
  constexpr int kTokens = N - kFirst < kRoom ? N - kFirst : kRoom;
  const uint32_t staging = c.staging + c.group * kStagingBytes;
  ptx::barrier_sync(1 + c.group, kWarpgroup);
  const int matrix = c.lane / 8;
  const uint32_t to = staging + swizzled(matrix / 2 * 8 + c.lane % 8, 2 * c.warp + matrix % 2);
  const float* weights = weighted ? tile.scale + kFirst : nullptr;
#pragma unroll
  for (int i = 0; i + 16 <= kTokens; i += 16) {
    stage_plain<T, 2>(&sum[(kFirst + i) / 2], weighted ? weights + i : nullptr, c, scales, to + i * kTokenBytes);
  }
  if constexpr (kTokens % 16 != 0) {
    constexpr int i = kTokens - 8;
    stage_plain<T, 1>(&sum[(kFirst + i) / 2], weighted ? weights + i : nullptr, c, scales, to + i * kTokenBytes);
  }
  ptx::barrier_sync(1 + c.group, kWarpgroup);
  const int panel = tile.row_tile * kConsumers + c.group;
  const int chunk = c.thread % 8;
  const int64_t feature = gemm.gated ? panel * int64_t{32} + chunk / 2 * 8 : panel * int64_t{64} + chunk * 8;
  if (feature < (gemm.gated ? gemm.n / 2 : gemm.n)) {
    T* out = static_cast<T*>(p.out) + feature + (gemm.gated ? chunk % 2 * (gemm.n / 2) : 0);
    for (int i = c.thread / 8; i < min(kTokens, tile.tokens - kFirst); i += kWarpgroup / 8) {
      *reinterpret_cast<uint4*>(out + tile.slot[kFirst + i] * gemm.n) =
          ptx::load_shared_128(staging + swizzled(i, chunk));
    }
  }
  if constexpr (kFirst + kTokens < N) store_plain<T, N, kFirst + kTokens>(p, gemm, tile, c, sum, scales, weighted);
}

template <class T, int N, bool kSilu>
__device__ __forceinline__ void finish_tile(const Params& p, Shared& shared, const Tile& tile,
                                            const float (&sum)[N / 2], const Consumer& c, bool active) {
  const ExpertGemm& gemm = p.gemm[tile.gemm];
  const bool first_gemm = tile.gemm == 0;
  const Scales scales{tile.gate_scale, tile.up_scale};
  if (first_gemm && p.gate_applies) {
    const uint32_t barrier = 1 + kConsumers + c.group / 2;
    const uint32_t staging = c.staging + c.group / 2 * 2 * kStagingBytes;
    ptx::barrier_sync(barrier, 2 * kWarpgroup);
    if (active) {
      stage_gated<T, N, kSilu>(p, tile, c, sum, scales, staging);
    } else {
      stage_zeros<N>(c, staging);
    }
    ptx::barrier_sync(barrier, 2 * kWarpgroup);
    if (p.mlp) {
      store_hidden(p, tile, c, staging);
      __syncwarp();
      warp_arrive(ptx::shared_address(&shared.stored), c.lane);
    } else {
      store_gated<T>(p, tile, c, staging);
    }
  } else if (active) {
    store_plain<T, N>(p, gemm, tile, c, sum, scales, first_gemm && p.slot_scale != nullptr);
  }
}

template <class T, int N, bool kSilu>
__device__ __forceinline__ void consume_tile(const Params& p, Shared& shared, const Tile& tile, Ring& ring,
                                             uint32_t staging) {
  float sum[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
  const Consumer c = current_consumer(staging);
  const ExpertGemm& gemm = p.gemm[uniform(tile.gemm)];
  const int k_blocks = gemm.k_blocks;
  const bool active = uniform(tile.row_tile) * kConsumers + uniform(c.group) < gemm.panels;
  if (active) {
    multiply_tile<T, N>(sum, ring, c, k_blocks);
  } else {
    skip_tile(ring, c, k_blocks);
  }
  finish_tile<T, N, kSilu>(p, shared, tile, sum, current_consumer(staging), active);
}

template <class T, bool kSilu>
__device__ __forceinline__ void consume_tiles(const Params& p, Shared& shared, Ring ring, uint32_t staging) {
  TileReader reader{shared};
  while (const Tile* tile = reader.next()) {
    switch (uniform(tile->width) / kTokenAtom) {
#define NVFP4_WIDTH(N)                                          \
  case N / kTokenAtom:                                          \
    consume_tile<T, N, kSilu>(p, shared, *tile, ring, staging); \
    break;
      NVFP4_WIDTH(8)
      NVFP4_WIDTH(16)
      NVFP4_WIDTH(24)
      NVFP4_WIDTH(32)
      NVFP4_WIDTH(40)
      NVFP4_WIDTH(48)
      NVFP4_WIDTH(56)
      NVFP4_WIDTH(64)
      NVFP4_WIDTH(72)
      NVFP4_WIDTH(80)
      NVFP4_WIDTH(88)
      NVFP4_WIDTH(96)
      NVFP4_WIDTH(104)
      NVFP4_WIDTH(112)
#undef NVFP4_WIDTH
    }
    reader.release();
  }
}

template <class T, bool kSilu>
__global__ void __launch_bounds__(kThreads, 1) expert_kernel(const __grid_constant__ Params p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory[];
  uint8_t* staging = memory + p.stages * stage_bytes(p.max_width);
  Shared& shared = *reinterpret_cast<Shared*>(staging + kConsumers * kStagingBytes);
  int* offsets = reinterpret_cast<int*>(&shared + 1);
  int* tiles = offsets + p.experts + 1;
  int* rows = tiles + p.experts + 1;

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&shared.full[i]), 1 + kGatherWarps * kWarpArrivals);
      ptx::mbarrier_init(ptx::shared_address(&shared.empty[i]), kConsumerWarps * kWarpArrivals);
    }
    for (int i = 0; i < kTileRing; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&shared.tile_full[i]), kWarp);
      ptx::mbarrier_init(ptx::shared_address(&shared.tile_empty[i]),
                         (kConsumerWarps + 1 + kGatherWarps) * kWarpArrivals);
    }
    ptx::mbarrier_init(ptx::shared_address(&shared.claim), 1);
    ptx::mbarrier_init(ptx::shared_address(&shared.stored), kConsumerWarps * kWarpArrivals);
    ptx::fence_mbarrier_init();
  }
  ptx::dependency_wait();
  ptx::dependency_release();
  for (int i = threadIdx.x; i <= p.experts; i += kThreads) offsets[i] = p.offsets[i];
  __syncthreads();

  const Ring ring{ptx::shared_address(memory), ptx::shared_address(shared.full),
                  static_cast<uint32_t>(stage_bytes(p.max_width)), static_cast<uint32_t>(p.stages)};
  const int warp = threadIdx.x / kWarp;
  if (warp < kConsumerWarps) {
    ptx::registers_raise<kConsumerRegisters>();
    consume_tiles<T, kSilu>(p, shared, ring, ptx::shared_address(staging));
  } else {
    ptx::registers_lower<kProducerRegisters>();
    if (warp == kConsumerWarps) {
      stream_weights(p, shared, ring);
    } else if (warp <= kConsumerWarps + kGatherWarps) {
      fetch_tokens(p, shared, ring, threadIdx.x - (kConsumerWarps + 1) * kWarp);
    } else {
      schedule_tiles(p, shared, offsets, tiles, rows);
    }
  }
#endif
}

}  // namespace nvfp4::cuda::wgmma_experts
