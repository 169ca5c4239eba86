"""The values: dense matrices out of a source, and what a piece of work writes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_nvfp4.checkpoint.headers import TensorInfo, tensor_error
from torch_nvfp4.checkpoint.layouts import Spelling
from torch_nvfp4.convert.plan import Work
from torch_nvfp4.convert.selection import Group, Part, StoredWeight
from torch_nvfp4.convert.source import Source
from torch_nvfp4.format import E2M1_MAX, E4M3_MAX, quantize

__all__ = ["dense", "written"]

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
    else:
        yield from _quantized(source, work, spelling)


def dense(source: Source, part: Part) -> Tensor:
    """A matrix [rows, cols] as the source means it: in the source's dtype, from FP8 blocks in fp32."""
    weight = part.weight
    first, rows = (0, part.cols) if part.swapped else (part.first_row, part.rows)
    matrix_rows = weight.data.shape[-2]
    values = source.files.rows(weight.data, (part.expert or 0) * matrix_rows + first, rows)
    if weight.scale is not None:
        values = _block_product(source, weight, values, part.expert or 0, first)
    if part.swapped:
        values = values[:, part.first_row : part.first_row + part.rows].t().contiguous()
    return values


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
