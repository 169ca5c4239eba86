#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

using Ring = CpAsyncRing<2>;

constexpr int kWarps = 16;

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    few_slots_mlp_sm80_kernel(const __grid_constant__ FewSlotsParams p) {
  extern __shared__ __align__(128) uint8_t storage[];
  FewSlotsMlp<T, Ring, kWarps>::run(p, storage);
}

template <class T>
FewSlotsLaunch with() {
  return {few_slots_mlp_sm80_kernel<T>, kWarps, FewSlotsMlp<T, Ring, kWarps>::kRingBytes};
}

}  // namespace

bool few_slots_fit_sm80(const FewSlotsParams& params) { return few_slots_fit(with<bf16>(), params); }

void few_slots_mlp_sm80(DType dtype, const FewSlotsParams& params, void* stream) {
  launch_few_slots(dtype == DType::bf16 ? with<bf16>() : with<fp16>(), params, stream);
}

}  // namespace nvfp4::cuda
