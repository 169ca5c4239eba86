// The parameters of the FP8 GEMM.
#pragma once

#include "../wgmma_experts/shared.cuh"
#include "plan.h"

namespace nvfp4::cuda::wgmma_fp8 {

using wgmma_experts::Params;

// What GEMM1 leaves to GEMM2: its tokens as GEMM2's stages will hold them, so that one bulk copy brings a tile's.
struct HiddenRows {
  uint8_t* images;     // [stages of a tile][rows][kTokenBytes], images of shared-memory token tiles
  int64_t rows;        // sorted by expert, each expert's padded to 8
  int* row_of_slot;    // [slots]
  uint8_t* codes;      // [slots, code_bytes]: scale_code() of each 32 values
  int parts;           // of 32 values, in a row
  int64_t code_bytes;  // parts, rounded up to 8

  // Where chunk `chunk`, of 16 bytes, of a row's block `block` lies.
  __device__ __forceinline__ uint8_t* chunk_at(int64_t row, int block, int chunk) const {
    const int within = block % kStageBlocks * 4 + chunk;
    return images + (block / kStageBlocks * rows + row) * kTokenBytes + ((within ^ static_cast<int>(row % 8)) << 4);
  }
};

struct Fp8Params {
  Params base;
  HiddenRows hidden;  // with a gate; else base.out has rows of 16-bit values
};

}  // namespace nvfp4::cuda::wgmma_fp8
