#include "launch.h"

#include <algorithm>
#include <exception>
#include <string>

namespace nvfp4 {
namespace {

// torch's new_empty through the dispatcher takes three times as long, and every call of an op makes two tensors.
Tensor empty_on_device_of(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  int32_t type = 0;
  int32_t index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  code, type, index, &handle));
  return Tensor(handle);
}

// Bytes of a tensor; none where 63 bits are too few.
std::optional<int64_t> bytes_of(const std::vector<int64_t>& shape, ScalarType dtype) {
  int64_t bytes = item_size(dtype);
  bool fits = true;
  for (int64_t size : shape) fits = !__builtin_mul_overflow(bytes, size, &bytes) && fits;
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  return fits ? std::optional(bytes) : std::nullopt;
}

}  // namespace

Tensor empty(const char* op, const char* what, const Tensor& like, const std::vector<int64_t>& shape,
             ScalarType dtype) {
  const std::optional<int64_t> bytes = bytes_of(shape, dtype);
  if (bytes) {
    try {
      return empty_on_device_of(like, shape, dtype);
    } catch (const std::exception&) {  // its text says neither what for nor how much
    }
  }
  fail(op, "expected to allocate ", bytes ? std::to_string(*bytes) : "2**63 or more", " bytes of memory for ", what,
       " ", list(shape), " on ", device_name(like), ", got none; use a smaller batch or free memory");
}

Tensor grad_tensor(const char* op, const char* what, const Tensor& of, bool wanted) {
  const auto sizes = of.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  return empty(op, what, of, wanted ? shape : std::vector<int64_t>{0}, of.scalar_type());
}

#ifdef USE_CUDA
Launch::Launch(const char* op, const Tensor& like) : guard_(like.get_device_index()), op_(op), like_(like) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &context_.stream));
#else
Launch::Launch(const char* op, const Tensor& like) : op_(op), like_(like) {
  context_.threads = static_cast<int>(torch::stable::get_num_threads());
#endif
  context_.level = backend::active_level();
}

void Launch::reserve(size_t bytes) {
  if (bytes == 0) return;
  // torch's CPU allocator aligns to less than the kernels rely on.
  workspace_ =
      empty(op_, "its workspace", like_, {static_cast<int64_t>(bytes + kWorkspaceAlignment)}, ScalarType::Byte);
  const auto address = reinterpret_cast<uintptr_t>(workspace_->data_ptr());
  context_.workspace = reinterpret_cast<void*>(round_up(address, uintptr_t{kWorkspaceAlignment}));
}

}  // namespace nvfp4
