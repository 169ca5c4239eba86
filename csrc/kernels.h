// What a backend implements: plain structs of pointers and sizes, no torch header.
//
// csrc/ops/<op>.cpp checks the tensors, allocates outputs and workspace, fills one of these structs and calls the
// backend's function of the same name. The CPU backend is namespace nvfp4::cpu (csrc/cpu), the CUDA backend is
// nvfp4::cuda (csrc/cuda).
//
// The words of both backends:
//   token        a row of hidden_states, m of M
//   slot         a routed (token, j), numbered token * top_k + j; skipped if its id has no expert here
//   row          of x: a token's, or a slot's where x already has one per slot; of a weight: an output feature
//   expert       a local one: an index into the weights
//   group        16 columns of a weight row, which share one block scale of the format
//   panel        weight rows that lie packed together, along all of k: 16 rows on the CPU, 64 on CUDA
//   block        64 columns of a panel: its codes, then its scales
//   expert tile  slots of one expert that are multiplied together (ExpertTile)
//   token tile   CPU: the activations of an expert tile, in the order in which they are multiplied (TokenTile)
// csrc/cuda/device/common.cuh has those that only CUDA has.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nvfp4 {

constexpr int64_t kGroupSize = 16;  // values along the input dimension that share one E4M3 block scale

enum class DType : int8_t { bf16, fp16, fp32 };

// The numbers are part of the op schemas; torch_nvfp4/gate.py holds the same table.
enum class Activation : int64_t { silu = 0, swiglustep = 1, gelu = 2, gelu_tanh = 3, relu2 = 4, situ = 5 };

// Applied to gate and up, or, where the weight before it has no gate rows, to its outputs alone.
struct Gate {
  Activation activation = Activation::silu;
  bool clamped = false;
  float limit = 0.0f;  // read only when clamped
  float alpha = 1.0f;  // silu: g * sigmoid(alpha * g) * (u + beta)
  float beta = 0.0f;   // situ: alpha * tanh(g / alpha) * sigmoid(g) * beta * tanh(u / beta), or * u where beta is 0
};

// Packed weights of one or more experts. `n` counts output rows: 2I when gated (gate rows 0..I-1, up rows I..2I-1).
struct Weight {
  const uint8_t* packed;      // experts * expert_bytes
  int64_t expert_bytes;       // bytes from one expert to the next
  const float* global_scale;  // [experts], or [experts, 2] = (gate, up) when gated
  int64_t experts;
  int64_t n;
  int64_t k;
  bool gated;
  const float* bias = nullptr;  // [experts, n], added to scaled products in fp32; null: none

  // Columns of what a gate makes of the outputs.
  int64_t features() const { return gated ? n / 2 : n; }
};

// Which slots go to which expert. Slot s = token * top_k + j.
struct Routing {
  const void* topk_ids;  // [tokens, top_k], int64 if ids_are_int64, else int32
  bool ids_are_int64;
  const int32_t* expert_map;  // [expert_map_size] global id -> local expert or -1; null: ids are local
  int64_t expert_map_size;
  int64_t tokens;
  int64_t top_k;
  int64_t experts;  // local experts; every other id is skipped
};

struct PackArgs {
  const uint8_t* weight;  // [experts, n, k / 2] e2m1 codes, low nibble = even column
  const uint8_t* scale;   // [experts, n, k / 16] E4M3 bytes
  uint8_t* packed;        // [experts, expert_bytes]
  int64_t expert_bytes;
  int64_t experts;
  int64_t n;
  int64_t k;
  bool gated;
};

struct UnpackArgs {
  const uint8_t* packed;
  int64_t expert_bytes;
  uint8_t* weight;
  uint8_t* scale;
  int64_t experts;
  int64_t n;
  int64_t k;
  bool gated;
};

struct RouteArgs {
  Routing routing;
  int32_t* order;    // [tokens * top_k] slots, stably sorted by local expert; skipped slots last
  int32_t* offsets;  // [experts + 1] expert e owns order[offsets[e] .. offsets[e + 1])
};

// out[s] = x[s / (slots / rows)] @ W[expert of s]^T, times slot_scale[s], plus bias, then the gate if there is one.
// Skipped slots (order[offsets[experts]] and after) give rows of zeros. Order and offsets may come from anywhere:
// unless they are a routing as RouteArgs has it, the CPU throws and CUDA fills all of out with NaN.
struct GroupedGemmArgs {
  DType dtype;
  const void* x;  // [rows, k]
  int64_t rows;
  int64_t slots;  // a multiple of rows
  Weight weight;
  const int32_t* order;     // [slots]
  const int32_t* offsets;   // [experts + 1]
  const float* slot_scale;  // [slots] or null
  const Gate* gate;         // null: out is [slots, n], gate rows first; else out is [slots, features()]
  bool batch_invariant;     // a row's bits depend on nothing but the row
  void* out;
};

// out[m] = sum over j of topk_weights[m, j] * x[m * top_k + j], in order of j, in fp32; skipped slots are not read.
struct CombineArgs {
  DType dtype;
  const void* x;              // [tokens * top_k, n]
  const float* topk_weights;  // [tokens, top_k], or null: all 1
  Routing routing;
  int64_t n;
  void* out;  // [tokens, n]
};

struct MoeArgs {
  DType dtype;
  const void* hidden_states;  // [tokens, w13.k]
  Weight w13;
  Weight w2;                  // n == w13.k, k == w13.features()
  const float* topk_weights;  // [tokens, top_k]
  Routing routing;
  Gate gate;
  bool apply_router_weight_on_input;  // scale GEMM1's pre-activations instead of the output
  bool batch_invariant;               // as in GroupedGemmArgs
  void* out;                          // [tokens, w13.k]; may be hidden_states
};

// One MLP per expert, over the rows that each expert has been given: out[e, t] = w2[e] gate(w13[e] hidden_states[e, t])
// for t below expert_num_tokens[e]. What lies behind is not read, and written only if it is to be cleared.
struct BatchedMoeArgs {
  DType dtype;
  const void* hidden_states;  // [experts, rows_per_expert, w13.k]
  int64_t rows_per_expert;
  Weight w13;
  Weight w2;                         // n == w13.k, k == w13.features()
  const int32_t* expert_num_tokens;  // [experts]; on CUDA any numbers, which it takes into [0, rows_per_expert]
  Gate gate;
  bool clears_rest;  // zeros in the rows behind an expert's tokens
  void* out;         // as hidden_states, and may be hidden_states
};

struct LinearArgs {
  DType dtype;
  const void* x;  // [rows, k]
  int64_t rows;
  Weight weight;         // experts == 1
  const void* bias;      // [n] in dtype, or null
  bool batch_invariant;  // as in GroupedGemmArgs
  void* out;             // [rows, n]
};

struct SwigluArgs {
  DType dtype;
  const void* gate_up;  // [rows, 2 * intermediate], gate columns first; [rows, intermediate] if not gated
  int64_t rows;
  int64_t intermediate;
  bool gated;
  Gate gate;
  void* out;  // [rows, intermediate]
};

// ---- derivatives with respect to activations and router weights; weights and biases have none

// From the gradient of grouped_gemm's result to those of x and of the slots' scales.
struct GroupedGemmBackwardArgs {
  GroupedGemmArgs forward;  // without out
  const void* grad_out;     // as the result of the forward op
  void* grad_x;             // [rows, k], or null
  float* grad_slot_scale;   // [slots], or null; zeros for skipped slots
};

struct MoeBackwardArgs {
  MoeArgs forward;           // without out
  const void* grad_out;      // [tokens, w13.k]
  void* grad_hidden_states;  // [tokens, w13.k], or null
  float* grad_topk_weights;  // [tokens, top_k], or null; zeros for skipped slots
};

// grad_x = grad_out W
struct LinearBackwardArgs {
  DType dtype;
  const void* grad_out;  // [rows, n]
  int64_t rows;
  Weight weight;  // experts == 1
  void* grad_x;   // [rows, k]
};

struct SwigluBackwardArgs {
  SwigluArgs forward;    // without out
  const void* grad_out;  // [rows, intermediate]
  void* grad_gate_up;    // as gate_up
};

// How one call runs. Nothing is kept between calls. What the environment and the calling thread's settings say is read
// once, when the call begins: it may change while the call runs, and the size and layout of the workspace follow from
// it.
struct Context {
  void* stream = nullptr;     // CUDA only
  void* workspace = nullptr;  // the bytes that the matching *_workspace() asks for, aligned to kWorkspaceAlignment
  int level = 0;              // active_level() of the backend
  int threads = 1;            // CPU only: how many threads the call may use
};

// active_level(): what the kernels of a call that begins now are chosen for: on the CPU the instruction level, on CUDA
// the instructions (Isa). TORCH_NVFP4_CPU_LEVEL and TORCH_NVFP4_ARCH lower it. It calls getenv, which, as everywhere,
// must not run beside a setenv of another thread where the C library does not lock the two (glibc before 2.41): a
// process of several threads should set these variables before it starts them.
#define NVFP4_BACKEND_FUNCTIONS                                                                \
  void pack(const PackArgs& args, const Context& context);                                     \
  void unpack(const UnpackArgs& args, const Context& context);                                 \
  void route(const RouteArgs& args, const Context& context);                                   \
  void grouped_gemm(const GroupedGemmArgs& args, const Context&);                              \
  void combine(const CombineArgs& args, const Context& context);                               \
  void moe(const MoeArgs& args, const Context& context);                                       \
  void batched_moe(const BatchedMoeArgs& args, const Context& context);                        \
  void linear(const LinearArgs& args, const Context& context);                                 \
  void swiglu(const SwigluArgs& args, const Context& context);                                 \
  void moe_backward(const MoeBackwardArgs& args, const Context&);                              \
  void grouped_gemm_backward(const GroupedGemmBackwardArgs& args, const Context&);             \
  void linear_backward(const LinearBackwardArgs& args, const Context&);                        \
  void swiglu_backward(const SwigluBackwardArgs& args, const Context&);                        \
  size_t route_workspace(const RouteArgs& args, const Context&);                               \
  size_t grouped_gemm_workspace(const GroupedGemmArgs& args, const Context&);                  \
  size_t moe_workspace(const MoeArgs& args, const Context&);                                   \
  size_t batched_moe_workspace(const BatchedMoeArgs& args, const Context&);                    \
  size_t linear_workspace(const LinearArgs& args, const Context&);                             \
  size_t moe_backward_workspace(const MoeBackwardArgs& args, const Context&);                  \
  size_t grouped_gemm_backward_workspace(const GroupedGemmBackwardArgs& args, const Context&); \
  size_t linear_backward_workspace(const LinearBackwardArgs& args, const Context&);            \
  int active_level();

namespace cpu {
NVFP4_BACKEND_FUNCTIONS

// Runs body(argument, i) for every i in [0, n), spread over the intra-op threads; n is usually Context::threads with
// the work shared out inside through an atomic counter. Defined over torch's pool in csrc/ops/threads.cpp.
void parallel_for(int64_t n, void (*body)(void* argument, int64_t i), void* argument);
}  // namespace cpu

namespace cuda {
NVFP4_BACKEND_FUNCTIONS

// The most experts that moe_fp8 takes: a CTA's shared memory holds three numbers for each. torch_nvfp4/ops/moe_fp8.py
// has the same number.
constexpr int64_t kFp8MaxExperts = 2048;

// FP8 activations, which only SM90 has kernels for.
bool runs_fp8(const Context& context);
// `packed` with its codes in the order of device/decode_fp8.cuh; bytes are a whole number of experts'.
void order_for_fp8(const uint8_t* packed, uint8_t* ordered, int64_t experts, int64_t expert_bytes, int64_t n, int64_t k,
                   const Context& context);
// As moe, with SiLU and a gate, no bias, and weights from order_for_fp8.
void moe_fp8(const MoeArgs& args, const Context& context);
size_t moe_fp8_workspace(const MoeArgs& args, const Context& context);
}  // namespace cuda

#undef NVFP4_BACKEND_FUNCTIONS

}  // namespace nvfp4
