"""The NVFP4 weight format in plain torch: quantize, dequantize, checks.

An NVFP4 matrix has one e2m1 code per value, one E4M3 scale per 16 consecutive values of a row, and one fp32 global
scale: ``value = e2m1 * scale * global_scale``. Nothing here depends on the kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

GROUP_SIZE = 16
"""Consecutive values along the input dimension that share one block scale."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each 4-bit code."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9

_CHUNK_VALUES = 1 << 18

# Midpoints between neighbouring magnitudes, by the code just below them. A tie goes to the even one of the two codes.
_E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


class NVFP4Weight(NamedTuple):
    """One or more NVFP4 matrices [..., N, K] (N outputs, K inputs).

    ``global_scale`` has one value per matrix. A gated weight [..., 2I, K] (gate rows first, then up rows) may instead
    carry two per matrix, [..., 2] = (gate, up).
    """

    data: Tensor  # uint8 [..., N, K/2], two codes per byte, low nibble = even column
    scale: Tensor  # float8_e4m3fn [..., N, K/16]
    global_scale: Tensor  # float32 [...] or [..., 2]; ModelOpt's weight_scale_2

    def to(self, device: torch.device | str) -> NVFP4Weight:
        """The same values on a device; the tensors that are there already are taken as they are."""
        return NVFP4Weight(*(part.to(device) for part in self))


def has_values(tensor: Tensor) -> bool:
    """False for tensors that only stand for some: on the meta device, or under FakeTensorMode."""
    return not (tensor.is_meta or is_fake(tensor))


def _first_index(mask: Tensor) -> list[int]:
    """Index of the first true element of ``mask``, which has at least one."""
    flat = int(mask.reshape(-1).to(torch.uint8).argmax())
    index: list[int] = []
    for size in reversed(mask.shape):
        flat, remainder = divmod(flat, size)
        index.insert(0, remainder)
    return index


def _require_finite(name: str, values: Tensor) -> None:
    if not has_values(values):
        return
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        index = _first_index(bad)
        raise ValueError(f"{name}: expected finite values, got {float(values[tuple(index)]):g} at index {index}")


def _require_sizes(name: str, shape: torch.Size, n: int, k: int) -> None:
    if n == 0 or k == 0 or k % GROUP_SIZE:
        raise ValueError(
            f"{name}: expected N > 0 and K a positive multiple of {GROUP_SIZE}, "
            f"got N={n}, K={k} from shape {list(shape)}"
        )


def validate_layout(weight: NVFP4Weight, *, gated: bool | None = None) -> None:
    """Checks dtypes, devices and shapes of ``weight``; reads no values, so it never synchronises with a GPU.

    ``gated=False`` forbids a gate/up pair of global scales, ``gated=True`` requires an even number of rows, ``None``
    takes the weight as gated if its global scale has one dimension more than there are batch dimensions.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong device or shape.
    """
    expected_dtypes = (("data", torch.uint8), ("scale", torch.float8_e4m3fn), ("global_scale", torch.float32))
    for (name, dtype), tensor in zip(expected_dtypes, weight, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
        if tensor.device != weight.data.device:
            raise ValueError(f"{name}: expected device {weight.data.device} (that of data), got {tensor.device}")

    if weight.data.dim() < 2:
        raise ValueError(f"data: expected shape [..., N, K/2], got {list(weight.data.shape)}")
    *batch, n, k = weight.data.shape
    k *= 2
    _require_sizes("data", weight.data.shape, n, k)
    expected_scale = [*batch, n, k // GROUP_SIZE]
    if list(weight.scale.shape) != expected_scale:
        raise ValueError(f"scale: expected shape {expected_scale}, got {list(weight.scale.shape)}")

    got = list(weight.global_scale.shape)
    allowed = [batch] if gated is False else [batch, [*batch, 2]]
    if got not in allowed:
        advice = "; a pair is of gate rows and up rows, which gated=True takes" if got == [*batch, 2] else ""
        raise ValueError(f"global_scale: expected shape {' or '.join(map(str, allowed))}, got {got}{advice}")
    if n % 2 and (gated or got != batch):
        raise ValueError(f"data: expected an even number of rows (gate rows, then up rows), got N={n}")


def validate(weight: NVFP4Weight, *, gated: bool | None = None) -> None:
    """``validate_layout``, and the values: block scales without NaN, global scales finite.

    Zero, negative and subnormal scales are valid. Reads the scales (synchronises with a GPU); tensors without values,
    meta and fake ones, pass.
    """
    validate_layout(weight, gated=gated)
    if not has_values(weight.scale):
        return
    scale_bytes = weight.scale.view(torch.uint8)
    bad = (scale_bytes & 0x7F) == 0x7F
    if bool(bad.any()):
        index = _first_index(bad)
        got = int(scale_bytes[tuple(index)])
        raise ValueError(f"scale: expected finite E4M3 values, got NaN (byte 0x{got:02X}) at index {index}")
    _require_finite("global_scale", weight.global_scale)


def is_gated_pair(weight: NVFP4Weight) -> bool:
    """Whether ``global_scale`` is [..., 2] = (gate, up) and not one value per matrix."""
    return weight.global_scale.dim() == weight.data.dim() - 1


def has_gate_rows(w13: NVFP4Weight, w2: NVFP4Weight) -> bool:
    """Whether experts' w13 has gate and up rows, [E, 2I, K], and not up rows alone, [E, I, K], beside w2 [E, K, I]."""
    return bool(w13.data.shape[-2] != 2 * w2.data.shape[-1])


def row_global_scale(weight: NVFP4Weight) -> Tensor:
    """Global scale of every row: fp32 [..., N]."""
    batch, n = weight.data.shape[:-2], weight.data.shape[-2]
    if is_gated_pair(weight):
        return weight.global_scale.unsqueeze(-1).expand(*batch, 2, n // 2).reshape(*batch, n)
    return weight.global_scale.unsqueeze(-1).expand(*batch, n)


def unpack_codes(data: Tensor) -> Tensor:
    """uint8 [..., K/2] with two codes per byte -> uint8 [..., K] with one code (0..15) per byte."""
    return torch.stack((data & 0x0F, data >> 4), dim=-1).flatten(-2)


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 [..., K] with one code (0..15) a byte -> uint8 [..., K/2], low nibble = even column."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def encode_e2m1(values: Tensor) -> Tensor:
    """Nearest e2m1 code of fp32 ``values``, ties to even, saturating at 6: uint8, same shape.

    Negative values that round to zero keep their sign (code 8); -0.0 becomes code 0, as in ModelOpt. NaN, from 0 / 0
    where a step underflowed to zero, becomes code 0.
    """
    magnitude = values.abs()
    codes = (values < 0).to(torch.uint8) << 3
    for code, bound in enumerate(_E2M1_BOUNDS):
        codes += magnitude > bound if code % 2 == 0 else magnitude >= bound
    return codes


def _quantize_rows(dense: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [N, K] and its matrix's 0-d global scale -> (data uint8 [N, K/2], scale E4M3 [N, K/16])."""
    blocks = dense.reshape(dense.shape[0], -1, GROUP_SIZE)
    block_scale = blocks.abs().amax(-1) / (E2M1_MAX * global_scale)
    # An all-zero block takes scale 1, as in ModelOpt; its codes are zero either way.
    block_scale = torch.where(block_scale == 0, 1.0, block_scale)
    scale = block_scale.clamp(E4M3_MIN_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)
    step = (scale.to(torch.float32) * global_scale).unsqueeze(-1)
    codes = encode_e2m1(blocks / step)
    return pack_codes(codes.flatten(-2)), scale


def _checked_global_scale(global_scale: Tensor, shape: list[int]) -> Tensor:
    """In fp32; ValueError unless it has this shape and positive, finite values."""
    if list(global_scale.shape) != shape:
        raise ValueError(f"global_scale: expected shape {shape}, got {list(global_scale.shape)}")
    global_scale = global_scale.to(torch.float32)
    _require_finite("global_scale", global_scale)
    if has_values(global_scale) and bool((global_scale <= 0).any()):
        index = _first_index(global_scale <= 0)
        raise ValueError(
            f"global_scale: expected positive values, got {float(global_scale[tuple(index)]):g} at index {index}"
        )
    return global_scale


def quantize(dense: Tensor, *, global_scale: Tensor | None = None, gated: bool = False) -> NVFP4Weight:
    """Quantizes [..., N, K] to NVFP4, bit-equal to nvidia-modelopt's ``NVFP4QTensor.quantize`` on each matrix.

    ``global_scale = amax / (6 * 448)`` per matrix, ``scale = E4M3(block amax / (6 * global_scale))`` clamped to
    [2^-9, 448], codes rounded to nearest even and saturated at 6. A matrix of zeros (for which ModelOpt gives NaN
    scales) takes global scale 1, block scales 1 and codes 0.

    Args:
        dense: floating point [..., N, K], K a multiple of 16, finite. fp64 is rounded to fp32 first.
        global_scale: positive and finite, fp32 [...] (or [..., 2] if gated), instead of the one from amax.
        gated: rows are gate rows then up rows (N = 2I); each half takes its own global scale, [..., 2].

    Raises ValueError, with the index of the first bad value where a value is not finite or not positive. Of tensors
    without values (meta, fake) come weights without values.
    """
    if not dense.is_floating_point() or dense.itemsize < 2:
        raise TypeError(f"dense: expected dtype bfloat16, float16, float32 or float64, got {dense.dtype}")
    if dense.dim() < 2:
        raise ValueError(f"dense: expected shape [..., N, K], got {list(dense.shape)}")
    *batch, n, k = dense.shape
    _require_sizes("dense", dense.shape, n, k)
    if gated and n % 2:
        raise ValueError(f"dense: expected an even number of rows (gate rows, then up rows), got N={n}")
    scale_shape = [*batch, 2] if gated else batch
    device = dense.device
    if global_scale is not None:
        global_scale = _checked_global_scale(global_scale.to(device), scale_shape)

    matrices = dense.detach().reshape(math.prod(scale_shape), n // 2 if gated else n, k)
    data = torch.empty((*matrices.shape[:-1], k // 2), dtype=torch.uint8, device=device)
    scale = torch.empty((*matrices.shape[:-1], k // GROUP_SIZE), dtype=torch.uint8, device=device)
    global_scales = torch.empty(math.prod(scale_shape), dtype=torch.float32, device=device)
    # A tensor as divisor: CUDA turns division by a number into a multiplication by its rounded reciprocal.
    divisor = torch.tensor(E2M1_MAX * E4M3_MAX, dtype=torch.float32, device=device)
    # A few rows at a time, so that the temporaries stay in the caches and small beside a stack of experts.
    chunk = max(1, _CHUNK_VALUES // k)
    for i, matrix in enumerate(matrices if has_values(dense) else ()):
        low, high = matrix.aminmax()
        amax = torch.maximum(-low, high).to(torch.float32)
        if not bool(torch.isfinite(amax)):
            _require_finite("dense", dense.to(torch.float32))
        if global_scale is not None:
            g = global_scale.reshape(-1)[i]
        else:
            g = amax / divisor
            g = torch.where(g == 0, 1.0, g)
        for start in range(0, matrix.shape[0], chunk):
            rows = slice(start, start + chunk)
            data[i, rows], block_scale = _quantize_rows(matrix[rows].to(torch.float32), g)
            scale[i, rows] = block_scale.view(torch.uint8)
        global_scales[i] = g
    return NVFP4Weight(
        data.reshape(*batch, n, k // 2),
        scale.reshape(*batch, n, k // GROUP_SIZE).view(torch.float8_e4m3fn),
        global_scales.reshape(scale_shape),
    )


def dequantize(weight: NVFP4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``e2m1 * scale * global_scale`` as [..., N, K] in ``dtype``.

    ``e2m1 * scale`` is exact. fp64 results are exact; fp32 results are rounded once (ModelOpt rounds
    ``scale * global_scale`` first and may differ in the last bit); 16-bit results are the fp32 ones rounded. Code 8 is
    -0.0 (0.0 in ModelOpt). NaN block scales give NaN.
    """
    validate_layout(weight)
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # One look-up for the two codes of a byte.
    pairs = [(E2M1_VALUES[byte & 0x0F], E2M1_VALUES[byte >> 4]) for byte in range(256)]
    table = torch.tensor(pairs, dtype=compute_dtype, device=weight.data.device)
    blocks = F.embedding(weight.data.int(), table).reshape(*weight.scale.shape, GROUP_SIZE)
    blocks *= weight.scale.to(compute_dtype).unsqueeze(-1)
    blocks *= row_global_scale(weight).to(compute_dtype)[..., None, None]
    return blocks.flatten(-2).to(dtype)


def reciprocal_global_scale(global_scale: Tensor) -> Tensor:
    """Converts a global scale between ModelOpt and compressed-tensors, in either direction.

    ModelOpt's ``weight_scale_2`` multiplies (this package's convention); compressed-tensors' ``weight_global_scale``
    divides: each is 1 over the other, rounded to fp32.

    Raises ValueError for values whose reciprocal is not finite (zero, NaN, infinity, the smallest subnormals).
    """
    if not global_scale.is_floating_point():
        raise TypeError(f"global_scale: expected a floating point dtype, got {global_scale.dtype}")
    reciprocal = global_scale.to(torch.float32).reciprocal()
    bad = ~torch.isfinite(reciprocal) | (reciprocal == 0)
    if bool(bad.any()):
        index = _first_index(bad)
        raise ValueError(
            f"global_scale: expected values with a finite reciprocal, got {float(global_scale[tuple(index)]):g} "
            f"at index {index}"
        )
    return reciprocal
