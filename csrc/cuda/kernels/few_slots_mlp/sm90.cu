#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

using Ring = BulkRing<kFewSlotsStagesSm90>;
using PartRing = BulkRing<kFewSlotsPartStages, kFewSlotsPartBytes>;
static_assert(FewSlotsMlp<bf16, Ring, kFewSlotsWarps>::kRingBytes == few_slots_ring_bytes(Isa::sm90));
static_assert(FewSlotsMlp<bf16, PartRing, kFewSlotsWarps, 1>::kRingBytes == few_slots_part_ring_bytes());

template <class T, int kRowTiles, bool kExtended>
__global__ void __maxnreg__(kFewSlotsMaxRegisters) few_slots_mlp_sm90_kernel(const __grid_constant__ FewSlotsParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t storage[];
  FewSlotsMlp<T, std::conditional_t<kRowTiles == 1, PartRing, Ring>, kFewSlotsWarps, kRowTiles, kExtended>::run(
      p, storage);
#endif
}

template <class T, bool kExtended>
FewSlotsKernel choose(FewSlotsItems items) {
  switch (items) {
    case FewSlotsItems::panels:
      return few_slots_mlp_sm90_kernel<T, 4, kExtended>;
    case FewSlotsItems::halves:
      return few_slots_mlp_sm90_kernel<T, 2, kExtended>;
    case FewSlotsItems::parts:
      return few_slots_mlp_sm90_kernel<T, 1, kExtended>;
  }
  return nullptr;
}

}  // namespace

void few_slots_mlp_sm90(DType dtype, const FewSlotsPlan& plan, const FewSlotsParams& params, void* stream) {
  const bool bf = dtype == DType::bf16;
  const auto usual = bf ? choose<bf16, false> : choose<fp16, false>;
  const auto extended = bf ? choose<bf16, true> : choose<fp16, true>;
  launch_few_slots((params.extended ? extended : usual)(plan.items), plan, params, stream);
}

}  // namespace nvfp4::cuda
