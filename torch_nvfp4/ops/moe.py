"""The fused mixture-of-experts layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.gate import activate, gate_keywords, parse_activation
from torch_nvfp4.ops import _checks
from torch_nvfp4.ops._library import below_autograd, register_fake
from torch_nvfp4.ops.batch_invariance import invariance_keywords
from torch_nvfp4.ops.moe_fp8 import moe_fp8
from torch_nvfp4.ops.optional import optional_arguments
from torch_nvfp4.ops.pack import check_input_quant


# Over 60 lines: most of them say what the arguments are.
def moe(
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
    activation: str | int = "silu",
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    apply_router_weight_on_input: bool = False,
    batch_invariant: bool | None = None,
    input_quant: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """For every token, the weighted sum over its experts e of ``w2[e] @ act(w13[e] @ x + w13_bias[e]) + w2_bias[e]``.

    The clamp is applied to the fp32 pre-activations, before the one rounding of the intermediate to 16 bits; sums are
    in fp32. ``torch_nvfp4.reference.moe`` is the specification, ``torch_nvfp4.gate.gated_activation`` has the
    formulas (DeepSeek-V4's modelling code for ``silu`` with a limit).

    Args:
        hidden_states: [M, K] bfloat16 or float16, on the CPU also float32; K a multiple of 16.
        w13: ``pack(..., gated=True)`` of [E, 2I, K], gate rows first; of experts without a gate ``pack(...)`` of
            [E, I, K]. (Up to I = 32, shapes cannot tell gate and up rows packed without gated=True from these.)
        w13_global_scale: [E, 2] float32 (gate, up); [E] without a gate.
        w2: ``pack(...)`` of [E, K, I].
        w2_global_scale: [E] float32.
        topk_weights: [M, top_k] float32.
        topk_ids: [M, top_k] int32 or int64. Ids outside [0, E) contribute nothing; repeated ids add up.
        expert_map: [global experts] int32, local expert or -1; then topk_ids are global.
        w13_bias: [E, 2I] float32, gate rows first ([E, I] without a gate), added in fp32 before the clamp.
        w2_bias: [E, K] float32, weighted as the expert's output that it is a part of.
        activation: silu, swiglustep, gelu, gelu_tanh, relu2 or situ; without a gate silu, gelu, gelu_tanh or relu2.
        clamp_limit: finite and positive, or None for no clamp; only silu and swiglustep with a gate
            have one.
        alpha, beta: of silu, ``g * sigmoid(alpha * g) * (u + beta)``, and of situ (from 2^-64 to 2^64, or beta 0).
        apply_router_weight_on_input: topk_weights scale w13's products (before bias and clamp), not the output.
        batch_invariant: a row's bits depend on nothing but the row; None: as ``set_batch_invariant`` says.
        input_quant: "fp8" calls ``moe_fp8``, which says what it takes: faster for thousands of tokens, with about 20
            times the error, on GPUs of compute capability 9.0. Without gradients: their backward raises.
        out: a buffer for the result (``nvfp4::moe.out``): [M, K] in hidden_states' dtype, contiguous, on CUDA beginning
            at a multiple of 16 bytes. It may be hidden_states itself, whose rows are all read before the first is
            written, and must share no memory with any other argument.

    A shared expert of the routed ones' activation, limit and I is expert E: ``torch.cat`` its packed weights, scales
    and biases behind theirs, and give every token the id E with weight 1. One that is n times as wide is n experts, of
    which one has its w2_bias.

    Returns [M, K] in hidden_states' dtype, ``out`` if that is given. A token with NaN or infinity comes out as NaN.
    Under ``torch.autocast`` (without ``out``) float32 hidden_states are rounded to its dtype first.
    No tensor may change while the op runs: on CUDA, another stream that writes topk_ids or expert_map meanwhile leads
    to no access outside the tensors, but to undefined values or, up to 32 slots, to a call that does not end.

    Raises RuntimeError (expected and got) for a wrong dtype, device, shape, layout or gate parameter, ValueError for an
    unknown activation name. hidden_states and topk_weights have gradients (reverse mode, once); another that is asked
    for raises NotImplementedError in backward.
    """
    check_input_quant(input_quant)
    if input_quant == "fp8":
        given = {"w13_bias": w13_bias, "w2_bias": w2_bias, "batch_invariant": batch_invariant or None, "out": out}
        if refused := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"input_quant='fp8': expected no {', '.join(refused)}, got it; use input_quant=None")
        return moe_fp8(
            hidden_states, w13, w13_global_scale, w2, w2_global_scale, topk_weights, topk_ids, expert_map,
            activation=activation, clamp_limit=clamp_limit, alpha=alpha, beta=beta,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )  # fmt: skip
    keywords: dict[str, Any] = gate_keywords(parse_activation(activation).value, clamp_limit, alpha, beta)
    keywords.update(invariance_keywords(batch_invariant))
    if apply_router_weight_on_input:
        keywords["apply_router_weight_on_input"] = True
    arguments: tuple[Any, ...] = (hidden_states, w13, w13_global_scale, w2, w2_global_scale, topk_weights, topk_ids)
    arguments += optional_arguments(expert_map, w13_bias, w2_bias)
    if out is None:
        floats = (hidden_states, w13_global_scale, w2_global_scale, topk_weights, w13_bias, w2_bias)
        return call_moe(floats, arguments, keywords)
    torch.ops.nvfp4.moe.out(*arguments, **keywords, out=out)
    return out


call_moe = below_autograd("moe")
"""The op past the autograd kernel where there is nothing to differentiate."""


def check_moe(
    op: str,
    hidden_states: Tensor,
    w13: Tensor,
    w13_global_scale: Tensor,
    w2: Tensor,
    w2_global_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    activation: int,
    clamp_limit: float | None,
    alpha: float,
    beta: float,
) -> None:
    like = "hidden_states"
    _checks.check_activations(op, like, hidden_states, ["M", "K"])
    _checks.check_k(op, like, hidden_states)
    tokens, k = hidden_states.shape
    gated = _checks.has_gate(w13, w13_global_scale, hidden_states)
    n = _checks.check_weight(op, "w13", w13, w13_global_scale, like, hidden_states, batched=True, gated=gated, k=k)
    experts, features = w13.shape[0], n // 2 if gated else n
    _checks.check_weight(
        op, "w2", w2, w2_global_scale, like, hidden_states, batched=True, gated=False, experts=experts, n=k, k=features
    )  # fmt: skip
    _checks.check_tensor(op, "topk_weights", topk_weights, like, hidden_states, (torch.float32,), [tokens, "top_k"])
    _checks.check_routing(op, topk_ids, expert_map, [tokens, topk_weights.shape[1]], like, hidden_states)
    _checks.check_bias(op, "w13_bias", w13_bias, like, hidden_states, experts, n)
    _checks.check_bias(op, "w2_bias", w2_bias, like, hidden_states, experts, k)
    _checks.check_gate(op, activation, clamp_limit, alpha, beta, gated)


@register_fake("moe")
def _(
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
) -> Tensor:
    check_moe(
        "moe", hidden_states, w13, w13_global_scale, w2, w2_global_scale, topk_weights, topk_ids, expert_map,
        w13_bias, w2_bias, activation, clamp_limit, alpha, beta,
    )  # fmt: skip
    return torch.empty_like(hidden_states)


@register_fake("moe.out")
def _(
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
    out: Tensor,
) -> None:
    op = "moe.out"
    check_moe(
        op, hidden_states, w13, w13_global_scale, w2, w2_global_scale, topk_weights, topk_ids, expert_map,
        w13_bias, w2_bias, activation, clamp_limit, alpha, beta,
    )  # fmt: skip
    _checks.check_out(op, out, "hidden_states", hidden_states)


def decomposed_moe(
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
) -> Tensor:
    """``torch.ops.nvfp4.moe`` as its steps, with the clamp and the activation in aten.

    The GEMMs return hidden_states' dtype, so in 16 bits the pre-activations are rounded before the clamp and each
    expert's output before the weighted sum: two roundings that the fused op does not have, for 1.5 to 2.3 times its
    error (3 times with relu2, which squares). Clamp and activation are in fp32, rounded once, as in the fused op.
    """
    nvfp4, experts = torch.ops.nvfp4, w13.shape[0]
    order, offsets = nvfp4.route(topk_ids, expert_map, experts)
    on_input = topk_weights if apply_router_weight_on_input else None
    how = invariance_keywords(batch_invariant)
    first = (on_input,) if w13_bias is None else (on_input, w13_bias)
    second = () if w2_bias is None else (None, w2_bias)
    gate_up = nvfp4.grouped_gemm(hidden_states, w13, w13_global_scale, order, offsets, *first, **how).to(torch.float32)
    gated = w13_global_scale.dim() == 2
    intermediate = activate(gate_up, activation, clamp_limit, alpha, beta, gated=gated).to(hidden_states.dtype)
    expert_out = nvfp4.grouped_gemm(intermediate, w2, w2_global_scale, order, offsets, *second, **how)
    on_output = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
    return nvfp4.combine(expert_out, on_output, topk_ids, expert_map, experts)
