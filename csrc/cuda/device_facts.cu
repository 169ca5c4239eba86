#include <map>
#include <mutex>

#include "../kernels.h"
#include "device_facts.h"
#include "launch.h"
#include "select.h"

namespace nvfp4::cuda {

const Device& device() {
  int ordinal = 0;
  check(cudaGetDevice(&ordinal), "current device");
  // Every launch asks; a thread seldom changes its device.
  static thread_local const Device* last = nullptr;
  if (last != nullptr && last->ordinal == ordinal) return *last;
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace(ordinal);
  if (is_new) {
    Device& d = entry->second;
    d.ordinal = ordinal;
    check(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, ordinal), "device attribute");
    check(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal), "device attribute");
    check(cudaDeviceGetAttribute(&d.shared_memory_per_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal),
          "device attribute");
  }
  last = &entry->second;
  return *last;
}

int active_level() { return static_cast<int>(isa_of(device())); }

}  // namespace nvfp4::cuda
