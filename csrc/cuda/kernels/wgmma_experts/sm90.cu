#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../../device/gather.cuh"
#include "../../launch.h"
#include "kernel.cuh"
#include "params.h"

namespace nvfp4::cuda {
namespace {

using namespace wgmma_experts;

constexpr size_t kAlign = 256;
constexpr int kPrepareThreads = 256;
constexpr int kOverrun = kTokenBytes;  // what gathering reads behind permuted tokens of an odd number of k-blocks

struct PrepareParams {
  const uint16_t* x;
  uint4* permuted;  // [rows, k_blocks * 8], and kOverrun bytes if k_blocks is odd
  int64_t rows;
  int64_t k;
  bool x_is_older;  // than the launch before this one
  int* control;
  int control_size;
  // Rows of skipped slots to clear, or out == null.
  const int* order;
  const int* offsets;
  int experts;
  int64_t slots;
  uint4* out;
  int64_t out_chunks;  // of kChunkBytes per row
};

// What the experts' kernel needs beside route(): permuted tokens, cleared counters, cleared rows of skipped slots.
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ PrepareParams p) {
  const int64_t thread = blockIdx.x * int64_t{kPrepareThreads} + threadIdx.x;
  const int64_t threads = gridDim.x * int64_t{kPrepareThreads};
  if (!p.x_is_older) ptx::dependency_wait();
  ptx::dependency_release();
  for (int64_t i = thread; i < p.control_size; i += threads) p.control[i] = 0;
  const int64_t k_blocks = ceil_div<int64_t>(p.k, kBlockK);
  if (k_blocks % kStageBlocks != 0 && thread < kOverrun / 16) {
    p.permuted[p.rows * k_blocks * (kTokenBytes / 16) + thread] = make_uint4(0, 0, 0, 0);
  }
  if (reinterpret_cast<uintptr_t>(p.x) % sizeof(uint32_t) == 0) {
    permute_rows<true>(p.x, p.permuted, p.rows, p.k, thread / kWarp, threads / kWarp);
  } else {
    permute_rows<false>(p.x, p.permuted, p.rows, p.k, thread / kWarp, threads / kWarp);
  }
  ptx::dependency_wait();
  if (p.out == nullptr) return;
  for (int64_t s = p.offsets[p.experts] + blockIdx.x; s < p.slots; s += gridDim.x) {
    uint4* row = p.out + p.order[s] * p.out_chunks;
    for (int64_t i = threadIdx.x; i < p.out_chunks; i += kPrepareThreads) row[i] = make_uint4(0, 0, 0, 0);
  }
}

ExpertGemm expert_gemm(const Weight& weight) {
  const int panels = static_cast<int>(ceil_div<int64_t>(weight.n, kBlockRows));
  return {.weight = weight.packed,
          .expert_bytes = weight.expert_bytes,
          .global_scale = weight.global_scale,
          .n = weight.n,
          .gated = weight.gated,
          .panels = panels,
          .k_blocks = static_cast<int>(ceil_div<int64_t>(weight.k, kBlockK))};
}

// Narrow tiles leave room for more stages, which few tokens need to keep weights streaming.
template <class S>
int choose_width(int64_t slots, int64_t experts) {
  return slots <= 32 * experts ? 64 : S::kMaxWidth;
}

// Panels come in pairs where the gate applies: a pair's features are a k-block of the next GEMM, zeros included.
template <class S>
int row_tiles(const ExpertGemm& gemm) {
  return ceil_div(gemm.gated ? round_up(gemm.panels, 2) : gemm.panels, S::kConsumers);
}

struct Workspace {
  size_t control;
  size_t x;  // unless permuted tokens lie elsewhere
  size_t hidden;
  size_t total;
};

Workspace lay_out(const Weight& first, const Weight* second, int64_t rows, int64_t slots, bool holds_x) {
  Workspace w;
  w.control = 0;
  w.x = round_up((1 + first.experts) * sizeof(int), kAlign);
  w.hidden = w.x;
  if (holds_x)
    w.hidden += round_up<size_t>(rows * round_up<int64_t>(first.k, kBlockK) * kElementBytes + kOverrun, kAlign);
  w.total = w.hidden;
  if (second != nullptr) {
    w.total += padded_rows(slots, first.experts) * ceil_div<int64_t>(second->k, kBlockK) * kTokenBytes;
  }
  return w;
}

template <class S, class T, bool kSilu>
void launch_experts(Params params, int64_t slots, void* stream) {
  const auto kernel = expert_kernel<S, T, kSilu>;
  for (ExpertGemm& gemm : params.gemm) gemm.row_tiles = row_tiles<S>(gemm);
  params.max_width = choose_width<S>(slots, params.experts);
  const int ring_bytes = device().shared_memory_per_block - fixed_bytes<S>(params.experts);
  params.stages = std::min(kMaxStages, ring_bytes / stage_bytes<S>(params.max_width));
  const int shared = params.stages * stage_bytes<S>(params.max_width) + fixed_bytes<S>(params.experts);
  allow_shared_memory(reinterpret_cast<const void*>(kernel));
  launch(kernel, dim3(device().multiprocessors), kThreads<S>, shared, stream, "wgmma experts", params);
}

// Where most experts fit into one wide tile, but not into one tall one; fp16, whose decoding costs more, gains beyond
// that too.
template <class T>
bool choose_wide(int64_t slots, int64_t experts) {
  return slots > Tall::kMaxWidth * experts && (slots <= 176 * experts || std::is_same_v<T, fp16>);
}

template <class T>
void launch_experts(const Params& params, int64_t slots, void* stream) {
  const bool silu = !params.gate_applies || params.gate.activation == Activation::silu;
  if (!silu) return launch_experts<Tall, T, false>(params, slots, stream);
  choose_wide<T>(slots, params.experts) ? launch_experts<Wide, T, true>(params, slots, stream)
                                        : launch_experts<Tall, T, true>(params, slots, stream);
}

// Permuted tokens go to x_image, or to the workspace if it is null.
void run(DType dtype, Params& params, PrepareParams& prepare, int64_t slots, void* x_image, uint8_t* workspace,
         const Workspace& layout, void* stream) {
  if (params.experts > kWgmmaMaxExperts) {
    throw std::invalid_argument("wgmma experts: expected at most " + std::to_string(kWgmmaMaxExperts) +
                                " experts, got " + std::to_string(params.experts));
  }
  params.control = reinterpret_cast<int*>(workspace + layout.control);
  uint8_t* permuted = x_image != nullptr ? static_cast<uint8_t*>(x_image) : workspace + layout.x;
  params.x = permuted;
  params.hidden = workspace + layout.hidden;
  params.hidden_rows = padded_rows(slots, params.experts);

  prepare.permuted = reinterpret_cast<uint4*>(permuted);
  prepare.control = params.control;
  prepare.control_size = 1 + params.experts;
  launch(prepare_kernel, dim3(device().multiprocessors * 8), kPrepareThreads, 0, stream, "wgmma prepare", prepare);

  dtype == DType::bf16 ? launch_experts<bf16>(params, slots, stream) : launch_experts<fp16>(params, slots, stream);
}

// x_image where it has room: no padding of k, no overrun.
void* usable_x_image(const ExpertMlpArgs& args) {
  return args.w13.k % (kStageBlocks * kBlockK) == 0 ? args.x_image : nullptr;
}

Workspace lay_out(const ExpertMlpArgs& args) {
  return lay_out(args.w13, &args.w2, args.rows, args.slots, usable_x_image(args) == nullptr);
}

Workspace lay_out(const GroupedGemmArgs& args) { return lay_out(args.weight, nullptr, args.rows, args.slots, true); }

}  // namespace

size_t wgmma_expert_mlp_workspace(const ExpertMlpArgs& args) { return lay_out(args).total; }

void wgmma_expert_mlp(const ExpertMlpArgs& args, void* workspace, void* stream) {
  if (args.slots == 0) return;
  Params params{.gemm = {expert_gemm(args.w13), expert_gemm(args.w2)},
                .mlp = true,
                .gate_applies = true,
                .gate = args.gate,
                .slots_per_row = static_cast<int>(args.slots / args.rows),
                .order = args.order,
                .offsets = args.offsets,
                .experts = static_cast<int>(args.w13.experts),
                .slot_scale = args.slot_scale,
                .out = args.out};
  PrepareParams prepare{
      .x = static_cast<const uint16_t*>(args.x), .rows = args.rows, .k = args.w13.k, .x_is_older = args.x_is_older};
  run(args.dtype, params, prepare, args.slots, usable_x_image(args), static_cast<uint8_t*>(workspace), lay_out(args),
      stream);
}

size_t wgmma_grouped_gemm_workspace(const GroupedGemmArgs& args) { return lay_out(args).total; }

void wgmma_grouped_gemm(const GroupedGemmArgs& args, void* workspace, void* stream) {
  if (args.slots == 0) return;
  Params params{.gemm = {expert_gemm(args.weight), {}},
                .mlp = false,
                .gate_applies = args.gate != nullptr,
                .gate = args.gate != nullptr ? *args.gate : Gate{},
                .slots_per_row = static_cast<int>(args.slots / args.rows),
                .order = args.order,
                .offsets = args.offsets,
                .experts = static_cast<int>(args.weight.experts),
                .slot_scale = args.slot_scale,
                .out = args.out};
  const int64_t columns = args.gate != nullptr ? args.weight.n / 2 : args.weight.n;
  PrepareParams prepare{.x = static_cast<const uint16_t*>(args.x),
                        .rows = args.rows,
                        .k = args.weight.k,
                        .order = args.order,
                        .offsets = args.offsets,
                        .experts = static_cast<int>(args.weight.experts),
                        .slots = args.slots,
                        .out = static_cast<uint4*>(args.out),
                        .out_chunks = columns * kElementBytes / kChunkBytes};
  run(args.dtype, params, prepare, args.slots, nullptr, static_cast<uint8_t*>(workspace), lay_out(args), stream);
}

}  // namespace nvfp4::cuda
