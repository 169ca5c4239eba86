// The checks of arguments, whose words torch_nvfp4/ops/_checks.py repeats for the fakes; and which backend this is.
//
// Each ops/<op>.cpp is compiled into both libraries: into _C for the CPU, and with USE_CUDA into _C_cuda.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../common.h"
#include "../kernels.h"

#ifdef USE_CUDA
#define NVFP4_DISPATCH_KEY CUDA
#else
#define NVFP4_DISPATCH_KEY CPU
#endif

namespace nvfp4 {

#ifdef USE_CUDA
namespace backend = cuda;
constexpr bool kIsCuda = true;
#else
namespace backend = cpu;
constexpr bool kIsCuda = false;
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Experts, K and N stay below it: kernels count them in int32, and a product of two fits int64.
constexpr int64_t kIndexLimit = int64_t{1} << 31;
// Slots and rows stay below 2 to this: CUDA's loops step over their end.
constexpr int kCountBits = kIsCuda ? 30 : 31;

// One expected dimension: a size, or a letter where any size will do.
struct Dim {
  int64_t size = -1;
  const char* letter = "";
  Dim(int64_t size) : size(size) {}
  Dim(const char* letter) : letter(letter) {}
};
using Dims = std::vector<Dim>;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "nvfp4::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Bytes of an element, for the dtypes that tensors may have here.
int64_t item_size(ScalarType dtype);
std::string device_name(const Tensor& tensor);
// "[1, 2, 3]"
std::string list(const std::vector<int64_t>& numbers);

// What to do about a tensor whose memory is not laid out as the kernels want it.
struct Advice {
  const char* strided = "call .contiguous() first";
  const char* misaligned = "call .clone() first";
};

// Checks dtype, device (that of `like`), shape, contiguity and alignment, in this order. `note` follows the expected
// shape. Before the shape: a tensor whose storage was freed has nothing to read.
void check_tensor(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like,
                  std::initializer_list<ScalarType> dtypes, const Dims& dims, const std::string& note = "",
                  const Advice& advice = {});

// Checks a buffer for the result, which the caller gives: of dtype and device of `like`, of this shape, and 16-byte
// aligned on CUDA.
void check_out(const char* op, const Tensor& out, const char* like_name, const Tensor& like, const Dims& dims);
// What the op reads must not lie in the buffer that it writes. `whole`: it may be the buffer itself, from its first
// byte.
void check_apart(const char* op, const Tensor& out, const char* name, const Tensor& tensor, bool whole = false);

// check_tensor with the dtypes that activations may have on this backend.
void check_activations(const char* op, const char* name, const Tensor& tensor, const Dims& dims);
void check_last_dim(const char* op, const char* name, const Tensor& tensor, int64_t multiple);
// The last dimension of activations that a weight is multiplied with.
void check_k(const char* op, const char* name, const Tensor& tensor);
// A number of slots or rows.
void check_count(const char* op, const char* what, int64_t count);
DType dtype_of(const Tensor& tensor);

// Sizes of a packed weight; -1 where any size will do.
struct PackedSize {
  bool batched;  // has a leading expert dimension
  bool gated;    // packed with gated=True
  int64_t experts;
  int64_t n;  // output rows, 2I when gated
  int64_t k;
  bool may_be_empty = false;            // no experts will do
  ScalarType dtype = ScalarType::Byte;  // Char: codes are in the order for FP8
};
// Checks pack()'s result against what is known of its size, and returns its output rows.
int64_t check_packed(const char* op, const char* name, const Tensor& packed, const char* like_name, const Tensor& like,
                     const PackedSize& size);
// The same with the global scale, for the kernels.
Weight check_weight(const char* op, const char* name, const Tensor& packed, const Tensor& global_scale,
                    const char* like_name, const Tensor& like, const PackedSize& size);
// global_scale's rank says whether the weight was packed with gated=True.
bool is_gated(const char* op, const Tensor& global_scale, bool batched);
// Whether w13 of moe has gate and up rows: as many dimensions as pack(gated=True) gives, or a pair of global scales. A
// w13 that is neither packed so nor so is taken for one that should have a gate.
bool has_gate(const Tensor& w13, const Tensor& global_scale);
// The bias of a weight's outputs, or null.
const float* check_bias(const char* op, const char* name, const std::optional<Tensor>& bias, const char* like_name,
                        const Tensor& like, const Weight& weight);
// The shape of pack()'s result.
std::vector<int64_t> packed_shape(std::optional<int64_t> experts, int64_t n, int64_t k, bool gated);

void check_in_features(const char* op, int64_t k);
void check_out_features(const char* op, int64_t n, bool gated);
void check_num_experts(const char* op, int64_t num_experts);

template <typename T>
T* optional_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// The dimensions of a tensor of any rank >= 1 whose last dimension is called `last`; and its shape with another last
// size.
Dims any_shape(const Tensor& tensor, const char* last);
std::vector<int64_t> with_last_dim(const Tensor& tensor, int64_t size);

// In check_gate.cpp. The words are those of gate_error in torch_nvfp4/gate.py.
Gate check_gate(const char* op, int64_t activation, std::optional<double> clamp_limit, double alpha, double beta,
                bool gated);

Routing check_routing(const char* op, const Tensor& topk_ids, const std::optional<Tensor>& expert_map, int64_t tokens,
                      int64_t top_k, int64_t experts, const char* like_name, const Tensor& like);

}  // namespace nvfp4
