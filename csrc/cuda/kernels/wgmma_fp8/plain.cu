#include "gemm.cuh"

namespace nvfp4::cuda::wgmma_fp8 {

template void launch_gemm<Tall, bf16, false>(Fp8Params, const WgmmaPlan&, void*);
template void launch_gemm<Wide, bf16, false>(Fp8Params, const WgmmaPlan&, void*);
template void launch_gemm<Tall, fp16, false>(Fp8Params, const WgmmaPlan&, void*);
template void launch_gemm<Wide, fp16, false>(Fp8Params, const WgmmaPlan&, void*);

}  // namespace nvfp4::cuda::wgmma_fp8
