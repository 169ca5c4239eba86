#include "aligned_rows.h"
#include "kernels/stream_gemm/params.h"
#include "select.h"

namespace nvfp4::cuda {

namespace {

Problem problem_of(const LinearArgs& args) {
  return {.op = Op::linear,
          .dtype = args.dtype,
          .tokens = args.rows,
          .top_k = 1,
          .experts = 1,
          .gemm = {{args.weight.n, args.weight.k}, {}},
          .wide_gate = true,
          .batch_invariant = args.batch_invariant};
}

}  // namespace

size_t linear_workspace(const LinearArgs& args, const Context&) {
  Workspace workspace(nullptr);
  take_copy(workspace, args.x, args.rows * args.weight.k);
  return workspace.bytes();
}

void linear(const LinearArgs& args, const Context& context) {
  if (args.rows == 0) return;
  const Choice choice = select(problem_of(args), device(), static_cast<Isa>(context.level));
  StreamGemmParams p = stream_gemm_params(args.weight, choice.stream.k_ways[0]);
  p.x = aligned_rows(args.x, context.workspace, args.rows * args.weight.k, context.stream);
  p.rows = static_cast<int>(args.rows);
  p.bias = args.bias;
  p.out = args.out;
  stream_gemm(choice.isa, args.dtype, choice.stream.tiles, p, context.stream);
}

}  // namespace nvfp4::cuda
