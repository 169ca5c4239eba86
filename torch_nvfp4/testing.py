"""Random weights and routings, and error metrics: shared by the tests and by ``torch-nvfp4 verify``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_nvfp4.format import E4M3_MAX, GROUP_SIZE, NVFP4Weight

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5, torch.float8_e4m3fn: 6e-2}
"""Largest allowed ``relative_l2`` against the fp64 reference, by the dtype of the activations; of E4M3 those of
``input_quant="fp8"``, where the weights' rounding to E4M3 is a part of it (with a clamp: ``fp8_tolerance``)."""

FP8_TOLERANCE = 2e-2
"""Largest allowed ``relative_l2`` of ``moe_fp8`` against its specification, ``reference_fp8.moe``: sums of 14 bits
decide the rounding of some values of the intermediate otherwise than exact ones, and each of them is off by a
sixteenth."""


def fp8_tolerance(clamped_share: float) -> float:
    """Largest allowed ``relative_l2`` of a layer with FP8 activations against the fp64 reference.

    That of ``TOLERANCE``, and a tenth of ``clamped_share`` more: the share (0..1) of the pre-activations that the limit
    changed. FP8's errors are in proportion to the pre-activations, while the clamp cuts those to the limit, so that the
    errors within the limit weigh more. The specification itself is off by 0.053 with no values clamped (normally
    distributed weights), by 0.062 with 22 %, by 0.088 with 60 %. From 70 % on, pre-activations are more than ten times
    the limit, and it is off by more than this allows: such a layer is not one for FP8.
    """
    return TOLERANCE[torch.float8_e4m3fn] + 0.1 * clamped_share


def random_weight(
    shape: Sequence[int],
    *,
    gated: bool = False,
    global_scale: float | None = None,
    all_scales: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> NVFP4Weight:
    """Random NVFP4 matrices of dense shape [..., N, K] with all 16 codes equally likely.

    Block scales spread over four octaves below 448, as in trained weights; ``all_scales`` draws from all 254 finite
    E4M3 bytes instead (negative, zero, subnormal). Global scales are drawn from 2^-13 .. 2^-9 with random mantissas,
    [...] or, if gated, [..., 2]; ``global_scale`` fixes them. The random numbers come from ``generator`` on the
    generator's device (the CPU without one), so a seed gives the same weight on every ``device``.
    """
    *batch, n, k = shape
    if k % GROUP_SIZE:
        raise ValueError(f"shape: expected K to be a multiple of {GROUP_SIZE}, got {list(shape)}")
    source = generator.device if generator is not None else torch.device("cpu")
    data = torch.randint(0, 256, (*batch, n, k // 2), dtype=torch.uint8, generator=generator, device=source)
    scale_shape = (*batch, n, k // GROUP_SIZE)
    if all_scales:
        magnitude = torch.randint(0, 0x7F, scale_shape, dtype=torch.uint8, generator=generator, device=source)
        sign = torch.randint(0, 2, scale_shape, dtype=torch.uint8, generator=generator, device=source)
        scale_bytes = magnitude | (sign << 7)
    else:
        octaves = torch.rand(scale_shape, dtype=torch.float32, generator=generator, device=source) * 4
        scale_bytes = (E4M3_MAX * torch.exp2(-octaves)).to(torch.float8_e4m3fn).view(torch.uint8)
    global_shape = (*batch, 2) if gated else tuple(batch)
    if global_scale is None:
        g = torch.exp2(torch.rand(global_shape, dtype=torch.float32, generator=generator, device=source) * 4 - 13)
    else:
        g = torch.full(global_shape, global_scale, dtype=torch.float32, device=source)
    return NVFP4Weight(data.to(device), scale_bytes.to(device).view(torch.float8_e4m3fn), g.to(device))


def random_routing(
    tokens: int,
    num_experts: int,
    top_k: int,
    *,
    skew: float = 0.0,
    ids_dtype: torch.dtype = torch.int64,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """(topk_weights fp32 [tokens, top_k] that sum to 1 per token, topk_ids [tokens, top_k] in ``ids_dtype``).

    The experts of a token are distinct unless top_k exceeds num_experts. ``skew`` > 0 prefers low-numbered experts: 1
    gives expert 0 to nearly every token.
    """
    source = generator.device if generator is not None else torch.device("cpu")
    scores = torch.rand(tokens, num_experts, dtype=torch.float32, generator=generator, device=source)
    scores = scores + skew * torch.linspace(1, 0, num_experts, dtype=torch.float32, device=source)
    distinct = min(top_k, num_experts)
    weights, ids = scores.topk(distinct, dim=-1)
    if top_k > num_experts:
        extra = torch.randint(0, num_experts, (tokens, top_k - distinct), generator=generator, device=source)
        ids = torch.cat((ids, extra), -1)
        weights = scores.gather(-1, ids)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(device), ids.to(device, ids_dtype)


def relative_l2(out: Tensor, ref: Tensor) -> float:
    """``|out - ref| / |ref|`` (Euclidean norms, fp64); 0 for empty tensors, infinity if only ``ref`` is zero.

    NaN and infinities must stand in the same places (AssertionError otherwise) and are left out of the norms.
    """
    if out.shape != ref.shape:
        raise AssertionError(f"expected shape {list(ref.shape)}, got {list(out.shape)}")
    a = out.detach().to(ref.device, torch.float64)
    b = ref.detach().to(torch.float64)
    finite = torch.isfinite(b)
    same = torch.where(finite, torch.isfinite(a), (a == b) | (a.isnan() & b.isnan()))
    if not bool(same.all()):
        index = torch.nonzero(~same)[0].tolist()
        raise AssertionError(
            f"expected NaN and infinities in the same places, {int((~same).sum())} of {same.numel()} elements differ; "
            f"the first at index {index}: expected {float(b[tuple(index)]):g}, got {float(a[tuple(index)]):g}"
        )
    a, b = a[finite], b[finite]
    error, norm = float((a - b).norm()), float(b.norm())
    if error == 0.0:
        return 0.0
    return error / norm if norm > 0.0 else math.inf


def assert_accurate(out: Tensor, ref: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """AssertionError unless ``relative_l2(out, ref)`` is within ``TOLERANCE`` of ``dtype`` (default: that of out)."""
    limit = TOLERANCE[dtype if dtype is not None else out.dtype]
    error = relative_l2(out, ref)
    if not error <= limit:
        raise AssertionError(f"expected a relative L2 error of at most {limit:g}, got {error:g}")
