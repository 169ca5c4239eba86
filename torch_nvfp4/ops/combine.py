"""The weighted sum over a token's slots."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_nvfp4.ops import _checks
from torch_nvfp4.ops._library import below_autograd, register_fake


def combine(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, num_experts: int) -> Tensor:
    """``out[m] = sum over j of topk_weights[m, j] * x[m * top_k + j]``, summed in fp32 in the order of j.

    Args:
        x: [M * top_k, N] bfloat16 or float16, on the CPU also float32: one row per slot.
        topk_weights: [M, top_k] float32.
        topk_ids, expert_map, num_experts: as in ``route``; slots without a local expert are not read.

    Returns [M, N] in x's dtype. Raises RuntimeError (expected and got). x and topk_weights have gradients (reverse
    mode, once).
    """
    return _call((x, topk_weights), (x, topk_weights, topk_ids, expert_map, num_experts), {})


_call = below_autograd("combine")


@register_fake("combine")
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, num_experts: int) -> Tensor:
    op = "combine"
    _checks.check_activations(op, "x", x, ["M * top_k", "N"])
    _checks.check_tensor(op, "topk_weights", topk_weights, "x", x, (torch.float32,), ["M", "top_k"])
    tokens, top_k = topk_weights.shape
    _checks.check_routing(op, topk_ids, expert_map, [tokens, top_k], "x", x)
    _checks.check_num_experts(op, num_experts)
    torch._check(
        x.shape[0] == tokens * top_k,
        lambda: f"nvfp4::{op}: x must have M * top_k = {tokens * top_k} rows, got {x.shape[0]}",
    )
    return _checks.new_empty(op, "out", x, (tokens, x.shape[1]))
