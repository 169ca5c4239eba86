// Host-side launching: error checks, and programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "device_facts.h"

namespace nvfp4::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch reports it again
  throw std::runtime_error(std::string("nvfp4: ") + what + ": " + cudaGetErrorString(error));
}

// Lets a kernel have all the shared memory that a CTA can have; asks the driver once per kernel and device.
void allow_shared_memory(const void* kernel);

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

struct LaunchShape {
  dim3 grid;
  int threads;
  size_t shared;
  void* stream;
  bool together;
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, const char* name, Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(shape.stream);
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (device().major >= 9) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.together) {
    cudaLaunchAttribute& together = attributes[config.numAttrs++];
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

// A kernel may begin while the launch before it still runs: it must call ptx::dependency_wait() before touching what
// that launch writes or reads.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, void* stream, const char* name,
            Args&&... args) {
  launch(kernel, {grid, threads, shared, stream, false}, name, std::forward<Args>(args)...);
}

// The same, and no CTA begins before there is room for all: so CTAs may wait for one another.
template <class... Params, class... Args>
void launch_together(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, void* stream, const char* name,
                     Args&&... args) {
  launch(kernel, {grid, threads, shared, stream, true}, name, std::forward<Args>(args)...);
}

}  // namespace nvfp4::cuda
