#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

using Ring = CpAsyncRing<kFewSlotsStagesSm80>;
static_assert(FewSlotsMlp<bf16, Ring, kFewSlotsWarps>::kRingBytes == few_slots_ring_bytes(Isa::sm80));

template <class T, bool kExtended>
__global__ void __launch_bounds__(kFewSlotsWarps* kWarp, 1)
    few_slots_mlp_sm80_kernel(const __grid_constant__ FewSlotsParams p) {
  extern __shared__ __align__(128) uint8_t storage[];
  FewSlotsMlp<T, Ring, kFewSlotsWarps, 4, kExtended>::run(p, storage);
}

}  // namespace

void few_slots_mlp_sm80(DType dtype, const FewSlotsPlan& plan, const FewSlotsParams& params, void* stream) {
  const bool bf = dtype == DType::bf16;
  const auto usual = bf ? few_slots_mlp_sm80_kernel<bf16, false> : few_slots_mlp_sm80_kernel<fp16, false>;
  const auto extended = bf ? few_slots_mlp_sm80_kernel<bf16, true> : few_slots_mlp_sm80_kernel<fp16, true>;
  launch_few_slots(params.extended ? extended : usual, plan, params, stream);
}

}  // namespace nvfp4::cuda
