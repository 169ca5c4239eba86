#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

// Two stages per warp: then two CTAs fit into an SM80 multiprocessor, and one into an SM89's.
using Ring = CpAsyncRing<2>;

template <class T, int kMaxTiles, int kWarps, int kCtas, bool kExtended>
__global__ void __launch_bounds__(kWarps* kWarp, kCtas)
    stream_gemm_sm80_kernel(const __grid_constant__ StreamGemmParams p) {
  extern __shared__ __align__(128) uint8_t storage[];
  using Gemm = StreamGemm<T, Ring, TileTable, kMaxTiles, kWarps, kExtended>;
  Gemm::run(p, *reinterpret_cast<typename Gemm::Storage*>(storage), [&] { return table_tiles<kMaxTiles>(p); });
}

template <class T, int kMaxTiles, int kWarps, int kCtas, bool kExtended>
__global__ void __launch_bounds__(kWarps* kWarp, kCtas)
    stream_gemm_batched_sm80_kernel(const __grid_constant__ StreamGemmParams p) {
  extern __shared__ __align__(128) uint8_t storage[];
  using Gemm = StreamGemm<T, Ring, BatchTiles, kMaxTiles, kWarps, kExtended>;
  Gemm::run(p, *reinterpret_cast<typename Gemm::Storage*>(storage), [&] { return batch_tiles(p); });
}

template <class T, int kMaxTiles, int kWarps, int kCtas, bool kExtended>
StreamGemmLaunch with(bool batched) {
  const auto kernel = batched ? stream_gemm_batched_sm80_kernel<T, kMaxTiles, kWarps, kCtas, kExtended>
                              : stream_gemm_sm80_kernel<T, kMaxTiles, kWarps, kCtas, kExtended>;
  return {kernel, kWarps, sizeof(StreamStorage<Ring, kWarps>)};
}

template <class T, bool kExtended>
StreamGemmLaunch choose(StreamTiles tiles, bool batched) {
  switch (tiles) {
    case StreamTiles::narrow:
      return with<T, 2, 8, 2, kExtended>(batched);
    case StreamTiles::wide:
      return with<T, 4, 8, 1, kExtended>(batched);
    case StreamTiles::split:  // select() gives it none
      break;
  }
  return {};
}

}  // namespace

void stream_gemm_sm80(DType dtype, StreamTiles tiles, const StreamGemmParams& params, void* stream) {
  const bool bf = dtype == DType::bf16;
  const auto usual = bf ? choose<bf16, false> : choose<fp16, false>;
  const auto extended = bf ? choose<bf16, true> : choose<fp16, true>;
  const auto choose_for = params.extended() ? extended : usual;
  launch_stream_gemm(choose_for(tiles, params.batched), params, stream);
}

}  // namespace nvfp4::cuda
