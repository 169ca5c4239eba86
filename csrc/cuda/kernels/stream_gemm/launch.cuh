// The host side that both architectures' instantiations share.
#pragma once

#include <map>
#include <mutex>

#include "../../launch.h"
#include "kernel.cuh"

namespace nvfp4::cuda {

using StreamGemmKernel = void (*)(StreamGemmParams);

// How many CTAs fill the device; asks the driver once per kernel and device.
inline int resident_ctas(StreamGemmKernel kernel, int threads, int shared) {
  static std::mutex mutex;
  static std::map<std::pair<int, StreamGemmKernel>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace({device().ordinal, kernel}, 0);
  if (is_new) {
    const auto raw = reinterpret_cast<const void*>(kernel);
    allow_shared_memory(raw);
    int ctas = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, raw, threads, shared), "occupancy of stream_gemm");
    entry->second = ctas * device().multiprocessors;
  }
  return entry->second;
}

struct StreamGemmLaunch {
  StreamGemmKernel kernel;
  int warps;
  int shared;
};

inline void launch_stream_gemm(const StreamGemmLaunch& l, const StreamGemmParams& params, void* stream) {
  const int threads = l.warps * kWarp;
  launch(l.kernel, dim3(resident_ctas(l.kernel, threads, l.shared)), threads, l.shared, stream, "stream_gemm", params);
}

}  // namespace nvfp4::cuda
