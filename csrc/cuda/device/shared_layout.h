// What kernels keep in shared memory, in plain C++ so that the host counts with the same numbers.
#pragma once

#include "packed_block.h"

namespace nvfp4::cuda {

// The rings of pipeline.cuh, for one warp.
template <int kStages>
struct CpAsyncStorage {
  alignas(128) uint8_t block[kStages][kBlockBytes];
};

template <int kStages, int kStageBytes = kBlockBytes>
struct BulkStorage {
  alignas(128) uint8_t block[kStages][kStageBytes];
  alignas(8) uint64_t landed[kStages];
};

// From a token's 64 rows of partial sums to the next token's: 4 floats of padding keep the stores of a fragment (8 rows
// x 4 tokens at a time) on 32 different banks.
constexpr int kPartialRows = kBlockRows + 4;

// What a ring keeps of a block for `tiles` of its warp tiles: their codes, and the scales of all four.
constexpr int part_bytes(int tiles) { return tiles * kBlockCodeBytes / 4 + kBlockScaleBytes; }

constexpr int kTokenAtom = 8;  // rows of wgmma's swizzle

// What order_slots() (cta_order.cuh) takes, and its scratch.
constexpr int kOrderWarps = 16;
constexpr int kOrderMaxSlots = 2048;
constexpr int kOrderBins = 1024;  // experts, and one for skipped slots
constexpr int kOrderScratch = kOrderWarps * (kOrderBins * 2 + 4);

}  // namespace nvfp4::cuda
