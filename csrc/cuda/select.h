// The one heuristic table: which kernel, tile and split a problem gets, and why. Plain host arithmetic, which needs no
// GPU: the CPU library holds it too, so that it can be asked about any device anywhere.
#pragma once

#include <string>

#include "device_facts.h"
#include "kernels/few_slots_mlp/plan.h"
#include "kernels/stream_gemm/plan.h"
#include "kernels/wgmma_experts/plan.h"
#include "problem.h"

namespace nvfp4::cuda {

enum class Kernel {
  few_slots_mlp,  // the whole MLP of at most 32 slots in one launch
  wgmma_experts,  // many tokens per expert, on SM90
  stream_gemm,    // everything else: rings of weight blocks, mma.sync
};

struct Choice {
  Kernel kernel;
  Isa isa;
  // The one that `kernel` names is set.
  FewSlotsPlan few_slots;
  WgmmaPlan wgmma;
  StreamPlan stream;
};

// The instructions that kernels on a device are built on: TORCH_NVFP4_ARCH=80 in the environment takes the SM80 kernels
// on any device. Asked once per call (Context::level), because the answer may change while the call runs.
Isa isa_of(const Device& device);

Choice select(const Problem& problem, const Device& device, Isa isa);

// A way through the MLPs of a batch, for up to so many tokens per expert that has any.
struct BatchedPath {
  int64_t most_per_expert;
  Kernel kernel;      // stream_gemm or wgmma_experts
  StreamTiles tiles;  // the device chooses the k_ways too
  WgmmaPlan wgmma;
};

// How many tokens experts have been given only the device knows when a batch begins. So all these paths are enqueued,
// and the device takes the first that is for as many tokens as there are, else the last.
struct BatchedChoice {
  static constexpr int kMaxPaths = 3;
  Isa isa;
  int count;
  BatchedPath paths[kMaxPaths];
};

// `problem` is that of moe with every row of the batch a token and top_k 1.
BatchedChoice select_batched(const Problem& problem, const Device& device, Isa isa);

// The same choice as lines of "name: text": the problem, the device, the kernel, its tile and split, and for each row
// of the table why it was taken or passed over.
std::string explain(const Problem& problem, const Device& device);
std::string explain_batched(const Problem& problem, const Device& device);

}  // namespace nvfp4::cuda
