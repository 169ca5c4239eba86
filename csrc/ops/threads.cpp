// kernels.h's parallel_for over torch's intra-op threads. The CUDA library, which holds csrc/ops too, needs none.
#ifndef USE_CUDA
#include <torch/csrc/stable/ops.h>

#include "../kernels.h"

namespace nvfp4::cpu {

void parallel_for(int64_t n, void (*body)(void* argument, int64_t i), void* argument) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(argument, i);
  });
}

}  // namespace nvfp4::cpu
#endif
