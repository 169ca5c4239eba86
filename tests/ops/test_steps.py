"""The steps of ``moe`` and ``linear`` against the fp64 reference, on every kernel there is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import torch_nvfp4
from helpers.layers import (
    BF16,
    GATES,
    activations,
    dtypes_of,
    make_layer,
    preactivation_scale,
    routed,
    run_moe,
    seeded,
    to,
)
from torch_nvfp4 import NVFP4Weight, reference
from torch_nvfp4.testing import assert_accurate, random_weight

gates = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


@gates
def test_swiglu(gate: dict[str, Any], target: str, dtype: torch.dtype) -> None:
    for shape in ((2,), (3, 34), (2, 5, 256), (0, 8), (4, 30)):
        gate_up = activations(*shape, seed=len(shape), scale=2.0 if gate["activation"] == "relu2" else 10.0)
        out = torch_nvfp4.swiglu(gate_up.to(target, dtype), **gate)
        expected = reference.swiglu(gate_up, **gate)
        assert out.dtype == dtype
        assert_accurate(out.cpu(), expected)


@gates
def test_swiglu_special_values(gate: dict[str, Any], target: str, dtype: torch.dtype) -> None:
    """NaN passes every clamp; infinities and the limit itself follow the formula."""
    limit = gate.get("clamp_limit", 7.0)
    values = [0.0, -0.0, 1e-3, -1e-3, 1.0, -1.0, math.nan, math.inf, -math.inf]
    # Where gelu is almost zero, its product with infinity depends on how it is computed.
    if not gate["activation"].startswith("gelu"):
        values += [limit, -limit, 1.25 * limit, -1.25 * limit, 60.0, -60.0]
    grid = torch.tensor(list(itertools.product(values, values)), dtype=dtype)  # [pairs, (gate, up)]
    gate_up = grid.T.reshape(1, -1)
    out = torch_nvfp4.swiglu(gate_up.to(target), **gate).cpu()
    expected = reference.swiglu(gate_up.double(), **gate).to(dtype)
    assert_accurate(out, expected)
    assert torch.equal(out.isnan(), expected.isnan())
    assert bool(out[0, grid.isnan().any(-1)].isnan().all())


@pytest.mark.parametrize("e", [1, 5, 300])
@pytest.mark.parametrize("mapped", [False, True], ids=["local", "mapped"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_route(e: int, mapped: bool, ids_dtype: torch.dtype, device: str) -> None:
    generator = seeded(e)
    ids_range = 3 * e if mapped else e + 2
    expert_map = torch.randint(-2, e + 2, (ids_range,), dtype=torch.int32, generator=generator) if mapped else None
    for m, top_k in ((0, 4), (1, 1), (1, 8), (7, 3), (257, 6), (3, 0), (1000, 2)):
        ids = torch.randint(-2, ids_range + 2, (m, top_k), generator=generator).to(ids_dtype)
        order, offsets = torch_nvfp4.route(*to(device, ids, expert_map), e)
        expected_order, expected_offsets = reference.route(ids, expert_map, e)
        assert order.dtype == offsets.dtype == torch.int32
        assert torch.equal(offsets.cpu(), expected_offsets)
        assert torch.equal(order.cpu(), expected_order)


@pytest.mark.parametrize("m", [0, 1, 6, 40])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_grouped_gemm(m: int, gated: bool, target: str, dtype: torch.dtype) -> None:
    e, n, k, top_k = 5, 96, 144, 3
    weight = random_weight((e, n, k), gated=gated, generator=seeded(38))
    w = NVFP4Weight(*to(target, *weight))
    packed = torch_nvfp4.pack(w, gated=gated)
    topk_weights, _, order, offsets = routed(m, e, top_k, seed=39)
    for rows, scale in ((m, None), (m, topk_weights), (m * top_k, None)):
        x = activations(rows, k, seed=40)
        arguments = to(target, x.to(dtype), packed, w.global_scale, order, offsets, scale)
        out = torch_nvfp4.grouped_gemm(*arguments).cpu()
        assert out.dtype == dtype
        assert_accurate(out, reference.grouped_gemm(x, weight, order, offsets, scale))
        assert bool((out[order[offsets[-1] :].long()] == 0).all())


@gates
def test_grouped_gemm_swiglu(gate: dict[str, Any], target: str, dtype: torch.dtype) -> None:
    e, i, k, top_k = 5, 48, 144, 3
    weight = random_weight((e, 2 * i, k), gated=True, generator=seeded(41))
    w = NVFP4Weight(*to(target, *weight))
    packed = torch_nvfp4.pack(w, gated=True)
    for m in (0, 1, 9):
        topk_weights, _, order, offsets = routed(m, e, top_k, seed=42)
        x = activations(
            m, k, seed=43, scale=preactivation_scale(weight, 2.0 if gate["activation"] == "relu2" else 10.0)
        )
        for scale in (None, topk_weights):
            arguments = to(target, x.to(dtype), packed, w.global_scale, order, offsets, scale)
            out = torch_nvfp4.grouped_gemm_swiglu(*arguments, **gate).cpu()
            assert out.dtype == dtype
            assert_accurate(out, reference.grouped_gemm_swiglu(x, weight, order, offsets, scale, **gate))
            skipped = order[offsets[-1] :].long()
            assert bool((out[skipped] == 0).all())


@pytest.mark.parametrize("n", [1, 16, 77])
def test_combine(n: int, target: str, dtype: torch.dtype) -> None:
    e = 6
    for m, top_k in ((0, 2), (1, 1), (5, 8), (33, 2)):
        topk_weights, topk_ids, _, _ = routed(m, e, min(top_k, e), seed=44)
        x = activations(topk_ids.numel(), n, seed=45)
        skipped = (topk_ids < 0).reshape(-1)
        x[skipped] = math.nan
        topk_weights.view(-1)[skipped] = math.nan
        arguments = to(target, x.to(dtype), topk_weights, topk_ids)
        out = torch_nvfp4.combine(*arguments, None, e)
        assert out.dtype == dtype
        assert_accurate(out.cpu(), reference.combine(x, topk_weights, topk_ids, None, e))


@pytest.mark.parametrize("shape", [(256,), (1, 256), (7, 256), (2, 3, 256), (0, 256), (65, 256)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_linear(shape: tuple[int, ...], gated: bool, target: str, dtype: torch.dtype) -> None:
    n = 96
    weight = random_weight((n, 256), gated=gated, generator=seeded(50))
    w = NVFP4Weight(*to(target, *weight))
    packed = torch_nvfp4.pack(w, gated=gated)
    x, bias = activations(*shape, seed=51), activations(n, seed=52)
    for b in (None, bias):
        arguments = to(target, x.to(dtype), packed, w.global_scale, None if b is None else b.to(dtype))
        out = torch_nvfp4.linear(*arguments)
        assert out.dtype == dtype
        assert_accurate(out.cpu(), reference.linear(x, weight, b))


@pytest.mark.parametrize("k", [16, 48, 80, 208, 4096])
def test_linear_ragged_sizes(k: int, target: str) -> None:
    for n in (16, 48, 208):
        weight = random_weight((n, k), all_scales=True, generator=seeded(k + n))
        w = NVFP4Weight(*to(target, *weight))
        packed = torch_nvfp4.pack(w)
        for m in (1, 3, 18):
            x = activations(m, k, seed=53)
            for dtype in dtypes_of(target):
                out = torch_nvfp4.linear(x.to(target, dtype), packed, w.global_scale)
                assert_accurate(out.cpu(), reference.linear(x, weight))


@pytest.mark.parametrize("op", ["moe", "grouped_gemm", "grouped_gemm_swiglu", "combine", "linear", "swiglu"])
def test_empty_batch(op: str, target: str) -> None:
    layer = make_layer(2, 64, 32, seed=54)
    w13, g13, w2, g2 = layer.packed(target)
    x = torch.empty(0, 64, dtype=BF16, device=target)
    weights = torch.empty(0, 2, device=target)
    ids = torch.empty(0, 2, dtype=torch.int64, device=target)
    order, offsets = torch_nvfp4.route(ids, None, 2)
    assert order.shape == (0,)
    assert offsets.tolist() == [0, 0, 0]
    plain = NVFP4Weight(*to(target, *random_weight((48, 64), generator=seeded(55))))
    out, columns = {
        "moe": lambda: (torch_nvfp4.moe(x, w13, g13, w2, g2, weights, ids), 64),
        "grouped_gemm": lambda: (torch_nvfp4.grouped_gemm(x, w13, g13, order, offsets), 64),
        "grouped_gemm_swiglu": lambda: (torch_nvfp4.grouped_gemm_swiglu(x, w13, g13, order, offsets), 32),
        "combine": lambda: (torch_nvfp4.combine(x, weights, ids, None, 2), 64),
        "linear": lambda: (torch_nvfp4.linear(x, torch_nvfp4.pack(plain), plain.global_scale), 48),
        "swiglu": lambda: (torch_nvfp4.swiglu(x), 32),
    }[op]()
    assert out.shape == (0, columns)
    assert out.dtype == BF16


def test_moe_without_experts_per_token_is_zero(target: str) -> None:
    layer = make_layer(2, 64, 32, seed=56)
    x = activations(3, 64, seed=57)
    ids = torch.empty(3, 0, dtype=torch.int64)
    out = run_moe(layer, x, torch.empty(3, 0), ids, device=target, dtype=BF16)
    assert torch.equal(out, torch.zeros_like(out))
