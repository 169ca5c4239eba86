#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

using Ring = BulkRing<kFewSlotsStagesSm90>;
static_assert(FewSlotsMlp<bf16, Ring, kFewSlotsWarps>::kRingBytes == few_slots_ring_bytes(Isa::sm90));

template <class T, int kRowTiles>
__global__ void __launch_bounds__(kFewSlotsWarps* kWarp, 1)
    few_slots_mlp_sm90_kernel(const __grid_constant__ FewSlotsParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t storage[];
  FewSlotsMlp<T, Ring, kFewSlotsWarps, kRowTiles>::run(p, storage);
#endif
}

}  // namespace

void few_slots_mlp_sm90(DType dtype, const FewSlotsPlan& plan, const FewSlotsParams& params, void* stream) {
  const bool bf = dtype == DType::bf16;
  const auto whole = bf ? few_slots_mlp_sm90_kernel<bf16, 4> : few_slots_mlp_sm90_kernel<fp16, 4>;
  const auto halves = bf ? few_slots_mlp_sm90_kernel<bf16, 2> : few_slots_mlp_sm90_kernel<fp16, 2>;
  const auto kernel = plan.halves ? halves : whole;
  launch_few_slots(kernel, plan, params, stream);
}

}  // namespace nvfp4::cuda
