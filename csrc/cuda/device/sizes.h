// Sizes that device and host code share, in plain C++.
#pragma once

#include "../../common.h"
#include "../../kernels.h"

namespace nvfp4::cuda {

constexpr int kWarp = 32;
constexpr int kElementBytes = 2;  // of an activation, bf16 or fp16
constexpr int kChunkBytes = 16;   // the widest access of one thread

}  // namespace nvfp4::cuda
