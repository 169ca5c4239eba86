"""The specification of FP8 activations: its parts against definitions written out anew, its error, and who refuses."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import torch_nvfp4
from torch_nvfp4 import NVFP4Weight, ops, quantize, reference, reference_fp8
from torch_nvfp4.testing import random_routing, relative_l2

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3_values() -> list[Fraction]:
    """The finite magnitudes of E4M3 by byte: 0 .. 0x7E."""
    values = []
    for byte in range(0x7F):
        exponent, mantissa = byte >> 3, byte & 7
        values.append(Fraction(8 + mantissa if exponent else mantissa, 8) * Fraction(2) ** (max(exponent, 1) - 7))
    return values


def nearest_e4m3(x: Fraction, values: list[Fraction]) -> float:
    """To nearest, ties to the even byte, saturated."""
    magnitude = min(range(len(values)), key=lambda byte: (abs(values[byte] - abs(x)), byte % 2))
    return math.copysign(float(values[magnitude]), x)


def test_weights_are_code_times_scale_over_6_rounded_once() -> None:
    values = e4m3_values()
    scales = torch.tensor([byte for byte in range(256) if byte % 128 != 127], dtype=torch.uint8)
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
    weight = NVFP4Weight(codes.repeat(len(scales), 1), scales[:, None].view(torch.float8_e4m3fn), torch.tensor(3.0))
    got = reference_fp8.fold_scales(weight)
    for row, byte in enumerate(scales.tolist()):
        scale = values[byte % 128] * (-1 if byte >= 128 else 1)
        want = [nearest_e4m3(sign * Fraction(code) * scale / 6, values) for sign in (1, -1) for code in CODES]
        assert got[row].tolist() == want, f"scale byte {byte:#x}"


def test_rows_have_448_as_their_largest() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[3] *= 1e-20
    values, scale = reference_fp8.quantize_rows(x.to(torch.bfloat16))
    assert values.abs().amax(-1).tolist() == [448.0] * 5
    assert relative_l2(values[:3] * scale[:3], x[:3]) < 0.03
    assert relative_l2(values[3] * scale[3], x[3]) < 0.03
    zero, finite = reference_fp8.quantize_rows(torch.zeros(1, 32))
    assert torch.equal(zero, torch.zeros(1, 32))
    assert finite.isfinite().all()


def test_a_row_of_the_intermediate_has_one_power_of_two() -> None:
    hidden = torch.zeros(2, 96, dtype=torch.float64)
    hidden[0, :32], hidden[0, 32:64], hidden[0, 64:] = 300.0, 1.0, 2.0**-30
    hidden[1] = 2.0**-30
    values, scale = reference_fp8.quantize_hidden(hidden)
    # The largest below 256 decides: 300 takes 2^8, and 1 / 256 is E4M3's to half of its finest step.
    assert scale.flatten().tolist() == [2.0**8, 2.0**-32]
    assert values[0, 0].item() == 1.125  # 300 / 256 = 1.171875 lies between 1.125 and 1.25
    assert values[0, 32].item() == 2.0**-8
    assert values[0, 64:].tolist() == [0.0] * 32
    assert values[1].tolist() == [4.0] * 96


@pytest.mark.parametrize("limit", [None, 10.0])
def test_error_of_a_layer(limit: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    experts, k, i = 4, 1024, 512
    w13 = quantize(torch.randn(experts, 2 * i, k, generator=generator) * (1.5 / k**0.5), gated=True)
    w2 = quantize(torch.randn(experts, k, i, generator=generator) / i**0.5)
    x = torch.randn(24, k, generator=generator).to(torch.bfloat16)
    weights, ids = random_routing(24, experts, 2, generator=generator)
    ids[::5, 0] = -1
    got = reference_fp8.moe(x, w13, w2, weights, ids, clamp_limit=limit)
    want = reference.moe(x, w13, w2, weights, ids, clamp_limit=limit)
    assert 0.03 < relative_l2(got, want) < 0.06


def test_router_weights_on_the_input() -> None:
    generator = torch.Generator().manual_seed(2)
    w13 = quantize(torch.randn(2, 64, 128, generator=generator) / 8, gated=True)
    w2 = quantize(torch.randn(2, 128, 32, generator=generator) / 8)
    x = torch.randn(8, 128, generator=generator).to(torch.bfloat16)
    weights, ids = random_routing(8, 2, 1, generator=generator)
    weights = weights * 0.5
    got = reference_fp8.moe(x, w13, w2, weights, ids, apply_router_weight_on_input=True)
    want = reference.moe(x, w13, w2, weights, ids, apply_router_weight_on_input=True)
    assert relative_l2(got, want) < 0.08


def test_the_cpu_refuses_with_the_fakes_words() -> None:
    w13 = quantize(torch.ones(1, 32, 64), gated=True)
    w2 = quantize(torch.ones(1, 64, 16))
    x, weights, ids = torch.ones(2, 64, dtype=torch.bfloat16), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    words = "expected tensors on a CUDA device, got them on the cpu, which has no kernels for FP8; use moe"
    p13, p2 = torch_nvfp4.pack(w13, gated=True), torch_nvfp4.pack(w2)

    def run(device: str) -> None:
        arguments = (x, p13, w13.global_scale, p2, w2.global_scale, weights, ids)
        ops.moe(*(tensor.to(device) for tensor in arguments), input_quant="fp8")

    with pytest.raises(RuntimeError, match=f"nvfp4::moe_fp8: {words}"):
        run("cpu")
    with pytest.raises(RuntimeError, match=f"nvfp4::order_for_fp8: {words}"):
        torch_nvfp4.pack(w2, input_quant="fp8")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (x, p13, w13.global_scale, p2, w2.global_scale, weights, ids)]
        with pytest.raises(RuntimeError, match=f"nvfp4::moe_fp8: {words}"):
            ops.moe(*fakes, input_quant="fp8")
        with pytest.raises(RuntimeError, match=f"nvfp4::order_for_fp8: {words}"):
            ops.order_for_fp8(fakes[3], 64)


def test_what_input_quant_may_be() -> None:
    tensor = torch.ones(1)
    with pytest.raises(ValueError, match="input_quant: expected None or 'fp8', got 'int8'"):
        ops.moe(*[tensor] * 7, input_quant="int8")
    with pytest.raises(ValueError, match="input_quant: expected None or 'fp8', got 'int8'"):
        torch_nvfp4.pack(quantize(torch.ones(1, 16, 16)), input_quant="int8")
    with pytest.raises(ValueError, match="input_quant='fp8': expected no w2_bias, batch_invariant, got it"):
        ops.moe(*[tensor] * 7, w2_bias=tensor, batch_invariant=True, input_quant="fp8")
