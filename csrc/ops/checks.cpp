#include "checks.h"

#include <algorithm>
#include <array>

namespace nvfp4 {
namespace {

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Float8_e4m3fnuz:
      return "float8_e4m3fnuz";
    case ScalarType::Float8_e5m2fnuz:
      return "float8_e5m2fnuz";
    case ScalarType::Float8_e8m0fnu:
      return "float8_e8m0fnu";
    case ScalarType::Float4_e2m1fn_x2:
      return "float4_e2m1fn_x2";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

template <typename Items, typename Print>
std::string list(const Items& items, Print print) {
  std::ostringstream out;
  out << '[';
  const char* separator = "";
  for (const auto& item : items) {
    out << separator;
    print(out, item);
    separator = ", ";
  }
  out << ']';
  return out.str();
}

std::string shape_of(const Tensor& tensor) {
  return list(tensor.sizes(), [](std::ostream& out, int64_t size) { out << size; });
}

std::string describe(const Dims& dims) {
  return list(dims, [](std::ostream& out, const Dim& dim) {
    if (dim.size < 0) {
      out << dim.letter;
    } else {
      out << dim.size;
    }
  });
}

bool matches(const Tensor& tensor, const Dims& dims) {
  const auto sizes = tensor.sizes();
  if (sizes.size() != dims.size()) return false;
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims[i].size >= 0 && sizes[i] != dims[i].size) return false;
  }
  return true;
}

bool on_one_device(const Tensor& tensor, const Tensor& like) { return tensor.device() == like.device(); }

// storage.resize_(0) frees memory under a tensor, as sharded data parallelism does between uses of a parameter.
bool has_memory(const Tensor& tensor) { return tensor.data_ptr() != nullptr || tensor.numel() == 0; }

bool begins_at_multiple(const Tensor& tensor, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether check_tensor has nothing to say, without making the words in which it would say it: every call of an op asks
// this of every argument.
bool is_as_expected(const Tensor& tensor, const Tensor& like, std::initializer_list<ScalarType> dtypes,
                    const Dims& dims) {
  const ScalarType dtype = tensor.scalar_type();
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end() && on_one_device(tensor, like) &&
         has_memory(tensor) && matches(tensor, dims) && tensor.is_contiguous() &&
         begins_at_multiple(tensor, item_size(dtype));
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes) {
  std::string expected;
  for (ScalarType dtype : dtypes) {
    if (tensor.scalar_type() == dtype) return;
    expected += (expected.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  }
  fail(op, name, " must be ", expected, ", got ", dtype_name(tensor.scalar_type()));
}

// A view into bytes, as torch.frombuffer gives, may begin anywhere.
void check_alignment(const char* op, const char* name, const Tensor& tensor, int64_t bytes,
                     const char* advice = Advice{}.misaligned) {
  if (!begins_at_multiple(tensor, bytes)) {
    fail(op, name, " must begin at a multiple of ", bytes, " bytes in memory, got a view that does not; ", advice);
  }
}

// Trailing dimensions of a packed weight: [KB, 36] on the CPU (64 values are 32 bytes of codes and 4 scales), and one
// dimension on CUDA, where 64 x 64 blocks are spread evenly over the rows.
constexpr size_t kPackedTailRank = kIsCuda ? 1 : 2;
struct PackedTail {
  std::array<int64_t, 2> sizes;
  const int64_t* begin() const { return sizes.data(); }
  const int64_t* end() const { return sizes.data() + kPackedTailRank; }
};
PackedTail packed_tail(int64_t n, int64_t k) {
  if (!kIsCuda) return {{ceil_div<int64_t>(k, 64), 36}};
  return {{ceil_div(round_up<int64_t>(n, 64) * round_up<int64_t>(k, 64) / 16 * 9, n), 0}};
}

}  // namespace

int64_t item_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Int:
    case ScalarType::Float:
      return 4;
    case ScalarType::Long:
      return 8;
    default:
      return 1;
  }
}

std::string device_name(const Tensor& tensor) {
  switch (tensor.device().type()) {
    case torch::headeronly::DeviceType::CPU:
      return "cpu";
    case torch::headeronly::DeviceType::CUDA:
      return "cuda:" + std::to_string(tensor.get_device_index());
    default:
      return "another device";
  }
}

std::string list(const std::vector<int64_t>& numbers) {
  return list(numbers, [](std::ostream& out, int64_t number) { out << number; });
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like,
                  std::initializer_list<ScalarType> dtypes, const Dims& dims, const std::string& note,
                  const Advice& advice) {
  if (is_as_expected(tensor, like, dtypes, dims)) return;
  check_dtype(op, name, tensor, dtypes);
  if (!on_one_device(tensor, like)) {
    fail(op, name, " must be on ", device_name(like), " like ", like_name, ", got ", device_name(tensor));
  }
  if (!has_memory(tensor)) {
    fail(op, name, " must have its memory, got a tensor whose storage was freed; give the storage its size and ",
         "contents back first");
  }
  if (!matches(tensor, dims)) {
    fail(op, name, " must have shape ", describe(dims), note, ", got ", shape_of(tensor));
  }
  if (!tensor.is_contiguous()) {
    fail(op, name, " must be contiguous, got a tensor of shape ", shape_of(tensor), " that is not; ", advice.strided);
  }
  check_alignment(op, name, tensor, item_size(tensor.scalar_type()), advice.misaligned);
}

void check_out(const char* op, const Tensor& out, const char* like_name, const Tensor& like, const Dims& dims) {
  constexpr Advice kAdvice{.strided = "take one from torch.empty", .misaligned = "take one from torch.empty"};
  check_tensor(op, "out", out, like_name, like, {like.scalar_type()}, dims, "", kAdvice);
  if (kIsCuda) check_alignment(op, "out", out, 16, kAdvice.misaligned);
}

void check_apart(const char* op, const Tensor& out, const char* name, const Tensor& tensor, bool whole) {
  const auto bytes = [](const Tensor& t) { return static_cast<uintptr_t>(t.numel() * item_size(t.scalar_type())); };
  if (out.numel() == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(out.data_ptr());
  const auto other = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  if (begin >= other + bytes(tensor) || other >= begin + bytes(out) || (whole && begin == other)) return;
  fail(op, "out must ", whole ? "be " : "share no memory with ", name,
       whole ? " itself or share no memory with it" : "", ", got one that overlaps it; take one from torch.empty");
}

void check_activations(const char* op, const char* name, const Tensor& tensor, const Dims& dims) {
  if (kIsCuda) {
    check_tensor(op, name, tensor, name, tensor, {ScalarType::BFloat16, ScalarType::Half}, dims);
  } else {
    check_tensor(op, name, tensor, name, tensor, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, dims);
  }
}

void check_last_dim(const char* op, const char* name, const Tensor& tensor, int64_t multiple) {
  const int64_t size = tensor.dim() > 0 ? tensor.size(tensor.dim() - 1) : 0;
  if (size <= 0 || size % multiple != 0) {
    fail(op, name, "'s last dimension must be a positive multiple of ", multiple, ", got ", size);
  }
}

void check_k(const char* op, const char* name, const Tensor& tensor) {
  check_last_dim(op, name, tensor, kGroupSize);
  const int64_t k = tensor.size(tensor.dim() - 1);
  if (k >= kIndexLimit) fail(op, name, "'s last dimension must be below 2**31, got ", k);
}

void check_count(const char* op, const char* what, int64_t count) {
  if (count < int64_t{1} << kCountBits) return;
  fail(op, what, " must be below 2**", kCountBits, ", got ", count, "; split the batch");
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::fp16;
    default:
      return DType::fp32;
  }
}

bool is_gated(const char* op, const Tensor& global_scale, bool batched) {
  const int64_t plain_rank = batched ? 1 : 0;
  if (global_scale.dim() != plain_rank && global_scale.dim() != plain_rank + 1) {
    fail(op, "global_scale must have shape ", batched ? "[E], or [E, 2]" : "[], or [2]",
         " for a weight packed with gated=True, got ", shape_of(global_scale));
  }
  return global_scale.dim() == plain_rank + 1;
}

bool has_gate(const Tensor& w13, const Tensor& global_scale) {
  constexpr int64_t kPlainRank = 2 + static_cast<int64_t>(kPackedTailRank);
  return w13.dim() != kPlainRank || global_scale.dim() == 2;
}

const float* check_bias(const char* op, const char* name, const std::optional<Tensor>& bias, const char* like_name,
                        const Tensor& like, const Weight& weight) {
  if (bias) check_tensor(op, name, *bias, like_name, like, {ScalarType::Float}, {weight.experts, weight.n});
  return optional_data<const float>(bias);
}

std::vector<int64_t> packed_shape(std::optional<int64_t> experts, int64_t n, int64_t k, bool gated) {
  std::vector<int64_t> shape;
  if (experts) shape.push_back(*experts);
  if (gated) shape.push_back(2);
  shape.push_back(gated ? n / 2 : n);
  for (int64_t size : packed_tail(n, k)) shape.push_back(size);
  return shape;
}

int64_t check_packed(const char* op, const char* name, const Tensor& packed, const char* like_name, const Tensor& like,
                     const PackedSize& size) {
  const int64_t halves = size.gated ? 2 : 1;
  Dims dims;
  dims.reserve(5);
  if (size.batched) dims.push_back(size.experts < 0 ? Dim("E") : Dim(size.experts));
  if (size.gated) dims.push_back(2);
  const auto row_dim = static_cast<int64_t>(dims.size());
  dims.push_back(size.n < 0 ? Dim(size.gated ? "I" : "N") : Dim(size.n / halves));
  int64_t n = size.n;
  if (n < 0 && packed.dim() == row_dim + 1 + static_cast<int64_t>(kPackedTailRank)) {
    const int64_t rows = packed.size(row_dim);
    if (rows >= kIndexLimit / halves) {
      fail(op, name, "'s dimension ", row_dim, " must be below 2**", size.gated ? 30 : 31, ", got ", rows);
    }
    n = rows * halves;
  }
  if (n > 0 || !kIsCuda) {
    for (int64_t dim : packed_tail(n > 0 ? n : kGroupSize, size.k)) dims.push_back(dim);
  } else {
    dims.push_back("R");
  }
  if (!is_as_expected(packed, like, {size.dtype}, dims)) {
    const std::string note = std::string(", as torch_nvfp4.pack(gated=") + (size.gated ? "True" : "False") +
                             ") gives on " + (kIsCuda ? "cuda" : "cpu") + " for K = " + std::to_string(size.k);
    check_tensor(op, name, packed, like_name, like, {size.dtype}, dims, note);
  }
  if (n <= 0 || n / halves % kGroupSize != 0) {
    fail(op, name, "'s dimension ", row_dim, " must be a positive multiple of 16, got ", n / halves);
  }
  if (size.batched && packed.size(0) == 0 && !size.may_be_empty) {
    fail(op, name, " must hold at least one expert, got 0");
  }
  if (size.batched && packed.size(0) >= kIndexLimit) {
    fail(op, name, " must hold fewer than 2**31 experts, got ", packed.size(0));
  }
  if (kIsCuda) check_alignment(op, name, packed, 16);
  return n;
}

Weight check_weight(const char* op, const char* name, const Tensor& packed, const Tensor& global_scale,
                    const char* like_name, const Tensor& like, const PackedSize& size) {
  const int64_t n = check_packed(op, name, packed, like_name, like, size);
  const int64_t experts = size.batched ? packed.size(0) : 1;
  Dims scale_dims;
  if (size.batched) scale_dims.push_back(experts);
  if (size.gated) scale_dims.push_back(2);
  if (!is_as_expected(global_scale, like, {ScalarType::Float}, scale_dims)) {
    const std::string scale_name = std::string(name) == "weight" ? "global_scale" : std::string(name) + "_global_scale";
    check_tensor(op, scale_name.c_str(), global_scale, like_name, like, {ScalarType::Float}, scale_dims);
  }
  return Weight{
      .packed = static_cast<const uint8_t*>(packed.data_ptr()),
      .expert_bytes = packed.numel() / experts,
      .global_scale = static_cast<const float*>(global_scale.data_ptr()),
      .experts = experts,
      .n = n,
      .k = size.k,
      .gated = size.gated,
  };
}

void check_in_features(const char* op, int64_t k) {
  if (k <= 0 || k % kGroupSize != 0) {
    fail(op, "the weight's input dimension K must be a positive multiple of 16, got ", k);
  }
  if (k >= kIndexLimit) fail(op, "the weight's input dimension K must be below 2**31, got ", k);
}

void check_out_features(const char* op, int64_t n, bool gated) {
  const int64_t multiple = gated ? 2 * kGroupSize : kGroupSize;
  if (n <= 0 || n % multiple != 0) {
    fail(op, "the weight's output dimension N must be a positive multiple of ", multiple, gated ? " (gated=True)" : "",
         ", got ", n);
  }
  if (n >= kIndexLimit) fail(op, "the weight's output dimension N must be below 2**31, got ", n);
}

void check_num_experts(const char* op, int64_t num_experts) {
  if (num_experts <= 0) fail(op, "num_experts must be positive, got ", num_experts);
  if (num_experts >= kIndexLimit) {
    fail(op, "num_experts must be below 2**31, where offsets take 8 GiB of memory, got ", num_experts);
  }
}

Dims any_shape(const Tensor& tensor, const char* last) {
  Dims dims;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) dims.push_back(tensor.size(i));
  dims.push_back(last);
  return dims;
}

std::vector<int64_t> with_last_dim(const Tensor& tensor, int64_t size) {
  std::vector<int64_t> shape;
  for (int64_t dim : tensor.sizes()) shape.push_back(dim);
  shape.back() = size;
  return shape;
}

Routing check_routing(const char* op, const Tensor& topk_ids, const std::optional<Tensor>& expert_map, int64_t tokens,
                      int64_t top_k, int64_t experts, const char* like_name, const Tensor& like) {
  check_tensor(op, "topk_ids", topk_ids, like_name, like, {ScalarType::Int, ScalarType::Long},
               {tokens < 0 ? Dim("M") : Dim(tokens), top_k < 0 ? Dim("top_k") : Dim(top_k)});
  if (expert_map) {
    check_tensor(op, "expert_map", *expert_map, like_name, like, {ScalarType::Int}, {"global_experts"});
  }
  check_count(op, "M * top_k", topk_ids.numel());
  // An empty tensor's data pointer is null, which would say that ids are local.
  static constexpr int32_t kEmptyMap = -1;
  const int32_t* map = optional_data<const int32_t>(expert_map);
  if (expert_map && map == nullptr) map = &kEmptyMap;
  return Routing{
      .topk_ids = topk_ids.data_ptr(),
      .ids_are_int64 = topk_ids.scalar_type() == ScalarType::Long,
      .expert_map = map,
      .expert_map_size = expert_map ? expert_map->numel() : 0,
      .tokens = topk_ids.size(0),
      .top_k = topk_ids.size(1),
      .experts = experts,
  };
}

}  // namespace nvfp4
