#include "gemm.cuh"

namespace nvfp4::cuda::wgmma_fp8 {

template void launch_gemm<Tall, bf16, true>(Fp8Params, const WgmmaPlan&, void*);
template void launch_gemm<Wide, bf16, true>(Fp8Params, const WgmmaPlan&, void*);

}  // namespace nvfp4::cuda::wgmma_fp8
