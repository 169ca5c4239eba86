// FP8 activations on SM90: the expert MLP of ExpertMlpArgs with tokens and `hidden` in E4M3, a scale per row.
//
// Calls enqueue four launches on `stream`. Sizes and pointers as for wgmma_expert_mlp; x is 4-byte aligned.
#pragma once

#include "../wgmma_experts/params.h"
#include "plan.h"

namespace nvfp4::cuda {

size_t wgmma_fp8_expert_mlp_workspace(const ExpertMlpArgs& args);
void wgmma_fp8_expert_mlp(const ExpertMlpArgs& args, const WgmmaPlan& plan, void* workspace, void* stream);

}  // namespace nvfp4::cuda
