"""The MXFP4 weight format, and its exact conversion to NVFP4.

An MXFP4 matrix has one e2m1 code per value and one E8M0 scale, a power of two, per 32 consecutive values of a row:
``value = e2m1 * 2^(byte - 127)``, NaN for byte 255. An NVFP4 matrix has an E4M3 scale per 16 values and a global scale,
and E4M3 has the powers 2^-9 to 2^8. So a matrix whose exponents span at most 18 octaves has the same values, bit for
bit, in both formats: the codes stay, every scale becomes 2^(e - e0) and stands twice, and the global scale is 2^e0.
A wider matrix is refused, never rounded.

It costs memory: NVFP4 takes 0.5625 byte per value (4 bits and a byte per 16), MXFP4 0.53125 (4 bits and a byte per 32),
so that the kernels read 6 % more than one for MXFP4 would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_nvfp4.format import E2M1_VALUES, NVFP4Weight, encode_e2m1, pack_codes
from torch_nvfp4.format import GROUP_SIZE as NVFP4_GROUP_SIZE

__all__ = ["GROUP_SIZE", "OCTAVES", "MXFP4Weight", "SpanError", "dequantize", "quantize", "to_nvfp4"]

GROUP_SIZE = 32
"""Consecutive values along the input dimension that share one scale."""

OCTAVES = 18
"""Exponents next to each other that one NVFP4 matrix can have: E4M3 holds 2^-9 (subnormal) to 2^8."""

_BIAS = 127
_NAN = 255
_SMALLEST, _LARGEST = -9, 8  # exponents of E4M3's powers of two
_SMALLEST_NORMAL = -126  # of fp32, for the global scale
_PER_GROUP = GROUP_SIZE // NVFP4_GROUP_SIZE


class MXFP4Weight(NamedTuple):
    """One or more MXFP4 matrices [..., N, K] (N outputs, K inputs).

    Of gpt-oss's tensors: ``MXFP4Weight(blocks.flatten(-2), scales)``; its gate and up rows alternate, and ops that are
    gated want the gate rows first.
    """

    data: Tensor  # uint8 or int8 [..., N, K/2], two codes per byte, low nibble = even column
    scale: Tensor  # float8_e8m0fnu, or uint8 with its bytes, [..., N, K/32]


class Place(NamedTuple):
    """Where an exponent stands: the row of a matrix, and its group of 32 values."""

    exponent: int
    row: int
    group: int

    def __str__(self) -> str:
        return f"2^{self.exponent} at row {self.row}, group {self.group}"


class SpanError(ValueError):
    """The exponents of a matrix span more octaves than NVFP4 has.

    Attributes:
        matrix: which one of those that were given.
        low, high: the smallest and the largest exponent of its groups with a value other than zero.
    """

    expected = f"exponents within {OCTAVES} octaves in one matrix, so that NVFP4 has the same values"

    def __init__(self, matrix: int, low: Place, high: Place) -> None:
        super().__init__(f"scale: expected {self.expected}, got {low} and {high} of matrix {matrix}")
        self.matrix, self.low, self.high = matrix, low, high


class NaNScaleError(ValueError):
    """A scale is NaN. ``matrix``, ``row``, ``group``: where."""

    expected = "finite E8M0 scales"

    def __init__(self, matrix: int, row: int, group: int) -> None:
        place = f"at row {row}, group {group} of matrix {matrix}"
        super().__init__(f"scale: expected {self.expected}, got NaN (byte 0xFF) {place}")
        self.matrix, self.row, self.group = matrix, row, group


def validate_layout(weight: MXFP4Weight) -> tuple[Tensor, Tensor]:
    """(data, scale) as uint8. Raises TypeError for other dtypes, ValueError for shapes and devices that do not fit."""
    data, scale = weight
    if data.dtype not in (torch.uint8, torch.int8):
        raise TypeError(f"data: expected dtype torch.uint8 or torch.int8, got {data.dtype}")
    if scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise TypeError(f"scale: expected dtype torch.uint8 or torch.float8_e8m0fnu, got {scale.dtype}")
    if scale.device != data.device:
        raise ValueError(f"scale: expected device {data.device} (that of data), got {scale.device}")
    if data.dim() < 2 or 0 in data.shape[-2:] or data.shape[-1] % (GROUP_SIZE // 2):
        expected = f"[..., N, K/2] with N > 0 and K a positive multiple of {GROUP_SIZE}"
        raise ValueError(f"data: expected shape {expected}, got {list(data.shape)}")
    groups = [*data.shape[:-1], data.shape[-1] // (GROUP_SIZE // 2)]
    if list(scale.shape) != groups:
        advice = ""
        if data.shape[-1] == GROUP_SIZE // 2 and data.shape[:-1] == scale.shape:
            advice = "; flatten data [..., N, K/32, 16], as gpt-oss has its blocks, with data.flatten(-2)"
        raise ValueError(f"scale: expected shape {groups}, got {list(scale.shape)}{advice}")
    return data.view(torch.uint8), scale.view(torch.uint8)


def dequantize(weight: MXFP4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``e2m1 * 2^(byte - 127)`` as [..., N, K] in ``dtype``; byte 255 gives NaN.

    fp64 and fp32 results are exact, except that fp32 has no value of 2^128 or more (infinity there); 16-bit results are
    the fp32 ones rounded. Code 8 is -0.0. Raises what ``validate_layout`` raises.
    """
    data, scale = validate_layout(weight)
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = [(E2M1_VALUES[byte & 0x0F], E2M1_VALUES[byte >> 4]) for byte in range(256)]
    table = torch.tensor(pairs, dtype=compute_dtype, device=data.device)
    powers = [math.ldexp(1.0, byte - _BIAS) for byte in range(_NAN)] + [math.nan]
    step = torch.tensor(powers, dtype=compute_dtype, device=data.device)[scale.int()]
    groups = F.embedding(data.int(), table).reshape(*scale.shape, GROUP_SIZE)
    return groups.mul_(step.unsqueeze(-1)).flatten(-2).to(dtype)


def quantize(dense: Tensor) -> MXFP4Weight:
    """Quantizes [..., N, K] as the OCP Microscaling specification has it; data uint8, scale float8_e8m0fnu.

    ``scale = 2^(floor(log2(group amax)) - 2)`` (2^2 is the largest power of two of e2m1), at least 2^-127, and 1 for a
    group of zeros; codes are rounded to nearest even and saturate at 6.

    Raises TypeError for a dtype that is not floating point, ValueError for a shape without groups of 32 and for values
    that are not finite.
    """
    if not dense.is_floating_point() or dense.itemsize < 2:
        raise TypeError(f"dense: expected dtype bfloat16, float16, float32 or float64, got {dense.dtype}")
    if dense.dim() < 2 or 0 in dense.shape[-2:] or dense.shape[-1] % GROUP_SIZE:
        expected = f"[..., N, K] with N > 0 and K a positive multiple of {GROUP_SIZE}"
        raise ValueError(f"dense: expected shape {expected}, got {list(dense.shape)}")
    groups = dense.detach().to(torch.float32).unflatten(-1, (-1, GROUP_SIZE))
    amax = groups.abs().amax(-1)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("dense: expected finite values, got NaN or infinity")
    _, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent with a mantissa in [0.5, 1)
    exponent = torch.where(amax == 0, 0, exponent - 1 - 2).clamp(min=-_BIAS)
    # In fp64: 2^127 is as large as fp32 goes, and values / 2^-127 is beyond it.
    codes = encode_e2m1(torch.ldexp(groups.double(), -exponent.unsqueeze(-1)))
    scale = (exponent + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)
    return MXFP4Weight(pack_codes(codes.flatten(-2)), scale)


def to_nvfp4(weight: MXFP4Weight, *, gated: bool = False) -> NVFP4Weight:
    """The NVFP4 weight with the same values, bit for bit. Its ``data`` may share the memory of ``weight.data``.

    Exact where the exponents of each matrix span at most 18 octaves; those of 16 values that are all zero do not count.
    The global scales are powers of two, finite and normal in fp32 as their reciprocals are.

    Args:
        weight: [..., N, K].
        gated: rows are gate rows then up rows (N = 2I). The global scale is then [..., 2], the same for both where all
            exponents of both fit, as engines that run them as one GEMM want it.

    Raises:
        SpanError (a ValueError): a matrix with a wider span; it says which, and where its two exponents are. ``matrix``
            counts matrices as in ``weight.scale.flatten(0, -3)``, for a gated weight two for each.
        ValueError: a NaN scale; an odd number of rows of a gated weight; what ``validate_layout`` raises.
    """
    data, scale = validate_layout(weight)
    *batch, n, half_k = data.shape
    if gated and n % 2:
        raise ValueError(f"data: expected an even number of rows (gate rows, then up rows), got N={n}")
    share = 2 if gated else 1
    matrices = data.reshape(math.prod(batch), share, n // share, half_k)
    groups = _PER_GROUP * scale.shape[-1]
    spread = spread_scales(scale).reshape(*matrices.shape[:3], groups)  # not -1, for which no matrix at all has no size
    block_scale = torch.empty_like(spread)
    global_scale = torch.empty(len(matrices), share, dtype=torch.float32, device="cpu")
    for i in range(len(matrices)):
        try:
            exponents = global_exponents(matrices[i], spread[i])
        except SpanError as error:
            raise SpanError(share * i + error.matrix, error.low, error.high) from None
        except NaNScaleError as error:
            raise NaNScaleError(share * i + error.matrix, error.row, error.group) from None
        for half, exponent in enumerate(exponents):
            block_scale[i, half] = e4m3_scales(spread[i, half], exponent)
            global_scale[i, half] = math.ldexp(1.0, exponent)
    return NVFP4Weight(
        data,
        block_scale.reshape(*batch, n, groups).view(torch.float8_e4m3fn),
        global_scale.reshape([*batch, 2] if gated else batch).to(data.device),
    )


def spread_scales(scale: Tensor) -> Tensor:
    """E8M0 bytes per 32 values [..., K/32] -> per 16 values [..., K/16], each twice."""
    return scale.repeat_interleave(_PER_GROUP, -1)


def global_exponents(data: Tensor, spread: Tensor, first_block: int = 0) -> list[int]:
    """For each of a few matrices, e0 of its global scale 2^e0: one for all of them where that is possible.

    Args:
        data: uint8 [S, N, K/2].
        spread: E8M0 bytes per 16 values, uint8 [S, N, K/16].
        first_block: 1 for columns that begin in the second half of a group of 32, which errors count from 0.

    Raises SpanError and NaNScaleError, with the index of the first matrix that cannot be converted.
    """
    ends = [(int(low), int(high)) for low, high in (matrix.aminmax() for matrix in spread)]
    for matrix, (_, high) in enumerate(ends):
        if high == _NAN:
            row, block = (spread[matrix] == _NAN).nonzero()[0].tolist()
            raise NaNScaleError(matrix, row, (first_block + block) // _PER_GROUP)
    shared = _fitting(ends)
    if shared is not None:
        return [shared] * len(ends)
    # Only now the codes: the exponent of zeros does not matter.
    used = [_used_ends(codes, scales) for codes, scales in zip(data, spread, strict=True)]
    shared = _fitting([each for each in used if each is not None])
    if shared is not None:
        return [shared] * len(ends)
    result = []
    for matrix, each in enumerate(used):
        exponent = _fitting([] if each is None else [each])
        if exponent is None:
            assert each is not None
            raise SpanError(matrix, *(_place(data[matrix], spread[matrix], byte, first_block) for byte in each))
        result.append(exponent)
    return result


def _fitting(ends: Sequence[tuple[int, int]]) -> int | None:
    """e0 such that all bytes between the ends become E4M3 scales; None where there is none."""
    low, high = min((low for low, _ in ends), default=_BIAS), max((high for _, high in ends), default=_BIAS)
    if high - low >= OCTAVES:
        return None
    # The largest scale is 2^8, or the global scale 2^-126: below, fp32 and the reciprocal would be subnormal.
    return max(high - _BIAS - _LARGEST, _SMALLEST_NORMAL)


def _is_used(data: Tensor, spread: Tensor) -> Tensor:
    """Whether 16 values are not all zero (of either sign): bool [N, K/16]."""
    return (data & 0x77).unflatten(-1, (spread.shape[-1], -1)).amax(-1) != 0


def _used_ends(data: Tensor, spread: Tensor) -> tuple[int, int] | None:
    """The smallest and the largest byte of scales whose values are not all zero; None where all are."""
    used = spread[_is_used(data, spread)]
    return (int(used.min()), int(used.max())) if used.numel() else None


def _place(data: Tensor, spread: Tensor, byte: int, first_block: int) -> Place:
    row, block = ((spread == byte) & _is_used(data, spread)).nonzero()[0].tolist()
    return Place(byte - _BIAS, row, (first_block + block) // _PER_GROUP)


def e4m3_scales(spread: Tensor, exponent: int) -> Tensor:
    """The bytes of E4M3 scales 2^(byte - 127 - exponent); for scales of zeros the nearest power that there is."""
    powers = [min(max(byte - _BIAS - exponent, _SMALLEST), _LARGEST) for byte in range(256)]
    # 4 bits of exponent with bias 7, 3 of mantissa; below 2^-6 the mantissa alone.
    codes = [(power + 7) << 3 if power >= -6 else 1 << (power + 9) for power in powers]
    table = torch.tensor(codes, dtype=torch.uint8, device=spread.device)
    return table[spread.int()]
