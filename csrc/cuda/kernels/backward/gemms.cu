// Instantiations and launches. SM80's instructions on every device.
#include "../../launch.h"
#include "activation_backward.cuh"
#include "transposed_gemm.cuh"

namespace nvfp4::cuda {
namespace {

template <class T, int kTileM, bool kGated>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    activation_backward_kernel(const __grid_constant__ ActivationBackwardParams p) {
  extern __shared__ __align__(128) uint8_t storage[];
  using Gemm = ActivationBackward<T, kTileM, kGated>;
  Gemm::run(p, *reinterpret_cast<typename Gemm::Storage*>(storage));
}

template <class T, int kTileM>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    transposed_gemm_kernel(const __grid_constant__ TransposedGemmParams p) {
  extern __shared__ __align__(128) uint8_t storage[];
  using Gemm = TransposedGemm<T, kTileM>;
  Gemm::run(p, *reinterpret_cast<typename Gemm::Storage*>(storage));
}

template <class Params>
void run(void (*kernel)(Params), size_t shared, int64_t ctas, const char* name, const Params& params, void* stream) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel));
  launch(kernel, dim3(static_cast<unsigned>(ctas)), kBackwardThreads, shared, stream, name, params);
}

template <class T, int kTileM, bool kGated>
void run_activation(const ActivationBackwardParams& p, void* stream) {
  run(activation_backward_kernel<T, kTileM, kGated>, sizeof(typename ActivationBackward<T, kTileM, kGated>::Storage),
      int64_t{p.rows.max_tiles} * p.feature_tiles(), "activation_backward", p, stream);
}

template <class T>
void choose_activation(BackwardTile tile, const ActivationBackwardParams& p, void* stream) {
  const bool narrow = tile == BackwardTile::narrow;
  if (p.w13.gated) return (narrow ? run_activation<T, 32, true> : run_activation<T, 64, true>)(p, stream);
  (narrow ? run_activation<T, 32, false> : run_activation<T, 64, false>)(p, stream);
}

template <class T, int kTileM>
void run_transposed(const TransposedGemmParams& p, void* stream) {
  run(transposed_gemm_kernel<T, kTileM>, sizeof(typename TransposedGemm<T, kTileM>::Storage),
      int64_t{p.rows.max_tiles} * p.column_tiles(), "transposed_gemm", p, stream);
}

}  // namespace

int scale_parts(const ActivationBackwardParams& params, BackwardTile tile) {
  if (tile == BackwardTile::tall) return tall_parts(params);
  return params.feature_tiles() * (kBackwardWarps * kWarpTokens / static_cast<int>(tile));
}

void activation_backward(DType dtype, BackwardTile tile, const ActivationBackwardParams& params, void* stream) {
  if (tile == BackwardTile::tall) return activation_backward_sm90(dtype, params, stream);
  (dtype == DType::bf16 ? choose_activation<bf16> : choose_activation<fp16>)(tile, params, stream);
}

void transposed_gemm(DType dtype, BackwardTile tile, const TransposedGemmParams& params, void* stream) {
  if (tile == BackwardTile::tall) return transposed_gemm_sm90(dtype, params, stream);
  const bool narrow = tile == BackwardTile::narrow;
  if (dtype == DType::bf16) return (narrow ? run_transposed<bf16, 32> : run_transposed<bf16, 64>)(params, stream);
  (narrow ? run_transposed<fp16, 32> : run_transposed<fp16, 64>)(params, stream);
}

}  // namespace nvfp4::cuda
