// What one instruction level provides. The scheduling around it (gemm.cpp, rowwise.cpp) is the same for all levels.
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "layout.h"

namespace nvfp4::cpu {

constexpr int kMaxTileTokens = 128;  // of levels that say nothing else, and of fp32
// Rows behind the tokens of a tile that a level may read, and whose sums it may write.
constexpr int kTileSlack = 32;

inline int64_t bytes_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }

inline char* at(void* base, DType dtype, int64_t index) { return static_cast<char*>(base) + index * bytes_of(dtype); }

inline const char* at(const void* base, DType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * bytes_of(dtype);
}

// Activations of the tokens that one expert multiplies, in the order in which the multiply kernels read them.
// 16-bit dtypes become int16 with one power-of-two scale per token and block of 64 columns; inside each run of eight
// columns the order is 0 4 1 5 2 6 3 7, the pairs that shifting a 32-bit lane of codes brings side by side.
// The largest magnitude of a block comes to lie in [2^13, 2^14). fp32 stays fp32 in natural order.
// A block with a NaN or an infinity comes to be NaN: its scale, or all 64 values.
// levels/amx.cpp instead has bf16 in the order of int16 where it multiplies in tiles, levels/avx2.cpp bytes for one
// token.
struct TokenTile {
  int64_t count;         // tokens, at most most_tokens of the level
  int64_t blocks;        // of 64 columns
  bool exact;            // fp32 values: activations in fp32, or a level that has nothing faster
  bool batch_invariant;  // a token's sums must have the same bits for every count
  int parts;             // what values has room for: 2 where a level splits 16-bit values in two, else 1
  void* values;          // int16 or float [blocks, count, 64]; levels/amx.cpp: bf16 [parts, blocks, count, 64]
  float* scale;          // [blocks, count], int16 only: what one unit of (2 * code * scale * 2^-8) * value is worth
  int32_t* corrections;  // [blocks, count, corrections of the level], int16 only: room for a level's own use
};

// From the sums of one panel pair to those of the next one, in floats.
constexpr int64_t pair_sums(int64_t count) { return (count + kTileSlack) * 2 * kPanelRows; }

// Rows of a [rows, k] matrix; tile token i is row rows[i].
struct TokenRows {
  DType dtype;
  const void* x;
  int64_t k;
  const int32_t* rows;
};

// What is done to the sums of a panel, or of a gate and an up panel, before the activation. Biases may be null.
struct PanelTerms {
  bool gated;  // sums hold a gate and an up panel; else one panel, without up
  float gate_scale;
  float up_scale;
  const float* gate_bias;  // [kPanelRows]
  const float* up_bias;    // [kPanelRows]
};

// What flows back through an activation of 16 columns.
struct PanelBackward {
  float value[16];  // of the activation
  float gate[16];   // into the gate's pre-activations, or those of a weight without a gate
  float up[16];
};

struct LevelKernels {
  bool always_exact;  // tiles are fp32 for all dtypes

  // Fill a tile whose count, blocks and exact are set: all of it from rows of a matrix, or one block from fp32 values.
  void (*gather)(const TokenRows& tokens, TokenTile* tile);
  void (*fill_block)(const float* values, int64_t block, TokenTile* tile);  // [count, 64]

  // sums[t, p, r] = sum over k of weight[p, r, k] * token[t, k], without the global scale, for up to most_pairs panel
  // pairs, the last of which may have one panel. The sums of the pairs lie pair_sums(count) apart.
  void (*multiply)(const uint8_t* panels, int64_t panel_count, const TokenTile& tile, float* sums);  // [count, 2, 16]

  // out[i] = gate(gate_scale * sums[0, i], up_scale * sums[1, i]) for one panel pair of one token.
  void (*gate_panel)(const Gate& gate, const float* sums, float gate_scale, float up_scale, DType dtype, void* out);
  // The same with biases, or without a gate: out[i] = gate(gate_scale * sums[0, i] + gate_bias[i]).
  void (*activate_panel)(const Gate& gate, const PanelTerms& terms, const float* sums, DType dtype, void* out);

  // sums[i] += scale * x[i]; out[i] = scale * sums[i] + bias[i], where bias may be null.
  void (*accumulate)(DType dtype, const void* x, int64_t n, float scale, float* sums);
  void (*store)(const float* sums, int64_t n, float scale, const void* bias, DType dtype, void* out);

  // out[i] = gate(gate_row[i], up_row[i]), or gate(gate_row[i]) where up_row is null.
  void (*swiglu)(const Gate& gate, const void* gate_row, const void* up_row, int64_t n, DType dtype, void* out);

  // Derivatives. `flow` [16] or `flow_row` [n] flows back into the activation's value.
  void (*differentiate_panel)(const Gate& gate, const PanelTerms& terms, const float* sums, const float* flow,
                              PanelBackward* out);
  void (*swiglu_backward)(const Gate& gate, const void* flow_row, const void* gate_row, const void* up_row, int64_t n,
                          DType dtype, void* to_gate, void* to_up);
  // sums[t, c] += sum over the weight's rows of rows[t, row] * weight[row, c], without the global scale, for the 64
  // columns of one block of every panel: `block` is the first panel's, the others are panel_stride bytes apart; rows
  // is [panels, count, 16], sums [count, 64].
  void (*multiply_transposed)(const uint8_t* block, int64_t panel_stride, int64_t panels, const float* rows,
                              int64_t count, float* sums);
  int most_tokens = kMaxTileTokens;  // of a tile
  int64_t most_pairs = 1;            // panel pairs that multiply takes at a time
  bool splits_fp16 = false;          // tiles of fp16 have two parts
  int corrections = 1;               // int32 of a tile's corrections per block and token
};

extern const LevelKernels kPortableKernels;
extern const LevelKernels kAvx2Kernels;
extern const LevelKernels kAvx512Kernels;
extern const LevelKernels kAmxKernels;

// Those of the call's level.
const LevelKernels& kernels_of(const Context& context);

}  // namespace nvfp4::cpu
