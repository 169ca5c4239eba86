// The parameters of the FP8 GEMM.
#pragma once

#include "../wgmma_experts/shared.cuh"
#include "plan.h"

namespace nvfp4::cuda::wgmma_fp8 {

using wgmma_experts::Params;

struct HiddenRows {
  uint8_t* rows;       // [slots, row_bytes], as GEMM2 reads them
  uint8_t* codes;      // [slots, code_bytes]: scale_code() of each 32 values
  int64_t row_bytes;   // 64 for each k-block of GEMM2
  int64_t code_bytes;  // row_bytes / 32, rounded up to 8
};

struct Fp8Params {
  Params base;
  HiddenRows hidden;  // with a gate; else base.out has rows of 16-bit values
};

}  // namespace nvfp4::cuda::wgmma_fp8
