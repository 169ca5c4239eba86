"""Values of every op against the fp64 reference, on every kernel that this machine has."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_nvfp4
from torch_nvfp4 import NVFP4Weight, reference
from torch_nvfp4.format import dequantize, pack_codes, row_global_scale
from torch_nvfp4.testing import TOLERANCE, assert_accurate, random_routing, random_weight, relative_l2

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]


@pytest.fixture(params=DTYPES, ids=["bf16", "fp16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of activations; ask for it beside ``target`` or ``device``."""
    if request.param is FP32 and any(str(value).startswith("cuda") for value in request.node.callspec.params.values()):
        pytest.skip("CUDA takes bfloat16 and float16")
    return request.param


def dtypes_of(device: str) -> list[torch.dtype]:
    return DTYPES if device == "cpu" else DTYPES[:2]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """fp64 values that bf16, fp16 and fp32 all hold exactly, so that one reference serves the three."""
    x = (torch.randn(shape, generator=seeded(seed)) * scale).to(BF16)
    return torch.where(x.abs() < 2.0**-16, 0.0, x.double())


def to(device: str, *tensors: Any) -> tuple[Any, ...]:
    return tuple(t.to(device) if isinstance(t, Tensor) else t for t in tensors)


class PackedLayer(NamedTuple):
    """The weight arguments of ``moe``."""

    w13: Tensor
    w13_global_scale: Tensor
    w2: Tensor
    w2_global_scale: Tensor


class Layer(NamedTuple):
    """The weights of one MoE layer, on the CPU."""

    w13: NVFP4Weight  # [E, 2I, K]
    w2: NVFP4Weight  # [E, K, I]

    def packed(self, device: str) -> PackedLayer:
        w13, w2 = (NVFP4Weight(*to(device, *weight)) for weight in self)
        return PackedLayer(torch_nvfp4.pack(w13, gated=True), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale)


def make_layer(e: int, k: int, i: int, *, seed: int, global_scale: float | None = None, **options: Any) -> Layer:
    generator = seeded(seed)
    w13 = random_weight((e, 2 * i, k), gated=True, global_scale=global_scale, generator=generator, **options)
    return Layer(w13, random_weight((e, k, i), global_scale=global_scale, generator=generator, **options))


def preactivation_scale(w13: NVFP4Weight, std: float) -> float:
    """The scale of normal activations for which pre-activations have this standard deviation, from a sample of rows."""
    rows = slice(None, None, max(1, w13.data.shape[-2] // 64))
    data, scale = w13.data[..., rows, :], w13.scale.view(torch.uint8)[..., rows, :].view(torch.float8_e4m3fn)
    sample = dequantize(NVFP4Weight(data, scale, torch.ones(w13.data.shape[:-2])))
    sample = sample * row_global_scale(w13)[..., rows, None]
    return std / float(sample.square().sum(-1).mean().sqrt())


def run_moe(
    layer: Layer | PackedLayer, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None, *,
    device: str, dtype: torch.dtype, **options: Any,
) -> Tensor:  # fmt: skip
    packed = layer.packed(device) if isinstance(layer, Layer) else layer
    routing = to(device, topk_weights, topk_ids, expert_map)
    out = torch_nvfp4.moe(x.to(device, dtype), *packed, *routing, **options)
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert out.device.type == device
    assert out.is_contiguous()
    return out.cpu()


# Accuracy over the whole range of sizes


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


# Activations


GATES: dict[str, dict[str, Any]] = {
    "silu": {"activation": "silu"},
    "silu-clamped": {"activation": "silu", "clamp_limit": 7.0},
    "gpt-oss": {"activation": "silu", "clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0},
    "alpha-beta": {"activation": "silu", "alpha": -0.5, "beta": -2.0},
    "swiglustep": {"activation": "swiglustep"},
    "swiglustep-clamped": {"activation": "swiglustep", "clamp_limit": 7.0},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu2": {"activation": "relu2"},
}
gates = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


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


# NaN, infinities, determinism, independence


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize(
    "gate", [GATES["silu"], GATES["gpt-oss"], GATES["swiglustep-clamped"], GATES["relu2"]], ids=str
)
def test_moe_nan_and_infinity_stay_in_their_token(m: int, gate: dict[str, Any], target: str) -> None:
    layer = make_layer(4, 128, 64, seed=14)
    topk_weights, topk_ids = random_routing(m, 4, 2, generator=seeded(15))
    x = activations(m, 128, seed=16, scale=preactivation_scale(layer.w13, 2.0))
    bad = torch.zeros(m, dtype=torch.bool)
    for token, value in ((0, math.nan), (2, math.inf), (7, -math.inf), (39, -math.nan)):
        if token < m:
            x[token, (37 * token + 5) % 128] = value
            bad[token] = True
    if m > 20:
        topk_weights[20, 1] = math.nan
        bad[20] = True
    clean = reference.moe(x.nan_to_num(0, 0, 0), *layer, topk_weights.nan_to_num(0), topk_ids, **gate)
    for dtype in dtypes_of(target):
        out = run_moe(layer, x, topk_weights, topk_ids, device=target, dtype=dtype, **gate)
        assert bool(out[bad].isnan().all())
        assert_accurate(out[~bad], clean[~bad])


def test_linear_nan_and_infinity_stay_in_their_row(target: str, dtype: torch.dtype) -> None:
    weight = random_weight((64, 192), generator=seeded(17))
    x = activations(9, 192, seed=18)
    x[1, 3], x[4, 100], x[8, 191] = math.nan, math.inf, -math.inf
    (w,) = (NVFP4Weight(*to(target, *weight)),)
    out = torch_nvfp4.linear(x.to(target, dtype), torch_nvfp4.pack(w), w.global_scale).cpu()
    bad = ~x.isfinite().all(-1)
    assert bool(out[1].isnan().all())
    assert not bool(out[bad].isfinite().any())
    assert_accurate(out[~bad], reference.linear(x, weight)[~bad])


@pytest.mark.parametrize("m", [1, 4, 64])
def test_deterministic(m: int, target: str, dtype: torch.dtype) -> None:
    layer = make_layer(8, 256, 128, seed=19)
    x = activations(m, 256, seed=20, scale=preactivation_scale(layer.w13, 10.0)).to(target, dtype)
    routing = to(target, *random_routing(m, 8, 6, generator=seeded(21)))
    arguments = (x, *layer.packed(target), *routing)
    before = [t.clone() for t in arguments]
    first = torch_nvfp4.moe(*arguments, clamp_limit=7.0)
    for _ in range(4):
        assert torch.equal(torch_nvfp4.moe(*arguments, clamp_limit=7.0), first)
    assert all(torch.equal(old, new) for old, new in zip(before, arguments, strict=True))


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("m", [1, 50])
@pytest.mark.usefixtures("restore_threads")
def test_threads_do_not_change_the_result(m: int, dtype: torch.dtype) -> None:
    layer = make_layer(8, 256, 128, seed=22)
    x = activations(m, 256, seed=23, scale=preactivation_scale(layer.w13, 10.0))
    routing = random_routing(m, 8, 2, generator=seeded(24))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_moe(layer, x, *routing, device="cpu", dtype=dtype, clamp_limit=7.0))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_token_does_not_depend_on_its_batch(target: str, dtype: torch.dtype) -> None:
    """Beside huge, tiny and NaN tokens that share its experts."""
    m = 33
    layer = make_layer(4, 256, 128, seed=25)
    x = activations(m, 256, seed=26, scale=preactivation_scale(layer.w13, 1.0))
    factor = 2.0**3 if dtype is FP16 else 2.0**10
    x[1::4] *= factor
    x[2::4] /= factor
    x[3, 0] = math.nan
    x = x.to(dtype).double()
    topk_weights, topk_ids = random_routing(m, 4, 2, generator=seeded(27))
    batch = run_moe(layer, x, topk_weights, topk_ids, device=target, dtype=dtype)
    for token in (0, 1, 2, 4, 32):
        one = slice(token, token + 1)
        arguments = (x[one], topk_weights[one], topk_ids[one])
        alone = run_moe(layer, *arguments, device=target, dtype=dtype)
        assert relative_l2(batch[one], alone.double()) <= TOLERANCE[dtype]
        hidden, *routing = arguments
        assert_accurate(batch[one], reference.moe(hidden, *layer, *routing))


# Numerics


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_scaling_activations_scales_the_output_exactly(m: int, dtype: torch.dtype, target: str) -> None:
    if dtype is FP32 and target == "cuda":
        pytest.skip("CUDA takes bfloat16 and float16")
    weight = NVFP4Weight(*to(target, *random_weight((96, 1024), global_scale=2.0**-13, generator=seeded(28))))
    packed = torch_nvfp4.pack(weight)
    x = torch.randn(m, 1024, generator=seeded(29)).to(target, dtype)
    out = torch_nvfp4.linear(x, packed, weight.global_scale)
    for power in (-20, 20):
        scaled = torch_nvfp4.linear(x * 2.0**power, packed, weight.global_scale)
        assert torch.equal(scaled, out * 2.0**power)


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("factor", [100.0, 3000.0])
def test_massive_outlier_channels(m: int, factor: float, target: str, dtype: torch.dtype) -> None:
    """A few channels far above the rest, as trained models have them, cost no accuracy."""
    k = 4096
    weight = random_weight((64, k), generator=seeded(30))
    x = activations(m, k, seed=31)
    x[:, 1234] *= factor
    x = x.to(BF16).double()
    w = NVFP4Weight(*to(target, *weight))
    out = torch_nvfp4.linear(x.to(target, dtype), torch_nvfp4.pack(w), w.global_scale)
    assert_accurate(out.cpu(), reference.linear(x, weight))


@pytest.mark.parametrize("m", [1, 20])
def test_moe_outlier_channels(m: int, target: str, dtype: torch.dtype) -> None:
    layer = make_layer(4, 1024, 128, seed=62)
    x = activations(m, 1024, seed=63, scale=preactivation_scale(layer.w13, 2.0))
    x[:, 321] *= 8 if dtype is FP16 else 100
    routing = random_routing(m, 4, 2, generator=seeded(64))
    expected = reference.moe(x, *layer, *routing, clamp_limit=7.0)
    assert_accurate(run_moe(layer, x, *routing, device=target, dtype=dtype, clamp_limit=7.0), expected)


@pytest.mark.parametrize("activation", ["silu", "swiglustep"])
def test_clamp_comes_before_rounding(activation: str, target: str) -> None:
    """Pre-activations beyond fp16's range: as infinities, a negative gate would come out as NaN."""
    layer = make_layer(4, 128, 64, seed=65, global_scale=2.0**-9)
    x = activations(9, 128, seed=66, scale=preactivation_scale(layer.w13, 6e4))
    assert float(x.abs().max()) < torch.finfo(FP16).max
    routing = random_routing(9, 4, 2, generator=seeded(67))
    order, offsets = reference.route(routing[1], None, 4)
    gate_up = reference.grouped_gemm(x, layer.w13, order, offsets)
    assert float((gate_up[:, :64] < -torch.finfo(FP16).max).double().mean()) > 0.05
    options = {"activation": activation, "clamp_limit": 8.0}
    out = run_moe(layer, x, *routing, device=target, dtype=FP16, **options)
    assert_accurate(out, reference.moe(x, *layer, *routing, **options))


# Memory


def misaligned(tensor: Tensor, elements: int = 1) -> Tensor:
    """A contiguous copy that begins ``elements`` elements after the start of its storage."""
    storage = tensor.new_empty(tensor.numel() + elements)
    view = storage[elements:].view(tensor.shape)
    return view.copy_(tensor)


def test_misaligned_tensors(target: str, dtype: torch.dtype) -> None:
    m, k, i = 11, 160, 80
    layer = make_layer(4, k, i, seed=32)
    x = activations(m, k, seed=33, scale=preactivation_scale(layer.w13, 10.0)).to(target, dtype)
    w13, g13, w2, g2 = layer.packed(target)
    weights, ids = to(target, *random_routing(m, 4, 2, generator=seeded(34)))
    expert_map = torch.arange(4, dtype=torch.int32, device=target)
    expected = torch_nvfp4.moe(x, w13, g13, w2, g2, weights, ids, expert_map, clamp_limit=7.0)
    moved = [misaligned(t) for t in (x, g13, g2, weights, ids, expert_map)]
    x_, g13_, g2_, weights_, ids_, map_ = moved
    # What pack returns is aligned; a tensor inside a mapped file may stand at any byte.
    w13_, w2_ = (misaligned(w13), misaligned(w2)) if target == "cpu" else (w13, w2)
    assert x_.data_ptr() % 16 != 0
    out = torch_nvfp4.moe(x_, w13_, g13_, w2_, g2_, weights_, ids_, map_, clamp_limit=7.0)
    assert torch.equal(out, expected)
    order, offsets = torch_nvfp4.route(ids_, map_, 4)
    gate_up = torch_nvfp4.grouped_gemm(x_, w13_, g13_, misaligned(order), misaligned(offsets))
    inner = torch_nvfp4.swiglu(misaligned(gate_up), clamp_limit=7.0)
    rows = torch_nvfp4.grouped_gemm(misaligned(inner), w2_, g2_, misaligned(order), misaligned(offsets))
    combined = torch_nvfp4.combine(misaligned(rows), weights_, ids_, map_, 4)
    # The steps round gate_up too.
    assert relative_l2(combined, expected.double()) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("m", [1, 16])
def test_moe_allocates_no_dequantized_weights(m: int, target: str) -> None:
    e, k, i, top_k = 8, 1024, 512, 2
    layer = make_layer(e, k, i, seed=35)
    arguments = (
        activations(m, k, seed=36).to(target, BF16),
        *layer.packed(target),
        *to(target, *random_routing(m, e, top_k, generator=seeded(37))),
    )
    torch_nvfp4.moe(*arguments)
    smallest_matrix = k * i  # one expert's w2 with a single byte a value
    if target == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch_nvfp4.moe(*arguments)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            torch_nvfp4.moe(*arguments)
        # All that was ever allocated, freed or not, is at least the peak.
        peak = sum(size for event in profile.events() if (size := event.self_cpu_memory_usage) > 0)
        assert peak >= m * k * 2  # the output at least: the profiler saw the op
    assert peak < smallest_matrix


# The steps of moe


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


def routed(m: int, e: int, top_k: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """topk_weights, topk_ids (a few of them out of range), order, offsets."""
    topk_weights, topk_ids = random_routing(m, e, top_k, generator=seeded(seed))
    topk_ids.view(-1)[3::7] = -1
    return topk_weights, topk_ids, *reference.route(topk_ids, None, e)


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


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
def test_moe_equals_its_steps(on_input: bool, target: str, dtype: torch.dtype) -> None:
    m, e, k, i, top_k = 17, 8, 192, 96, 3
    layer = make_layer(e, k, i, seed=46)
    topk_weights, topk_ids, _, _ = routed(m, e, top_k, seed=47)
    expert_map = torch.randperm(e, generator=seeded(48)).to(torch.int32)
    x = activations(m, k, seed=49, scale=preactivation_scale(layer.w13, 10.0))
    weights, ids, table, hidden = to(target, topk_weights, topk_ids, expert_map, x.to(dtype))
    w13, g13, w2, g2 = layer.packed(target)
    fused = torch_nvfp4.moe(
        hidden, w13, g13, w2, g2, weights, ids, table, clamp_limit=7.0, apply_router_weight_on_input=on_input
    )
    order, offsets = torch_nvfp4.route(ids, table, e)
    inner = torch_nvfp4.grouped_gemm_swiglu(
        hidden, w13, g13, order, offsets, weights if on_input else None, clamp_limit=7.0
    )
    rows = torch_nvfp4.grouped_gemm(inner, w2, g2, order, offsets)
    out = torch_nvfp4.combine(rows, torch.ones_like(weights) if on_input else weights, ids, table, e)
    assert relative_l2(fused, out.double()) <= TOLERANCE[dtype]


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


# Packing


PACK_SHAPES = [(16, 16), (48, 80), (64, 64), (208, 144), (1, 16, 48), (3, 96, 64), (5, 160, 272)]


@pytest.mark.parametrize("shape", PACK_SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_pack_round_trip(shape: tuple[int, ...], gated: bool, target: str) -> None:
    if gated:
        shape = (*shape[:-2], 2 * shape[-2], shape[-1])
    *experts, n, k = shape
    weight = random_weight(shape, gated=gated, all_scales=True, generator=seeded(58))
    w = NVFP4Weight(*to(target, *weight))
    packed = torch_nvfp4.pack(w, gated=gated)
    assert packed.dtype == torch.uint8
    rows = [2, n // 2] if gated else [n]
    if target == "cpu":
        assert list(packed.shape) == [*experts, *rows, math.ceil(k / 64), 36]
    else:
        assert list(packed.shape[:-1]) == [*experts, *rows]
    back = torch_nvfp4.unpack(packed, k, w.global_scale, gated=gated)
    assert torch.equal(back.data.cpu(), weight.data)
    assert torch.equal(back.scale.cpu().view(torch.uint8), weight.scale.view(torch.uint8))
    assert back.global_scale is w.global_scale
    # From other strides, the same bytes.
    transposed = w._replace(data=w.data.mT.contiguous().mT)
    assert torch.equal(torch_nvfp4.pack(transposed, gated=gated), packed)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_packed_bytes_do_not_depend_on_the_level(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed weight that was saved on one machine serves another."""
    weight = random_weight((2, 96, 144), gated=gated, all_scales=True, generator=seeded(59))
    best = torch_nvfp4.pack(weight, gated=gated)
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", "portable")
    assert torch.equal(torch_nvfp4.pack(weight, gated=gated), best)


FINITE_SCALES = [byte for byte in range(256) if byte & 0x7F != 0x7F]


@st.composite
def every_code_and_scale(draw: st.DrawFn) -> NVFP4Weight:
    """A weight [N, K] with all 16 codes under each of the 254 finite scales, in a random order."""
    groups = draw(st.sampled_from([1, 2, 3, 4, 5, 9, 16]))
    n = math.ceil(len(FINITE_SCALES) / groups / 32) * 32
    generator = seeded(draw(st.integers(0, 2**32 - 1)))
    count = n * groups
    extra = torch.randint(len(FINITE_SCALES), (count - len(FINITE_SCALES),), generator=generator)
    scales = torch.tensor(FINITE_SCALES, dtype=torch.uint8)
    scales = torch.cat((scales, scales[extra]))[torch.randperm(count, generator=generator)]
    codes = torch.rand(count, 16, generator=generator).argsort(-1).to(torch.uint8)
    exponent = st.integers(-13, -9)
    gated = draw(st.booleans())
    powers = [draw(exponent), draw(exponent)] if gated else draw(exponent)
    return NVFP4Weight(
        pack_codes(codes.view(n, groups * 16)),
        scales.view(n, groups).view(torch.float8_e4m3fn),
        torch.tensor(powers, dtype=FP32).exp2(),
    )


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weight=every_code_and_scale(), tokens=st.sampled_from([1, 2, 3, 8, 64, 256]))
def test_every_code_times_every_scale_is_exact(target: str, weight: NVFP4Weight, tokens: int) -> None:
    """Identity activations read the weights back through the kernels: each product has 6 significant bits, which
    bf16, fp16 and fp32 hold."""
    gated = weight.global_scale.dim() == 1
    n, k = weight.data.shape[0], weight.data.shape[1] * 2
    w = NVFP4Weight(*to(target, *weight))
    packed = torch_nvfp4.pack(w, gated=gated)
    back = torch_nvfp4.unpack(packed, k, w.global_scale, gated=gated)
    assert torch.equal(back.data.cpu(), weight.data)
    assert torch.equal(back.scale.cpu().view(torch.uint8), weight.scale.view(torch.uint8))

    expected = dequantize(weight, torch.float64).T
    ids = torch.zeros(k, 1, dtype=torch.int32, device=target)
    order, offsets = torch_nvfp4.route(ids, None, 1)
    # One token a call costs k calls; a few of them will do.
    chunks = range(0, k, tokens) if tokens > 2 else range(0, k, max(k // 8, tokens))
    for dtype in dtypes_of(target):
        identity = torch.eye(k, dtype=dtype, device=target)
        for start in chunks:
            rows = slice(start, start + tokens)
            out = torch_nvfp4.linear(identity[rows], packed, w.global_scale)
            assert torch.equal(out.cpu().double(), expected[rows])
        grouped = torch_nvfp4.grouped_gemm(identity, packed[None], w.global_scale[None], order, offsets)
        assert grouped.shape == (k, n)
        assert torch.equal(grouped.cpu().double(), expected)
        assert torch.equal(expected.to(dtype).double(), expected)


def test_gate_and_up_have_their_own_global_scale(target: str) -> None:
    weight = random_weight((2, 64, 80), gated=True, generator=seeded(60))
    weight = weight._replace(global_scale=torch.tensor([[2.0**-9, 2.0**-13], [2.0**-12, 2.0**-10]]))
    assert not torch.equal(row_global_scale(weight)[:, 0], row_global_scale(weight)[:, -1])
    w = NVFP4Weight(*to(target, *weight))
    x = activations(4, 80, seed=61)
    ids = torch.tensor([[0], [1], [0], [1]])
    order, offsets = reference.route(ids, None, 2)
    out = torch_nvfp4.grouped_gemm(
        *to(target, x.to(BF16), torch_nvfp4.pack(w, gated=True), w.global_scale, order, offsets)
    )
    expected = reference.grouped_gemm(x, weight, order, offsets)
    assert_accurate(out[:, :32].cpu(), expected[:, :32])
    assert_accurate(out[:, 32:].cpu(), expected[:, 32:])
