// The packed weight layout that all instruction levels read.
//
// Sixteen output rows form a panel, 64 input columns a block. A panel is its blocks one after the other; a block is
//   8 x 64 bytes of codes: vector c holds for row r in its 32-bit lane r the codes of columns 8c .. 8c + 7,
//                          lowest nibble first (the four bytes as they stand in the checkpoint);
//   4 x 16 bytes of E4M3 scales: byte r of quarter g belongs to row r and columns 16g .. 16g + 15.
// Columns from k up to the next multiple of 64 hold zero codes and zero scales. A gated weight alternates gate and up
// panels, so that one thread has both halves of a SwiGLU at hand.
#pragma once

#include <cstdint>

namespace nvfp4::cpu {

constexpr int kPanelRows = 16;
constexpr int kBlockColumns = 64;
constexpr int kBlockGroups = kBlockColumns / 16;
constexpr int kBlockCodeBytes = kPanelRows * kBlockColumns / 2;
constexpr int kBlockBytes = kBlockCodeBytes + kPanelRows * kBlockGroups;

constexpr int64_t blocks_of(int64_t k) { return (k + kBlockColumns - 1) / kBlockColumns; }
constexpr int64_t panel_bytes(int64_t k) { return blocks_of(k) * kBlockBytes; }

// The first checkpoint row of a panel.
constexpr int64_t panel_first_row(int64_t panel, int64_t n, bool gated) {
  return gated ? (panel % 2) * (n / 2) + panel / 2 * kPanelRows : panel * kPanelRows;
}

}  // namespace nvfp4::cpu
