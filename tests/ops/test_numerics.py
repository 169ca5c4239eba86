"""What holds beside accuracy: NaN stays in its token, results repeat, tokens do not mix, memory stays small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from helpers.layers import (
    BF16,
    FP16,
    FP32,
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
from torch_nvfp4.gate import Activation, gated_activation
from torch_nvfp4.testing import TOLERANCE, assert_accurate, random_routing, random_weight, relative_l2

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


@pytest.mark.parametrize("m", [1, 4, 5, 10, 40])
@pytest.mark.parametrize("global_scale", [2.0**-9, 8.0], ids=["normal", "subnormal"])
def test_fp16_activations_count_to_their_last_bit(m: int, global_scale: float, target: str) -> None:
    """Some kernels multiply them as two bf16 numbers. Rounded to one they would be wrong by twice the tolerance."""
    layer = make_layer(4, 256, 128, seed=30, global_scale=2.0**-9)
    layer = layer._replace(
        w13=random_weight((4, 256, 256), gated=True, global_scale=global_scale, generator=seeded(31))
    )
    x = torch.randn(m, 256, generator=seeded(32)) * preactivation_scale(layer.w13, 2.0)
    x = x.to(FP16).double()
    assert (global_scale == 8.0) == bool(x.std() < torch.finfo(FP16).smallest_normal)
    routing = random_routing(m, 4, 3, generator=seeded(33))
    expected = reference.moe(x, *layer, *routing)
    assert_accurate(run_moe(layer, x, *routing, device=target, dtype=FP16), expected)
    if global_scale != 8.0:
        with pytest.raises(AssertionError, match="relative L2 error"):
            assert_accurate(reference.moe(x.to(BF16).double(), *layer, *routing), expected, dtype=FP16)


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


@pytest.mark.parametrize("gate", ["silu-clamped", "gpt-oss", "swiglustep-clamped"])
@pytest.mark.parametrize("m", [1, 2, 24])
def test_gates_that_overflow_fp32_are_zero(m: int, gate: str, target: str) -> None:
    """Finite activations of which fp32 makes a gate of minus infinity: silu of it is 0, as of the exact number."""
    layer = make_layer(2, 128, 64, seed=71, global_scale=1.0)
    x = torch.zeros(m, 128)
    x[0, 5] = 3e38
    x[m - 1, 5] = 3e38 if m == 1 else -3e38
    routing = random_routing(m, 2, 2, generator=seeded(72))
    expected = reference.moe(x, *layer, *routing, **GATES[gate])
    assert bool(expected.isfinite().all())
    gate_up = reference.grouped_gemm(x, layer.w13, *reference.route(routing[1], None, 2))
    assert float((gate_up[:, :64] < -torch.finfo(FP32).max).double().mean()) > 0.25 / m
    for dtype in dtypes_of(target):
        if dtype is not FP16:
            assert_accurate(run_moe(layer, x, *routing, device=target, dtype=dtype, **GATES[gate]), expected)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "without-gate"])
def test_minus_infinity_gates_to_zero(gated: bool, target: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[-math.inf, -3e38 if dtype is not FP16 else -6e4] * 8, [2.0] * 16]).reshape(1 if gated else 2, -1)
    for name in GATES if gated else ("silu", "gelu", "gelu_tanh", "relu2"):
        if GATES[name].get("alpha", 1.0) > 0:
            out = torch_nvfp4.swiglu(x.to(target, dtype), gated=gated, **GATES[name]).cpu()
            assert bool((out[0] == 0).all()), name


def test_a_large_gate_of_relu2_beside_a_small_up(target: str) -> None:
    """The square alone would overflow where the product does not, and times 0 be NaN."""
    gate = torch.tensor([2e19, 3e38, 3e38, 2.0**70, 1e-25, -3e38, 3.0]).repeat(5)
    up = torch.tensor([0.0, -0.0, 2.0**-130, 2.0**-40, 1e20, 0.0, 5.0]).repeat(5)
    for dtype in dtypes_of(target):
        if dtype is FP16:
            continue
        gate_up = torch.cat([gate, up])[None].to(target, dtype).requires_grad_()
        out = torch_nvfp4.swiglu(gate_up, activation="relu2")
        out.backward(torch.zeros_like(out))
        exact = gate_up.detach().double().chunk(2, 1)
        expected = (exact[0].relu() ** 2 * exact[1]).to(dtype)
        assert bool(expected.isfinite().all())
        torch.testing.assert_close(out.detach(), expected, rtol=2e-7 if dtype is FP32 else 1e-2, atol=0.0)
        assert gate_up.grad is not None
        assert not bool(gate_up.grad.any())
        plain = gated_activation(*gate_up.detach().float().chunk(2, 1), Activation.relu2)  # what decompositions compute
        torch.testing.assert_close(plain.to(dtype), expected, rtol=2e-7 if dtype is FP32 else 1e-2, atol=0.0)


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
    smallest_matrix = k * i  # one expert's w2 with a single byte per value
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
