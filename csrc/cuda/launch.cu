#include <mutex>
#include <set>

#include "launch.h"

namespace nvfp4::cuda {

void allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  const Device& d = device();
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.contains({d.ordinal, kernel})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared_memory_per_cta),
        "shared memory of a kernel");
  allowed.insert({d.ordinal, kernel});
}

}  // namespace nvfp4::cuda
