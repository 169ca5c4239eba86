#include "../../device/cta_sort.cuh"
#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

using Ring = BulkRing<4>;

template <class T, int kMaxTiles, int kWarps, int kCtas, bool kExtended>
__global__ void __launch_bounds__(kWarps* kWarp, kCtas)
    stream_gemm_sm90_kernel(const __grid_constant__ StreamGemmParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t storage[];
  using Gemm = StreamGemm<T, Ring, TileTable, kMaxTiles, kWarps, kExtended>;
  Gemm::run(p, *reinterpret_cast<typename Gemm::Storage*>(storage), [&] { return table_tiles<kMaxTiles>(p); });
#endif
}

// Narrow tiles, sorted by every CTA.
constexpr int kSortingWarps = 16;
using SortedTiles = CtaSortedTiles<kSortingWarps>;
static_assert(SortedTiles::kMaxSlots == kCtaSortSlots && SortedTiles::kMaxExperts == kCtaSortExperts,
              "select() knows them from plan.h");
static_assert(SortedTiles::kMaxTiles >= kCtaSortExperts + kCtaSortSlots / kNarrowTile);

struct SortingStorage {
  StreamStorage<Ring, kSortingWarps> gemm;
  SortedTiles::Storage tiles;
};

template <class T, bool kExtended>
__global__ void __launch_bounds__(kSortingWarps* kWarp, 1)
    stream_gemm_sorting_sm90_kernel(const __grid_constant__ StreamGemmParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t storage[];
  using Gemm = StreamGemm<T, Ring, SortedTiles, kNarrowTile / 8, kSortingWarps, kExtended>;
  SortingStorage& s = *reinterpret_cast<SortingStorage*>(storage);
  static_assert(sizeof(s.gemm.partial) >= sizeof(SortedTiles::Scratch));
  Gemm::run(p, s.gemm, [&] {
    auto& scratch = *reinterpret_cast<SortedTiles::Scratch*>(s.gemm.partial);  // not in use yet
    return SortedTiles(p.routing, kNarrowTile, s.tiles, scratch, [&] {
      if (!p.plan_is_older) ptx::dependency_wait();
    });
  });
#endif
}

// Narrow tiles of a batch.
constexpr int kBatchWarps = 16;

template <class T, bool kExtended>
__global__ void __launch_bounds__(kBatchWarps* kWarp, 1)
    stream_gemm_batched_sm90_kernel(const __grid_constant__ StreamGemmParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t storage[];
  using Gemm = StreamGemm<T, Ring, BatchTiles, kNarrowTile / 8, kBatchWarps, kExtended>;
  Gemm::run(p, *reinterpret_cast<typename Gemm::Storage*>(storage), [&] { return batch_tiles(p); });
#endif
}

template <class T, int kMaxTiles, int kWarps, int kCtas, bool kExtended>
StreamGemmLaunch with() {
  return {stream_gemm_sm90_kernel<T, kMaxTiles, kWarps, kCtas, kExtended>, kWarps, sizeof(StreamStorage<Ring, kWarps>)};
}

template <class T, bool kExtended>
StreamGemmLaunch choose(StreamTiles tiles, const StreamGemmParams& params) {
  if (params.batched) {  // select_batched() gives it no wide tiles
    return {stream_gemm_batched_sm90_kernel<T, kExtended>, kBatchWarps, sizeof(StreamStorage<Ring, kBatchWarps>)};
  }
  if (params.sorting) return {stream_gemm_sorting_sm90_kernel<T, kExtended>, kSortingWarps, sizeof(SortingStorage)};
  switch (tiles) {
    // One CTA of 16 warps per multiprocessor, so that a few items spread evenly.
    case StreamTiles::narrow:
      return with<T, 2, 16, 1, kExtended>();
    case StreamTiles::wide:
      return with<T, 4, 8, 1, kExtended>();
  }
  return {};
}

}  // namespace

void stream_gemm_sm90(DType dtype, StreamTiles tiles, const StreamGemmParams& params, void* stream) {
  const bool bf = dtype == DType::bf16;
  const auto usual = bf ? choose<bf16, false> : choose<fp16, false>;
  const auto extended = bf ? choose<bf16, true> : choose<fp16, true>;
  const auto choose_for = params.extended() ? extended : usual;
  launch_stream_gemm(choose_for(tiles, params), params, stream);
}

}  // namespace nvfp4::cuda
