"""MXFP4 and its conversion to NVFP4, bit for bit against a decoder that shares nothing with the package."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from torch_nvfp4 import mxfp4
from torch_nvfp4.format import NVFP4Weight, is_gated_pair, validate
from torch_nvfp4.format import dequantize as dequantize_nvfp4
from torch_nvfp4.mxfp4 import MXFP4Weight, SpanError, dequantize, to_nvfp4

LOWEST, HIGHEST = -127, 127  # exponents that E8M0 has


def e2m1(code: int) -> float:
    """From the bits: sign, 2 of exponent with bias 1, 1 of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(magnitude, -1.0 if sign else 1.0)


def e4m3(byte: int) -> float:
    """From the bits: sign, 4 of exponent with bias 7, 3 of mantissa."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return math.copysign(magnitude, -1.0 if byte >> 7 else 1.0)


def decoded(data: Tensor, scale: Tensor) -> NDArray[np.float64]:
    """Value by value: codes [N, K/2], E8M0 bytes [N, K/32] -> fp64 [N, K]."""
    codes, exponents = data.numpy().view(np.uint8), scale.numpy()
    result = np.empty((len(codes), 2 * codes.shape[1]))
    for row, column in np.ndindex(*result.shape):
        byte, exponent = int(codes[row, column // 2]), int(exponents[row, column // 32])
        value = e2m1(byte >> 4 if column % 2 else byte & 15)
        # ldexp keeps the sign of a zero.
        result[row, column] = math.nan if exponent == 255 else math.ldexp(value, exponent - 127)
    return result


def decoded_nvfp4(weight: NVFP4Weight) -> NDArray[np.float64]:
    codes, scale = weight.data.numpy().view(np.uint8), weight.scale.view(torch.uint8).numpy()
    result = np.empty((len(codes), 2 * codes.shape[1]))
    for row, column in np.ndindex(*result.shape):
        byte = int(codes[row, column // 2])
        value = e2m1(byte >> 4 if column % 2 else byte & 15)
        per_row = weight.global_scale.reshape(-1)
        global_scale = float(per_row[row * len(per_row) // len(codes)])
        result[row, column] = value * e4m3(int(scale[row, column // 16])) * global_scale
    return result


def assert_same_bits(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    np.testing.assert_array_equal(actual.view(np.int64), expected.view(np.int64))


ALL_CODES = torch.tensor([code | (15 - code) << 4 for code in range(16)], dtype=torch.uint8)  # a group of 32


def matrix(exponents: list[int]) -> MXFP4Weight:
    """One row with a group of all codes for each exponent."""
    data = ALL_CODES.repeat(len(exponents)).reshape(1, -1)
    return MXFP4Weight(data, torch.tensor([[e + 127 for e in exponents]], dtype=torch.uint8))


def test_dequantize_every_code_and_scale() -> None:
    weight = MXFP4Weight(ALL_CODES.repeat(256).reshape(1, -1), torch.arange(256, dtype=torch.uint8).reshape(1, -1))
    expected = decoded(*weight)
    values = dequantize(weight, torch.float64)
    assert values.shape == (1, 256 * 32)
    assert_same_bits(values[:, : 255 * 32].numpy(), expected[:, : 255 * 32])
    assert values[0, 255 * 32 :].isnan().all()
    single = dequantize(weight)
    assert single.dtype == torch.float32
    with np.errstate(over="ignore"):
        rounded = expected.astype(np.float32)
    np.testing.assert_array_equal(single.numpy(), rounded)
    finite = np.isfinite(rounded)
    assert np.array_equal(np.signbit(single.numpy()[finite]), np.signbit(rounded[finite]))
    assert np.array_equal(rounded[finite].astype(np.float64), expected[finite])  # exact
    assert torch.equal(dequantize(weight, torch.bfloat16).nan_to_num(), single.bfloat16().nan_to_num())


@pytest.mark.parametrize("data", [torch.uint8, torch.int8])
@pytest.mark.parametrize("scale", [torch.uint8, torch.float8_e8m0fnu])
def test_dtypes_are_views(data: torch.dtype, scale: torch.dtype) -> None:
    weight = matrix([0, 3, -5])
    other = MXFP4Weight(weight.data.view(data), weight.scale.view(scale))
    assert torch.equal(dequantize(other, torch.float64), dequantize(weight, torch.float64))
    assert_same_bits(decoded_nvfp4(to_nvfp4(other)), decoded(*weight))


@pytest.mark.parametrize("lowest", range(LOWEST, HIGHEST - 16))
def test_every_window_of_18_octaves(lowest: int) -> None:
    """All codes with all of the exponents that fit into one matrix, wherever they begin."""
    weight = matrix(list(range(lowest, lowest + 18)))
    converted = to_nvfp4(weight)
    validate(converted, gated=False)
    assert_same_bits(decoded_nvfp4(converted), decoded(*weight))
    assert_same_bits(dequantize_nvfp4(converted, torch.float64).numpy(), decoded(*weight))
    (global_scale,) = converted.global_scale.reshape(-1).tolist()
    mantissa, _ = math.frexp(global_scale)
    assert mantissa == 0.5  # a power of two
    tiny = float(np.finfo(np.float32).tiny)
    assert tiny <= global_scale < math.inf
    assert tiny <= 1 / global_scale < math.inf


@pytest.mark.parametrize("exponent", range(LOWEST, HIGHEST + 1))
def test_every_exponent_alone(exponent: int) -> None:
    weight = matrix([exponent])
    converted = to_nvfp4(weight)
    assert_same_bits(decoded_nvfp4(converted), decoded(*weight))
    reciprocal = converted.global_scale.reciprocal()  # as compressed-tensors stores it
    assert torch.equal(reciprocal.reciprocal(), converted.global_scale)


@pytest.mark.parametrize("lowest", [LOWEST, -20, 0, HIGHEST - 18])
def test_19_octaves_are_refused(lowest: int) -> None:
    data, scale = matrix([lowest + 1] * 4)
    data, scale = data.repeat(3, 1), scale.repeat(3, 1)
    scale[1, 2], scale[2, 1] = lowest + 127, lowest + 18 + 127
    words = f"got 2^{lowest} at row 1, group 2 and 2^{lowest + 18} at row 2, group 1 of matrix 0"
    with pytest.raises(SpanError, match=re.escape(words)) as caught:
        to_nvfp4(MXFP4Weight(data, scale))
    assert "expected exponents within 18 octaves" in str(caught.value)
    assert (caught.value.low, caught.value.high) == ((lowest, 1, 2), (lowest + 18, 2, 1))


@pytest.mark.parametrize("zero", [0x00, 0x88, 0x80])
@pytest.mark.parametrize("exponent", [LOWEST, HIGHEST])
def test_exponents_of_zeros_do_not_count(zero: int, exponent: int) -> None:
    """Zeros of both signs keep their bits under any scale; also where only half of a group is zero."""
    weight = matrix([0, 17, exponent])
    weight.data[0, 32:] = zero
    assert_same_bits(decoded_nvfp4(to_nvfp4(weight)), decoded(*weight))
    weight.data[0, 40] = 0x10  # one value in the second half: 0.5
    with pytest.raises(SpanError, match="at row 0, group 2"):
        to_nvfp4(weight)
    weight = matrix([exponent] * 2)
    weight.data[:] = zero
    assert_same_bits(decoded_nvfp4(to_nvfp4(weight)), decoded(*weight))


def test_half_a_group_of_zeros() -> None:
    weight = matrix([0, 17])
    weight.data[0, :8] = 0
    converted = to_nvfp4(weight)
    assert_same_bits(decoded_nvfp4(converted), decoded(*weight))


@given(st.data())
def test_any_matrix_is_the_same_or_refused(choose: st.DataObject) -> None:
    """The rule itself: exact exactly where the exponents of blocks with values span at most 18 octaves."""
    rows, groups = choose.draw(st.integers(1, 3)), choose.draw(st.integers(1, 3))
    low = choose.draw(st.integers(0, 254))
    high = min(254, low + choose.draw(st.sampled_from([0, 5, 16, 17, 18, 19, 40, 254])))
    size = rows * groups
    scale = torch.tensor(
        choose.draw(st.lists(st.integers(low, high), min_size=size, max_size=size)), dtype=torch.uint8
    ).reshape(rows, groups)
    data = torch.tensor(list(choose.draw(st.binary(min_size=16 * size, max_size=16 * size))), dtype=torch.uint8)
    data = data.reshape(rows, -1)
    for group in choose.draw(st.lists(st.integers(0, size - 1), max_size=3)):
        row, column = divmod(group, groups)
        data[row, 16 * column : 16 * column + 16] = 0x80
    weight = MXFP4Weight(data, scale)
    expected = decoded(data, scale)
    used = [
        int(scale[row, block // 2])
        for row, block in np.ndindex(rows, 2 * groups)
        if np.any(expected[row, 16 * block : 16 * block + 16] != 0)
    ]
    if used and max(used) - min(used) > 17:
        with pytest.raises(SpanError):
            to_nvfp4(weight)
        return
    converted = to_nvfp4(weight)
    validate(converted, gated=False)
    assert_same_bits(decoded_nvfp4(converted), expected)
    assert torch.equal(converted.data, data)


def test_batches_and_gated_pairs() -> None:
    """Gate and up share a global scale where all of their exponents fit into one, and have their own where not."""
    exponents = torch.tensor([[0, 5], [3, 17], [-9, 8], [9, 26]])  # gate, up of matrix 0; gate, up of matrix 1
    scale = (exponents + 127).to(torch.uint8).reshape(2, 2, 2)
    weight = MXFP4Weight(ALL_CODES.repeat(2).expand(2, 2, 32).contiguous(), scale)
    plain, pair = to_nvfp4(weight._replace(scale=scale.clamp(max=127 + 8))), to_nvfp4(weight, gated=True)
    assert plain.global_scale.shape == (2,)
    validate(pair, gated=True)
    assert is_gated_pair(pair)
    assert torch.log2(pair.global_scale).tolist() == [[9, 9], [0, 18]]
    for i in range(2):
        one = NVFP4Weight(*(part[i] for part in pair))
        assert_same_bits(decoded_nvfp4(one), decoded(weight.data[i], scale[i]))
    scale[1, 1, 0] = 127 + 8
    words = "got 2^8 at row 0, group 0 and 2^26 at row 0, group 1 of matrix 3"
    with pytest.raises(SpanError, match=re.escape(words)):
        to_nvfp4(weight, gated=True)
    with pytest.raises(SpanError, match="of matrix 1"):
        to_nvfp4(weight)


@pytest.mark.parametrize("gated", [False, True])
def test_no_matrix_at_all(gated: bool) -> None:
    """A rank may have no experts."""
    weight = to_nvfp4(MXFP4Weight(*(torch.zeros(0, 32, k, dtype=torch.uint8) for k in (32, 2))), gated=gated)
    validate(weight, gated=gated)
    assert dequantize_nvfp4(weight).shape == (0, 32, 64)


def test_nan_scales() -> None:
    weight = matrix([0, 1, 2])
    weight.scale[0, 1] = 255
    data = torch.stack((ALL_CODES.repeat(3).reshape(1, -1), weight.data))
    scale = torch.stack((weight.scale.clamp(max=127), weight.scale))
    words = "expected finite E8M0 scales, got NaN (byte 0xFF) at row 0, group 1 of matrix 1"
    with pytest.raises(ValueError, match=re.escape(words)):
        to_nvfp4(MXFP4Weight(data, scale))
    weight.data[:] = 0  # NaN times zero is NaN
    with pytest.raises(ValueError, match=re.escape("at row 0, group 1 of matrix 0")):
        to_nvfp4(weight)


MAGNITUDES = np.array(sorted({abs(e2m1(code)) for code in range(16)}))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=64, max_size=64), st.integers(-140, 110))
def test_quantize_is_the_specification(values: list[float], shift: int) -> None:
    """Each group's scale and each value by the formula, in fp64: nearest, the even one of two, saturating."""
    with np.errstate(over="ignore", under="ignore"):
        dense = np.ldexp(np.array(values, dtype=np.float32), shift).astype(np.float32)
    dense[~np.isfinite(dense)] = 1.0
    data, scale = mxfp4.quantize(torch.from_numpy(dense).reshape(1, -1))
    assert (data.dtype, scale.dtype) == (torch.uint8, torch.float8_e8m0fnu)
    decoded_values = decoded(data, scale.view(torch.uint8))[0]
    for group in range(2):
        part = dense[32 * group : 32 * group + 32].astype(np.float64)
        amax = np.abs(part).max()
        exponent = max(-127, math.frexp(amax)[1] - 3) if amax else 0
        assert int(scale.view(torch.uint8)[0, group]) == exponent + 127
        for value, got in zip(part, decoded_values[32 * group : 32 * group + 32], strict=True):
            distance = np.abs(MAGNITUDES - abs(math.ldexp(value, -exponent)))
            nearest = np.flatnonzero(distance == distance.min())
            wanted = MAGNITUDES[next(i for i in nearest if i % 2 == 0 or len(nearest) == 1)]
            assert abs(got) == math.ldexp(float(wanted), exponent)
            assert got == 0 or (got < 0) == (value < 0)


def test_quantize_gives_back_what_it_can_hold() -> None:
    weight = matrix(list(range(LOWEST, HIGHEST - 1)))  # fp32 holds 6 * 2^125
    again = mxfp4.quantize(dequantize(weight))
    assert torch.equal(again.scale.view(torch.uint8), weight.scale)
    values = dequantize(again, torch.float64)
    assert torch.equal(values, dequantize(weight, torch.float64))
    assert torch.equal(mxfp4.quantize(torch.zeros(1, 32)).scale.view(torch.uint8), torch.tensor([[127]]).byte())


@pytest.mark.parametrize(
    ("dense", "error", "words"),
    [
        (torch.zeros(2, 32, dtype=torch.int32), TypeError, "dense: expected dtype bfloat16, float16, float32 or"),
        (torch.zeros(2, 48), ValueError, "a positive multiple of 32, got [2, 48]"),
        (torch.zeros(32), ValueError, "dense: expected shape [..., N, K]"),
        (torch.full((2, 32), math.inf), ValueError, "dense: expected finite values, got NaN or infinity"),
        (torch.full((2, 32), math.nan), ValueError, "dense: expected finite values, got NaN or infinity"),
    ],
)
def test_bad_input_of_quantize(dense: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        mxfp4.quantize(dense)


BYTES = torch.zeros(2, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("data", "scale", "error", "words"),
    [
        (BYTES.float(), BYTES[:, :1], TypeError, "data: expected dtype torch.uint8 or torch.int8, got torch.float32"),
        (BYTES, BYTES[:, :1].float(), TypeError, "scale: expected dtype torch.uint8 or torch.float8_e8m0fnu, got"),
        (BYTES, BYTES[:, :2], ValueError, "scale: expected shape [2, 1], got [2, 2]"),
        (BYTES[None], BYTES[:, :2], ValueError, "scale: expected shape [1, 2, 1], got [2, 2]"),
        (
            torch.zeros(2, 4, 3, 16, dtype=torch.uint8),
            torch.zeros(2, 4, 3, dtype=torch.uint8),
            ValueError,
            "scale: expected shape [2, 4, 3, 1], got [2, 4, 3]; flatten data [..., N, K/32, 16], as gpt-oss has its "
            "blocks, with data.flatten(-2)",
        ),
        (BYTES[:, :8], BYTES[:, :1], ValueError, "a positive multiple of 32, got [2, 8]"),
        (BYTES[:0], BYTES[:0, :1], ValueError, "with N > 0"),
        (BYTES[0], BYTES[0, :1], ValueError, "data: expected shape [..., N, K/2]"),
        (BYTES, BYTES[:, :1].to("meta"), ValueError, "scale: expected device cpu (that of data), got meta"),
    ],
)
def test_bad_input(data: Tensor, scale: Tensor, error: type[Exception], words: str) -> None:
    for call in (dequantize, to_nvfp4):
        with pytest.raises(error, match=re.escape(words)):
            call(MXFP4Weight(data, scale))


def test_odd_gated_rows() -> None:
    with pytest.raises(ValueError, match=r"expected an even number of rows .* got N=1"):
        to_nvfp4(matrix([0]), gated=True)


def test_what_it_costs() -> None:
    """Bytes per value, as the documentation says: 0.53125 and 0.5625."""
    data = torch.zeros(64, 512, dtype=torch.uint8)
    weight = MXFP4Weight(data, torch.full((64, 32), 127, dtype=torch.uint8))
    converted = to_nvfp4(weight)
    values = 64 * 1024
    assert (data.nbytes + weight.scale.nbytes) / values == 0.53125
    assert (converted.data.nbytes + converted.scale.nbytes) / values == 0.5625
    assert mxfp4.__doc__ is not None
    assert "0.5625" in mxfp4.__doc__
