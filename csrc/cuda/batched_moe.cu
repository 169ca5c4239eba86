#include "aligned_rows.h"
#include "kernels/batch.h"
#include "kernels/stream_gemm/params.h"
#include "kernels/wgmma_experts/params.h"
#include "select.h"

namespace nvfp4::cuda {

namespace {

static_assert(BatchedChoice::kMaxPaths <= kMaxBatchPaths);

// What a call runs and where its intermediates lie. What no path has a use for stays null.
struct Plan {
  BatchedChoice choice;
  int64_t rows;     // of all experts
  void* aligned_x;  // for hidden_states that are not, and stream_gemm
  void* hidden;     // of the path that is taken
  BatchPath path[kMaxBatchPaths];
  int32_t* order;  // these two for wgmma_experts
  void* permuted;  //
  size_t bytes;
};

Problem problem_of(const BatchedMoeArgs& args) {
  return {.op = Op::moe,
          .dtype = args.dtype,
          .tokens = args.w13.experts * args.rows_per_expert,
          .top_k = 1,
          .experts = args.w13.experts,
          .gemm = {{args.w13.n, args.w13.k}, {args.w2.n, args.w2.k}},
          .wide_gate = has_wide_tiles(args.w13, &args.gate),
          .batch_invariant = false};
}

// The permuted tokens of an expert may lie where its results will: w2 begins with an expert when w13 is done with it.
// Not tokens that lie there themselves, nor rows that become longer.
bool can_permute_into_out(const BatchedMoeArgs& args) {
  constexpr int64_t kStage = int64_t{wgmma_experts::kStageBlocks} * kBlockK;
  return args.w13.k % kStage == 0 && args.out != args.hidden_states;
}

Plan plan_of(const BatchedMoeArgs& args, const Context& context) {
  Plan plan{};
  Workspace workspace(context.workspace);
  const int64_t experts = args.w13.experts;
  plan.choice = select_batched(problem_of(args), device(), static_cast<Isa>(context.level));
  plan.rows = experts * args.rows_per_expert;
  plan.aligned_x = take_copy(workspace, args.hidden_states, plan.rows * args.w13.k);
  auto hidden_bytes = static_cast<size_t>(plan.rows * args.w2.k * kElementBytes);
  bool has_wgmma = false;
  for (int i = 0; i < plan.choice.count; ++i) {
    const BatchedPath& chosen = plan.choice.paths[i];
    BatchPath& path = plan.path[i];
    path.most_per_expert = chosen.most_per_expert;
    if (chosen.kernel == Kernel::stream_gemm) {
      path.tile_width = tile_width(chosen.tiles);
      path.tile_table = workspace.take<int4>(1 + experts * ceil_div<int64_t>(args.rows_per_expert, path.tile_width));
    } else {
      has_wgmma = true;
      hidden_bytes = std::max(hidden_bytes, wgmma_hidden_bytes(plan.rows, experts, args.w2.k));
      path.offsets = workspace.take<int32_t>(experts + 1);
      path.control = workspace.take<int32_t>(1 + experts);
    }
  }
  plan.hidden = workspace.take<void>(static_cast<int64_t>(hidden_bytes));
  if (has_wgmma) {
    plan.order = workspace.take<int32_t>(plan.rows);
    if (can_permute_into_out(args)) {
      plan.permuted = args.out;
    } else {
      const int64_t row = k_blocks_of(args.w13.k) * int64_t{wgmma_experts::kTokenBytes};
      plan.permuted = workspace.take<void>(plan.rows * row + static_cast<int64_t>(wgmma_overrun_bytes()));
    }
  }
  plan.bytes = workspace.bytes();
  return plan;
}

void begin(const BatchedMoeArgs& args, const Plan& plan, void* stream) {
  BatchParams p{};
  p.expert_num_tokens = args.expert_num_tokens;
  p.experts = static_cast<int>(args.w13.experts);
  p.rows_per_expert = static_cast<int>(args.rows_per_expert);
  p.paths = plan.choice.count;
  for (int i = 0; i < p.paths; ++i) p.path[i] = plan.path[i];
  p.multiprocessors = device().multiprocessors;
  const Weight* weights[] = {&args.w13, &args.w2};
  for (int i = 0; i < 2; ++i) {
    p.k_blocks[i] = k_blocks_of(weights[i]->k);
    p.panels[i] = panels_of(weights[i]->n);
  }
  p.order = plan.order;
  p.x = static_cast<const uint16_t*>(args.hidden_states);
  p.k = static_cast<int>(args.w13.k);
  p.permuted = static_cast<uint4*>(plan.permuted);
  p.out = args.clears_rest ? static_cast<uint4*>(args.out) : nullptr;
  p.row_vectors = args.w2.n * kElementBytes / kChunkBytes;
  begin_batch(p, stream);
}

// Tiles name rows, which are slots, so there is no order and nothing to combine.
void run_stream(const BatchedMoeArgs& args, const Plan& plan, int index, void* stream) {
  const StreamTiles tiles = plan.choice.paths[index].tiles;
  StreamGemmParams gate_up = stream_gemm_params(args.w13, /*k_ways=*/0);
  gate_up.batched = true;
  gate_up.x = args.hidden_states;
  gate_up.tile_table = plan.path[index].tile_table;
  gate_up.has_gate = true;
  gate_up.gate = args.gate;
  gate_up.out = plan.hidden;
  stream_gemm(plan.choice.isa, args.dtype, tiles, gate_up, stream);

  StreamGemmParams down = stream_gemm_params(args.w2, /*k_ways=*/0);
  down.batched = true;
  down.gemm_index = 1;
  down.x = plan.hidden;
  down.tile_table = plan.path[index].tile_table;
  down.plan_is_older = true;
  down.out = args.out;
  stream_gemm(plan.choice.isa, args.dtype, tiles, down, stream);
}

void run_wgmma(const BatchedMoeArgs& args, const Plan& plan, int index, void* stream) {
  const ExpertMlpArgs mlp{
      .dtype = args.dtype,
      .x = nullptr,
      .rows = plan.rows,
      .slots = plan.rows,
      .w13 = args.w13,
      .w2 = args.w2,
      .order = plan.order,
      .offsets = plan.path[index].offsets,
      .slot_scale = nullptr,
      .gate = args.gate,
      .out = args.out,
      .x_is_older = false,
  };
  const PreparedTokens tokens{.permuted = plan.permuted, .hidden = plan.hidden, .control = plan.path[index].control};
  wgmma_prepared_mlp(mlp, plan.choice.paths[index].wgmma, tokens, stream);
}

}  // namespace

size_t batched_moe_workspace(const BatchedMoeArgs& args, const Context& context) {
  return args.rows_per_expert == 0 ? 0 : plan_of(args, context).bytes;
}

void batched_moe(const BatchedMoeArgs& original, const Context& context) {
  if (original.rows_per_expert == 0) return;
  const Plan plan = plan_of(original, context);
  BatchedMoeArgs args = original;
  args.hidden_states = aligned_rows(args.hidden_states, plan.aligned_x, plan.rows * args.w13.k, context.stream);
  begin(args, plan, context.stream);
  for (int i = 0; i < plan.choice.count; ++i) {
    if (plan.choice.paths[i].kernel == Kernel::stream_gemm) {
      run_stream(args, plan, i, context.stream);
    } else {
      run_wgmma(args, plan, i, context.stream);
    }
  }
}

}  // namespace nvfp4::cuda
