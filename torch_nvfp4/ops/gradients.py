"""Gradients of the ops with respect to activations and router weights, through the packed weights.

The backward ops, ``nvfp4::<op>_backward``, read the packed weights that the forward op reads and make its fp32
pre-activations again, so that autograd saves an op's arguments and nothing else. A clamp has aten's derivative: 1 up to
the limit itself, 0 beyond it and for NaN. Weights, scales and the experts' biases are frozen and have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.ops import _checks
from torch_nvfp4.ops._autograd import register_autograd, register_no_autograd_of_out
from torch_nvfp4.ops._library import register_fake
from torch_nvfp4.ops.grouped_gemm import check_grouped_gemm
from torch_nvfp4.ops.moe import check_moe
from torch_nvfp4.ops.optional import optional_arguments

__all__: list[str] = []

_MOE_TENSORS = (
    "hidden_states", "w13", "w13_global_scale", "w2", "w2_global_scale", "topk_weights", "topk_ids", "expert_map",
    "w13_bias", "w2_bias",
)  # fmt: skip
_GEMM_TENSORS = ("x", "weight", "global_scale", "order", "offsets", "topk_weights", "bias")


def _grad(of: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(of) if wanted else of.new_empty(0)


def _like(op: str, grad_output: Tensor, name: str, like: Tensor, *shape: Any) -> None:
    _checks.check_tensor(op, "grad_output", grad_output, name, like, (like.dtype,), shape)


# ---- moe


@register_fake("moe_backward")
def _(
    grad_output: Tensor,
    hidden_states: Tensor,
    w13: Tensor,
    w13_global_scale: Tensor,
    w2: Tensor,
    w2_global_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    *,
    activation: int = 0,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    apply_router_weight_on_input: bool = False,
    batch_invariant: bool = False,
    needs_hidden_states: bool = True,
    needs_topk_weights: bool = True,
) -> tuple[Tensor, Tensor]:
    op = "moe_backward"
    check_moe(
        op, hidden_states, w13, w13_global_scale, w2, w2_global_scale, topk_weights, topk_ids, expert_map,
        w13_bias, w2_bias, activation, clamp_limit, alpha, beta,
    )  # fmt: skip
    _like(op, grad_output, "hidden_states", hidden_states, *hidden_states.shape)
    return _grad(hidden_states, needs_hidden_states), _grad(topk_weights, needs_topk_weights)


def _moe(grad_output: Tensor, arguments: dict[str, Any], needed: dict[str, bool]) -> dict[str, Tensor]:
    tensors = [arguments.pop(name, None) for name in _MOE_TENSORS]
    wants = {f"needs_{name}": needed[name] for name in ("hidden_states", "topk_weights")}
    if not any(wants.values()):
        return {}
    given = (*tensors[:7], *optional_arguments(*tensors[7:]))
    grad_x, grad_weights = torch.ops.nvfp4.moe_backward(grad_output, *given, **arguments, **wants)
    grads = {"hidden_states": grad_x, "topk_weights": grad_weights}
    return {name: grad for name, grad in grads.items() if needed[name]}


# ---- its steps


@register_fake("grouped_gemm_backward")
def _(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    global_scale: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None = None,
    *,
    batch_invariant: bool = False,
    needs_x: bool = True,
    needs_topk_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    op = "grouped_gemm_backward"
    slots, columns = check_grouped_gemm(op, x, weight, global_scale, order, offsets, topk_weights, None)
    return _grouped_gemm_grads(op, grad_output, x, topk_weights, [slots, columns], needs_x, needs_topk_weights)


@register_fake("grouped_gemm_swiglu_backward")
def _(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    global_scale: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: int = 0,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    batch_invariant: bool = False,
    needs_x: bool = True,
    needs_topk_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    op = "grouped_gemm_swiglu_backward"
    gate = (activation, clamp_limit, alpha, beta)
    slots, columns = check_grouped_gemm(op, x, weight, global_scale, order, offsets, topk_weights, bias, gate)
    return _grouped_gemm_grads(op, grad_output, x, topk_weights, [slots, columns], needs_x, needs_topk_weights)


def _grouped_gemm_grads(
    op: str, grad_output: Tensor, x: Tensor, topk_weights: Tensor | None, shape: list[Any], needs_x: bool,
    needs_topk_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _like(op, grad_output, "x", x, *shape)
    if needs_topk_weights and topk_weights is None:
        _checks.fail(op, "expected topk_weights where needs_topk_weights is True, got None")
    return _grad(x, needs_x), _grad(x if topk_weights is None else topk_weights, needs_topk_weights)


def _grouped_gemm(with_gate: bool) -> Any:
    name = "grouped_gemm_swiglu_backward" if with_gate else "grouped_gemm_backward"
    backward_op = getattr(torch.ops.nvfp4, name)

    def backward(grad_output: Tensor, arguments: dict[str, Any], needed: dict[str, bool]) -> dict[str, Tensor]:
        x = arguments["x"]
        if not isinstance(x, Tensor):  # nobody reads it
            arguments["x"] = grad_output.new_empty(x)
        tensors = [arguments.pop(name, None) for name in _GEMM_TENSORS]
        wants = {f"needs_{name}": needed.get(name, False) for name in ("x", "topk_weights")}
        if not any(wants.values()):
            return {}
        given = (*tensors[:5], *optional_arguments(*tensors[5 : 7 if with_gate else 6]))
        grad_x, grad_weights = backward_op(grad_output, *given, **arguments, **wants)
        grads = {"x": grad_x, "topk_weights": grad_weights}
        return {name: grad for name, grad in grads.items() if needed.get(name)}

    return backward


def _unread_x(needed: dict[str, bool]) -> tuple[str, ...]:
    """The gradient of x is made of the weights and of what flows back; only the slots' scales take x's values."""
    return () if needed.get("topk_weights") else ("x",)


def _combine(grad_output: Tensor, arguments: dict[str, Any], needed: dict[str, bool]) -> dict[str, Tensor]:
    """In plain torch: products of a slot's row and its token's gradient, in fp32 and rounded once."""
    x, weights, ids = arguments["x"], arguments["topk_weights"], arguments["topk_ids"]
    expert_map, experts = arguments["expert_map"], arguments["num_experts"]
    local = ids
    if expert_map is not None:
        inside = (ids >= 0) & (ids < expert_map.shape[0])
        # A map of one -1 stands in for an empty one, which cannot be indexed.
        table = expert_map if expert_map.shape[0] else expert_map.new_full((1,), -1)
        local = torch.where(inside, table[torch.where(inside, ids, 0)], -1)
    kept = ((local >= 0) & (local < experts)).unsqueeze(-1)
    flow = grad_output.unsqueeze(1).to(torch.float32)  # [M, 1, N]
    grads = {}
    if needed["x"]:
        rows = torch.where(kept, weights.unsqueeze(-1) * flow, 0.0).to(grad_output.dtype)
        grads["x"] = rows.flatten(0, 1)
    if needed["topk_weights"]:
        # where and not a product with 0: a skipped slot may hold NaN.
        rows = torch.where(kept, x.view(*ids.shape, x.shape[1]), 0.0)
        grads["topk_weights"] = torch.where(kept, rows.to(torch.float32) * flow, 0.0).sum(-1)
    return grads


# ---- dense ops


@register_fake("linear_backward")
def _(grad_output: Tensor, weight: Tensor, global_scale: Tensor, in_features: int) -> Tensor:
    op, name = "linear_backward", "grad_output"
    _checks.check_activations(op, name, grad_output, _checks.any_shape(grad_output, "N"))
    _checks.check_in_features(op, in_features)
    _checks.check_last_dim(op, name, grad_output, 16)
    n, gated = grad_output.shape[-1], _checks.is_gated(op, global_scale, batched=False)
    _checks.check_weight(
        op, "weight", weight, global_scale, name, grad_output, batched=False, gated=gated, n=n, k=in_features
    )  # fmt: skip
    _checks.check_count(op, "the number of grad_output's rows", grad_output.numel() // n, grad_output)
    return _checks.new_empty(op, "the gradient of x", grad_output, (*grad_output.shape[:-1], in_features))


def _linear(grad_output: Tensor, arguments: dict[str, Any], needed: dict[str, bool]) -> dict[str, Tensor]:
    grads = {}
    if needed["x"]:
        weight, scale = arguments["weight"], arguments["global_scale"]
        grads["x"] = torch.ops.nvfp4.linear_backward(grad_output, weight, scale, arguments["x"][-1])
    if needed.get("bias"):
        grads["bias"] = grad_output.flatten(0, -2).sum(0) if grad_output.dim() > 1 else grad_output
    return grads


@register_fake("swiglu_backward")
def _(
    grad_output: Tensor,
    gate_up: Tensor,
    *,
    activation: int = 0,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gated: bool = True,
) -> Tensor:
    op = "swiglu_backward"
    halves = 2 if gated else 1
    _checks.check_activations(op, "gate_up", gate_up, _checks.any_shape(gate_up, "2I" if gated else "I"))
    _checks.check_last_dim(op, "gate_up", gate_up, halves)
    _checks.check_gate(op, activation, clamp_limit, alpha, beta, gated)
    _like(op, grad_output, "gate_up", gate_up, *gate_up.shape[:-1], gate_up.shape[-1] // halves)
    return torch.empty_like(gate_up)


def _swiglu(grad_output: Tensor, arguments: dict[str, Any], needed: dict[str, bool]) -> dict[str, Tensor]:
    gate_up = arguments.pop("gate_up")
    return {"gate_up": torch.ops.nvfp4.swiglu_backward(grad_output, gate_up, **arguments)}


def _register() -> None:
    backward = {
        "moe": _moe,
        "grouped_gemm": _grouped_gemm(False),
        "grouped_gemm_swiglu": _grouped_gemm(True),
        "combine": _combine,
        "linear": _linear,
        "swiglu": _swiglu,
    }
    unread: dict[str, Any] = dict.fromkeys(("grouped_gemm", "combine", "linear"), _unread_x)
    for op, function in backward.items():
        register_autograd(
            op,
            "Weights, scales and experts' biases are frozen, and activations and router weights have first derivatives "
            f"by reverse mode alone: detach the argument, or use torch_nvfp4.reference.{op} (plain torch).",
            function,
            unread.get(op),
        )
    for op in ("moe", "grouped_gemm", "grouped_gemm_swiglu", "linear", "swiglu"):
        register_autograd(
            f"{op}_backward",
            f"It is the derivative of nvfp4::{op}, which has no second one: use torch_nvfp4.reference.{op} (plain "
            "torch).",
        )
    register_autograd(
        "batched_moe",
        "Call it under torch.no_grad(), or use nvfp4::moe or torch_nvfp4.reference.batched_moe (plain torch, "
        "differentiable in its activations).",
    )
    register_autograd(
        "moe_fp8",
        "Call it under torch.no_grad(), or use nvfp4::moe, or torch_nvfp4.reference.moe (plain torch).",
    )
    for op in ("moe", "batched_moe"):
        register_no_autograd_of_out(
            f"{op}.out",
            f"Call it under torch.no_grad(), or nvfp4::moe without out, or torch_nvfp4.reference.{op} (plain torch, "
            "differentiable in its activations).",
        )


_register()
