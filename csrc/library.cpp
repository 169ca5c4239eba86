// Every schema of the nvfp4 namespace. Kernels register beside their op, in ops/<op>.cpp; fakes and autograd in
// torch_nvfp4/ops/<op>.py.
//
// The activation is an int because a str argument leaks memory through the stable ABI of torch 2.11 to 2.13; the typed
// Python wrappers take its name. An argument that an op gets later stands behind the others of its kind and has a
// default, so that exported programs go on; a tensor stands before the `*`, where autograd sees it.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(nvfp4, m) {
  m.def(
      "moe(Tensor hidden_states, Tensor w13, Tensor w13_global_scale, Tensor w2, Tensor w2_global_scale, "
      "Tensor topk_weights, Tensor topk_ids, Tensor? expert_map=None, Tensor? w13_bias=None, Tensor? w2_bias=None, *, "
      "int activation=0, float? clamp_limit=None, float alpha=1.0, float beta=0.0, bool "
      "apply_router_weight_on_input=False, bool batch_invariant=False) -> "
      "Tensor");
  // An out overload returns nothing: torch.compile functionalizes an op of its own making only if no result is an alias
  // of an argument (torch 2.11 to 2.13 refuse `-> Tensor(a!)`).
  m.def(
      "moe.out(Tensor hidden_states, Tensor w13, Tensor w13_global_scale, Tensor w2, Tensor w2_global_scale, "
      "Tensor topk_weights, Tensor topk_ids, Tensor? expert_map=None, Tensor? w13_bias=None, Tensor? w2_bias=None, *, "
      "int activation=0, float? clamp_limit=None, float alpha=1.0, float beta=0.0, bool "
      "apply_router_weight_on_input=False, bool batch_invariant=False, "
      "Tensor(a!) out) -> ()");
  m.def(
      "batched_moe(Tensor hidden_states, Tensor w13, Tensor w13_global_scale, Tensor w2, Tensor w2_global_scale, "
      "Tensor expert_num_tokens, Tensor? w13_bias=None, Tensor? w2_bias=None, *, int activation=0, "
      "float? clamp_limit=None, float alpha=1.0, float beta=0.0) -> Tensor");
  m.def(
      "batched_moe.out(Tensor hidden_states, Tensor w13, Tensor w13_global_scale, Tensor w2, Tensor w2_global_scale, "
      "Tensor expert_num_tokens, Tensor? w13_bias=None, Tensor? w2_bias=None, *, int activation=0, "
      "float? clamp_limit=None, float alpha=1.0, float beta=0.0, Tensor(a!) out) -> ()");
  m.def("route(Tensor topk_ids, Tensor? expert_map, int num_experts) -> (Tensor order, Tensor offsets)");
  m.def(
      "grouped_gemm(Tensor x, Tensor weight, Tensor global_scale, Tensor order, Tensor offsets, "
      "Tensor? topk_weights=None, Tensor? bias=None, *, bool batch_invariant=False) -> Tensor");
  m.def(
      "grouped_gemm_swiglu(Tensor x, Tensor weight, Tensor global_scale, Tensor order, Tensor offsets, "
      "Tensor? topk_weights=None, Tensor? bias=None, *, int activation=0, float? clamp_limit=None, float alpha=1.0, "
      "float beta=0.0, bool batch_invariant=False) -> Tensor");
  m.def("combine(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, int num_experts) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor global_scale, Tensor? bias=None, *, "
      "bool batch_invariant=False) -> Tensor");
  m.def(
      "swiglu(Tensor gate_up, *, int activation=0, float? clamp_limit=None, float alpha=1.0, float beta=0.0, "
      "bool gated=True) -> Tensor");
  m.def("pack(Tensor weight, Tensor scale, bool gated=False) -> Tensor");
  m.def(
      "moe_fp8(Tensor hidden_states, Tensor w13, Tensor w13_global_scale, Tensor w2, Tensor w2_global_scale, "
      "Tensor topk_weights, Tensor topk_ids, Tensor? expert_map=None, *, int activation=0, float? clamp_limit=None, "
      "float alpha=1.0, float beta=0.0, bool apply_router_weight_on_input=False) -> Tensor");
  m.def("order_for_fp8(Tensor packed, int in_features, bool gated=False) -> Tensor");
  m.def("unpack(Tensor packed, int in_features, bool gated=False) -> (Tensor weight, Tensor scale)");
  // Derivatives: what autograd calls. Gradients that are not needed come back empty.
  m.def(
      "moe_backward(Tensor grad_output, Tensor hidden_states, Tensor w13, Tensor w13_global_scale, Tensor w2, "
      "Tensor w2_global_scale, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map=None, Tensor? w13_bias=None, "
      "Tensor? w2_bias=None, *, int activation=0, float? clamp_limit=None, float alpha=1.0, float beta=0.0, "
      "bool apply_router_weight_on_input=False, bool batch_invariant=False, bool needs_hidden_states=True, "
      "bool needs_topk_weights=True) -> (Tensor grad_hidden_states, Tensor grad_topk_weights)");
  m.def(
      "grouped_gemm_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor global_scale, Tensor order, "
      "Tensor offsets, Tensor? topk_weights=None, *, bool batch_invariant=False, bool needs_x=True, "
      "bool needs_topk_weights=False) -> (Tensor grad_x, Tensor grad_topk_weights)");
  m.def(
      "grouped_gemm_swiglu_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor global_scale, Tensor order, "
      "Tensor offsets, Tensor? topk_weights=None, Tensor? bias=None, *, int activation=0, float? clamp_limit=None, "
      "float alpha=1.0, float beta=0.0, bool batch_invariant=False, bool needs_x=True, "
      "bool needs_topk_weights=False) -> (Tensor grad_x, Tensor grad_topk_weights)");
  m.def("linear_backward(Tensor grad_output, Tensor weight, Tensor global_scale, int in_features) -> Tensor");
  m.def(
      "swiglu_backward(Tensor grad_output, Tensor gate_up, *, int activation=0, float? clamp_limit=None, "
      "float alpha=1.0, float beta=0.0, bool gated=True) -> Tensor");
  // A gradient that does not exist: autograd hands it out where one is asked for, and its kernel, in Python, raises. So
  // a forward pass whose derivative nobody takes can be compiled, which traces the backward pass too.
  // It reads grad_output so that compilers leave it in the backward pass.
  m.def("no_gradient(Tensor grad_output, Tensor input, int reason) -> Tensor");
}
