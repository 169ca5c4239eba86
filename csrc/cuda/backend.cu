// namespace nvfp4::cuda of kernels.h: workspaces, and the launches that make up each op.
#include <algorithm>
#include <map>
#include <mutex>

#include "device/decode.cuh"
#include "kernels/route.h"
#include "kernels/stream_gemm.h"
#include "kernels/wgmma_experts.h"
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
  return is_aligned(rows, 16) ? nullptr : carver.take<void>(bytes);
}

const void* aligned_rows(const void* rows, void* copy, size_t bytes, void* stream) {
  if (is_aligned(rows, 16)) return rows;
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
  void* expert_out;    // [slots, n of w2], fp32 with panels_done
  void* aligned_x;     // [tokens, k of w13], for hidden_states that are not
  int* panels_done;    // so few slots that nothing is sorted and no launch sums
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

MoePlan plan_moe(const MoeArgs& args, void* workspace) {
  MoePlan plan{};
  Carver carver(workspace);
  plan.slots = args.routing.tokens * args.routing.top_k;
  const bool is_inline = plan.slots <= kInlineSlots;
  plan.choice = is_inline ? select_inline(plan.slots) : select(plan.slots, args.routing.experts);
  plan.aligned_x = take_copy(carver, args.hidden_states, args.routing.tokens * args.w13.k * 2);
  plan.expert_out = carver.take<void>(plan.slots * args.w2.n * (is_inline ? sizeof(float) : 2));
  if (is_inline) {
    plan.panels_done = carver.take<int>(ceil_div<int64_t>(args.w2.n, kBlockRows) * sizeof(int));
    plan.intermediate = carver.take<void>(plan.slots * args.w2.k * 2);
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
    plan.intermediate = carver.take<void>(plan.slots * args.w2.k * 2);
  }
  plan.bytes = carver.used();
  return plan;
}

void stream_mlp(const MoeArgs& args, const MoePlan& plan, void* stream) {
  const int64_t tiles = std::min(plan.slots, args.w13.experts);
  const int64_t down_panels = ceil_div<int64_t>(args.w2.n, kBlockRows);
  StreamGemmParams gate_up = weight_params(args.w13, tiles);
  gate_up.x = args.hidden_states;
  gate_up.slots_per_row = static_cast<int>(args.routing.top_k);
  gate_up.tile_table = plan.tile_table;
  gate_up.order = plan.order;
  gate_up.routing = args.routing;
  gate_up.slot_scale = args.apply_router_weight_on_input ? args.topk_weights : nullptr;
  gate_up.has_gate = true;
  gate_up.gate = args.gate;
  gate_up.out = plan.intermediate;
  gate_up.clear = plan.panels_done;
  gate_up.clear_size = static_cast<int>(down_panels);
  stream_gemm(plan.choice, args.dtype, gate_up, stream);

  StreamGemmParams down = weight_params(args.w2, tiles);
  down.x = plan.intermediate;
  down.tile_table = plan.tile_table;
  down.order = plan.order;
  down.plan_is_older = true;
  down.routing = args.routing;
  down.out = plan.expert_out;
  down.sum = {plan.panels_done, args.apply_router_weight_on_input ? nullptr : args.topk_weights, args.out};
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
  plan.aligned_x = take_copy(carver, args.x, args.rows * args.weight.k * 2);
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
  args.x = aligned_rows(args.x, plan.aligned_x, args.rows * args.weight.k * 2, context.stream);
  if (choice.path == Path::wgmma) return wgmma_grouped_gemm(args, plan.wgmma, context.stream);
  const int64_t columns = args.gate != nullptr ? args.weight.n / 2 : args.weight.n;
  cut_tiles(args.order, args.offsets, args.slots, args.weight.experts, tile_table, tile_width(choice.tiles), args.out,
            columns * 2, context.stream);
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
  args.hidden_states =
      aligned_rows(args.hidden_states, plan.aligned_x, args.routing.tokens * args.w13.k * 2, context.stream);
  if (plan.panels_done != nullptr) return stream_mlp(args, plan, context.stream);
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
  take_copy(carver, args.x, args.rows * args.weight.k * 2);
  return carver.used();
}

void linear(const LinearArgs& args, const Context& context) {
  if (args.rows == 0) return;
  Choice choice = select(args.rows, 1);
  if (choice.path == Path::wgmma) choice.path = Path::stream_sm90;
  StreamGemmParams p = weight_params(args.weight, ceil_div<int64_t>(args.rows, tile_width(choice.tiles)));
  p.x = aligned_rows(args.x, context.workspace, args.rows * args.weight.k * 2, context.stream);
  p.rows = static_cast<int>(args.rows);
  p.bias = args.bias;
  p.out = args.out;
  stream_gemm(choice, args.dtype, p, context.stream);
}

}  // namespace nvfp4::cuda
