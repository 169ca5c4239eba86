"""Experts without a gate, biases, and every activation against fp64, on every kernel there is."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from helpers.expert_kinds import KINDS, Experts, expected_moe, expert_mlp, hidden_of, make_experts
from helpers.layers import BF16, dtypes_of, seeded, to
from torch_nvfp4 import dequantize, reference
from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.gate import parse_activation
from torch_nvfp4.ops.decomposition import decomposed_batched_moe
from torch_nvfp4.ops.moe import decomposed_moe
from torch_nvfp4.testing import TOLERANCE, assert_accurate, random_routing, relative_l2

E, K, I, TOP_K = 16, 144, 48, 2  # noqa: E741 (three panels of 16 rows, and part of a block)
# CUDA: few_slots_mlp, stream_gemm, wgmma_experts. CPU: few and many tokens per expert.
TOKENS = (1, 9, 30, 200)
kinds = pytest.mark.parametrize("name", KINDS)


@lru_cache(maxsize=len(KINDS) * len(TOKENS))  # each level of the CPU goes through all of them
def prepared(name: str, m: int, on_input: bool = False) -> tuple[Experts, Tensor, Tensor, Tensor, Tensor]:
    """Experts, hidden_states in fp64, topk_weights, topk_ids (some without an expert), and the result."""
    seed = zlib.crc32(f"{name} {m}".encode())
    experts = make_experts(KINDS[name], E, K, I, seed=seed)
    x = hidden_of(experts, m, seed=seed)
    weights, ids = random_routing(m, E, TOP_K, generator=seeded(seed))
    ids.view(-1)[5::11] = -1
    return experts, x, weights, ids, expected_moe(experts, x, weights, ids, on_input=on_input)


def call(
    experts: Experts, x: Tensor, weights: Tensor, ids: Tensor, device: str, dtype: torch.dtype, **options: Any
) -> Tensor:
    routing = to(device, weights, ids)
    return torch_nvfp4.moe(
        x.to(device, dtype),
        *experts.weights(device),
        *routing,
        **experts.biases(device),
        **experts.kind.gate,
        **options,
    )


@pytest.mark.parametrize("m", TOKENS)
@kinds
def test_moe(name: str, m: int, target: str) -> None:
    experts, x, weights, ids, expected = prepared(name, m)
    for dtype in dtypes_of(target):
        out = call(experts, x, weights, ids, target, dtype)
        assert out.dtype == dtype
        assert_accurate(out.cpu(), expected)
        buffer = torch.full_like(out, 3.0)
        assert call(experts, x, weights, ids, target, dtype, out=buffer) is buffer
        assert torch.equal(buffer, out)


@pytest.mark.gpu
@pytest.mark.parametrize("m", TOKENS)
@kinds
def test_sm80_kernels(name: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_ARCH", "80")
    experts, x, weights, ids, expected = prepared(name, m)
    for dtype in dtypes_of("cuda"):
        assert_accurate(call(experts, x, weights, ids, "cuda", dtype).cpu(), expected)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("name", ["gpt-oss with biases", "relu2 without a gate, with biases", "situ with biases"])
def test_router_weight_on_input_scales_no_bias(name: str, m: int, target: str) -> None:
    experts, x, weights, ids, expected = prepared(name, m, on_input=True)
    for dtype in dtypes_of(target):
        out = call(experts, x, weights, ids, target, dtype, apply_router_weight_on_input=True)
        assert_accurate(out.cpu(), expected)


@kinds
def test_reference(name: str) -> None:
    """The specification itself; the expert_map names every second expert."""
    experts, x, weights, ids, _ = prepared(name, 30)
    kept = torch.where(ids % 2 == 0, ids, -1)
    expert_map = torch.full((E,), -1, dtype=torch.int32)
    expert_map[::2] = torch.arange(E // 2, dtype=torch.int32)
    local = Experts(*(pick(part) for part in experts[:4]), experts.kind)
    out = reference.moe(
        x, local.w13, local.w2, weights, ids, expert_map, local.w13_bias, local.w2_bias, **experts.kind.gate
    )
    assert relative_l2(out, expected_moe(experts, x, weights, kept)) < 1e-12


def pick(part: Any) -> Any:
    if isinstance(part, NVFP4Weight):
        return NVFP4Weight(
            part.data[::2], part.scale.view(torch.uint8)[::2].view(part.scale.dtype), part.global_scale[::2]
        )
    return None if part is None else part[::2]


def test_biases_matter() -> None:
    """Else nothing here would show that one is dropped."""
    experts, x, weights, ids, expected = prepared("gpt-oss with biases", 30)
    for without in ("w13_bias", "w2_bias"):
        out = expected_moe(experts._replace(**{without: None}), x, weights, ids)
        assert relative_l2(out, expected) > 25 * TOLERANCE[BF16]


@kinds
def test_batched_moe(name: str, target: str, dtype: torch.dtype) -> None:
    counts = torch.tensor([0, 1, 40, 7, 16, 0, *[2] * (E - 6)], dtype=torch.int32)
    for t, most in ((40, 40), (3, 3)):
        experts = make_experts(KINDS[name], E, K, I, seed=t)
        x, counts = hidden_of(experts, E, t, seed=t), counts.clamp(max=most)
        expected = torch.zeros_like(x)
        for e, count in enumerate(counts.tolist()):
            expected[e, :count] = expert_mlp(experts, e)(x[e, :count])
            x[e, count:] = torch.nan
        arguments = to(target, x.to(dtype)), experts.weights(target), to(target, counts)
        flat = [tensor for group in arguments for tensor in group]
        out = torch_nvfp4.batched_moe(*flat, **experts.biases(target), **experts.kind.gate)
        assert_accurate(out.cpu(), expected)
        gate = {**experts.kind.gate, "activation": parse_activation(experts.kind.gate["activation"]).value}
        steps = decomposed_batched_moe(*flat, **experts.biases(target), **gate)
        assert relative_l2(steps.cpu(), expected) <= 3 * TOLERANCE[dtype]
        own = reference.batched_moe(
            x, experts.w13, experts.w2, counts, experts.w13_bias, experts.w2_bias, **experts.kind.gate
        )
        assert relative_l2(own, expected) < 1e-12


@pytest.mark.parametrize("m", TOKENS)
@kinds
def test_steps(name: str, m: int, target: str, dtype: torch.dtype) -> None:
    """grouped_gemm with a bias, and with the activation behind it."""
    experts, x, weights, ids, _ = prepared(name, m)
    w13, scale, *_ = experts.weights(target)
    bias = experts.biases(target).get("w13_bias")
    order, offsets = reference.route(ids, None, E)
    values, scales, *routing = to(target, x.to(dtype), weights, order, offsets)
    for topk_weights, on_device in ((None, None), (weights, scales)):
        out = torch_nvfp4.grouped_gemm(values, w13, scale, *routing, on_device, bias)
        expected = reference.grouped_gemm(x, experts.w13, order, offsets, topk_weights, experts.w13_bias)
        assert_accurate(out.cpu(), expected)
        out = torch_nvfp4.grouped_gemm_swiglu(values, w13, scale, *routing, on_device, bias, **experts.kind.gate)
        expected = reference.grouped_gemm_swiglu(
            x,
            experts.w13,
            order,
            offsets,
            topk_weights,
            experts.w13_bias,
            gated=experts.kind.gated,
            **experts.kind.gate,
        )
        assert_accurate(out.cpu(), expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_activation_alone(activation: str, target: str, dtype: torch.dtype) -> None:
    """``swiglu`` without a gate is that activation of gate columns beside up columns of ones."""
    for shape in ((1,), (3, 33), (2, 5, 256), (0, 8)):
        x = torch.randn(shape, generator=seeded(len(shape))).to(dtype)
        out = torch_nvfp4.swiglu(x.to(target), activation, gated=False).cpu()
        assert_accurate(out, reference.swiglu(x, activation, gated=False))
        assert torch.equal(out, torch_nvfp4.swiglu(torch.cat((x, torch.ones_like(x)), -1).to(target), activation).cpu())
    assert bool(
        torch_nvfp4.swiglu(torch.full((4,), torch.nan, dtype=dtype, device=target), activation, gated=False)
        .isnan()
        .all()
    )


@kinds
def test_decomposition(name: str, target: str) -> None:
    experts, x, weights, ids, expected = prepared(name, 30)
    routing = to(target, weights, ids)
    gate = {**experts.kind.gate, "activation": parse_activation(experts.kind.gate["activation"]).value}
    for dtype in dtypes_of(target):
        out = decomposed_moe(x.to(target, dtype), *experts.weights(target), *routing, **experts.biases(target), **gate)
        assert_accurate(out.cpu(), expected) if dtype == torch.float32 else None
        assert relative_l2(out.cpu(), expected) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(
    "name", ["silu-clamped with biases", "gelu_tanh with biases", "relu2 without a gate, with biases"]
)
def test_batch_invariance(name: str, on_input: bool, target: str, dtype: torch.dtype) -> None:
    experts, x, weights, ids, _ = prepared(name, 200)
    how = {"batch_invariant": True, "apply_router_weight_on_input": on_input}
    whole = call(experts, x, weights, ids, target, dtype, **how)
    for count in (1, 2, 16, 30, 120):
        rows = torch.randperm(200, generator=seeded(count))[:count]
        part = call(experts, x[rows], weights[rows], ids[rows], target, dtype, **how)
        assert torch.equal(part.view(torch.uint8), whole[rows.to(whole.device)].view(torch.uint8)), count


# Models whose sizes are unlike others: K and I at full width.
MODELS = {
    "Gemma-4-26B": (2816, 704, "gelu_tanh with biases"),
    "Nemotron-3-Nano": (2688, 1856, "relu2 without a gate"),
    "gpt-oss": (2880, 2880, "gpt-oss with biases"),
    "Step-3.7-Flash, a rank of 8": (4096, 160, "swiglustep-clamped with biases"),
    "Kimi-K3, a rank of 8": (3584, 384, "situ with biases"),
}


@pytest.mark.parametrize("model", MODELS)
def test_sizes_of_models(model: str, device: str) -> None:
    k, i, name = MODELS[model]
    experts = make_experts(KINDS[name], 2, k, i, seed=k)
    weights = experts.weights(device)
    for m in (1, 20, 70):
        x = hidden_of(experts, m, seed=m)
        routing = random_routing(m, 2, 1, generator=seeded(m))
        out = torch_nvfp4.moe(
            x.to(device, BF16), *weights, *to(device, *routing), **experts.biases(device), **experts.kind.gate
        )
        assert_accurate(out.cpu(), expected_moe(experts, x, *routing))


@pytest.mark.parametrize(
    "name", ["silu-clamped with biases", "relu2 without a gate", "relu2 without a gate, with biases"]
)
def test_a_shared_expert_is_one_expert_more_with_weight_one(name: str, target: str, dtype: torch.dtype) -> None:
    """The recipe of the op's docstring: packed behind the routed experts, and in every token's list."""
    experts, x, weights, ids, expected = prepared(name, 30)
    shared = make_experts(KINDS[name], 1, K, I, seed=77)
    both = zip(experts.weights(target), shared.weights(target), strict=True)
    one = shared.biases(target)
    biases = {key: torch.cat((bias, one[key])) for key, bias in experts.biases(target).items()}
    all_ids = torch.cat((ids, torch.full((30, 1), E)), 1)
    all_weights = torch.cat((weights, torch.ones(30, 1)), 1)
    out = torch_nvfp4.moe(
        x.to(target, dtype),
        *(torch.cat(pair) for pair in both),
        *to(target, all_weights, all_ids),
        **biases,
        **experts.kind.gate,
    )
    assert_accurate(out.cpu(), expected + expert_mlp(shared, 0)(x))


def test_a_wide_shared_expert_is_several_experts() -> None:
    """Its intermediate features are a sum, which may be cut; its bias of w2 belongs to one part alone."""
    wide = make_experts(KINDS["gpt-oss with biases"], 1, K, 2 * I, seed=78)
    x = hidden_of(wide, 5, seed=79)
    w13, w2 = dequantize(wide.w13, torch.float64)[0], dequantize(wide.w2, torch.float64)[0]
    assert wide.w13_bias is not None
    assert wide.w2_bias is not None
    rows = [torch.cat((torch.arange(p * I, (p + 1) * I), torch.arange((2 + p) * I, (3 + p) * I))) for p in (0, 1)]
    parts = torch.stack([w13[r] for r in rows]), torch.stack([w2[:, p * I : (p + 1) * I] for p in (0, 1)])
    biases = torch.stack([wide.w13_bias[0, r] for r in rows]), torch.cat((wide.w2_bias, torch.zeros(1, K)))
    ids = torch.tensor([[0, 1]] * 5)
    out = reference.moe(x, *parts, torch.ones(5, 2), ids, None, *biases, **wide.kind.gate)
    assert relative_l2(out, expert_mlp(wide, 0)(x)) < 1e-12
