"""Gradients of activations and router weights against fp64 autograd through the reference, on every kernel there is."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from helpers.expert_kinds import KINDS, Experts, Kind, activated, expected_moe, hidden_of, make_experts
from helpers.layers import BF16, FP32, GATES, activations, dtypes_of, seeded, to
from torch_nvfp4 import reference
from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.gate import activate, parse_activation
from torch_nvfp4.testing import TOLERANCE, assert_accurate, random_routing, random_weight, relative_l2

E, K, I, TOP_K = 16, 144, 48, 2  # noqa: E741 (three panels of 16 rows, and part of a block)
MANY = 72  # experts: enough tiles for the kernels on wgmma
ALL = {**{name: Kind(gate, True, False) for name, gate in GATES.items()}, **KINDS}
UNBIASED = [name for name, kind in ALL.items() if not kind.biased]
# A bias is added before the activation, whichever it is.
kinds = pytest.mark.parametrize("name", [*UNBIASED, "gpt-oss with biases", "relu2 without a gate, with biases"])
# What takes another way through the kernels with more or fewer tokens.
few_kinds = ["silu-clamped", "gpt-oss with biases", "relu2 without a gate", "situ"]


def leaf_of(tensor: Tensor, device: str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """A copy that requires a gradient."""
    return tensor.detach().to(device, dtype, copy=True).requires_grad_()


class Case:
    """A layer, its input, the gradient of its output, and what flows back in fp64."""

    def __init__(self, name: str, m: int, on_input: bool) -> None:
        seed = zlib.crc32(f"{name} {m}".encode())
        self.experts = make_experts(ALL[name], E, K, I, seed=seed)
        self.x = hidden_of(self.experts, m, seed=seed)
        self.weights, self.ids = random_routing(m, E, TOP_K, generator=seeded(seed))
        self.ids.view(-1)[5::11] = -1
        self.ids[9::9] = -1  # tokens without an expert
        self.grad = activations(m, K, seed=seed + 1)
        x, weights = leaf_of(self.x), leaf_of(self.weights, dtype=torch.float64)
        expected_moe(self.experts, x, weights, self.ids, on_input=on_input).backward(self.grad)
        self.grads = x.grad, weights.grad

    def run(self, device: str, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
        x, weights = leaf_of(self.x, device, dtype), leaf_of(self.weights, device)
        experts, gate = self.experts, self.experts.kind.gate
        arguments = (*experts.weights(device), weights, self.ids.to(device))
        out = torch_nvfp4.moe(x, *arguments, **experts.biases(device), **gate, **options)
        out.backward(self.grad.to(device, dtype))
        assert x.grad is not None
        assert weights.grad is not None
        assert (x.grad.dtype, weights.grad.dtype) == (dtype, FP32)
        return x.grad.cpu(), weights.grad.cpu()


prepared = lru_cache(maxsize=4)(Case)


@kinds
def test_moe(name: str, target: str) -> None:
    _check_moe(name, 30, target)


@pytest.mark.parametrize("m", [1, 200])
@pytest.mark.parametrize("name", few_kinds)
def test_moe_of_few_and_of_many_tokens(name: str, m: int, target: str) -> None:
    _check_moe(name, m, target)


def _check_moe(name: str, m: int, target: str) -> None:
    case = prepared(name, m, False)
    skipped = (case.ids < 0).all(1)
    assert m == 1 or bool(skipped.any())
    for dtype in dtypes_of(target):
        grad_x, grad_weights = case.run(target, dtype)
        assert_accurate(grad_x, case.grads[0])
        assert_accurate(grad_weights, case.grads[1], dtype=dtype)
        assert not grad_x[skipped].any()
        assert not grad_weights[case.ids < 0].any()


@kinds
def test_router_weight_on_input(name: str, target: str) -> None:
    case = prepared(name, 30, True)
    for dtype in dtypes_of(target):
        grad_x, grad_weights = case.run(target, dtype, apply_router_weight_on_input=True)
        assert_accurate(grad_x, case.grads[0])
        assert_accurate(grad_weights, case.grads[1], dtype=dtype)
        assert not grad_weights[case.ids < 0].any()


@pytest.mark.parametrize("k", [144, 320])
@pytest.mark.parametrize("name", few_kinds)
def test_many_experts(name: str, k: int, target: str) -> None:
    """Experts of few tokens, and of so many that a tile is full or not enough."""
    kind, m, inner = ALL[name], 200, 176
    experts = make_experts(kind, MANY, k, inner, seed=1)
    hidden, flow = hidden_of(experts, m, seed=2), activations(m, k, seed=3)
    topk_weights, ids = random_routing(m, MANY, 3, generator=seeded(4))
    ids[:, 0] = 0
    ids[:110, 1], ids[110:190, 1] = 1, 2
    ids[:40, 2], ids[40:43, 2] = 3, -1
    x, weights = leaf_of(hidden), leaf_of(topk_weights, dtype=torch.float64)
    expected_moe(experts, x, weights, ids).backward(flow)
    arguments = experts.weights(target), ids.to(target), experts.biases(target)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = leaf_of(hidden, target, dtype), leaf_of(topk_weights, target)
        out = torch_nvfp4.moe(leaves[0], *arguments[0], leaves[1], arguments[1], **arguments[2], **kind.gate)
        return torch.autograd.grad(out, leaves, flow.to(target, dtype))

    for dtype in dtypes_of(target):
        grad_x, grad_weights = run(dtype)
        assert_accurate(grad_x.cpu(), x.grad)  # type: ignore[arg-type]
        assert_accurate(grad_weights.cpu(), weights.grad, dtype=dtype)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(run(dtype), (grad_x, grad_weights), strict=True))


@pytest.mark.parametrize("m", [30, 500])
def test_same_bits_twice(m: int, target: str, dtype: torch.dtype) -> None:
    case = prepared("gpt-oss with biases", m, False)
    first, second = case.run(target, dtype), case.run(target, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@kinds
def test_reference_in_fp64(name: str) -> None:
    """Autograd through ``reference.moe`` is what the loop over experts gives, and passes gradcheck."""
    case = prepared(name, 30, False)
    experts, gate = case.experts, case.experts.kind.gate
    x, weights = leaf_of(case.x), leaf_of(case.weights, dtype=torch.float64)

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        ids = case.ids[: x.shape[0]]
        return reference.moe(
            x, experts.w13, experts.w2, weights, ids, None, experts.w13_bias, experts.w2_bias, **gate
        )  # fmt: skip

    layer(x, weights).backward(case.grad)
    assert relative_l2(x.grad, case.grads[0]) < 1e-12  # type: ignore[arg-type]
    assert relative_l2(weights.grad, case.grads[1]) < 1e-12  # type: ignore[arg-type]
    few = x.detach()[:2].requires_grad_(), weights.detach()[:2].requires_grad_()
    assert torch.autograd.gradcheck(layer, few, fast_mode=True)


def test_expert_map(target: str, dtype: torch.dtype) -> None:
    """Of the experts of another rank no gradient comes; ids are global."""
    case = prepared("silu-clamped", 30, False)
    half = [None if part is None else _first_half(part) for part in case.experts[:4]]
    local = Experts(*half, case.experts.kind)  # type: ignore[arg-type]
    expert_map = torch.cat((torch.arange(E // 2, dtype=torch.int32), torch.full((E // 2,), -1, dtype=torch.int32)))
    x, weights = leaf_of(case.x), leaf_of(case.weights, dtype=torch.float64)
    kept = case.ids.where(case.ids < E // 2, -1)
    expected_moe(case.experts, x, weights, kept).backward(case.grad)
    leaf, router = leaf_of(case.x, target, dtype), leaf_of(case.weights, target)
    out = torch_nvfp4.moe(
        leaf, *local.weights(target), router, *to(target, case.ids, expert_map), **case.experts.kind.gate
    )
    out.backward(case.grad.to(target, dtype))
    assert_accurate(leaf.grad.cpu(), x.grad)  # type: ignore[union-attr, arg-type]
    assert_accurate(router.grad.cpu(), weights.grad, dtype=dtype)  # type: ignore[union-attr, arg-type]


def _first_half(part: Any) -> Any:
    if isinstance(part, NVFP4Weight):
        scale = part.scale.view(torch.uint8)[: E // 2].view(part.scale.dtype)
        return NVFP4Weight(part.data[: E // 2], scale, part.global_scale[: E // 2])
    return part[: E // 2]


def test_only_what_is_needed(target: str) -> None:
    case = prepared("gpt-oss with biases", 30, False)
    expected = case.run(target, BF16)
    experts = case.experts
    for needs in ((True, False), (False, True)):
        leaves = leaf_of(case.x, target, BF16), leaf_of(case.weights, target)
        for leaf, needed in zip(leaves, needs, strict=True):
            leaf.requires_grad_(needed)
        arguments = leaves[0], *experts.weights(target), leaves[1], case.ids.to(target)
        out = torch_nvfp4.moe(*arguments, **experts.biases(target), **experts.kind.gate)
        out.backward(case.grad.to(target, BF16))
        for leaf, needed, grad in zip(leaves, needs, expected, strict=True):
            assert (leaf.grad is not None) == needed
            assert not needed or torch.equal(leaf.grad.cpu(), grad)  # type: ignore[union-attr]


def test_no_tokens(target: str, dtype: torch.dtype) -> None:
    experts = make_experts(ALL["silu"], E, K, I, seed=0)
    x = torch.zeros(0, K, dtype=dtype, device=target, requires_grad=True)
    weights = torch.zeros(0, TOP_K, device=target, requires_grad=True)
    ids = torch.zeros(0, TOP_K, dtype=torch.int64, device=target)
    torch_nvfp4.moe(x, *experts.weights(target), weights, ids).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    assert (x.grad.shape, weights.grad.shape) == ((0, K), (0, TOP_K))


# ---- the steps


@pytest.mark.parametrize("m", [1, 30, 200])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_grouped_gemm(gated: bool, scaled: bool, m: int, target: str, dtype: torch.dtype) -> None:
    _check_grouped_gemm(gated, scaled, m, target, dtype, bias=None)
    if m == 200 and dtype != FP32:
        _check_grouped_gemm(gated, scaled, m, target, dtype, bias=None, experts=MANY)


@pytest.mark.parametrize("scaled", [False, True])
@kinds
def test_grouped_gemm_swiglu(name: str, scaled: bool, target: str) -> None:
    kind = ALL[name]
    for dtype in dtypes_of(target):
        _check_grouped_gemm(kind.gated, scaled, 30, target, dtype, bias=kind.biased, kind=kind)


@pytest.mark.parametrize(("m", "experts"), [(1, E), (200, MANY)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", few_kinds)
def test_grouped_gemm_swiglu_of_few_and_of_many_tokens(
    name: str, scaled: bool, m: int, experts: int, target: str
) -> None:
    kind = ALL[name]
    for dtype in dtypes_of(target):
        _check_grouped_gemm(kind.gated, scaled, m, target, dtype, bias=kind.biased, kind=kind, experts=experts)


def _check_grouped_gemm(
    gated: bool, scaled: bool, m: int, target: str, dtype: torch.dtype, *, bias: bool | None, kind: Kind | None = None,
    experts: int = E,
) -> None:  # fmt: skip
    n, gate = 96 if gated else 80, {} if kind is None else kind.gate
    generator = seeded(m)
    weight = random_weight((experts, n, K), gated=gated, generator=generator)
    added = torch.randn(experts, n, generator=generator) if bias else None
    topk_weights, ids = random_routing(m, experts, 3, generator=generator)
    ids.view(-1)[::7] = -1
    order, offsets = reference.route(ids, None, experts)
    x = activations(m if scaled else m * 3, K, seed=m, scale=0.1)
    packed = torch_nvfp4.pack(NVFP4Weight(*to(target, *weight)), gated=gated)
    leaf, router = leaf_of(x, target, dtype), leaf_of(topk_weights, target)
    arguments = packed, weight.global_scale.to(target), *to(target, order, offsets), router if scaled else None
    op = torch_nvfp4.grouped_gemm if kind is None else torch_nvfp4.grouped_gemm_swiglu
    out = op(leaf, *arguments, *to(target, added), **gate)
    exact, exact_router = leaf_of(x), leaf_of(topk_weights, dtype=torch.float64)
    expected = reference.grouped_gemm(exact, weight, order, offsets, exact_router if scaled else None, added)
    expected = expected if kind is None else activated(expected, kind)
    flow = activations(*out.shape, seed=m + 1)
    skipped = order[int(offsets[-1]) :].long()
    expected.backward(flow)
    flow[skipped] = torch.nan  # what flows into a skipped row goes nowhere
    out.backward(flow.to(target, dtype))
    assert_accurate(leaf.grad.cpu(), exact.grad)  # type: ignore[union-attr, arg-type]
    if scaled:
        assert_accurate(router.grad.cpu(), exact_router.grad, dtype=dtype)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("mapped", [False, True])
def test_combine(mapped: bool, target: str, dtype: torch.dtype) -> None:
    weights, ids = random_routing(40, 8, 3, generator=seeded(0))
    expert_map = torch.tensor([0, -1, 1, 2, 7, -1, 3, 0], dtype=torch.int32) if mapped else None
    ids.view(-1)[::5] = 9
    local = reference.local_experts(ids, expert_map, 4)
    x = activations(120, 24, seed=1)
    exact, exact_weights = leaf_of(x), leaf_of(weights, dtype=torch.float64)
    flow = activations(40, 24, seed=2)
    reference.combine(exact, exact_weights, ids, expert_map, 4).backward(flow)
    x[(local == 4).view(-1)] = torch.nan
    leaf, router = leaf_of(x, target, dtype), leaf_of(weights, target)
    torch_nvfp4.combine(leaf, router, *to(target, ids, expert_map), 4).backward(flow.to(target, dtype))
    assert_accurate(leaf.grad.cpu(), exact.grad)  # type: ignore[union-attr, arg-type]
    assert_accurate(router.grad.cpu(), exact_weights.grad, dtype=dtype)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 50), (300,), (0,)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_linear(gated: bool, shape: tuple[int, ...], target: str, dtype: torch.dtype) -> None:
    weight = random_weight((96, K), gated=gated, generator=seeded(1))
    if gated:
        weight = weight._replace(global_scale=weight.global_scale * torch.tensor([1.0, 3.7]))
    packed = torch_nvfp4.pack(NVFP4Weight(*to(target, *weight)), gated=gated)
    x, flow = activations(*shape, K, seed=2), activations(*shape, 96, seed=3)
    leaf, bias = leaf_of(x, target, dtype), torch.zeros(96, dtype=dtype, device=target, requires_grad=True)
    torch_nvfp4.linear(leaf, packed, weight.global_scale.to(target), bias).backward(flow.to(target, dtype))
    exact, exact_bias = leaf_of(x), torch.zeros(96, dtype=torch.float64, requires_grad=True)
    reference.linear(exact, weight, exact_bias).backward(flow)
    assert_accurate(leaf.grad.cpu(), exact.grad)  # type: ignore[union-attr, arg-type]
    assert_accurate(bias.grad.cpu(), exact_bias.grad)  # type: ignore[union-attr, arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_linear_of_many_rows(gated: bool) -> None:
    """Enough tiles for the kernels on wgmma."""
    weight = random_weight((96, K), gated=gated, generator=seeded(1))
    flow = activations(9000, 96, seed=3)
    exact = leaf_of(torch.zeros(9000, K, dtype=torch.float64))
    reference.linear(exact, weight).backward(flow)
    packed = torch_nvfp4.pack(NVFP4Weight(*to("cuda", *weight)), gated=gated)
    for dtype in dtypes_of("cuda"):
        leaf = torch.zeros(9000, K, dtype=dtype, device="cuda", requires_grad=True)
        torch_nvfp4.linear(leaf, packed, weight.global_scale.cuda()).backward(flow.to("cuda", dtype))
        assert_accurate(leaf.grad.cpu(), exact.grad)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("shape", [(1,), (3, 33), (2, 5, 256), (0, 8)], ids=str)
@pytest.mark.parametrize("name", UNBIASED)
def test_swiglu(name: str, shape: tuple[int, ...], target: str) -> None:
    kind = ALL[name]
    z = activations(*shape[:-1], shape[-1] * (2 if kind.gated else 1), seed=len(shape), scale=3.0)
    flow = activations(*shape, seed=7)
    exact = leaf_of(z)
    activated(exact, kind).backward(flow)
    for dtype in dtypes_of(target):
        leaf = leaf_of(z, target, dtype)
        torch_nvfp4.swiglu(leaf, **kind.gate, gated=kind.gated).backward(flow.to(target, dtype))
        assert_accurate(leaf.grad.cpu(), exact.grad)  # type: ignore[union-attr, arg-type]


# ---- the clamp's masks


def _at_the_limit(limit: float) -> Tensor:
    """Gate and up values around a limit that 16 bits hold exactly, in pairs of every kind."""
    near = [limit, -limit, limit * 1.0078125, -limit * 1.0078125, limit * 0.9921875, 0.0, torch.inf, -torch.inf]
    grid = torch.cartesian_prod(torch.tensor(near), torch.tensor(near))
    return torch.cat((grid[:, 0], grid[:, 1]))[None]


@pytest.mark.parametrize("activation", ["silu", "swiglustep"])
def test_gradient_at_the_limit_is_that_of_aten(activation: str, target: str, dtype: torch.dtype) -> None:
    """1 at equality, 0 beyond; torch.minimum would give a half and hardtanh 0."""
    z, gate = _at_the_limit(2.0), {"activation": activation, "clamp_limit": 2.0}
    expected = leaf_of(z, dtype=torch.float64)
    activate(expected, parse_activation(activation), 2.0).sum().backward()
    leaf = leaf_of(z, target, dtype)
    torch_nvfp4.swiglu(leaf, **gate).sum().backward()
    torch.testing.assert_close(
        leaf.grad.cpu().double(), expected.grad, rtol=2 * TOLERANCE[dtype], atol=1e-6, equal_nan=True  # type: ignore[union-attr]
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["silu", "swiglustep", "gelu", "gelu_tanh"])
def test_a_gate_that_overflowed_lets_nothing_through(activation: str, target: str, dtype: torch.dtype) -> None:
    """Minus infinity stands for a finite number, of which the activation and its derivative are 0."""
    leaf = torch.tensor([[-torch.inf, 3.0]], dtype=dtype, device=target, requires_grad=True)
    torch_nvfp4.swiglu(leaf, activation=activation).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[0.0, 0.0]]


def test_the_masks_are_those_of_the_fp32_preactivations(target: str, dtype: torch.dtype) -> None:
    """Gate and up of moe are exactly at the limit, or above it by less than 16 bits show."""
    k = i = 64
    data = torch.zeros(1, 2 * i, k // 2, dtype=torch.uint8)
    data[:, :, 0] = 0x22  # columns 0 and 1 are 1
    w13 = NVFP4Weight(data, torch.ones(1, 2 * i, k // 16).to(torch.float8_e4m3fn), torch.ones(1, 2))
    w2 = random_weight((1, k, i), generator=seeded(0))
    x = torch.zeros(3, k)
    x[:, 0] = 2.0
    x[1, 1], x[2, 1] = 2.0**-12, -(2.0**-12)  # pre-activations 2, 2 + 2^-12 and 2 - 2^-12
    exact = leaf_of(x, dtype=torch.float64)
    weights, ids = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64)
    flow = activations(3, k, seed=1)
    reference.moe(exact, w13, w2, weights, ids, clamp_limit=2.0).backward(flow)
    assert exact.grad[0, 0] != 0
    assert exact.grad[1, 0] == 0
    packed = [NVFP4Weight(*to(target, *weight)) for weight in (w13, w2)]
    leaf = leaf_of(x, target, dtype)
    experts = torch_nvfp4.pack(packed[0], gated=True), packed[0].global_scale, torch_nvfp4.pack(packed[1])
    out = torch_nvfp4.moe(leaf, *experts, packed[1].global_scale, *to(target, weights, ids), clamp_limit=2.0)
    out.backward(flow.to(target, dtype))
    for row in range(3):
        assert_accurate(leaf.grad[row].cpu(), exact.grad[row])  # type: ignore[index]


@pytest.mark.parametrize("name", ["silu-clamped", "swiglustep-clamped"])
def test_nan_does_not_pass_a_clamp(name: str, target: str, dtype: torch.dtype) -> None:
    z = torch.tensor([[torch.nan, 1.0, 2.0, torch.nan]], dtype=dtype, device=target, requires_grad=True)
    torch_nvfp4.swiglu(z, **GATES[name]).sum().backward()
    grad = z.grad.cpu()[0]  # type: ignore[union-attr]
    assert grad[0] == 0 if name == "silu-clamped" else grad[0].isnan()  # silu itself is NaN there
    assert grad[2].isnan()
    assert grad[1].isnan()
    assert grad[3] == 0


# ---- autograd


def _layer(device: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    case = prepared("silu", 30, False)
    arguments = (*case.experts.weights(device), *to(device, case.weights, case.ids))
    return lambda x: torch_nvfp4.moe(x, *arguments), leaf_of(case.x, device, BF16)


def test_a_second_derivative_is_refused(device: str) -> None:
    layer, x = _layer(device)
    (grad,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^nvfp4::moe_backward has no gradient .*second.*reference\.moe "):
        grad.sum().backward()


def test_a_view_and_an_expanded_gradient(device: str) -> None:
    layer, x = _layer(device)
    layer(x).sum().backward()
    ones, x.grad = x.grad, None
    layer(x).backward(torch.ones(31 * K, dtype=BF16, device=device)[3 : 30 * K + 3].view(30, K))
    assert torch.equal(x.grad, ones)  # type: ignore[arg-type]


def test_saved_tensors_are_arguments(device: str) -> None:
    """x and the routing, beside the weights that are there anyway."""
    case = prepared("silu", 30, False)
    x = leaf_of(case.x, device, BF16)
    arguments = (*case.experts.weights(device), *to(device, case.weights, case.ids))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch_nvfp4.moe(x, *arguments)
    given = {t.data_ptr() for t in (x, *arguments)}
    assert {t.data_ptr() for t in saved} <= given


@pytest.mark.parametrize("op", ["linear", "grouped_gemm", "combine"])
def test_x_is_saved_where_its_values_are_read(op: str, device: str) -> None:
    """The gradient of x itself takes the weights alone; that of the router weights takes x."""
    case = prepared("silu", 30, False)
    w2, scale = case.experts.weights(device)[2:]
    weights, ids = to(device, case.weights, case.ids)
    order, offsets = torch_nvfp4.route(ids, None, E)
    dense = random_weight((96, I), generator=seeded(1), device=device)
    packed = torch_nvfp4.pack(dense)
    run = {
        "linear": lambda x, _: torch_nvfp4.linear(x, packed, dense.global_scale),
        "grouped_gemm": lambda x, weights: torch_nvfp4.grouped_gemm(x, w2, scale, order, offsets, weights.view(-1, 1)),
        "combine": lambda x, weights: torch_nvfp4.combine(x, weights, ids, None, E),
    }[op]
    saved: list[int] = []
    grads = []
    for wanted in (False, True):
        x = activations(ids.numel(), I, seed=1).to(device, BF16).requires_grad_()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            out = run(x, weights.detach().requires_grad_(wanted))
        assert (x.data_ptr() in saved) == (wanted and op != "linear")
        out.sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


def test_activation_checkpointing(device: str) -> None:
    layer, x = _layer(device)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)  # type: ignore[arg-type]
