#include <algorithm>

#include "checks.h"
#include "launch.h"

namespace nvfp4 {
namespace {

// NaN, the E4M3 bytes 0x7F and 0xFF, would be decoded as 480.
void check_scales(const char* op, const Tensor& scale) {
  const auto* bytes = static_cast<const uint8_t*>(scale.data_ptr());
  const int64_t count = scale.numel();
  const auto* bad = std::find_if(bytes, bytes + count, [](uint8_t byte) { return (byte & 0x7F) == 0x7F; });
  if (bad == bytes + count) return;
  std::vector<int64_t> index;
  int64_t rest = bad - bytes;
  for (int64_t dim = scale.dim() - 1; dim >= 0; --dim) {
    index.insert(index.begin(), rest % scale.size(dim));
    rest /= scale.size(dim);
  }
  fail(op, "scale must hold finite E4M3 values, got NaN (byte ", *bad & 0x80 ? "0xFF" : "0x7F", ") at index ",
       list(index));
}

// pack and unpack are inverses over codes [..., N, K / 2] and scales [..., N, K / 16], with or without experts in
// front.
Tensor pack(const Tensor& weight, const Tensor& scale, bool gated) {
  const char* op = "pack";
  const bool batched = weight.dim() != 2;
  check_tensor(op, "weight", weight, "weight", weight, {ScalarType::Byte},
               batched ? Dims{"E", "N", "K / 2"} : Dims{"N", "K / 2"}, batched ? " or [N, K / 2]" : "");
  const int64_t n = weight.size(weight.dim() - 2);
  const int64_t row_bytes = weight.size(weight.dim() - 1);
  if (row_bytes >= kIndexLimit / 2) fail(op, "weight's last dimension K / 2 must be below 2**30, got ", row_bytes);
  const int64_t k = 2 * row_bytes;
  check_in_features(op, k);
  check_out_features(op, n, gated);
  Dims scale_dims{n, k / kGroupSize};
  if (batched) scale_dims.insert(scale_dims.begin(), weight.size(0));
  check_tensor(op, "scale", scale, "weight", weight, {ScalarType::Float8_e4m3fn, ScalarType::Byte}, scale_dims);

  if (!kIsCuda) check_scales(op, scale);

  const std::optional<int64_t> experts = batched ? std::optional(weight.size(0)) : std::nullopt;
  Tensor packed = empty(op, "the packed weight", weight, packed_shape(experts, n, k, gated), ScalarType::Byte);
  if (packed.numel() == 0) return packed;
  const PackArgs args{
      .weight = static_cast<const uint8_t*>(weight.data_ptr()),
      .scale = static_cast<const uint8_t*>(scale.data_ptr()),
      .packed = static_cast<uint8_t*>(packed.data_ptr()),
      .expert_bytes = packed.numel() / experts.value_or(1),
      .experts = experts.value_or(1),
      .n = n,
      .k = k,
      .gated = gated,
  };
  const Launch launch(op, weight);
  backend::pack(args, launch.context());
  return packed;
}

std::tuple<Tensor, Tensor> unpack(const Tensor& packed, int64_t in_features, bool gated) {
  const char* op = "unpack";
  check_in_features(op, in_features);
  const int64_t plain_rank = (gated ? 2 : 1) + (kIsCuda ? 1 : 2);
  const bool batched = packed.dim() != plain_rank;
  // A stack of no experts has an inverse too, as pack makes one.
  const PackedSize size{
      .batched = batched, .gated = gated, .experts = -1, .n = -1, .k = in_features, .may_be_empty = true};
  const int64_t n = check_packed(op, "packed", packed, "packed", packed, size);

  std::vector<int64_t> shape{n, in_features / 2};
  std::vector<int64_t> scale_shape{n, in_features / kGroupSize};
  if (batched) {
    shape.insert(shape.begin(), packed.size(0));
    scale_shape.insert(scale_shape.begin(), packed.size(0));
  }
  Tensor weight = empty(op, "weight", packed, shape, ScalarType::Byte);
  Tensor scale = empty(op, "scale", packed, scale_shape, ScalarType::Byte);
  if (packed.numel() == 0) return {weight, scale};
  const int64_t experts = batched ? packed.size(0) : 1;
  const UnpackArgs args{
      .packed = static_cast<const uint8_t*>(packed.data_ptr()),
      .expert_bytes = packed.numel() / experts,
      .weight = static_cast<uint8_t*>(weight.data_ptr()),
      .scale = static_cast<uint8_t*>(scale.data_ptr()),
      .experts = experts,
      .n = n,
      .k = in_features,
      .gated = gated,
  };
  const Launch launch(op, packed);
  backend::unpack(args, launch.context());
  return {weight, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nvfp4, NVFP4_DISPATCH_KEY, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace nvfp4
