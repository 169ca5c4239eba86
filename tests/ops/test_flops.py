"""FlopCounterMode against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import torch_nvfp4
from torch_nvfp4.testing import random_routing, random_weight

EXPERTS, HIDDEN, INNER, TOP_K, TOKENS = 4, 64, 32, 2, 6
MLP = 2 * (2 * INNER * HIDDEN + HIDDEN * INNER)  # of one row


def flops(call: object) -> int:
    with FlopCounterMode(display=False) as counter:
        call()  # type: ignore[operator]
    return counter.get_total_flops()


def arguments(device: str) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w13 = random_weight((EXPERTS, 2 * INNER, HIDDEN), gated=True, generator=generator, device=device)
    w2 = random_weight((EXPERTS, HIDDEN, INNER), generator=generator, device=device)
    packed = (torch_nvfp4.pack(w13, gated=True), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(device, torch.bfloat16)
    return x, packed, *random_routing(TOKENS, EXPERTS, TOP_K, generator=generator, device=device)


def test_moe_counts_every_slot(device: str) -> None:
    x, packed, topk_weights, ids = arguments(device)
    expected = TOKENS * TOP_K * MLP
    assert flops(lambda: torch_nvfp4.moe(x, *packed, topk_weights, ids, clamp_limit=7)) == expected
    assert flops(lambda: torch_nvfp4.moe(x, *packed, topk_weights, ids, out=torch.empty_like(x))) == expected
    assert flops(lambda: torch_nvfp4.moe(x[:0], *packed, topk_weights[:0], ids[:0])) == 0


def test_batched_moe_counts_every_row(device: str) -> None:
    x, packed, _, _ = arguments(device)
    rows = x[:5].expand(EXPERTS, 5, HIDDEN).contiguous()
    counts = torch.full((EXPERTS,), 2, dtype=torch.int32, device=device)
    assert flops(lambda: torch_nvfp4.batched_moe(rows, *packed, counts)) == EXPERTS * 5 * MLP


def test_the_steps_add_up(device: str) -> None:
    x, (w13, scale13, w2, scale2), topk_weights, ids = arguments(device)
    order, offsets = torch_nvfp4.route(ids, None, EXPERTS)
    slots = TOKENS * TOP_K
    first = 2 * slots * 2 * INNER * HIDDEN
    assert flops(lambda: torch_nvfp4.grouped_gemm(x, w13, scale13, order, offsets)) == first
    assert flops(lambda: torch_nvfp4.grouped_gemm_swiglu(x, w13, scale13, order, offsets, clamp_limit=7)) == first

    def steps() -> None:
        half = torch_nvfp4.grouped_gemm_swiglu(x, w13, scale13, order, offsets)
        out = torch_nvfp4.grouped_gemm(half, w2, scale2, order, offsets)
        torch_nvfp4.combine(out, topk_weights, ids, None, EXPERTS)

    assert flops(steps) == slots * MLP


@pytest.mark.parametrize("gated", [False, True])
def test_linear(device: str, gated: bool) -> None:
    weight = random_weight((96, HIDDEN), gated=gated, generator=torch.Generator().manual_seed(1), device=device)
    packed = torch_nvfp4.pack(weight, gated=gated)
    x = torch.randn(2, 3, HIDDEN, device=device).to(torch.bfloat16)
    assert flops(lambda: torch_nvfp4.linear(x, packed, weight.global_scale)) == 2 * 6 * 96 * HIDDEN


def test_derivatives(device: str) -> None:
    """The forward op, what its derivative makes again, and the products with the stored rows."""
    x, (w13, scale13, w2, scale2), topk_weights, ids = arguments(device)
    order, offsets = torch_nvfp4.route(ids, None, EXPERTS)
    slots, w13_products = TOKENS * TOP_K, 2 * 2 * INNER * HIDDEN
    dense = random_weight((96, HIDDEN), generator=torch.Generator().manual_seed(1), device=device)
    packed = torch_nvfp4.pack(dense)
    calls = {
        "moe": lambda x, w: torch_nvfp4.moe(x, w13, scale13, w2, scale2, w, ids),
        "grouped_gemm": lambda x, w: torch_nvfp4.grouped_gemm(x, w13, scale13, order, offsets, w),
        "grouped_gemm_swiglu": lambda x, w: torch_nvfp4.grouped_gemm_swiglu(x, w13, scale13, order, offsets, w),
        "linear": lambda x, _: torch_nvfp4.linear(x, packed, dense.global_scale),
    }
    # Of one slot, or row: forward and backward with respect to x, to the router weights, and to both.
    expected = {
        "moe": (2 * MLP + w13_products, 2 * MLP, 2 * MLP + w13_products),
        "grouped_gemm": (2 * w13_products, 2 * w13_products, 3 * w13_products),
        "grouped_gemm_swiglu": (3 * w13_products, 2 * w13_products, 3 * w13_products),
        "linear": (2 * 2 * 96 * HIDDEN,),
    }
    for op, call in calls.items():
        rows = TOKENS if op == "linear" else slots
        for needs, products in zip(((True, False), (False, True), (True, True)), expected[op], strict=False):
            leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip((x, topk_weights), needs, strict=True)]
            assert flops(lambda call=call, leaves=leaves: call(*leaves).sum().backward()) == rows * products, op


def test_modules_count_under_fake_tensors() -> None:
    with FakeTensorMode():
        experts = torch_nvfp4.NVFP4Experts(EXPERTS, HIDDEN, INNER, clamp_limit=7.0)
        routing = (torch.empty(TOKENS, TOP_K), torch.zeros(TOKENS, TOP_K, dtype=torch.int64))
        assert flops(lambda: experts(torch.empty(TOKENS, HIDDEN), *routing)) == TOKENS * TOP_K * MLP
