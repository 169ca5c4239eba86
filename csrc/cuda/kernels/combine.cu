// The weighted sum of a token's expert outputs, and the gate alone.
#include <algorithm>

#include "../device/gate.cuh"
#include "../device/ptx/control.cuh"
#include "../device/scheduler.cuh"
#include "../launch.h"
#include "combine.h"

namespace nvfp4::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // values in 16 bytes
constexpr int kBatch = 8;   // rows that are loaded before the first is added

struct CombineParams {
  const uint4* x;             // [tokens * top_k, n]
  const float* topk_weights;  // null: all 1
  Routing routing;
  bool routing_is_older;  // ids and weights were complete before the launch before this one began
  int tokens_per_cta;     // 1, or so few that a lane has one of their slots at most
  int64_t vectors;        // n / 8
  uint4* out;             // [tokens, n]
};

// What a warp needs of 32 slots; every lane holds one.
struct SlotWeights {
  float weight;
  unsigned used;  // bit i: slot i has an expert here

  static __device__ __forceinline__ SlotWeights load(const CombineParams& p, int64_t first, int slots) {
    const int lane = threadIdx.x % kWarp;
    SlotWeights s = {1.0f, 0};
    bool used = false;
    if (lane < slots) {
      if (p.topk_weights != nullptr) s.weight = p.topk_weights[first + lane];
      used = local_expert(p.routing, first + lane) >= 0;
    }
    s.used = __ballot_sync(~0u, used);
    return s;
  }
};

// A warp sums 32 vectors of each of the CTA's tokens. It shares nothing with other warps and reads the routing while
// it still waits for the rows.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CombineParams p) {
  const int top_k = static_cast<int>(p.routing.top_k);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * p.tokens_per_cta;
  const int tokens = static_cast<int>(min(p.routing.tokens - first_token, static_cast<int64_t>(p.tokens_per_cta)));
  const int slots = tokens * top_k;
  const int64_t first_slot = first_token * top_k;
  const int64_t vector = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const bool inside = vector < p.vectors;
  const uint4* row = p.x + first_slot * p.vectors + vector;
  uint4* out = p.out + first_token * p.vectors + vector;
  if (!p.routing_is_older) ptx::dependency_wait();
  SlotWeights weights = SlotWeights::load(p, first_slot, slots);
  if (p.routing_is_older) ptx::dependency_wait();
  ptx::dependency_release();
  int lane = 0;  // that has the next slot
  for (int token = 0; token < tokens; ++token, out += p.vectors) {
    float sum[kVector] = {};
    for (int left = top_k; left > 0; left -= kBatch) {
      if (lane == kWarp) {
        weights = SlotWeights::load(p, first_slot + top_k - left, left);
        lane = 0;
      }
      const int batch = min(left, kBatch);
      const unsigned used = weights.used >> lane;
      uint4 value[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (inside && j < batch && (used >> j & 1) != 0) value[j] = __ldcg(row + j * p.vectors);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (j >= batch || (used >> j & 1) == 0) continue;
        const float weight = __shfl_sync(~0u, weights.weight, lane + j);
        const uint32_t words[4] = {value[j].x, value[j].y, value[j].z, value[j].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 v = unpack2<T>(words[i]);
          sum[2 * i] += weight * v.x;
          sum[2 * i + 1] += weight * v.y;
        }
      }
      row += batch * p.vectors;
      lane += batch;
    }
    if (inside) {
      *out = make_uint4(pack2<T>(sum[0], sum[1]), pack2<T>(sum[2], sum[3]), pack2<T>(sum[4], sum[5]),
                        pack2<T>(sum[6], sum[7]));
    }
  }
}

// Any n, any alignment.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_scalar_kernel(CombineArgs args) {
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  ptx::dependency_wait();
  ptx::dependency_release();
  if (column >= args.n) return;
  for (int64_t token = blockIdx.x; token < args.routing.tokens; token += gridDim.x) {
    float sum = 0.0f;
    for (int64_t slot = token * args.routing.top_k; slot < (token + 1) * args.routing.top_k; ++slot) {
      if (local_expert(args.routing, slot) < 0) continue;
      const float weight = args.topk_weights != nullptr ? args.topk_weights[slot] : 1.0f;
      sum += weight * to_float(static_cast<const T*>(args.x)[slot * args.n + column]);
    }
    static_cast<T*>(args.out)[token * args.n + column] = from_float<T>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwigluArgs args) {
  const T* gate_up = static_cast<const T*>(args.gate_up);
  const int64_t columns = args.gated ? 2 * args.intermediate : args.intermediate;
  const int64_t total = args.rows * args.intermediate;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t gate_at = i / args.intermediate * columns + i % args.intermediate;
    const float g = to_float(gate_up[gate_at]);
    const float u = args.gated ? to_float(gate_up[gate_at + args.intermediate]) : 1.0f;
    static_cast<T*>(args.out)[i] = from_float<T>(apply_gate<true>(args.gate, g, u));
  }
}

// A few CTAs of a dependent launch all go to the multiprocessors that are done first with the launch before, and leave
// the others without work. Shared memory that nobody uses keeps it to two per multiprocessor.
template <class Kernel>
size_t spreading_bytes(Kernel kernel, int64_t ctas) {
  constexpr int kCtas = 2;
  if (ctas > int64_t{kCtas} * device().multiprocessors) return 0;
  constexpr int kReserved = 1024;  // by the driver, for each CTA
  allow_shared_memory(reinterpret_cast<const void*>(kernel));
  return static_cast<size_t>(device().shared_memory_per_cta + kReserved) / kCtas - kReserved;
}

}  // namespace

void combine(const CombineArgs& args, bool routing_is_older, const Context& context) {
  const Routing& routing = args.routing;
  if (routing.tokens == 0 || args.n == 0) return;
  const bool is_bf16 = args.dtype == DType::bf16;
  if (args.n % kVector != 0 || !is_aligned(args.x, sizeof(uint4)) || !is_aligned(args.out, sizeof(uint4))) {
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(routing.tokens, 1 << 20)),
                    static_cast<unsigned>(ceil_div<int64_t>(args.n, kThreads)));
    launch(is_bf16 ? combine_scalar_kernel<bf16> : combine_scalar_kernel<fp16>, grid, kThreads, 0, context.stream,
           "combine", args);
    return;
  }
  const int64_t vectors = args.n / kVector;
  const int64_t columns = ceil_div<int64_t>(vectors, kThreads);
  // As many tokens per CTA as leave several CTAs to every multiprocessor.
  constexpr int64_t kCtas = 16;
  const int64_t most_tokens = std::max<int64_t>(kWarp / std::max<int64_t>(routing.top_k, 1), 1);
  const int64_t tokens_per_cta =
      std::clamp<int64_t>(routing.tokens * columns / (device().multiprocessors * kCtas), 1, most_tokens);
  const CombineParams params{
      .x = static_cast<const uint4*>(args.x),
      .topk_weights = args.topk_weights,
      .routing = routing,
      .routing_is_older = routing_is_older,
      .tokens_per_cta = static_cast<int>(tokens_per_cta),
      .vectors = vectors,
      .out = static_cast<uint4*>(args.out),
  };
  const dim3 grid(static_cast<unsigned>(ceil_div(routing.tokens, tokens_per_cta)), static_cast<unsigned>(columns));
  const auto kernel = is_bf16 ? combine_kernel<bf16> : combine_kernel<fp16>;
  launch(kernel, grid, kThreads, spreading_bytes(kernel, int64_t{grid.x} * grid.y), context.stream, "combine", params);
}

void combine(const CombineArgs& args, const Context& context) { combine(args, false, context); }

void swiglu(const SwigluArgs& args, const Context& context) {
  const int64_t total = args.rows * args.intermediate;
  if (total == 0) return;
  const int64_t blocks = std::min<int64_t>(ceil_div<int64_t>(total, kThreads), 1 << 16);
  const auto kernel = args.dtype == DType::bf16 ? swiglu_kernel<bf16> : swiglu_kernel<fp16>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(args);
  check(cudaGetLastError(), "swiglu");
}

}  // namespace nvfp4::cuda
