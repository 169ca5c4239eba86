// Host-side launching: error checks, programmatic dependent launch, and what a device can hold.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace nvfp4::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch reports it again
  throw std::runtime_error(std::string("nvfp4: ") + what + ": " + cudaGetErrorString(error));
}

// Facts of the current device, read once a device.
struct Device {
  int major;
  int multiprocessors;
  int shared_memory_per_block;
  int ordinal;
};
const Device& device();

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// A kernel may begin while the launch before it still runs: it must call ptx::dependency_wait() before touching what
// that launch writes or reads.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, void* stream, const char* name,
            Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = device().major >= 9 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

}  // namespace nvfp4::cuda
