// What every op needs around its kernel: outputs, and the device, stream, settings and workspace of a call.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../kernels.h"
#include "checks.h"

namespace nvfp4 {

// An uninitialised tensor on the device of `like`. Where there is no memory for it, the error names the op, how many
// bytes were wanted, and for `what`.
Tensor empty(const char* op, const char* what, const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype);

// Where the gradient of `of` goes: a tensor like it, or an empty one where it is not wanted.
Tensor grad_tensor(const char* op, const char* what, const Tensor& of, bool wanted);

// Selects the device and current stream of `like` for one call of an op, reads the settings that hold for all of the
// call, and owns its scratch memory.
class Launch {
 public:
  Launch(const char* op, const Tensor& like);
  const Context& context() const { return context_; }
  // Gives the context a workspace of so many bytes.
  void reserve(size_t bytes);

 private:
#ifdef USE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  const char* op_;
  Tensor like_;
  std::optional<Tensor> workspace_;
  Context context_;
};

}  // namespace nvfp4
