#include "launch.cuh"

namespace nvfp4::cuda {

size_t wgmma_fp8_expert_mlp_workspace(const ExpertMlpArgs& args) { return wgmma_fp8::lay_out(nullptr, args).bytes; }

void wgmma_fp8_expert_mlp(const ExpertMlpArgs& args, const WgmmaPlan& plan, void* workspace, void* stream) {
  if (args.slots == 0) return;
  args.dtype == DType::bf16 ? wgmma_fp8::run<bf16>(args, plan, workspace, stream)
                            : wgmma_fp8::run<fp16>(args, plan, workspace, stream);
}

}  // namespace nvfp4::cuda
