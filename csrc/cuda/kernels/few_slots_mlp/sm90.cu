#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

using Ring = BulkRing<kFewSlotsStagesSm90>;
static_assert(FewSlotsMlp<bf16, Ring, kFewSlotsWarps>::kRingBytes == few_slots_ring_bytes(Isa::sm90));

template <class T, int kRowTiles, bool kExtended>
__global__ void __launch_bounds__(kFewSlotsWarps* kWarp, 1)
    few_slots_mlp_sm90_kernel(const __grid_constant__ FewSlotsParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t storage[];
  FewSlotsMlp<T, Ring, kFewSlotsWarps, kRowTiles, kExtended>::run(p, storage);
#endif
}

template <bool kExtended>
FewSlotsKernel choose(DType dtype, bool halves) {
  const bool bf = dtype == DType::bf16;
  if (halves) return bf ? few_slots_mlp_sm90_kernel<bf16, 2, kExtended> : few_slots_mlp_sm90_kernel<fp16, 2, kExtended>;
  return bf ? few_slots_mlp_sm90_kernel<bf16, 4, kExtended> : few_slots_mlp_sm90_kernel<fp16, 4, kExtended>;
}

}  // namespace

void few_slots_mlp_sm90(DType dtype, const FewSlotsPlan& plan, const FewSlotsParams& params, void* stream) {
  const auto choose_for = params.extended ? choose<true> : choose<false>;
  launch_few_slots(choose_for(dtype, plan.halves), plan, params, stream);
}

}  // namespace nvfp4::cuda
