"""The specification of ``moe`` with FP8 activations in plain torch: which values are rounded to E4M3, and with which
scale. Sums are in fp64, where the kernels' are in fp32 of about 14 bits.

A sum's rounding can decide which way a value of the intermediate is rounded, so the kernels come within 2e-2 of this
(relative L2 of a layer; ``testing.FP8_TOLERANCE``). This is within 6e-2 of ``reference.moe`` where a clamp changes few
pre-activations; ``testing.fp8_tolerance`` says how far off it is where it changes many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_nvfp4.format import NVFP4Weight, dequantize
from torch_nvfp4.gate import activate, parse_activation
from torch_nvfp4.reference import local_experts

E4M3_MAX = 448.0
WEIGHT_DIVISOR = 6.0  # the largest code: the largest weight, 6 * 448, becomes 448
PART = 32  # values of the intermediate that share a power of two until their row has one


def to_e4m3(x: Tensor) -> Tensor:
    """Rounded to E4M3, to nearest even, saturated; NaN stays. fp32."""
    return x.to(torch.float32).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (E4M3 values as fp32 [M, K], scale fp32 [M, 1]): a row's largest magnitude becomes 448."""
    largest = x.to(torch.float32).abs().nan_to_num(0.0, torch.inf).amax(-1, keepdim=True).clamp_min(7.9e-31)
    return to_e4m3(x.to(torch.float32) * (E4M3_MAX / largest)), largest * (1.0 / E4M3_MAX)


def fold_scales(weight: NVFP4Weight) -> Tensor:
    """E4M3 of code * block scale / 6, as fp32 [..., N, K]: without the global scale, and without the 6."""
    ones = torch.ones_like(weight.global_scale)
    return to_e4m3(dequantize(NVFP4Weight(weight.data, weight.scale, ones), torch.float32) / WEIGHT_DIVISOR)


def _scale_code(part: Tensor) -> Tensor:
    """c for parts [..., PART] of bf16 values, with 2^(8 c - 128) as their scale: it takes the largest below 256."""
    exponent = part.abs().nan_to_num(0.0).amax(-1, keepdim=True).view(torch.int16).to(torch.int32) >> 7
    return ((exponent + 1) >> 3).clamp(1, 31)


def quantize_hidden(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [M, I] -> (E4M3 values as fp32 [M, I], scale fp32 [M, 1]).

    Values are rounded to bf16, then, 32 at a time, to E4M3 with a power of two as their scale, then brought to the
    row's largest scale.
    """
    rows, features = hidden.shape
    part = torch.nn.functional.pad(hidden.to(torch.bfloat16), (0, -features % (2 * PART))).reshape(rows, -1, PART)
    code = _scale_code(part)
    largest = code.amax(1, keepdim=True)
    values = to_e4m3(torch.ldexp(part.to(torch.float32), 128 - 8 * code))
    values = to_e4m3(torch.ldexp(values, 8 * (code - largest)))
    scale = torch.ldexp(torch.ones(rows, 1, device=hidden.device), 8 * largest[:, :, 0] - 128)
    return values.reshape(rows, -1)[:, :features], scale


def moe(
    hidden_states: Tensor,
    w13: NVFP4Weight,
    w2: NVFP4Weight,
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
    """``reference.moe`` with E4M3 activations and weights: hidden_states [M, K], w13 [E, 2I, K] with global scales
    [E, 2], w2 [E, K, I], topk_weights and topk_ids [M, top_k] -> fp64 [M, K]."""
    double = torch.float64
    experts = w2.data.shape[0]
    local = local_experts(topk_ids, expert_map, experts)
    x, x_scale = quantize_rows(hidden_states)
    out = torch.zeros(hidden_states.shape, dtype=double, device=hidden_states.device)
    for expert in local.unique().tolist():
        if expert == experts:
            continue
        token, j = torch.where(local == expert)
        router = topk_weights[token, j, None].to(double)
        first, second = (fold_scales(NVFP4Weight(*(part[expert] for part in w))).to(double) for w in (w13, w2))
        rows = x_scale[token].to(double) * (router if apply_router_weight_on_input else 1.0)
        gate_up = x[token].to(double) @ first.mT * (WEIGHT_DIVISOR * rows)
        scale = w13.global_scale[expert].to(double).repeat_interleave(gate_up.shape[-1] // 2)
        hidden = activate(gate_up * scale, parse_activation(activation), clamp_limit, alpha, beta, gated=True)
        values, hidden_scale = quantize_hidden(hidden)
        factor = hidden_scale.to(double) * WEIGHT_DIVISOR * w2.global_scale[expert].to(double)
        y = values.to(double) @ second.mT * factor
        out.index_add_(0, token, y if apply_router_weight_on_input else y * router)
    return out
