"""One GEMM per expert over routed slots, with or without the gated activation in its epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.gate import gate_keywords, parse_activation
from torch_nvfp4.ops import _checks
from torch_nvfp4.ops._library import below_autograd, register_fake
from torch_nvfp4.ops.batch_invariance import invariance_keywords
from torch_nvfp4.ops.optional import optional_arguments


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    global_scale: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    batch_invariant: bool | None = None,
) -> Tensor:
    """``out[s] = x[s // (slots // rows)] @ W[expert of s]^T``, times the slot's topk weight, plus the expert's bias.

    Args:
        x: [rows, K] bfloat16 or float16, on the CPU also float32. rows = M with slots = M * top_k for a first GEMM,
            rows = slots for a second one.
        weight: ``pack`` of [E, N, K], gated or not.
        global_scale: float32 [E], or [E, 2] (gate, up) for a weight packed with gated=True.
        order, offsets: int32 [slots] and [E + 1], from ``route``.
        topk_weights: float32 [rows, slots / rows]; None: all 1.
        bias: float32 [E, N], added in fp32, gate before up; None: none.
        batch_invariant: a row's bits depend on nothing but the row; None: as ``set_batch_invariant`` says.

    Returns [slots, N] in x's dtype, one row per slot, gate columns before up columns; slots without an expert are zero.

    Raises RuntimeError (expected and got). Values count too: ``order`` must hold every slot once, and ``offsets`` begin
    with 0, not decrease, and not exceed the slots. Where the values cannot be looked at without waiting for the device,
    on CUDA, all of the result is NaN instead. x and topk_weights have gradients (reverse mode, once); another that is
    asked for raises NotImplementedError in backward. ``torch.autocast`` acts as in ``linear``.
    """
    arguments = (x, weight, global_scale, order, offsets, *optional_arguments(topk_weights, bias))
    return _call((x, global_scale, topk_weights, bias), arguments, invariance_keywords(batch_invariant))


def grouped_gemm_swiglu(
    x: Tensor,
    weight: Tensor,
    global_scale: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str | int = "silu",
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    batch_invariant: bool | None = None,
) -> Tensor:
    """``swiglu(grouped_gemm(...))`` of a weight [E, 2I, K], with the clamp applied before any rounding.

    Arguments as in ``grouped_gemm`` and ``swiglu``. A global_scale [E] says that the weight is [E, I, K], of experts
    without a gate; one of [E, 2] belongs to a weight packed with gated=True.

    Returns [slots, I] in x's dtype. Raises RuntimeError (expected and got), ValueError for an unknown activation name.
    Gradients and ``torch.autocast`` as in ``grouped_gemm``.
    """
    keywords: dict[str, Any] = gate_keywords(parse_activation(activation).value, clamp_limit, alpha, beta)
    keywords.update(invariance_keywords(batch_invariant))
    arguments = (x, weight, global_scale, order, offsets, *optional_arguments(topk_weights, bias))
    return _call_swiglu((x, global_scale, topk_weights, bias), arguments, keywords)


_call = below_autograd("grouped_gemm")
_call_swiglu = below_autograd("grouped_gemm_swiglu")


def _check(
    op: str, x: Tensor, weight: Tensor, global_scale: Tensor, order: Tensor, offsets: Tensor,
    topk_weights: Tensor | None, bias: Tensor | None, gated: bool,
) -> int:  # fmt: skip
    n = _checks.check_weight(op, "weight", weight, global_scale, "x", x, batched=True, gated=gated, k=x.shape[1])
    _checks.check_tensor(op, "order", order, "x", x, (torch.int32,), ["slots"])
    _checks.check_tensor(op, "offsets", offsets, "x", x, (torch.int32,), [weight.shape[0] + 1])
    rows, slots = x.shape[0], order.shape[0]
    _checks.check_count(op, "order's size", slots, order)
    if topk_weights is not None:
        _checks.check_tensor(op, "topk_weights", topk_weights, "x", x, (torch.float32,), [rows, "top_k"])
        expected, count, fits = "as many slots as topk_weights", topk_weights.numel(), [slots == topk_weights.numel()]
    else:  # 0 is the only multiple of 0
        fits = [torch.sym_min(slots, 1) <= rows, slots % torch.sym_max(rows, 1) == 0]
        expected, count = "a multiple of x's rows", rows
    for fit in fits:
        torch._check(fit, lambda: f"nvfp4::{op}: order must hold {expected} ({count}), got {slots}")
    _checks.check_bias(op, "bias", bias, "x", x, weight.shape[0], n)
    return n


def _check_x(op: str, x: Tensor) -> None:
    _checks.check_activations(op, "x", x, ["rows", "K"])
    _checks.check_k(op, "x", x)


def check_grouped_gemm(
    op: str, x: Tensor, weight: Tensor, global_scale: Tensor, order: Tensor, offsets: Tensor,
    topk_weights: Tensor | None, bias: Tensor | None, gate: tuple[int, float | None, float, float] | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Slots and columns of the result; ``gate`` (activation, clamp_limit, alpha, beta) stands behind the GEMM."""
    _check_x(op, x)
    if gate is None:
        gated = _checks.is_gated(op, global_scale, batched=True)
    else:
        gated = _checks.has_gate(weight, global_scale, x)
        _checks.check_gate(op, *gate, gated)
    n = _check(op, x, weight, global_scale, order, offsets, topk_weights, bias, gated)
    return order.shape[0], n // 2 if gated and gate is not None else n


@register_fake("grouped_gemm")
def _(
    x: Tensor,
    weight: Tensor,
    global_scale: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    op = "grouped_gemm"
    shape = check_grouped_gemm(op, x, weight, global_scale, order, offsets, topk_weights, bias)
    return _checks.new_empty(op, "out", x, shape)


@register_fake("grouped_gemm_swiglu")
def _(
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
) -> Tensor:
    op = "grouped_gemm_swiglu"
    gate = (activation, clamp_limit, alpha, beta)
    shape = check_grouped_gemm(op, x, weight, global_scale, order, offsets, topk_weights, bias, gate)
    return _checks.new_empty(op, "out", x, shape)
