"""The specification of the ops in plain torch: slow, independent of the kernels, without intermediate rounding.

Every function takes the arguments of the op of the same name with the weights unpacked (NVFP4Weight, or a dense
floating point tensor of the same shape), computes in ``dtype`` (fp64 by default) and returns ``dtype``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_nvfp4.format import NVFP4Weight, dequantize, is_gated_pair
from torch_nvfp4.gate import Activation, activate, check_gate, parse_activation

Weight = NVFP4Weight | Tensor


def _shape(weight: Weight) -> tuple[int, ...]:
    """Dense shape [..., N, K]."""
    if isinstance(weight, NVFP4Weight):
        return (*weight.data.shape[:-1], weight.data.shape[-1] * 2)
    return tuple(weight.shape)


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, dtype) if isinstance(weight, NVFP4Weight) else weight.to(dtype)


def _expert(weight: Weight, e: int, dtype: torch.dtype) -> Tensor:
    """Matrix of expert ``e``, [N, K] in ``dtype``: one at a time, since all of them may not fit in memory."""
    if isinstance(weight, NVFP4Weight):
        return dequantize(NVFP4Weight(weight.data[e], weight.scale[e], weight.global_scale[e]), dtype)
    return weight[e].to(dtype)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """``x @ weight^T + bias``: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    y = x.to(dtype) @ _dense(weight, dtype).mT
    return y if bias is None else y + bias.to(dtype)


def swiglu(
    gate_up: Tensor,
    activation: str | int = "silu",
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    *,
    gated: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``gated_activation`` of gate_up [..., 2I], gate columns first -> [..., I]; with ``gated=False``
    ``plain_activation`` of [..., I] -> [..., I]."""
    if gated and gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even last dimension (gate, then up), got shape {list(gate_up.shape)}")
    return activate(gate_up.to(dtype), parse_activation(activation), clamp_limit, alpha, beta, gated=gated)


def local_experts(topk_ids: Tensor, expert_map: Tensor | None, num_experts: int) -> Tensor:
    """Local expert of every slot, int64 in the shape of ``topk_ids``; ``num_experts`` for skipped slots.

    Skipped are ids outside [0, num_experts), or, with an ``expert_map`` (int32 [global experts]), ids outside the map
    and ids that it sends outside [0, num_experts), such as to -1.
    """
    local = topk_ids.to(torch.int64)
    if expert_map is not None:
        size = expert_map.numel()
        inside = (local >= 0) & (local < size)
        # A map of one -1 stands in for an empty one, which cannot be indexed.
        table = expert_map.to(torch.int64) if size else local.new_full((1,), -1)
        local = torch.where(inside, table[torch.where(inside, local, 0)], -1)
    return torch.where((local >= 0) & (local < num_experts), local, num_experts)


def route(topk_ids: Tensor, expert_map: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """Groups the slots by expert: topk_ids [M, top_k] -> (order int32 [M * top_k], offsets int32 [num_experts + 1]).

    Slot s is ``token * top_k + j``. ``order`` has the slots stably sorted by local expert, skipped ones last; expert e
    owns ``order[offsets[e]:offsets[e + 1]]``.
    """
    local = local_experts(topk_ids, expert_map, num_experts).reshape(-1)
    order = torch.argsort(local, stable=True).to(torch.int32)
    counts = torch.bincount(local, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
    return order, offsets


def grouped_gemm(
    x: Tensor,
    weight: Weight,
    order: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``out[s] = x[s // (slots // rows)] @ weight[expert of s]^T``, times ``topk_weights[s]`` if given, plus
    ``bias[expert of s]`` if given.

    x [rows, K], weight [E, N, K], order and offsets from ``route``, topk_weights with as many elements as slots, bias
    [E, N] -> [slots, N]; rows of skipped slots are zero. ``slots`` is a multiple of ``rows``.
    """
    slots, rows = order.numel(), x.shape[0]
    experts, n, _ = _shape(weight)
    if offsets.numel() != experts + 1:
        raise ValueError(f"offsets: expected {experts + 1} elements for {experts} experts, got {offsets.numel()}")
    if slots and (rows == 0 or slots % rows):
        raise ValueError(f"x: expected a number of rows that divides the {slots} slots, got {rows}")
    out = torch.zeros(slots, n, dtype=dtype, device=x.device)
    bounds = offsets.tolist()
    for e in range(experts):
        own = order[bounds[e] : bounds[e + 1]].to(torch.int64)
        if own.numel():
            y = x[own // (slots // rows)].to(dtype) @ _expert(weight, e, dtype).mT
            if topk_weights is not None:
                y = y * topk_weights.reshape(-1)[own].to(dtype).unsqueeze(-1)
            out[own] = y if bias is None else y + bias[e].to(dtype)
    return out


def grouped_gemm_swiglu(
    x: Tensor,
    weight: Weight,
    order: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str | int = "silu",
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gated: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``swiglu(grouped_gemm(...))`` of a weight [E, 2I, K], or [E, I, K] with ``gated=False`` -> [slots, I]; rows of
    skipped slots are zero."""
    gate_up = grouped_gemm(x, weight, order, offsets, topk_weights, bias, dtype=dtype)
    return swiglu(gate_up, activation, clamp_limit, alpha, beta, gated=gated, dtype=dtype)


def combine(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_experts: int,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``out[m] = sum over j of topk_weights[m, j] * x[m * top_k + j]``; skipped slots are not read.

    x [M * top_k, N], topk_weights and topk_ids [M, top_k] -> [M, N].
    """
    tokens, top_k = topk_ids.shape
    kept = (local_experts(topk_ids, expert_map, num_experts) < num_experts).unsqueeze(-1)
    terms = x.to(dtype).reshape(tokens, top_k, x.shape[-1]) * topk_weights.to(dtype).unsqueeze(-1)
    # where and not a product with 0: a skipped slot may hold NaN.
    return torch.where(kept, terms, 0.0).sum(1)


def clamped_share(gate_up: Tensor, *, activation: str | int = "silu", clamp_limit: float | None) -> float:
    """Share (0..1) of the pre-activations gate_up [..., 2I] that the limit changes; 0 without a limit or values.

    Counts ``gate > L`` (swiglustep: ``silu(gate) > L``) and ``abs(up) > L``.
    """
    act = parse_activation(activation)
    check_gate(act, clamp_limit, 1.0, 0.0)
    if clamp_limit is None or gate_up.numel() == 0:
        return 0.0
    gate, up = gate_up.chunk(2, dim=-1)
    if act is Activation.swiglustep:
        gate = gate * torch.sigmoid(gate)
    changed = (gate > clamp_limit).sum() + (up.abs() > clamp_limit).sum()
    return int(changed) / gate_up.numel()


class MoEResult(NamedTuple):
    """A layer's output, and how much of it the limit had a part in."""

    output: Tensor  # [M, K]
    clamped_share: float  # of the pre-activations of the slots that were not skipped


def _is_gated(w13: Weight, w2: Weight) -> bool:
    """Whether w13 has gate and up rows, or up rows alone, from its size beside w2 [E, K, I]."""
    (experts, rows, k), down = _shape(w13), _shape(w2)
    pair = isinstance(w13, NVFP4Weight) and is_gated_pair(w13)
    for gated in (True,) if pair else (True, False):
        intermediate = rows // 2 if gated else rows
        if down == (experts, k, intermediate) and not (gated and rows % 2):
            return gated
    raise ValueError(
        "expected w13 of shape [E, 2I, K], or [E, I, K] for experts without a gate, and w2 of shape [E, K, I], "
        f"got {list(_shape(w13))} and {list(_shape(w2))}"
    )


def _check_biases(w13: Weight, w2: Weight, w13_bias: Tensor | None, w2_bias: Tensor | None) -> None:
    for name, bias, weight in (("w13_bias", w13_bias, w13), ("w2_bias", w2_bias, w2)):
        if bias is not None and tuple(bias.shape) != _shape(weight)[:2]:
            raise ValueError(f"{name}: expected shape {list(_shape(weight)[:2])}, got {list(bias.shape)}")


def moe_with_clamped_share(
    hidden_states: Tensor,
    w13: Weight,
    w2: Weight,
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
    dtype: torch.dtype = torch.float64,
) -> MoEResult:
    """``moe``, and the share of pre-activations that the limit changed."""
    gated = _is_gated(w13, w2)
    experts, _, k = _shape(w13)
    _check_biases(w13, w2, w13_bias, w2_bias)
    if hidden_states.dim() != 2 or hidden_states.shape[1] != k:
        raise ValueError(f"hidden_states: expected shape [M, {k}], got {list(hidden_states.shape)}")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != hidden_states.shape[0]:
        raise ValueError(f"topk_ids: expected shape [{hidden_states.shape[0]}, top_k], got {list(topk_ids.shape)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_weights: expected shape {list(topk_ids.shape)}, got {list(topk_weights.shape)}")
    order, offsets = route(topk_ids, expert_map, experts)
    on_input = topk_weights if apply_router_weight_on_input else None
    gate_up = grouped_gemm(hidden_states, w13, order, offsets, on_input, w13_bias, dtype=dtype)
    intermediate = swiglu(gate_up, activation, clamp_limit, alpha, beta, gated=gated, dtype=dtype)
    expert_out = grouped_gemm(intermediate, w2, order, offsets, None, w2_bias, dtype=dtype)
    on_output = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
    output = combine(expert_out, on_output, topk_ids, expert_map, experts, dtype=dtype)
    computed = order[: int(offsets[-1])].to(torch.int64)
    share = clamped_share(gate_up[computed], activation=activation, clamp_limit=clamp_limit) if gated else 0.0
    return MoEResult(output, share)


def moe(
    hidden_states: Tensor,
    w13: Weight,
    w2: Weight,
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
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The MoE layer: for every token, the weighted sum over its experts e of ``w2[e] @ act(w13[e] @ x + w13_bias[e]) +
    w2_bias[e]``.

    Args:
        hidden_states: [M, K], any floating point dtype.
        w13: [E, 2I, K], gate rows first; or [E, I, K], the up rows of experts without a gate.
        w2: [E, K, I].
        topk_weights: fp32 [M, top_k].
        topk_ids: int32 or int64 [M, top_k]; repeated experts add up, ids without a local expert contribute nothing.
        expert_map: int32 [global experts], local expert or -1; None: ids are local.
        w13_bias: [E, 2I] (or [E, I]), added before the clamp; None: no bias.
        w2_bias: [E, K], inside the weighted sum; None: no bias.
        apply_router_weight_on_input: topk_weights scale the expert's input (so the clamp sees the scaled
            pre-activations; not the biases) instead of its output.

    Returns [M, K] in ``dtype``. The activation parameters are those of ``gated_activation``.
    """
    return moe_with_clamped_share(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        expert_map,
        w13_bias,
        w2_bias,
        activation=activation,
        clamp_limit=clamp_limit,
        alpha=alpha,
        beta=beta,
        apply_router_weight_on_input=apply_router_weight_on_input,
        dtype=dtype,
    ).output


def batched_moe(
    hidden_states: Tensor,
    w13: Weight,
    w2: Weight,
    expert_num_tokens: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    *,
    activation: str | int = "silu",
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """One MLP per expert over the rows that it has been given, for every expert e and t below expert_num_tokens[e]
    ``w2[e] @ act(w13[e] @ hidden_states[e, t] + w13_bias[e]) + w2_bias[e]``.

    hidden_states [E, T, K], expert_num_tokens integers [E] in [0, T], weights and biases as in ``moe`` -> [E, T, K]
    with zeros at and behind the counts. What hidden_states holds there is not read.
    """
    gated = _is_gated(w13, w2)
    experts, _, k = _shape(w13)
    _check_biases(w13, w2, w13_bias, w2_bias)
    if hidden_states.dim() != 3 or (hidden_states.shape[0], hidden_states.shape[2]) != (experts, k):
        raise ValueError(f"hidden_states: expected shape [{experts}, T, {k}], got {list(hidden_states.shape)}")
    if expert_num_tokens.shape != (experts,):
        raise ValueError(f"expert_num_tokens: expected shape [{experts}], got {list(expert_num_tokens.shape)}")
    rows, counts = hidden_states.shape[1], expert_num_tokens.tolist()
    for e, count in enumerate(counts):
        if not 0 <= count <= rows:
            raise ValueError(f"expert_num_tokens: expected counts from 0 to T = {rows}, got {count} at index {e}")
    out = torch.zeros(hidden_states.shape, dtype=dtype, device=hidden_states.device)
    for e, count in enumerate(counts):
        b13, b2 = (None if bias is None else bias[e] for bias in (w13_bias, w2_bias))
        gate_up = linear(hidden_states[e, :count], _expert(w13, e, dtype), b13, dtype=dtype)
        hidden = swiglu(gate_up, activation, clamp_limit, alpha, beta, gated=gated, dtype=dtype)
        out[e, :count] = linear(hidden, _expert(w2, e, dtype), b2, dtype=dtype)
    return out
