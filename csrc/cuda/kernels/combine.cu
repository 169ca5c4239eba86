// The weighted sum of a token's expert outputs, and the gate alone.
#include <algorithm>

#include "../device/gate.cuh"
#include "../device/ptx.cuh"
#include "../device/scheduler.cuh"
#include "../launch.h"

namespace nvfp4::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // values in 16 bytes
constexpr int kBatch = 8;   // rows that are loaded before the first is added

struct CombineParams {
  const uint4* x;             // [tokens * top_k, n]
  const float* topk_weights;  // null: all 1
  Routing routing;
  int64_t vectors;  // n / 8
  uint4* out;       // [tokens, n]
};

template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CombineParams p) {
  const int64_t vector = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  ptx::dependency_wait();
  ptx::dependency_release();
  if (vector >= p.vectors) return;
  for (int64_t token = blockIdx.x; token < p.routing.tokens; token += gridDim.x) {
    float sum[kVector] = {};
    for (int64_t first = 0; first < p.routing.top_k; first += kBatch) {
      uint4 value[kBatch];
      float weight[kBatch];
      bool used[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int64_t slot = token * p.routing.top_k + first + j;
        used[j] = first + j < p.routing.top_k && local_expert(p.routing, slot) >= 0;
        if (used[j]) {
          value[j] = p.x[slot * p.vectors + vector];
          weight[j] = p.topk_weights != nullptr ? p.topk_weights[slot] : 1.0f;
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (!used[j]) continue;
        const uint32_t words[4] = {value[j].x, value[j].y, value[j].z, value[j].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 v = unpack2<T>(words[i]);
          sum[2 * i] += weight[j] * v.x;
          sum[2 * i + 1] += weight[j] * v.y;
        }
      }
    }
    p.out[token * p.vectors + vector] = make_uint4(pack2<T>(sum[0], sum[1]), pack2<T>(sum[2], sum[3]),
                                                   pack2<T>(sum[4], sum[5]), pack2<T>(sum[6], sum[7]));
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
  const int64_t total = args.rows * args.intermediate;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t gate_at = i + i / args.intermediate * args.intermediate;
    const float g = to_float(gate_up[gate_at]);
    const float u = to_float(gate_up[gate_at + args.intermediate]);
    static_cast<T*>(args.out)[i] = from_float<T>(apply_gate(args.gate, g, u));
  }
}

}  // namespace

void combine(const CombineArgs& args, const Context& context) {
  if (args.routing.tokens == 0 || args.n == 0) return;
  const unsigned rows = static_cast<unsigned>(std::min<int64_t>(args.routing.tokens, 1 << 20));
  const bool is_bf16 = args.dtype == DType::bf16;
  if (args.n % kVector != 0 || !is_aligned(args.x, sizeof(uint4)) || !is_aligned(args.out, sizeof(uint4))) {
    const dim3 grid(rows, static_cast<unsigned>(ceil_div<int64_t>(args.n, kThreads)));
    launch(is_bf16 ? combine_scalar_kernel<bf16> : combine_scalar_kernel<fp16>, grid, kThreads, 0, context.stream,
           "combine", args);
    return;
  }
  const CombineParams params{
      .x = static_cast<const uint4*>(args.x),
      .topk_weights = args.topk_weights,
      .routing = args.routing,
      .vectors = args.n / kVector,
      .out = static_cast<uint4*>(args.out),
  };
  const dim3 grid(rows, static_cast<unsigned>(ceil_div<int64_t>(params.vectors, kThreads)));
  launch(is_bf16 ? combine_kernel<bf16> : combine_kernel<fp16>, grid, kThreads, 0, context.stream, "combine", params);
}

void swiglu(const SwigluArgs& args, const Context& context) {
  const int64_t total = args.rows * args.intermediate;
  if (total == 0) return;
  const int64_t blocks = std::min<int64_t>(ceil_div<int64_t>(total, kThreads), 1 << 16);
  const auto kernel = args.dtype == DType::bf16 ? swiglu_kernel<bf16> : swiglu_kernel<fp16>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(args);
  check(cudaGetLastError(), "swiglu");
}

}  // namespace nvfp4::cuda
