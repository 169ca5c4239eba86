// The host side of both ops on wgmma: the workspace, and the two launches.
#pragma once

#include <stdexcept>
#include <string>

#include "../../launch.h"
#include "gemm.cuh"
#include "kernel.cuh"
#include "prepare.cuh"

namespace nvfp4::cuda::wgmma_experts {

struct Layout {
  int* control;
  uint8_t* x;  // null where permuted tokens lie elsewhere
  uint8_t* hidden;
  size_t bytes;
};

inline Layout lay_out(void* base, const Weight& first, const Weight* second, int64_t rows, int64_t slots,
                      bool holds_x) {
  Workspace workspace(base);
  Layout layout{};
  layout.control = workspace.take<int>(1 + first.experts);
  if (holds_x) layout.x = workspace.take<uint8_t>(rows * k_blocks_of(first.k) * kTokenBytes + kOverrun);
  if (second != nullptr) {
    layout.hidden = workspace.take<uint8_t>(padded_rows(slots, first.experts) * k_blocks_of(second->k) * kTokenBytes);
  }
  layout.bytes = workspace.bytes();
  return layout;
}

template <class S, class T, GateKind kGate>
void launch_experts(Params params, const WgmmaPlan& plan, void* stream) {
  const auto kernel = expert_kernel<S, T, kGate>;
  for (ExpertGemm& gemm : params.gemm) gemm.row_tiles = row_tiles<S>(gemm);
  params.max_width = plan.max_width;
  params.stages = plan.stages;
  params.weights_leave_first = plan.weights_leave_first;
  params.sorting = plan.sorting;
  params.extra_claims = params.mlp && is_short(params.gemm[1].k_blocks) ? 1 : 0;
  allow_shared_memory(reinterpret_cast<const void*>(kernel));
  launch(kernel, dim3(device().multiprocessors), kThreads<S>, plan.shared_bytes, stream, "wgmma experts", params);
}

inline bool is_extended(const Params& params) {
  return params.activates || params.bias[0] != nullptr || params.bias[1] != nullptr ||
         (params.gate_applies && params.gate.activation == Activation::situ);
}

inline GateKind gate_kind(const Params& params) {
  if (params.activates) return GateKind::other;
  if (!params.gate_applies || params.gate.activation == Activation::silu) return GateKind::silu;
  return params.gate.activation == Activation::situ ? GateKind::situ : GateKind::other;
}

// Wide tiles are compiled for SiLU and SiTU only: select() gives them to no other gate.
template <class T>
void launch_experts(const Params& params, const WgmmaPlan& plan, void* stream) {
  const bool wide = plan.tiles == WgmmaTiles::wide;
  const bool extended = is_extended(params);
  const auto launch = [&] {
    switch (gate_kind(params)) {
      case GateKind::silu:
        if (!extended) return wide ? launch_experts<Wide, T, GateKind::silu> : launch_experts<Tall, T, GateKind::silu>;
        return wide ? launch_experts<WideExtended, T, GateKind::silu> : launch_experts<TallExtended, T, GateKind::silu>;
      case GateKind::situ:
        return wide ? launch_experts<WideExtended, T, GateKind::situ> : launch_experts<TallExtended, T, GateKind::situ>;
      default:
        return extended ? launch_experts<TallOther, T, GateKind::other> : launch_experts<Tall, T, GateKind::other>;
    }
  }();
  launch(params, plan, stream);
}

// Fills in what depends on the workspace, and launches. Permuted tokens go to x_image, or to the workspace if it is
// null.
inline void run(DType dtype, Params& params, PrepareParams& prepare, int64_t slots, void* x_image, const Layout& layout,
                const WgmmaPlan& plan, void* stream) {
  if (params.experts > kWgmmaMaxExperts) {
    throw std::invalid_argument("wgmma experts: expected at most " + std::to_string(kWgmmaMaxExperts) +
                                " experts, got " + std::to_string(params.experts));
  }
  params.control = layout.control;
  params.hidden = layout.hidden;
  params.hidden_rows = padded_rows(slots, params.experts);
  prepare.control = params.control;
  prepare.control_size = 1 + params.experts;
  if (plan.sorting) {
    params.x = reinterpret_cast<const uint8_t*>(prepare.x);
    launch(clear_kernel, dim3(1), kPrepareThreads, 0, stream, "wgmma clear", prepare.control, prepare.control_size);
  } else {
    uint8_t* permuted = x_image != nullptr ? static_cast<uint8_t*>(x_image) : layout.x;
    params.x = permuted;
    prepare.permuted = reinterpret_cast<uint4*>(permuted);
    launch(prepare_kernel, dim3(device().multiprocessors * 8), kPrepareThreads, 0, stream, "wgmma prepare", prepare);
  }
  dtype == DType::bf16 ? launch_experts<bf16>(params, plan, stream) : launch_experts<fp16>(params, plan, stream);
}

}  // namespace nvfp4::cuda::wgmma_experts
