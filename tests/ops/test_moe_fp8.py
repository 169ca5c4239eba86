"""``moe`` with FP8 activations on a GPU: against its specification, against itself, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from torch_nvfp4 import NVFP4Weight, ops, quantize, reference, reference_fp8
from torch_nvfp4.testing import FP8_TOLERANCE, TOLERANCE, random_routing, random_weight, relative_l2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs compute capability 9.0"
    ),
]


class Experts:
    def __init__(self, w13: NVFP4Weight, w2: NVFP4Weight) -> None:
        self.w13, self.w2 = w13, w2
        self.packed = (
            torch_nvfp4.pack(w13, gated=True, input_quant="fp8"), w13.global_scale,
            torch_nvfp4.pack(w2, input_quant="fp8"), w2.global_scale,
        )  # fmt: skip

    @classmethod
    def random(cls, experts: int, k: int, i: int, **options: bool) -> Experts:
        generator = torch.Generator("cuda").manual_seed(k + i)
        w13 = random_weight((experts, 2 * i, k), gated=True, generator=generator, device="cuda", **options)
        return cls(w13, random_weight((experts, k, i), generator=generator, device="cuda", **options))

    @classmethod
    def normal(cls, experts: int, k: int, i: int) -> Experts:
        """Of normally distributed weights, for pre-activations of about 1.5."""
        generator = torch.Generator("cuda").manual_seed(k)
        w13 = torch.randn(experts, 2 * i, k, generator=generator, device="cuda") * (1.5 / k**0.5)
        w2 = torch.randn(experts, k, i, generator=generator, device="cuda") / i**0.5
        return cls(quantize(w13, gated=True), quantize(w2))

    def run(self, x: Tensor, weights: Tensor, ids: Tensor, **options: object) -> Tensor:
        return torch_nvfp4.moe(x, *self.packed, weights, ids, input_quant="fp8", **options)

    def specification(self, x: Tensor, weights: Tensor, ids: Tensor, **options: object) -> Tensor:
        return reference_fp8.moe(x, self.w13, self.w2, weights, ids, **options)


def inputs(m: int, k: int, experts: int, top_k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(m)
    x = torch.randn(m, k, generator=generator, device="cuda").to(dtype)
    weights, ids = random_routing(m, experts, top_k, generator=generator, device="cuda")
    return x, weights, ids


# Sizes whose k-blocks are odd and even, whose last panel is half, and whose tiles have every width of both shapes.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("experts", "k", "i", "top_k", "tokens"),
    [
        (8, 1024, 512, 6, (1, 3, 20, 80, 145, 230, 256)),
        (5, 704, 176, 3, (7, 130, 333)),
        (4, 208, 96, 2, (50, 400)),
        (3, 64, 16, 1, (33, 500)),
        (256, 256, 128, 8, (64, 3000)),
    ],
)
def test_specification(experts: int, k: int, i: int, top_k: int, tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = Experts.random(experts, k, i)
    for m in tokens:
        x, weights, ids = inputs(m, k, experts, top_k, dtype)
        ids[::3, 0], ids[1::5, -1] = -1, experts + 7
        got = layer.run(x, weights, ids, clamp_limit=10.0)
        want = layer.specification(x, weights, ids, clamp_limit=10.0)
        assert got.dtype == dtype
        assert relative_l2(got, want) < FP8_TOLERANCE, f"M = {m}"


@pytest.mark.parametrize("m", [100, 1500])
def test_error(m: int) -> None:
    layer = Experts.normal(8, 4096, 2048)
    x, weights, ids = inputs(m, 4096, 8, 2)
    want = reference.moe(x, layer.w13, layer.w2, weights, ids, clamp_limit=10.0)
    assert relative_l2(layer.run(x, weights, ids, clamp_limit=10.0), want) < TOLERANCE[torch.float8_e4m3fn]


def test_every_scale_byte() -> None:
    layer = Experts.random(2, 512, 128, all_scales=True)
    x, weights, ids = inputs(64, 512, 2, 1)
    assert relative_l2(layer.run(x, weights, ids), layer.specification(x, weights, ids)) < FP8_TOLERANCE


def test_parts_of_the_intermediate_that_differ_in_scale() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    w13 = torch.randn(2, 1024, 256, generator=generator, device="cuda") / 16
    for part in range(16):
        w13[:, 32 * part : 32 * part + 32] *= 2.0 ** -(part % 4 * 6)
    layer = Experts(quantize(w13, gated=True), quantize(torch.randn(2, 256, 512, generator=generator, device="cuda")))
    x, weights, ids = inputs(150, 256, 2, 1)
    assert relative_l2(layer.run(x, weights, ids), layer.specification(x, weights, ids)) < FP8_TOLERANCE


def test_gate_and_router_weights_on_the_input() -> None:
    layer = Experts.random(4, 512, 256)
    x, weights, ids = inputs(90, 512, 4, 1)
    options = {"alpha": 1.702, "beta": 1.0, "clamp_limit": 7.0, "apply_router_weight_on_input": True}
    want = layer.specification(x, weights * 0.7, ids, **options)
    assert relative_l2(layer.run(x, weights * 0.7, ids, **options), want) < FP8_TOLERANCE


def test_expert_map() -> None:
    layer = Experts.random(4, 512, 256)
    x, weights, ids = inputs(60, 512, 12, 4)
    expert_map = torch.tensor([-1, 2, 0, -1, -1, 3, -1, -1, 1, -1, -1, -1], dtype=torch.int32, device="cuda")
    got = layer.run(x, weights, ids.to(torch.int32), expert_map=expert_map)
    want = layer.specification(x, weights, ids, expert_map=expert_map)
    assert relative_l2(got, want) < FP8_TOLERANCE


def test_20_runs_and_a_graph_give_the_same_bits() -> None:
    layer = Experts.random(16, 1024, 512)
    x, weights, ids = inputs(700, 1024, 16, 6)
    first = layer.run(x, weights, ids)
    assert all(torch.equal(layer.run(x, weights, ids), first) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.run(x, weights, ids)
    graph.replay()
    assert torch.equal(out, first)
    x.mul_(-0.5)
    graph.replay()
    assert torch.equal(out, layer.run(x, weights, ids))


def test_nan_stays_in_its_token_and_no_token_is_fine() -> None:
    layer = Experts.random(4, 512, 256)
    x, weights, ids = inputs(40, 512, 4, 2)
    clean = layer.run(x, weights, ids)
    x[3, 5] = torch.nan
    got = layer.run(x, weights, ids)
    assert got[3].isnan().all()
    assert torch.equal(got[:3], clean[:3])
    assert torch.equal(got[4:], clean[4:])
    assert layer.run(x[:0], weights[:0], ids[:0]).shape == (0, 512)


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Experts.random(4, 512, 256)
    x, weights, ids = inputs(8, 512, 4, 2)
    p13, g13, p2, g2 = layer.packed
    plain = torch_nvfp4.pack(layer.w2)
    cases = [
        ((x, p13, g13, plain, g2, weights, ids), {}, "w2 must be int8, got uint8"),
        ((x.float(), p13, g13, p2, g2, weights, ids), {}, "hidden_states must be bfloat16 or float16, got float32"),
        (
            (x, p13, g13, p2, g2, weights, ids), {"activation": "gelu"},
            r"activation must be silu \(0\), got 2; use moe for others",
        ),
    ]  # fmt: skip
    for arguments, options, words in cases:
        with pytest.raises(RuntimeError, match=f"nvfp4::moe_fp8: {words}"):
            ops.moe_fp8(*arguments, **options)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(tensor) for tensor in arguments]
            with pytest.raises(RuntimeError, match=f"nvfp4::moe_fp8: {words}"):
                ops.moe_fp8(*fakes, **options)
    with pytest.raises(RuntimeError, match="nvfp4::moe: w2 must be uint8, got int8"):
        ops.moe(x, torch_nvfp4.pack(layer.w13, gated=True), g13, p2, g2, weights, ids)
    monkeypatch.setenv("TORCH_NVFP4_ARCH", "80")
    with pytest.raises(RuntimeError, match=r"nvfp4::moe_fp8: expected a GPU of compute capability 9\.0"):
        layer.run(x, weights, ids)
