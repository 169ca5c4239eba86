"""The fused mixture-of-experts layer with FP8 activations, and the order of packed codes that it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.gate import Activation, gate_keywords, parse_activation
from torch_nvfp4.ops import _checks
from torch_nvfp4.ops._library import register_fake
from torch_nvfp4.ops.batch_invariance import refuse_batch_invariance

MAX_EXPERTS = 2048
"""kFp8MaxExperts in csrc/kernels.h: a CTA's shared memory holds three numbers for each."""


def moe_fp8(
    hidden_states: Tensor,
    w13: Tensor,
    w13_global_scale: Tensor,
    w2: Tensor,
    w2_global_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    *,
    activation: str | int = "silu",
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """``moe`` with tokens and intermediate in E4M3, for GPUs of compute capability 9.0: faster where the tensor cores
    limit, and less exact. ``moe(..., input_quant="fp8")`` calls it; nothing chooses it by itself.

    The formula is ``torch_nvfp4.reference_fp8.moe``: a scale per token, block scales folded into E4M3 weights, fp32
    sums (to about 1e-3: Hopper's FP8 instructions cut the terms of a sum to 14 bits), the gate in fp32, and a power of
    two as the scale of a token's intermediate.

    Args as of ``moe``, but:
        hidden_states: [M, K] bfloat16 or float16 on such a GPU.
        w13: int8, ``pack(..., gated=True, input_quant="fp8")`` of [E, 2I, K].
        w2: int8, ``pack(..., input_quant="fp8")`` of [E, K, I].
        activation: silu only.

    Returns [M, K] in hidden_states' dtype. Raises RuntimeError (expected and got) for a wrong dtype, device, shape,
    layout or gate parameter or while ``set_batch_invariant`` holds, ValueError for an unknown activation name. Nothing
    has a gradient here: one that is asked for raises NotImplementedError in backward.
    """
    refuse_batch_invariance("moe_fp8")
    keywords: dict[str, Any] = gate_keywords(parse_activation(activation).value, clamp_limit, alpha, beta)
    if apply_router_weight_on_input:
        keywords["apply_router_weight_on_input"] = True
    arguments: tuple[Any, ...] = (hidden_states, w13, w13_global_scale, w2, w2_global_scale, topk_weights, topk_ids)
    if expert_map is not None:
        arguments += (expert_map,)
    return torch.ops.nvfp4.moe_fp8(*arguments, **keywords)


def order_for_fp8(packed: Tensor, in_features: int, *, gated: bool = False) -> Tensor:
    """A packed weight [E, ...] (``pack``, on CUDA) with its codes in the order that ``moe_fp8`` reads: int8 of the same
    shape, a dtype that no other op takes for a packed weight. ``unpack`` takes it too."""
    return torch.ops.nvfp4.order_for_fp8(packed, in_features, gated)


@register_fake("moe_fp8")
def _(
    hidden_states: Tensor,
    w13: Tensor,
    w13_global_scale: Tensor,
    w2: Tensor,
    w2_global_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    *,
    activation: int = 0,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    op, like = "moe_fp8", "hidden_states"
    _checks.check_on_cuda(op, hidden_states)
    dtypes = (torch.bfloat16, torch.float16)
    _checks.check_tensor(op, like, hidden_states, like, hidden_states, dtypes, ["M", "K"])
    _checks.check_k(op, like, hidden_states)
    tokens, k = hidden_states.shape
    int8 = torch.int8
    n = _checks.check_weight(
        op, "w13", w13, w13_global_scale, like, hidden_states, batched=True, gated=True, k=k, dtype=int8
    )  # fmt: skip
    experts = w13.shape[0]
    _checks.check_weight(
        op, "w2", w2, w2_global_scale, like, hidden_states, batched=True, gated=False, experts=experts, n=k, k=n // 2,
        dtype=int8,
    )  # fmt: skip
    _checks.check_tensor(op, "topk_weights", topk_weights, like, hidden_states, (torch.float32,), [tokens, "top_k"])
    _checks.check_routing(op, topk_ids, expert_map, [tokens, topk_weights.shape[1]], like, hidden_states)
    _checks.check_gate(op, activation, clamp_limit, alpha, beta)
    if activation != Activation.silu:
        _checks.fail(op, f"activation must be silu (0), got {activation}; use moe for others")
    if isinstance(experts, int) and experts > MAX_EXPERTS:
        _checks.fail(op, f"w13 must hold at most {MAX_EXPERTS} experts, got {experts}")
    return torch.empty_like(hidden_states)


@register_fake("order_for_fp8")
def _(packed: Tensor, in_features: int, gated: bool = False) -> Tensor:
    op = "order_for_fp8"
    _checks.check_on_cuda(op, packed)
    _checks.check_in_features(op, in_features)
    _checks.check_packed(op, "packed", packed, "packed", packed, batched=True, gated=gated, k=in_features)
    return torch.empty_like(packed, dtype=torch.int8)
