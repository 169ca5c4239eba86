#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

using Ring = BulkRing<kFewSlotsStagesSm90>;
static_assert(FewSlotsMlp<bf16, Ring, kFewSlotsWarps>::kRingBytes == few_slots_ring_bytes(Isa::sm90));

template <class T>
__global__ void __launch_bounds__(kFewSlotsWarps* kWarp, 1)
    few_slots_mlp_sm90_kernel(const __grid_constant__ FewSlotsParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t storage[];
  FewSlotsMlp<T, Ring, kFewSlotsWarps>::run(p, storage);
#endif
}

}  // namespace

void few_slots_mlp_sm90(DType dtype, const FewSlotsPlan& plan, const FewSlotsParams& params, void* stream) {
  const auto kernel = dtype == DType::bf16 ? few_slots_mlp_sm90_kernel<bf16> : few_slots_mlp_sm90_kernel<fp16>;
  launch_few_slots(kernel, plan, params, stream);
}

}  // namespace nvfp4::cuda
