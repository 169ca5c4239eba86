#include "../../device/cta_sort.cuh"
#include "../../device/ptx/control.cuh"
#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

using Ring = BulkRing<4>;

template <class T, int kMaxTiles, int kWarps, int kCtas, bool kExtended, bool kSplit>
__global__ void __launch_bounds__(kWarps* kWarp, kCtas)
    stream_gemm_sm90_kernel(const __grid_constant__ StreamGemmParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t storage[];
  using Gemm = StreamGemm<T, Ring, TileTable, kMaxTiles, kWarps, kExtended, kSplit>;
  Gemm::run(p, *reinterpret_cast<typename Gemm::Storage*>(storage), [&] { return table_tiles<kMaxTiles>(p); });
#endif
}

// Narrow tiles, sorted by every CTA.
constexpr int kSortingWarps = 16;
using SortedTiles = CtaSortedTiles<kSortingWarps>;
static_assert(SortedTiles::kMaxSlots == kCtaSortSlots && SortedTiles::kMaxExperts == kCtaSortExperts,
              "select() knows them from plan.h");
static_assert(SortedTiles::kMaxTiles >= kCtaSortExperts + kCtaSortSlots / kSplitTile);

struct SortingStorage {
  StreamStorage<Ring, kSortingWarps> gemm;
  SortedTiles::Storage tiles;
};

template <class T, bool kExtended, bool kSplit>
__global__ void __launch_bounds__(kSortingWarps* kWarp, 1)
    stream_gemm_sorting_sm90_kernel(const __grid_constant__ StreamGemmParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t storage[];
  using Gemm = StreamGemm<T, Ring, SortedTiles, kNarrowTile / 8, kSortingWarps, kExtended, kSplit>;
  SortingStorage& s = *reinterpret_cast<SortingStorage*>(storage);
  static_assert(sizeof(s.gemm.partial) >= sizeof(SortedTiles::Scratch));
  Gemm::run(p, s.gemm, [&] {
    auto& scratch = *reinterpret_cast<SortedTiles::Scratch*>(s.gemm.partial);  // not in use yet
    return SortedTiles(p.routing, kSplit ? kSplitTile : kNarrowTile, s.tiles, scratch, [&] {
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

template <class T, int kMaxTiles, int kWarps, int kCtas, bool kExtended, bool kSplit = false>
StreamGemmLaunch with() {
  return {stream_gemm_sm90_kernel<T, kMaxTiles, kWarps, kCtas, kExtended, kSplit>, kWarps,
          sizeof(StreamStorage<Ring, kWarps>)};
}

template <bool kExtended>
StreamGemmLaunch choose_split(bool sorting) {
  if (sorting) {
    return {stream_gemm_sorting_sm90_kernel<fp16, kExtended, true>, kSortingWarps, sizeof(SortingStorage)};
  }
  return with<fp16, 2, 16, 1, kExtended, true>();
}

constexpr int kSplitThreads = 128;

__global__ void __launch_bounds__(kSplitThreads)
    split_rows_kernel(const uint4* x, int64_t chunks, uint32_t row_chunks, uint8_t* split) {
  ptx::dependency_wait();
  ptx::dependency_release();  // not before: what is older than this launch is complete for the next one
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x;
  if (i >= chunks) return;
  const auto row = static_cast<uint32_t>(i) / row_chunks;
  const auto column = static_cast<uint32_t>(i) - row * row_chunks;
  uint8_t* high = split + (int64_t{2} * row * row_chunks + column) * kChunkBytes;
  store_split(x[i], high, high + int64_t{row_chunks} * kChunkBytes);
}

template <class T, bool kExtended>
StreamGemmLaunch choose(StreamTiles tiles, const StreamGemmParams& params) {
  if (params.batched) {  // select_batched() gives it no wide tiles
    return {stream_gemm_batched_sm90_kernel<T, kExtended>, kBatchWarps, sizeof(StreamStorage<Ring, kBatchWarps>)};
  }
  if (tiles == StreamTiles::split) return choose_split<kExtended>(params.sorting);
  if (params.sorting) {
    return {stream_gemm_sorting_sm90_kernel<T, kExtended, false>, kSortingWarps, sizeof(SortingStorage)};
  }
  switch (tiles) {
    // One CTA of 16 warps per multiprocessor, so that a few items spread evenly.
    case StreamTiles::narrow:
      return with<T, 2, 16, 1, kExtended>();
    case StreamTiles::wide:
      return with<T, 4, 8, 1, kExtended>();
    case StreamTiles::split:
      break;
  }
  return {};
}

}  // namespace

void stream_split_rows(const void* x, int64_t rows, int64_t k, void* split, void* stream) {
  const int64_t row_chunks = k * kElementBytes / kChunkBytes;
  const int64_t chunks = rows * row_chunks;
  launch(split_rows_kernel, dim3(static_cast<unsigned>(ceil_div<int64_t>(chunks, kSplitThreads))), kSplitThreads, 0,
         stream, "split_rows", static_cast<const uint4*>(x), chunks, static_cast<uint32_t>(row_chunks),
         static_cast<uint8_t*>(split));
}

void stream_gemm_sm90(DType dtype, StreamTiles tiles, const StreamGemmParams& params, void* stream) {
  const bool bf = dtype == DType::bf16;
  const auto usual = bf ? choose<bf16, false> : choose<fp16, false>;
  const auto extended = bf ? choose<bf16, true> : choose<fp16, true>;
  const auto choose_for = params.extended() ? extended : usual;
  launch_stream_gemm(choose_for(tiles, params), params, stream);
}

}  // namespace nvfp4::cuda
