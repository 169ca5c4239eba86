"""Floating point operations of the ops that multiply matrices, for ``torch.utils.flop_counter.FlopCounterMode``.

The counter sees shapes alone, so every slot counts as if it had an expert, and every row of ``batched_moe`` as if it
were one of those that the expert was given: an upper bound with ``expert_map``, ids of no expert, or fewer rows. A
multiplication and an addition are two operations, as in torch's own formulas; gates, sums over slots and decoding of
weights count nothing. Backward ops count the products that they make again, as torch's attention does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from torch_nvfp4.ops import _library  # noqa: F401  (loads the ops)

Shape = Sequence[int]


def _rows(weight: Shape, global_scale: Shape, batched: bool) -> int:
    """N of a packed weight, 2I if it is gated, which the rank of its global scale says."""
    first = 1 if batched else 0
    gated = len(global_scale) == first + 1
    return 2 * weight[first + 1] if gated else weight[first]


def _moe(slots: int, k: int, w13: Shape, w13_global_scale: Shape) -> int:
    rows = _rows(w13, w13_global_scale, batched=True)
    intermediate = rows // len(w13_global_scale)  # [E, 2] has gate and up rows, [E] up rows alone
    return 2 * slots * k * (rows + intermediate)


@register_flop_formula([torch.ops.nvfp4.moe, torch.ops.nvfp4.moe_fp8])
def _moe_flop(
    hidden_states: Shape, w13: Shape, w13_global_scale: Shape, w2: Shape, w2_global_scale: Shape, topk_weights: Shape,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _moe(math.prod(topk_weights), hidden_states[-1], w13, w13_global_scale)


@register_flop_formula(torch.ops.nvfp4.batched_moe)
def _batched_moe_flop(hidden_states: Shape, w13: Shape, w13_global_scale: Shape, *_: Any, **__: Any) -> int:
    return _moe(hidden_states[0] * hidden_states[1], hidden_states[-1], w13, w13_global_scale)


@register_flop_formula([torch.ops.nvfp4.grouped_gemm, torch.ops.nvfp4.grouped_gemm_swiglu])
def _grouped_gemm_flop(
    x: Shape, weight: Shape, global_scale: Shape, order: Shape, *_: Any, **__: Any
) -> int:  # fmt: skip
    return 2 * order[0] * x[-1] * _rows(weight, global_scale, batched=True)


@register_flop_formula(torch.ops.nvfp4.linear)
def _linear_flop(x: Shape, weight: Shape, global_scale: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * _rows(weight, global_scale, batched=False)


@register_flop_formula(torch.ops.nvfp4.moe_backward)
def _moe_backward_flop(
    grad_output: Shape, hidden_states: Shape, w13: Shape, w13_global_scale: Shape, w2: Shape, w2_global_scale: Shape,
    topk_weights: Shape, *_: Any, needs_hidden_states: bool = True, **__: Any,
) -> int:  # fmt: skip
    slots, k = math.prod(topk_weights), hidden_states[-1]
    again = 2 * slots * k * _rows(w13, w13_global_scale, batched=True)
    return _moe(slots, k, w13, w13_global_scale) + (again if needs_hidden_states else 0)


@register_flop_formula(torch.ops.nvfp4.grouped_gemm_backward)
def _grouped_gemm_backward_flop(
    grad_output: Shape, x: Shape, *arguments: Any, needs_x: bool = True, needs_topk_weights: bool = False, **__: Any
) -> int:
    return math.prod(grad_output) * 2 * x[-1] * (needs_x + needs_topk_weights)


@register_flop_formula(torch.ops.nvfp4.grouped_gemm_swiglu_backward)
def _grouped_gemm_swiglu_backward_flop(
    grad_output: Shape, x: Shape, weight: Shape, global_scale: Shape, order: Shape, *_: Any, needs_x: bool = True,
    **__: Any,
) -> int:  # fmt: skip
    return _grouped_gemm_flop(x, weight, global_scale, order) * (1 + needs_x)


@register_flop_formula(torch.ops.nvfp4.linear_backward)
def _linear_backward_flop(
    grad_output: Shape, weight: Shape, global_scale: Shape, in_features: int, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(grad_output) * in_features
