"""The values: dense matrices out of a source, and what a piece of work writes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_nvfp4 import mxfp4
from torch_nvfp4.checkpoint.headers import TensorInfo, tensor_error
from torch_nvfp4.checkpoint.layouts import Spelling
from torch_nvfp4.convert.plan import Work
from torch_nvfp4.convert.selection import Bias, Group, Part, StoredWeight
from torch_nvfp4.convert.source import Source
from torch_nvfp4.format import E2M1_MAX, E4M3_MAX, quantize
from torch_nvfp4.mxfp4 import MXFP4Weight

__all__ = ["dense", "mxfp4_matrix", "written"]

_COPY_BYTES = 16 << 20

Piece = tuple[str, int, Tensor]  # name, byte of the tensor, values


def written(source: Source, work: Work, spelling: Spelling) -> Iterator[Piece]:
    """The pieces of tensors that a piece of work writes; one is made when the one before it has been written.

    Raises CheckpointError for a value that is not finite, or one that its format cannot hold.
    """
    if isinstance(work, TensorInfo):
        for begin in range(0, work.nbytes, _COPY_BYTES):
            yield work.name, begin, source.files.read(work, begin, min(_COPY_BYTES, work.nbytes - begin))
    elif isinstance(work, StoredWeight):
        yield from _dequantized(source, work)
    elif isinstance(work, Bias):
        yield work.name, 0, _bias(source, work)
    elif work.parts[0].weight.is_mxfp4:
        yield from _converted(source, work, spelling)
    else:
        yield from _quantized(source, work, spelling)


def dense(source: Source, part: Part) -> Tensor:
    """A matrix [rows, cols] as the source means it: in the source's dtype, from FP8 blocks and MXFP4 in fp32."""
    weight = part.weight
    if weight.is_mxfp4:
        return mxfp4.dequantize(mxfp4_matrix(source, part))
    step = 2 if part.interleaved else 1
    first, rows = (0, part.cols) if part.swapped else (part.first_row, step * part.rows - (step - 1))
    matrix_rows = weight.data.shape[-2]
    values = source.files.rows(weight.data, (part.expert or 0) * matrix_rows + first, rows)
    if weight.scale is not None:
        values = _block_product(source, weight, values, part.expert or 0, first)
    if part.swapped:
        values = values[:, part.first_row :: step][:, : part.rows].t().contiguous()
    elif part.interleaved:
        values = values[::step].contiguous()
    return values


def mxfp4_matrix(source: Source, part: Part) -> MXFP4Weight:
    """Codes and scales of a part, both uint8."""
    weight = part.weight
    assert weight.scale is not None
    matrix_rows, step = weight.shape[-2], 2 if part.interleaved else 1
    begin = (part.expert or 0) * matrix_rows + part.first_row
    rows = slice(begin, begin + step * part.rows - (step - 1))
    num_rows = math.prod(weight.shape[:-1])
    return MXFP4Weight(
        *(source.files.bytes_of_rows(info, num_rows, rows)[::step] for info in (weight.data, weight.scale))
    )


def _bias(source: Source, work: Bias) -> Tensor:
    part, info = work.part, work.info
    values = source.files.rows(info, part.expert or 0, 1)[0]
    values = values[part.first_row :: 2 if part.interleaved else 1][: part.rows].contiguous()
    if not bool(torch.isfinite(values).all()):
        got = "NaN or infinity" + ("" if part.expert is None else f" in that of expert {part.expert}")
        raise tensor_error(info.file, info.name, "finite biases", got)
    return values


def _converted(source: Source, group: Group, spelling: Spelling) -> Iterator[Piece]:
    """MXFP4 as NVFP4 with the same values; the matrices of a group get one global scale where they can."""
    codes, scales = zip(*(mxfp4_matrix(source, part) for part in group.parts), strict=True)
    spread = [mxfp4.spread_scales(scale) for scale in scales]
    try:
        exponents = mxfp4.global_exponents(torch.stack(codes), torch.stack(spread))
    except (mxfp4.SpanError, mxfp4.NaNScaleError) as error:
        part = group.parts[error.matrix]
        places = (error.low, error.high) if isinstance(error, mxfp4.SpanError) else (error,)
        texts = []
        for place in places:
            row = part.first_row + (2 if part.interleaved else 1) * place.row
            value = f"2^{place.exponent}" if isinstance(place, mxfp4.Place) else "NaN (0xff)"
            texts.append(f"{value} at row {row}, group {place.group}")
        got = " and ".join(texts) + ("" if part.expert is None else f" of expert {part.expert}")
        info, advice = part.weight.scale, "--exclude leaves the layer as it is"
        assert info is not None
        raise tensor_error(info.file, info.name, error.expected, got, advice) from None
    for part, data, scale, exponent in zip(group.parts, codes, spread, exponents, strict=True):
        assert spelling.global_scale is not None
        yield part.name + spelling.data, 0, data.contiguous()
        yield part.name + spelling.scale, 0, mxfp4.e4m3_scales(scale, exponent)
        stored = math.ldexp(1.0, -exponent if spelling.reciprocal else exponent)
        yield part.name + spelling.global_scale, 0, torch.tensor(stored, dtype=torch.float32, device="cpu")


def _block_product(source: Source, weight: StoredWeight, values: Tensor, matrix: int, first: int) -> Tensor:
    """fp32 rows from `first` on of a matrix of E4M3 values, times the scales of their blocks."""
    assert weight.scale is not None
    block_rows, block_cols = source.block
    scale_rows = weight.scale.shape[-2]
    begin, end = first // block_rows, (first + len(values) - 1) // block_rows + 1
    scale = source.files.rows(weight.scale, matrix * scale_rows + begin, end - begin).to(torch.float32)
    by_column = scale.repeat_interleave(block_cols, 1)[:, : values.shape[1]]
    result = values.to(torch.float32)
    for block in range(begin, end):
        rows = slice(max(0, block * block_rows - first), (block + 1) * block_rows - first)
        result[rows].mul_(by_column[block - begin])
    return result


def _dequantized(source: Source, weight: StoredWeight) -> Iterator[Piece]:
    """An FP8 weight in bf16, one row of blocks at a time."""
    rows, place = weight.data.shape[-2], 0
    for matrix in range(math.prod(weight.data.shape[:-2])):
        for first in range(0, rows, source.block[0]):
            count = min(source.block[0], rows - first)
            values = source.files.rows(weight.data, matrix * rows + first, count)
            product = _block_product(source, weight, values, matrix, first).to(torch.bfloat16)
            _require_finite(weight.data, product, first)
            yield weight.data.name, place, product
            place += product.nbytes


def _quantized(source: Source, group: Group, spelling: Spelling) -> Iterator[Piece]:
    matrices = [dense(source, part) for part in group.parts]
    largest = []
    for part, matrix in zip(group.parts, matrices, strict=True):
        low, high = matrix.aminmax()
        amax = torch.maximum(-low, high).to(torch.float32)
        if not bool(torch.isfinite(amax)):
            _require_finite(part.weight.data, matrix, part.first_row, part.expert)
        largest.append(amax)
    global_scale, stored = _global_scales(group, torch.stack(largest).amax(), spelling)
    for part in group.parts:
        weight = quantize(matrices.pop(0), global_scale=global_scale)
        assert spelling.global_scale is not None
        yield part.name + spelling.data, 0, weight.data
        yield part.name + spelling.scale, 0, weight.scale
        yield part.name + spelling.global_scale, 0, stored


def _global_scales(group: Group, amax: Tensor, spelling: Spelling) -> tuple[Tensor, Tensor]:
    """What values are multiplied by, and what is stored: that, or 6 * 448 / amax as compressed-tensors rounds it."""
    largest = E2M1_MAX * E4M3_MAX
    global_scale = amax / torch.tensor(largest, dtype=torch.float32, device="cpu")
    if global_scale == 0:  # a matrix of zeros, or almost: as in `quantize`
        return torch.ones_like(amax), torch.ones_like(amax)
    if not spelling.reciprocal:
        return global_scale, global_scale
    stored = amax.reciprocal() * largest  # torch divides a number by a tensor like this, and it rounds twice
    if not bool(torch.isfinite(stored)):
        info = group.parts[0].weight.data
        got = f"{float(amax):g} as the largest one"
        raise tensor_error(info.file, info.name, "values above 1e-35, as compressed-tensors stores 2688 / amax", got)
    return global_scale, stored


def _require_finite(info: TensorInfo, values: Tensor, first_row: int, expert: int | None = None) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        place = f"row {first_row + row}, column {column}" + ("" if expert is None else f" of expert {expert}")
        raise tensor_error(info.file, info.name, "finite values", f"{float(values[row, column]):g} at {place}")
