"""The NVFP4 format: bit equality with nvidia-modelopt, exact decoding, properties, and errors."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from torch_nvfp4.format import (
    E2M1_VALUES,
    GROUP_SIZE,
    NVFP4Weight,
    dequantize,
    pack_codes,
    quantize,
    reciprocal_global_scale,
    row_global_scale,
    unpack_codes,
    validate,
    validate_layout,
)
from torch_nvfp4.testing import random_weight

GOLDEN = load_file(Path(__file__).parent / "data" / "modelopt_nvfp4.safetensors")
CASES = sorted({name.split(".")[0] for name in GOLDEN})
POWER_OF_TWO_CASES = ("e2m1_ties", "e4m3_ties", "power_of_two_scale", "saturated_scale")

# Enough for the properties, and the same examples in every run.
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def e4m3_value(byte: int) -> Fraction:
    """E4M3FN by its definition: sign, 4 exponent bits with bias 7, 3 mantissa bits."""
    sign = -1 if byte & 0x80 else 1
    exponent, mantissa = (byte >> 3) & 0xF, byte & 7
    if exponent == 0:
        return sign * Fraction(mantissa, 8) * Fraction(1, 64)
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


def golden_weight(case: str) -> NVFP4Weight:
    return NVFP4Weight(GOLDEN[f"{case}.data"], GOLDEN[f"{case}.scale"], GOLDEN[f"{case}.global_scale"])


def assert_same_bits(weight: NVFP4Weight, expected: NVFP4Weight) -> None:
    assert torch.equal(weight.global_scale.view(torch.int32), expected.global_scale.view(torch.int32))
    assert torch.equal(weight.scale.view(torch.uint8), expected.scale.view(torch.uint8))
    assert torch.equal(weight.data, expected.data)


@pytest.mark.parametrize("case", CASES)
def test_quantize_is_bit_equal_to_modelopt(case: str, device: str) -> None:
    """The file is written by nvidia-modelopt's own quantizer: ``python tests/data/make_modelopt_golden.py``
    (its docstring has the environment)."""
    weight = quantize(GOLDEN[f"{case}.dense"].to(device), global_scale=GOLDEN.get(f"{case}.given_global_scale"))
    assert weight.data.device.type == device
    assert_same_bits(NVFP4Weight(*(t.cpu() for t in weight)), golden_weight(case))
    validate(weight)


@pytest.mark.parametrize("case", CASES)
def test_dequantize_agrees_with_modelopt(case: str, device: str) -> None:
    """Bit-equal to ModelOpt (``python tests/data/make_modelopt_golden.py``) where its fp32 product is exact, and in the
    16-bit dtypes of checkpoints; else ModelOpt rounds twice and this package once, so they agree to one ulp of fp32."""
    weight = NVFP4Weight(*(t.to(device) for t in golden_weight(case)))
    ours, theirs = dequantize(weight).cpu(), GOLDEN[f"{case}.dequantized"]
    # Neighbours in fp32 have neighbouring bit patterns. Adding 0 turns -0 into 0: ModelOpt loses the sign of code 8.
    ulps = ((ours + 0.0).view(torch.int32).long() - (theirs + 0.0).view(torch.int32).long()).abs().max()
    assert ulps <= (0 if case in POWER_OF_TWO_CASES else 1)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(weight, dtype).cpu(), theirs.to(dtype))


def test_golden_file_covers_every_code_and_both_ties() -> None:
    codes = torch.cat([unpack_codes(GOLDEN[f"{case}.data"]).reshape(-1) for case in CASES])
    assert torch.bincount(codes).gt(0).all()
    assert codes.max() == 15
    ties = unpack_codes(GOLDEN["e2m1_ties.data"])[0].tolist()
    # 6, -6, then +-0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5: to the even code.
    assert ties == [7, 15, 0, 8, 2, 10, 2, 10, 4, 12, 4, 12, 6, 14, 6, 14]


def test_every_code_times_every_finite_scale_decodes_exactly() -> None:
    scale_bytes = [byte for byte in range(256) if byte & 0x7F != 0x7F]
    data = pack_codes(torch.arange(16, dtype=torch.uint8)).repeat(len(scale_bytes), 1)
    scale = torch.tensor(scale_bytes, dtype=torch.uint8).unsqueeze(1).view(torch.float8_e4m3fn)
    global_scale = torch.tensor(0.000123456789)
    weight = NVFP4Weight(data, scale, global_scale)
    validate(weight)
    got = dequantize(weight, torch.float64)
    for row, byte in enumerate(scale_bytes):
        for code in range(16):
            exact = Fraction(E2M1_VALUES[code]) * e4m3_value(byte) * Fraction(float(global_scale))
            value = float(got[row, code])
            assert Fraction(value) == exact
            if exact == 0:
                assert math.copysign(1.0, value) == (-1.0 if (code >= 8) != (byte >= 128) else 1.0)
    # fp32 is the exact value rounded once.
    assert torch.equal(dequantize(weight), got.to(torch.float32))


def test_nan_scale_decodes_to_nan_and_is_rejected_by_validate() -> None:
    weight = random_weight((2, 32, 64))
    weight.scale.view(torch.uint8)[1, 3, 2] = 0xFF
    assert dequantize(weight)[1, 3].isnan().sum() == GROUP_SIZE
    with pytest.raises(ValueError, match=r"^scale: .*finite E4M3.* got NaN \(byte 0xFF\) at index \[1, 3, 2\]$"):
        validate(weight)


@given(st.binary(min_size=8, max_size=64).filter(lambda b: len(b) % 8 == 0))
@PROPERTY
def test_codes_round_trip(raw: bytes) -> None:
    data = torch.tensor(list(raw), dtype=torch.uint8).reshape(1, -1)
    codes = unpack_codes(data)
    assert codes[0].tolist() == [nibble for byte in raw for nibble in (byte & 15, byte >> 4)]
    assert torch.equal(pack_codes(codes), data)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """fp32 [N, K] whose blocks span many orders of magnitude."""
    n, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 2.0, 8.0, 30.0]))
    exponent = draw(st.integers(-60, 60))
    values = torch.randn(n, blocks, GROUP_SIZE, generator=generator)
    values *= torch.exp2(exponent - spread * torch.rand(n, blocks, 1, generator=generator))
    if draw(st.booleans()):
        values[torch.rand(n, blocks, generator=generator) < 0.3] = 0.0
    return values.flatten(1)


@given(matrices())
@PROPERTY
def test_quantize_picks_a_nearest_value_within_the_block_bound(dense: Tensor) -> None:
    weight = quantize(dense)
    validate(weight)
    exact = dense.double().unflatten(1, (-1, GROUP_SIZE))
    error = (dequantize(weight, torch.float64).unflatten(1, (-1, GROUP_SIZE)) - exact).abs()
    step = (weight.scale.double() * weight.global_scale.double()).unsqueeze(-1)
    candidates = step.unsqueeze(-1) * torch.tensor(E2M1_VALUES, dtype=torch.float64)
    nearest = (candidates - exact.unsqueeze(-1)).abs().amin(-1)
    # The division before rounding is done in fp32, so a near tie may go either way.
    assert (error <= nearest + 2**-20 * step).all()
    # Half of e2m1's widest gap (4 to 6) at a step of at most (1 + 2^-4) block amax / 6, or the smallest step.
    amax = exact.abs().amax(-1, keepdim=True)
    smallest_step = 2**-9 * weight.global_scale.double()
    assert (error <= torch.maximum((1 + 2**-4) * amax / 6, smallest_step) * (1 + 1e-6)).all()


@given(matrices())
@PROPERTY
def test_quantize_is_idempotent(dense: Tensor) -> None:
    once = quantize(dense)
    twice = quantize(dequantize(once), global_scale=once.global_scale)
    # Blocks with a subnormal scale may hold no code 6, from which the scale could be found again.
    normal = once.scale.float() >= 2**-6
    assert torch.equal(twice.scale.float()[normal], once.scale.float()[normal])
    before, after = (dequantize(w).unflatten(1, (-1, GROUP_SIZE))[normal] for w in (once, twice))
    assert torch.equal(after, before)


@given(st.integers(-120, 120), st.integers(0, 2**23 - 1))
@PROPERTY
def test_reciprocal_global_scale_goes_both_ways(exponent: int, mantissa: int) -> None:
    modelopt = torch.tensor([(1 + mantissa / 2**23) * 2.0**exponent], dtype=torch.float32)
    compressed_tensors = reciprocal_global_scale(modelopt)
    assert float(compressed_tensors) == float(torch.tensor(1 / float(modelopt), dtype=torch.float64).float())
    back = reciprocal_global_scale(compressed_tensors)
    assert torch.allclose(back, modelopt, rtol=2**-23, atol=0)
    if mantissa == 0:
        assert torch.equal(back, modelopt)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e-45])
def test_reciprocal_global_scale_rejects_what_has_no_finite_reciprocal(value: float) -> None:
    with pytest.raises(ValueError, match=rf"finite reciprocal, got {float(torch.tensor(value)):g} at index \[1\]"):
        reciprocal_global_scale(torch.tensor([1.0, value]))


def test_gated_halves_are_quantized_separately() -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up = torch.randn(3, 8, 32, generator=generator), 0.01 * torch.randn(3, 8, 32, generator=generator)
    weight = quantize(torch.cat((gate, up), 1), gated=True)
    assert weight.global_scale.shape == (3, 2)
    for e in range(3):
        for half, dense in enumerate((gate[e], up[e])):
            alone = quantize(dense)
            rows = slice(8 * half, 8 * half + 8)
            got = NVFP4Weight(weight.data[e, rows], weight.scale[e, rows], weight.global_scale[e, half])
            assert_same_bits(got, alone)
            assert torch.equal(dequantize(weight)[e, rows], dequantize(alone))
    expected_rows = weight.global_scale.repeat_interleave(8, dim=1)
    assert torch.equal(row_global_scale(weight), expected_rows)

    shared = quantize(torch.cat((gate, up), 1))
    assert shared.global_scale.shape == (3,)
    validate(shared, gated=True)


def test_each_matrix_of_a_stack_is_quantized_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    # More rows than one chunk holds, and a non-contiguous stack of stacks.
    dense = torch.randn(2, 64, 3, 8192, generator=generator).transpose(1, 2) * torch.tensor([1.0, 8.0]).view(2, 1, 1, 1)
    weight = quantize(dense)
    assert weight.data.shape == (2, 3, 64, 4096)
    assert weight.global_scale.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert_same_bits(
                NVFP4Weight(weight.data[i, j], weight.scale[i, j], weight.global_scale[i, j]),
                quantize(dense[i, j].contiguous()),
            )


def test_zeros() -> None:
    dense = torch.zeros(2, 4, 32)
    dense[1, 0, 0] = 1.0
    weight = quantize(dense)
    validate(weight)
    assert weight.global_scale[0] == 1
    assert (weight.scale[0].float() == 1).all()
    assert not weight.data[0].any()
    assert torch.equal(dequantize(weight), dense)
    # An absolute maximum so small that amax / 2688 underflows is no reason for NaN.
    tiny = quantize(torch.full((1, 16), 1e-43))
    validate(tiny)
    assert float(tiny.global_scale) > 0
    assert dequantize(tiny).abs().max() <= 1e-43
    for tiny_scale in (1e-45, 1e-40):
        weight = quantize(torch.zeros(1, 16), global_scale=torch.tensor(tiny_scale))
        assert not dequantize(weight).any()


def test_an_empty_stack_and_the_default_dtype() -> None:
    weight = quantize(torch.zeros(0, 16, 32), gated=True)
    assert weight.data.shape == (0, 16, 16)
    assert weight.scale.shape == (0, 16, 2)
    assert weight.global_scale.shape == (0, 2)
    assert dequantize(weight).shape == (0, 16, 32)
    dense = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    expected = quantize(dense)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = quantize(dense)
        values = dequantize(got)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(got, expected)
    assert torch.equal(values, dequantize(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_quantize_takes_every_float_dtype(dtype: torch.dtype) -> None:
    dense = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert_same_bits(quantize(dense), quantize(dense.float()))
    assert dequantize(quantize(dense), dtype).dtype == dtype


@pytest.mark.parametrize(
    ("dense", "arguments", "error", "words"),
    [
        (torch.zeros(16, 24), {}, ValueError, "dense: expected N > 0 and K a positive multiple of 16, got N=16, K=24"),
        (torch.zeros(16, 0), {}, ValueError, "got N=16, K=0"),
        (torch.zeros(0, 16), {}, ValueError, "got N=0, K=16"),
        (torch.zeros(16), {}, ValueError, "dense: expected shape [..., N, K], got [16]"),
        (torch.zeros(3, 16), {"gated": True}, ValueError, "expected an even number of rows"),
        (torch.zeros(2, 16, dtype=torch.int8), {}, TypeError, "dense: expected dtype bfloat16, float16, float32"),
        (torch.zeros(2, 16).to(torch.float8_e4m3fn), {}, TypeError, "got torch.float8_e4m3fn"),
        (torch.zeros(2, 16), {"global_scale": torch.ones(2)}, ValueError, "global_scale: expected shape [], got [2]"),
        (torch.zeros(2, 16), {"global_scale": torch.tensor(0.0)}, ValueError, "expected positive values, got 0 at"),
        (torch.zeros(1, 2, 16), {"global_scale": torch.tensor([math.nan])}, ValueError, "got nan at index [0]"),
        (
            torch.zeros(3, 2, 16),
            {"global_scale": torch.ones(3), "gated": True},
            ValueError,
            "global_scale: expected shape [3, 2], got [3]",
        ),
    ],
)
def test_quantize_errors(dense: Tensor, arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        quantize(dense, **arguments)  # type: ignore[arg-type]
    assert words in str(raised.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_names_the_first_value_that_is_not_finite(value: float, dtype: torch.dtype) -> None:
    dense = torch.randn(3, 4, 32).to(dtype)
    dense[1, 2, 17] = value
    dense[2, 0, 0] = value
    with pytest.raises(ValueError, match=rf"^dense: expected finite values, got {value:g} at index \[1, 2, 17\]$"):
        quantize(dense)


def test_validate_accepts_every_finite_value() -> None:
    validate(random_weight((3, 8, 32), all_scales=True))
    weight = random_weight((3, 8, 32), gated=True)
    validate(weight)
    validate(weight._replace(global_scale=torch.tensor([[0.0, -1.0], [1e-45, 3e38], [1.0, 1.0]])))
    # [2] beside a batch of 2 is one global scale per matrix, beside a single matrix it is (gate, up).
    validate(random_weight((2, 8, 32)), gated=False)
    validate(random_weight((8, 32), gated=True), gated=True)


@pytest.mark.parametrize(
    ("change", "gated", "error", "words"),
    [
        ({"data": torch.zeros(3, 8, 16)}, None, TypeError, "data: expected dtype torch.uint8, got torch.float32"),
        ({"scale": torch.zeros(3, 8, 2)}, None, TypeError, "scale: expected dtype torch.float8_e4m3fn"),
        ({"global_scale": 1.0}, None, TypeError, "global_scale: expected a tensor, got float"),
        ({"global_scale": torch.ones(3).double()}, None, TypeError, "expected dtype torch.float32, got torch.float64"),
        (
            {"global_scale": torch.ones(3, device="meta")},
            None,
            ValueError,
            "expected device cpu (that of data), got meta",
        ),
        ({"global_scale": torch.ones(4)}, None, ValueError, "global_scale: expected shape [3] or [3, 2], got [4]"),
        (
            {"global_scale": torch.ones(3, 2)},
            False,
            ValueError,
            "global_scale: expected shape [3], got [3, 2]; a pair is of gate rows and up rows, which gated=True takes",
        ),
        (
            {"data": torch.zeros(16, dtype=torch.uint8)},
            None,
            ValueError,
            "data: expected shape [..., N, K/2], got [16]",
        ),
        ({"data": torch.zeros(3, 8, 12, dtype=torch.uint8)}, None, ValueError, "got N=8, K=24 from shape [3, 8, 12]"),
        ({"data": torch.zeros(3, 8, 24, dtype=torch.uint8)}, None, ValueError, "scale: expected shape [3, 8, 3], got"),
        ({"global_scale": torch.tensor([1.0, math.inf, 1.0])}, None, ValueError, "got inf at index [1]"),
    ],
)
def test_validate_errors(change: dict[str, object], gated: bool | None, error: type[Exception], words: str) -> None:
    weight = random_weight((3, 8, 32))._replace(**change)  # type: ignore[arg-type]
    with pytest.raises(error) as raised:
        validate(weight, gated=gated)
    assert words in str(raised.value)


def test_validate_errors_for_gated_weights() -> None:
    with pytest.raises(ValueError, match=r"even number of rows .* got N=7"):
        validate_layout(random_weight((3, 7, 32)), gated=True)
    with pytest.raises(ValueError, match=r"even number of rows .* got N=7"):
        dequantize(random_weight((3, 7, 32), gated=True))


def test_dequantize_checks_shapes() -> None:
    weight = random_weight((8, 64))
    with pytest.raises(ValueError, match=r"scale: expected shape \[8, 4\], got \[8, 3\]"):
        dequantize(weight._replace(scale=weight.scale[:, :3]))
