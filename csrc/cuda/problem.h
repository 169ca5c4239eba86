// What a choice of kernels depends on: the op and its sizes.
#pragma once

#include "../kernels.h"

namespace nvfp4::cuda {

enum class Op { moe, grouped_gemm, linear };

struct GemmSize {
  int64_t n;
  int64_t k;
};

struct Problem {
  Op op;
  DType dtype;
  int64_t tokens;        // rows of x
  int64_t top_k;         // slots per row; 1 for linear
  int64_t experts;       // local ones; 1 for linear
  GemmSize gemm[2];      // moe: w13 and w2; else the second is empty
  bool wide_gate;        // wgmma_experts has wide tiles for the gate: has_wide_tiles()
  bool batch_invariant;  // a row's bits must not depend on what else is in the batch

  int64_t slots() const { return tokens * top_k; }
};

// Whether a GEMM needs the kernels whose epilogues have all there is: experts' biases, activations without a gate,
// SiTU.
inline bool is_extended(const Weight& weight, const Gate* gate) {
  return weight.bias != nullptr || (gate != nullptr && (!weight.gated || gate->activation == Activation::situ));
}

// Whether wgmma_experts' wide tiles are compiled for what the GEMM ends with.
inline bool has_wide_tiles(const Weight& weight, const Gate* gate) {
  return gate == nullptr ||
         (weight.gated && (gate->activation == Activation::silu || gate->activation == Activation::situ));
}

}  // namespace nvfp4::cuda
