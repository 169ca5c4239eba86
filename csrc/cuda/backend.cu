// namespace nvfp4::cuda of kernels.h: workspaces, and the launches that make up each op.
#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "device/decode.cuh"
#include "kernels/few_slots_mlp/params.h"
#include "kernels/route.h"
#include "kernels/stream_gemm/params.h"
#include "kernels/wgmma_experts/params.h"
#include "launch.h"
#include "select.h"

namespace nvfp4::cuda {

const Device& device() {
  int ordinal = 0;
  check(cudaGetDevice(&ordinal), "current device");
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace(ordinal);
  if (is_new) {
    Device& d = entry->second;
    d.ordinal = ordinal;
    check(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, ordinal), "device attribute");
    check(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal), "device attribute");
    check(cudaDeviceGetAttribute(&d.shared_memory_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal),
          "device attribute");
  }
  return entry->second;
}

void allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  const Device& d = device();
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.contains({d.ordinal, kernel})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared_memory_per_block),
        "shared memory of a kernel");
  allowed.insert({d.ordinal, kernel});
}

namespace {

constexpr size_t kAlignment = 256;

// Hands out consecutive aligned pieces of a workspace; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class P>
  P* take(size_t bytes) {
    P* piece = base_ == nullptr ? nullptr : reinterpret_cast<P*>(base_ + used_);
    used_ += round_up(bytes, kAlignment);
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// The kernels load 16 bytes at a time. Rows that do not begin at such an address, as a view into a larger tensor may,
// are copied to the workspace first.
void* take_copy(Carver& carver, const void* rows, size_t bytes) {
  return is_aligned(rows, kChunkBytes) ? nullptr : carver.take<void>(bytes);
}

const void* aligned_rows(const void* rows, void* copy, size_t bytes, void* stream) {
  if (is_aligned(rows, kChunkBytes)) return rows;
  check(cudaMemcpyAsync(copy, rows, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)),
        "copy of rows");
  return copy;
}

int tile_width(StreamTiles tiles) { return tiles == StreamTiles::wide ? kWideTile : kNarrowTile; }

// `tiles` is an estimate of how many token tiles there will be.
StreamGemmParams weight_params(const Weight& weight, int64_t tiles) {
  StreamGemmParams p{};
  p.slots_per_row = 1;
  p.packed = weight.packed;
  p.expert_bytes = weight.expert_bytes;
  p.global_scale = weight.global_scale;
  p.gated = weight.gated;
  p.k = static_cast<int>(weight.k);
  p.n = static_cast<int>(weight.n);
  p.k_blocks = static_cast<int>(ceil_div<int64_t>(weight.k, kBlockK));
  p.panels = static_cast<int>(ceil_div<int64_t>(weight.n, kBlockRows));
  p.k_ways = select_k_ways(p.k_blocks, tiles * p.panels);
  return p;
}

void stream_gemm(const Choice& choice, DType dtype, const StreamGemmParams& params, void* stream) {
  const auto launch_path = choice.path == Path::stream_sm80 ? stream_gemm_sm80 : stream_gemm_sm90;
  launch_path(dtype, choice.tiles, params, stream);
}

struct MoePlan {
  Choice choice;
  int64_t slots;
  int32_t* order;
  int32_t* offsets;
  void* sort;
  int4* tile_table;
  void* intermediate;  // [slots, k of w2], stream paths
  void* expert_out;    // [slots, n of w2], fp32 with few_slots
  void* aligned_x;     // [tokens, k of w13], for hidden_states that are not
  bool few_slots;      // nothing else than the two intermediates is needed
  void* mlp;
  size_t bytes;
};

ExpertMlpArgs mlp_args(const MoeArgs& args, const MoePlan& plan) {
  return {
      .dtype = args.dtype,
      .x = args.hidden_states,
      .rows = args.routing.tokens,
      .slots = plan.slots,
      .w13 = args.w13,
      .w2 = args.w2,
      .order = plan.order,
      .offsets = plan.offsets,
      .slot_scale = args.apply_router_weight_on_input ? args.topk_weights : nullptr,
      .gate = args.gate,
      .out = plan.expert_out,
      .x_is_older = true,
      .x_image = args.out,  // written by combine, after everything else
  };
}

FewSlotsGemm few_slots_gemm(const Weight& weight, const void* x, int64_t rows, int64_t slots_per_row) {
  FewSlotsGemm gemm{};
  gemm.x = x;
  gemm.rows = static_cast<int>(rows);
  gemm.slots_per_row = Divider(static_cast<uint32_t>(slots_per_row));
  gemm.packed = weight.packed;
  gemm.expert_bytes = weight.expert_bytes;
  gemm.global_scale = weight.global_scale;
  gemm.k = static_cast<int>(weight.k);
  gemm.n = static_cast<int>(weight.n);
  gemm.k_blocks = static_cast<int>(ceil_div<int64_t>(weight.k, kBlockK));
  gemm.panels = static_cast<int>(ceil_div<int64_t>(weight.n, kBlockRows));
  gemm.by_k_blocks = Divider(gemm.k_blocks);
  gemm.by_panels = Divider(gemm.panels);
  return gemm;
}

FewSlotsParams few_slots_params(const MoeArgs& args, const MoePlan& plan) {
  FewSlotsParams p{};
  p.gemm[0] =
      few_slots_gemm(args.w13, args.hidden_states, args.routing.tokens, std::max<int64_t>(1, args.routing.top_k));
  p.gemm[1] = few_slots_gemm(args.w2, plan.intermediate, plan.slots, 1);
  p.routing = args.routing;
  (args.apply_router_weight_on_input ? p.slot_scale : p.topk_weights) = args.topk_weights;
  p.gate = args.gate;
  p.hidden = plan.intermediate;
  p.expert_out = static_cast<float*>(plan.expert_out);
  p.out = args.out;
  return p;
}

// Whether nothing is sorted and one launch does it all.
bool is_few_slots(const MoeArgs& args, const MoePlan& plan) {
  if (plan.slots > kInlineSlots) return false;
  const FewSlotsParams p = few_slots_params(args, plan);
  return plan.choice.path == Path::stream_sm80 ? few_slots_fit_sm80(p) : few_slots_fit_sm90(p);
}

MoePlan plan_moe(const MoeArgs& args, void* workspace) {
  MoePlan plan{};
  Carver carver(workspace);
  plan.slots = args.routing.tokens * args.routing.top_k;
  plan.choice = select(plan.slots, args.routing.experts);
  plan.few_slots = is_few_slots(args, plan);
  plan.aligned_x = take_copy(carver, args.hidden_states, args.routing.tokens * args.w13.k * kElementBytes);
  plan.expert_out = carver.take<void>(plan.slots * args.w2.n * (plan.few_slots ? int{sizeof(float)} : kElementBytes));
  if (plan.few_slots) {
    plan.intermediate = carver.take<void>(plan.slots * args.w2.k * kElementBytes);
    plan.bytes = carver.used();
    return plan;
  }
  plan.order = carver.take<int32_t>(plan.slots * sizeof(int32_t));
  plan.offsets = carver.take<int32_t>((args.routing.experts + 1) * sizeof(int32_t));
  plan.sort = carver.take<void>(sort_workspace(args.routing));
  if (plan.choice.path == Path::wgmma) {
    plan.mlp = carver.take<void>(wgmma_expert_mlp_workspace(mlp_args(args, plan)));
  } else {
    plan.tile_table =
        carver.take<int4>(tile_table_bytes(plan.slots, args.routing.experts, tile_width(plan.choice.tiles)));
    plan.intermediate = carver.take<void>(plan.slots * args.w2.k * kElementBytes);
  }
  plan.bytes = carver.used();
  return plan;
}

void stream_mlp(const MoeArgs& args, const MoePlan& plan, void* stream) {
  const int64_t tiles = std::min(plan.slots, args.w13.experts);
  StreamGemmParams gate_up = weight_params(args.w13, tiles);
  gate_up.x = args.hidden_states;
  gate_up.slots_per_row = static_cast<int>(args.routing.top_k);
  gate_up.tile_table = plan.tile_table;
  gate_up.order = plan.order;
  gate_up.slot_scale = args.apply_router_weight_on_input ? args.topk_weights : nullptr;
  gate_up.has_gate = true;
  gate_up.gate = args.gate;
  gate_up.out = plan.intermediate;
  stream_gemm(plan.choice, args.dtype, gate_up, stream);

  StreamGemmParams down = weight_params(args.w2, tiles);
  down.x = plan.intermediate;
  down.tile_table = plan.tile_table;
  down.order = plan.order;
  down.plan_is_older = true;
  down.out = plan.expert_out;
  stream_gemm(plan.choice, args.dtype, down, stream);
}

struct GroupedPlan {
  Choice choice;
  void* aligned_x;
  int4* tile_table;  // stream paths
  void* wgmma;
  size_t bytes;
};

GroupedPlan plan_grouped(const GroupedGemmArgs& args, void* workspace) {
  GroupedPlan plan{};
  Carver carver(workspace);
  plan.choice = select(args.slots, args.weight.experts);
  plan.aligned_x = take_copy(carver, args.x, args.rows * args.weight.k * kElementBytes);
  if (plan.choice.path == Path::wgmma) {
    plan.wgmma = carver.take<void>(wgmma_grouped_gemm_workspace(args));
  } else {
    plan.tile_table =
        carver.take<int4>(tile_table_bytes(args.slots, args.weight.experts, tile_width(plan.choice.tiles)));
  }
  plan.bytes = carver.used();
  return plan;
}

}  // namespace

size_t route_workspace(const RouteArgs& args) { return sort_workspace(args.routing); }

void route(const RouteArgs& args, const Context& context) {
  sort_slots(args.routing, args.order, args.offsets, nullptr, 0, context.workspace, context.stream);
}

size_t grouped_gemm_workspace(const GroupedGemmArgs& args) {
  return args.slots == 0 ? 0 : plan_grouped(args, nullptr).bytes;
}

void grouped_gemm(const GroupedGemmArgs& original, const Context& context) {
  if (original.slots == 0) return;
  const GroupedPlan plan = plan_grouped(original, context.workspace);
  const Choice& choice = plan.choice;
  int4* tile_table = plan.tile_table;
  GroupedGemmArgs args = original;
  args.x = aligned_rows(args.x, plan.aligned_x, args.rows * args.weight.k * kElementBytes, context.stream);
  if (choice.path == Path::wgmma) return wgmma_grouped_gemm(args, plan.wgmma, context.stream);
  const int64_t columns = args.gate != nullptr ? args.weight.n / 2 : args.weight.n;
  cut_tiles(args.order, args.offsets, args.slots, args.weight.experts, tile_table, tile_width(choice.tiles), args.out,
            columns * kElementBytes, context.stream);
  StreamGemmParams p = weight_params(args.weight, std::min(args.slots, args.weight.experts));
  p.x = args.x;
  p.slots_per_row = static_cast<int>(args.slots / args.rows);
  p.tile_table = tile_table;
  p.order = args.order;
  p.slot_scale = args.slot_scale;
  p.has_gate = args.gate != nullptr;
  if (p.has_gate) p.gate = *args.gate;
  p.out = args.out;
  stream_gemm(choice, args.dtype, p, context.stream);
}

size_t moe_workspace(const MoeArgs& args) { return plan_moe(args, nullptr).bytes; }

void moe(const MoeArgs& original, const Context& context) {
  if (original.routing.tokens == 0) return;
  const MoePlan plan = plan_moe(original, context.workspace);
  MoeArgs args = original;
  args.hidden_states = aligned_rows(args.hidden_states, plan.aligned_x,
                                    args.routing.tokens * args.w13.k * kElementBytes, context.stream);
  if (plan.few_slots) {
    const auto launch_path = plan.choice.path == Path::stream_sm80 ? few_slots_mlp_sm80 : few_slots_mlp_sm90;
    return launch_path(args.dtype, few_slots_params(args, plan), context.stream);
  }
  const int width = plan.tile_table != nullptr ? tile_width(plan.choice.tiles) : 0;
  sort_slots(args.routing, plan.order, plan.offsets, plan.tile_table, width, plan.sort, context.stream);
  if (plan.choice.path == Path::wgmma) {
    wgmma_expert_mlp(mlp_args(args, plan), plan.mlp, context.stream);
  } else {
    stream_mlp(args, plan, context.stream);
  }
  const CombineArgs sum{
      .dtype = args.dtype,
      .x = plan.expert_out,
      .topk_weights = args.apply_router_weight_on_input ? nullptr : args.topk_weights,
      .routing = args.routing,
      .n = args.w2.n,
      .out = args.out,
  };
  combine(sum, context);
}

size_t linear_workspace(const LinearArgs& args) {
  Carver carver(nullptr);
  take_copy(carver, args.x, args.rows * args.weight.k * kElementBytes);
  return carver.used();
}

void linear(const LinearArgs& args, const Context& context) {
  if (args.rows == 0) return;
  Choice choice = select(args.rows, 1);
  if (choice.path == Path::wgmma) choice.path = Path::stream_sm90;
  StreamGemmParams p = weight_params(args.weight, ceil_div<int64_t>(args.rows, tile_width(choice.tiles)));
  p.x = aligned_rows(args.x, context.workspace, args.rows * args.weight.k * kElementBytes, context.stream);
  p.rows = static_cast<int>(args.rows);
  p.bias = args.bias;
  p.out = args.out;
  stream_gemm(choice, args.dtype, p, context.stream);
}

}  // namespace nvfp4::cuda
