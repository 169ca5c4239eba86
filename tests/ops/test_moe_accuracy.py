"""``moe`` against the fp64 reference over the whole range of sizes, gates and routings, on every kernel there is."""

from __future__ import annotations

import itertools
import math
import zlib
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.layers import (
    BF16,
    FP32,
    GATES,
    Layer,
    PackedLayer,
    activations,
    dtypes_of,
    make_layer,
    preactivation_scale,
    run_moe,
    seeded,
)
from torch_nvfp4 import NVFP4Weight, reference
from torch_nvfp4.testing import TOLERANCE, assert_accurate, random_routing, relative_l2

gates = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


# Sizes


class Case(NamedTuple):
    m: int
    k: int
    i: int
    e: int
    top_k: int
    limit: float | None
    global_scale: float | None  # None: drawn from 2^-13 .. 2^-9, gate and up apart


# A covering design: every pair of values of two columns that can be afforded together (256 experts: K <= 128).
CASES = [
    Case(0, 64, 16, 1, 6, 15.0, None),
    Case(0, 64, 16, 256, 1, None, None),
    Case(1, 64, 16, 8, 1, 7.0, 2**-9),
    Case(1, 64, 16, 256, 8, 5.0, None),
    Case(2, 64, 16, 1, 6, 5.0, 2**-9),
    Case(2, 64, 16, 8, 1, 7.0, None),
    Case(2, 64, 16, 8, 1, 15.0, 2**-9),
    Case(7, 64, 16, 256, 8, 10.0, 2**-13),
    Case(7, 64, 16, 8, 2, 7.0, 2**-13),
    Case(16, 64, 16, 256, 8, 5.0, 2**-13),
    Case(33, 64, 16, 8, 6, None, 2**-13),
    Case(33, 64, 16, 256, 8, 10.0, None),
    Case(256, 64, 16, 256, 2, 7.0, 2**-13),
    Case(256, 64, 16, 256, 8, 15.0, None),
    Case(0, 128, 64, 8, 2, 5.0, 2**-13),
    Case(1, 128, 64, 8, 2, 15.0, None),
    Case(2, 128, 64, 256, 8, None, None),
    Case(7, 128, 64, 8, 1, None, 2**-13),
    Case(16, 128, 64, 256, 6, 10.0, 2**-9),
    Case(16, 128, 64, 8, 1, 15.0, 2**-13),
    Case(33, 128, 64, 1, 1, 7.0, None),
    Case(256, 128, 64, 8, 6, None, 2**-9),
    Case(0, 1024, 512, 8, 8, 7.0, 2**-9),
    Case(1, 1024, 512, 1, 6, 10.0, 2**-13),
    Case(2, 1024, 512, 1, 1, 10.0, 2**-13),
    Case(7, 1024, 512, 8, 6, 5.0, None),
    Case(16, 1024, 512, 8, 2, None, 2**-9),
    Case(33, 1024, 512, 1, 2, 15.0, 2**-9),
    Case(256, 1024, 512, 1, 1, 10.0, 2**-13),
    Case(0, 4096, 2048, 1, 2, 10.0, None),
    Case(1, 4096, 2048, 1, 8, None, 2**-13),
    Case(2, 4096, 2048, 8, 2, 10.0, None),
    Case(7, 4096, 2048, 1, 2, 15.0, 2**-9),
    Case(16, 4096, 2048, 1, 6, 7.0, None),
    Case(33, 4096, 2048, 1, 1, 5.0, None),
    Case(256, 4096, 2048, 1, 1, 5.0, 2**-9),
]


def test_cases_cover_every_pair() -> None:
    values = [
        (0, 1, 2, 7, 16, 33, 256),
        ((64, 16), (128, 64), (1024, 512), (4096, 2048)),
        (1, 8, 256),
        (1, 2, 6, 8),
        (None, 5.0, 7.0, 10.0, 15.0),
        (None, 2**-13, 2**-9),
    ]
    rows = [(c.m, (c.k, c.i), c.e, c.top_k, c.limit, c.global_scale) for c in CASES]
    for (a, first), (b, second) in itertools.combinations(enumerate(values), 2):
        wanted = set(itertools.product(first, second))
        if (a, b) == (1, 2):
            wanted -= {((1024, 512), 256), ((4096, 2048), 256)}
        if (a, b) == (1, 3):
            wanted |= {((4096, 2048), 6)}
        missing = wanted - {(row[a], row[b]) for row in rows}
        assert not missing


class Prepared(NamedTuple):
    packed: PackedLayer
    inputs: tuple[Tensor, Tensor, Tensor]  # hidden_states, topk_weights, topk_ids
    result: reference.MoEResult


@lru_cache(maxsize=1)
def prepare(case: Case, device: str) -> Prepared:
    """Weights, input and fp64 reference of a case, shared by its levels and dtypes."""
    m, k, i, e, top_k, limit, global_scale = case
    seed = zlib.crc32(repr(case).encode())
    layer = make_layer(e, k, i, seed=seed, global_scale=global_scale)
    # With a limit, about half of the pre-activations pass it; without one, fp16 must be able to hold the result.
    x = activations(m, k, seed=seed, scale=preactivation_scale(layer.w13, 2 * limit if limit else 3.0))
    topk_weights, topk_ids = random_routing(m, e, top_k, generator=seeded(seed))
    result = reference.moe_with_clamped_share(x, *layer, topk_weights, topk_ids, clamp_limit=limit)
    return Prepared(layer.packed(device), (x, topk_weights, topk_ids), result)


@pytest.mark.parametrize("case", CASES, ids=str, scope="module")
def test_moe_accuracy(case: Case, target: str) -> None:
    packed, inputs, (expected, share) = prepare(case, target)
    for dtype in dtypes_of(target):
        out = run_moe(packed, *inputs, device=target, dtype=dtype, clamp_limit=case.limit)
        assert_accurate(out, expected)
    if case.m and case.limit is not None:
        assert 0.1 < share < 0.9
        unclamped = run_moe(packed, *inputs, device=target, dtype=BF16)
        assert relative_l2(unclamped, expected) > 25 * TOLERANCE[BF16]


# K and I that are multiples of 16 and not of 64


@pytest.mark.parametrize(("k", "i"), [(16, 16), (48, 208), (80, 48), (208, 16), (144, 112)])
@pytest.mark.parametrize("m", [1, 5, 19])
def test_moe_ragged_sizes(m: int, k: int, i: int, target: str) -> None:
    layer = make_layer(4, k, i, seed=k + i, all_scales=True)
    x = activations(m, k, seed=m, scale=preactivation_scale(layer.w13, 8.0))
    topk_weights, topk_ids = random_routing(m, 4, 2, generator=seeded(m))
    expected = reference.moe(x, *layer, topk_weights, topk_ids, clamp_limit=7.0)
    for dtype in dtypes_of(target):
        out = run_moe(layer, x, topk_weights, topk_ids, device=target, dtype=dtype, clamp_limit=7.0)
        assert_accurate(out, expected)


# Gates


@gates
@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
def test_moe_activations(gate: dict[str, Any], on_input: bool, target: str) -> None:
    m, k, i, e, top_k = 7, 128, 64, 8, 2
    layer = make_layer(e, k, i, seed=1)
    topk_weights, topk_ids = random_routing(m, e, top_k, generator=seeded(2))
    if on_input:
        topk_weights = topk_weights * 2
    # relu2 squares the pre-activations, so smaller ones keep fp16 in range.
    std = 2.0 if gate["activation"] == "relu2" else 10.0
    x = activations(m, k, seed=3, scale=preactivation_scale(layer.w13, std))
    options = {**gate, "apply_router_weight_on_input": on_input}
    expected, share = reference.moe_with_clamped_share(x, *layer, topk_weights, topk_ids, **options)
    assert (share > 0.2) == ("clamp_limit" in gate)
    for dtype in dtypes_of(target):
        assert_accurate(run_moe(layer, x, topk_weights, topk_ids, device=target, dtype=dtype, **options), expected)


# Routing


def routings(m: int, e: int, top_k: int) -> dict[str, Tensor]:
    """topk_ids of every kind that a kernel may trip over; what is skipped may be most of a token or all of it."""
    _, random = random_routing(m, e, top_k, generator=seeded(0))
    far = random.clone()
    far.view(-1)[::2] = torch.tensor([-1, e, -(2**63), 2**63 - 1, 2**32, 2**32 + 1, 2**40, -(2**32) + 1]).repeat(
        m * top_k
    )[: far.view(-1)[::2].numel()]
    nothing = random.clone()
    nothing[1::2] = -1
    return {
        "one-expert": torch.full((m, top_k), e - 2),
        "two-experts": torch.tensor([1, e - 1]).repeat(m, top_k)[:, :top_k].contiguous(),
        "repeated": random[:, :1].expand(m, top_k).contiguous(),
        "out-of-range": far,
        "empty-tokens": nothing,
        "all-skipped": torch.full((m, top_k), e),
    }


@pytest.mark.parametrize("kind", routings(1, 2, 1))
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("m", [1, 20])
def test_moe_routings(kind: str, ids_dtype: torch.dtype, m: int, target: str) -> None:
    e, top_k = 8, 3
    layer = make_layer(e, 128, 64, seed=4)
    ids = routings(m, e, top_k)[kind]
    if ids_dtype == torch.int32:
        ids = ids.clamp(-(2**31), 2**31 - 1).to(torch.int32)
    topk_weights = torch.rand(m, top_k, generator=seeded(5))
    # A skipped slot's weight is not used.
    topk_weights[(ids < 0) | (ids >= e)] = math.nan
    x = activations(m, 128, seed=6, scale=preactivation_scale(layer.w13, 10.0))
    for on_input in (False, True):
        options = {"clamp_limit": 10.0, "apply_router_weight_on_input": on_input}
        expected = reference.moe(x, *layer, topk_weights, ids, **options)
        for dtype in dtypes_of(target):
            assert_accurate(run_moe(layer, x, topk_weights, ids, device=target, dtype=dtype, **options), expected)
    skipped = ((ids < 0) | (ids >= e)).all(-1)
    assert bool((expected[skipped] == 0).all())


def test_moe_without_slots(target: str, dtype: torch.dtype) -> None:
    layer = make_layer(4, 128, 64, seed=4)
    topk_weights, topk_ids = torch.empty(5, 0), torch.empty(5, 0, dtype=torch.int32)
    out = run_moe(layer, activations(5, 128, seed=6), topk_weights, topk_ids, device=target, dtype=dtype)
    assert torch.equal(out, torch.zeros(5, 128, dtype=dtype))


def test_moe_expert_map(device: str, dtype: torch.dtype) -> None:
    """Two ranks with half of the experts each add up to the whole layer."""
    e, m, top_k = 16, 21, 4
    layer = make_layer(e, 128, 64, seed=7)
    topk_weights, topk_ids = random_routing(m, e, top_k, generator=seeded(8))
    x = activations(m, 128, seed=9, scale=preactivation_scale(layer.w13, 10.0))
    whole = reference.moe(x, *layer, topk_weights, topk_ids, clamp_limit=7.0)
    total = torch.zeros_like(whole)
    local = torch.randperm(e, generator=seeded(10))
    for owned in local.chunk(2):
        expert_map = torch.full((e,), -1, dtype=torch.int32)
        expert_map[owned] = torch.arange(owned.numel(), dtype=torch.int32)
        rank = Layer(*(NVFP4Weight(*(t.view(torch.uint8)[owned].view(t.dtype) if t.dtype != FP32 else t[owned]
                                     for t in weight)) for weight in layer))  # fmt: skip
        routing = (topk_weights, topk_ids, expert_map)
        expected = reference.moe(x, *rank, *routing, clamp_limit=7.0)
        out = run_moe(rank, x, *routing, device=device, dtype=dtype, clamp_limit=7.0)
        assert_accurate(out, expected)
        total += out
    assert_accurate(total, whole, dtype=dtype)


def test_moe_expert_map_out_of_range(target: str) -> None:
    """Ids outside the map, and map entries outside the local experts, contribute nothing."""
    layer = make_layer(4, 64, 32, seed=11)
    expert_map = torch.tensor([3, 4, -1, -7, 2**31 - 1, -(2**31), 0, 2], dtype=torch.int32)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [8, -1], [2**32, 6], [2**62, 7], [-(2**63), 0]])
    topk_weights = torch.rand(ids.shape, generator=seeded(12))
    x = activations(8, 64, seed=13, scale=preactivation_scale(layer.w13, 10.0))
    for table in (expert_map, expert_map[:0]):
        expected = reference.moe(x, *layer, topk_weights, ids, table, clamp_limit=7.0)
        out = run_moe(layer, x, topk_weights, ids, table, device=target, dtype=BF16, clamp_limit=7.0)
        assert_accurate(out, expected)
