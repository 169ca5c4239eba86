// swiglu, its derivative and combine: one row of the output a step, rows shared out over the threads.
#include <algorithm>

#include "../common.h"
#include "level_kernels.h"
#include "routing.h"
#include "schedule.h"

namespace nvfp4::cpu {
namespace {

constexpr int64_t kSegment = 1024;  // values of a combined row that are summed at a time

// Calls body(row) for every row, in tasks of about 32 thousand values.
template <class Body>
void for_each_row(int threads, int64_t rows, int64_t values_per_row, const Body& body) {
  const int64_t rows_per_task = std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(values_per_row, 1));
  for_each_task(threads, ceil_div(rows, rows_per_task), [&](int64_t, int64_t task) {
    const int64_t last = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < last; ++row) body(row);
  });
}

}  // namespace

void swiglu(const SwigluArgs& args, const Context& context) {
  const LevelKernels& kernels = kernels_of(context);
  const int64_t n = args.intermediate;
  const int64_t columns = args.gated ? 2 * n : n;
  for_each_row(context.threads, args.rows, columns, [&](int64_t row) {
    kernels.swiglu(args.gate, at(args.gate_up, args.dtype, row * columns),
                   args.gated ? at(args.gate_up, args.dtype, row * columns + n) : nullptr, n, args.dtype,
                   at(args.out, args.dtype, row * n));
  });
}

void swiglu_backward(const SwigluBackwardArgs& args, const Context& context) {
  const LevelKernels& kernels = kernels_of(context);
  const SwigluArgs& forward = args.forward;
  const DType dtype = forward.dtype;
  const int64_t n = forward.intermediate;
  const int64_t columns = forward.gated ? 2 * n : n;
  for_each_row(context.threads, forward.rows, columns, [&](int64_t row) {
    const int64_t first = row * columns;
    const bool gated = forward.gated;
    kernels.swiglu_backward(forward.gate, at(args.grad_out, dtype, row * n), at(forward.gate_up, dtype, first),
                            gated ? at(forward.gate_up, dtype, first + n) : nullptr, n, dtype,
                            at(args.grad_gate_up, dtype, first),
                            gated ? at(args.grad_gate_up, dtype, first + n) : nullptr);
  });
}

void combine(const CombineArgs& args, const Context& context) {
  const LevelKernels& kernels = kernels_of(context);
  const int64_t top_k = args.routing.top_k;
  for_each_row(context.threads, args.routing.tokens, args.n * top_k, [&](int64_t token) {
    for (int64_t first = 0; first < args.n; first += kSegment) {
      const int64_t n = std::min(kSegment, args.n - first);
      float sums[kSegment] = {};
      for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
        if (local_expert(args.routing, slot) < 0) continue;
        const float weight = args.topk_weights == nullptr ? 1.0f : args.topk_weights[slot];
        kernels.accumulate(args.dtype, at(args.x, args.dtype, slot * args.n + first), n, weight, sums);
      }
      kernels.store(sums, n, 1.0f, nullptr, args.dtype, at(args.out, args.dtype, token * args.n + first));
    }
  });
}

}  // namespace nvfp4::cpu
