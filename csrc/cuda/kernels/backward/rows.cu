// What stands around the GEMMs of the derivatives: row by row, and far from what takes the time.
#include <algorithm>

#include "../../device/epilogue.cuh"
#include "../../device/gate_backward.cuh"
#include "../../launch.h"
#include "tile.cuh"

namespace nvfp4::cuda {
namespace {

constexpr int kThreads = 256;

// A CTA takes one token tile.
template <class T, int kTileM>
__global__ void __launch_bounds__(kThreads) gated_flow_kernel(const __grid_constant__ GatedFlowParams p) {
  ptx::dependency_wait();
  const ExpertTile tile = backward_tile<kTileM>(p.rows, blockIdx.x);
  const int features = p.weight.n / 2;
  const float gate_scale = relative_scale(p.weight, tile.expert, false);
  const float up_scale = relative_scale(p.weight, tile.expert, true);
  for (int row = 0; row < tile.count; ++row) {
    const int position = tile.begin + row;
    const T* from = static_cast<const T*>(p.grad_out) + static_cast<int64_t>(slot_of(p.rows, position)) * p.weight.n;
    T* to = static_cast<T*>(p.flow) + static_cast<int64_t>(position) * p.weight.n;
    for (int feature = threadIdx.x; feature < features; feature += kThreads) {
      const int at = feature / 8 * 16 + feature % 8;
      to[at] = from_float<T>(to_float(from[feature]) * gate_scale);
      to[at + 8] = from_float<T>(to_float(from[features + feature]) * up_scale);
    }
  }
}

// A warp takes one position; the order of its sums is fixed.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_grad_kernel(const __grid_constant__ ScaleGradParams p) {
  const int lane = threadIdx.x % kWarp;
  const int position = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  ptx::dependency_wait();
  if (position >= p.slots) return;
  const int slot = p.order[position];
  if (position >= p.offsets[p.experts]) {
    const bool invalid = p.checked && p.offsets[p.experts + 1] != 0;
    if (lane == 0) p.grad[slot] = invalid ? __int_as_float(0x7FC00000) : 0.0f;
    return;
  }
  float sum = 0.0f;
  if (p.partial != nullptr) {
    for (int i = lane; i < p.parts; i += kWarp) sum += p.partial[static_cast<int64_t>(position) * p.parts + i];
  }
  if (p.bias != nullptr) {
    const T* grad = static_cast<const T*>(p.grad_out) + static_cast<int64_t>(slot / p.slots_per_row) * p.columns;
    const float* bias = p.bias + static_cast<int64_t>(max(local_expert(p.routing, slot), 0)) * p.columns;
    for (int i = lane; i < p.columns; i += kWarp) sum += to_float(grad[i]) * bias[i];
  }
  sum = warp_sum(sum);
  if (lane == 0) p.grad[slot] = sum;
}

// A thread takes four columns, whose slots it adds in their order.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(const __grid_constant__ SumRowsParams p) {
  const int64_t quads = p.columns / 4;
  ptx::dependency_wait();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.rows * quads;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / quads;
    const int64_t column = i % quads * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int64_t slot = row * p.slots_per_row; slot < (row + 1) * p.slots_per_row; ++slot) {
      if (p.has_routing && local_expert(p.routing, slot) < 0) continue;
      const float4 part = *reinterpret_cast<const float4*>(p.x + slot * p.columns + column);
      sum.x += part.x;
      sum.y += part.y;
      sum.z += part.z;
      sum.w += part.w;
    }
    *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + row * p.columns + column) =
        make_uint2(pack2<T>(sum.x, sum.y), pack2<T>(sum.z, sum.w));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(SwigluBackwardArgs args) {
  const SwigluArgs& f = args.forward;
  const int64_t columns = f.gated ? 2 * f.intermediate : f.intermediate;
  const int64_t total = f.rows * f.intermediate;
  const T* gate_up = static_cast<const T*>(f.gate_up);
  T* grad = static_cast<T*>(args.grad_gate_up);
  ptx::dependency_wait();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t at = i / f.intermediate * columns + i % f.intermediate;
    const float g = to_float(gate_up[at]);
    const float u = f.gated ? to_float(gate_up[at + f.intermediate]) : 1.0f;
    const GateBackward back = gate_backward(f.gate, g, u, to_float(static_cast<const T*>(args.grad_out)[i]));
    grad[at] = from_float<T>(back.gate);
    if (f.gated) grad[at + f.intermediate] = from_float<T>(back.up);
  }
}

unsigned blocks_for(int64_t total) {
  return static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(total, kThreads), 1 << 16));
}

template <class T>
void run_gated_flow(BackwardTile tile, const GatedFlowParams& p, void* stream) {
  const auto kernel = tile == BackwardTile::narrow ? gated_flow_kernel<T, 32>
                      : tile == BackwardTile::wide ? gated_flow_kernel<T, 64>
                                                   : gated_flow_kernel<T, 128>;
  launch(kernel, dim3(static_cast<unsigned>(p.rows.max_tiles)), kThreads, 0, stream, "gated_flow", p);
}

}  // namespace

void gated_flow(DType dtype, BackwardTile tile, const GatedFlowParams& params, void* stream) {
  (dtype == DType::bf16 ? run_gated_flow<bf16> : run_gated_flow<fp16>)(tile, params, stream);
}

void scale_grad(DType dtype, const ScaleGradParams& params, void* stream) {
  const auto kernel = dtype == DType::bf16 ? scale_grad_kernel<bf16> : scale_grad_kernel<fp16>;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(params.slots, kThreads / kWarp));
  launch(kernel, dim3(blocks), kThreads, 0, stream, "scale_grad", params);
}

void sum_rows(DType dtype, const SumRowsParams& params, void* stream) {
  const auto kernel = dtype == DType::bf16 ? sum_rows_kernel<bf16> : sum_rows_kernel<fp16>;
  launch(kernel, dim3(blocks_for(params.rows * params.columns / 4)), kThreads, 0, stream, "sum_rows", params);
}

void swiglu_backward(const SwigluBackwardArgs& args, const Context& context) {
  const auto kernel = args.forward.dtype == DType::bf16 ? swiglu_backward_kernel<bf16> : swiglu_backward_kernel<fp16>;
  const int64_t total = args.forward.rows * args.forward.intermediate;
  if (total == 0) return;
  launch(kernel, dim3(blocks_for(total)), kThreads, 0, context.stream, "swiglu_backward", args);
}

}  // namespace nvfp4::cuda
