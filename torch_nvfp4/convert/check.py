"""Compares the matrices that lie on the disk with those of the source."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torch_nvfp4 import mxfp4
from torch_nvfp4.checkpoint.headers import read_header, tensor_error
from torch_nvfp4.checkpoint.layouts import Spelling
from torch_nvfp4.convert.plan import Shard
from torch_nvfp4.convert.selection import Group
from torch_nvfp4.convert.source import Source, TensorFiles
from torch_nvfp4.convert.values import dense, mxfp4_matrix
from torch_nvfp4.format import (
    E2M1_MAX,
    E4M3_MIN_SUBNORMAL,
    GROUP_SIZE,
    NVFP4Weight,
    dequantize,
    reciprocal_global_scale,
)
from torch_nvfp4.mxfp4 import MXFP4Weight

__all__ = ["Difference", "open_shard", "worst_of_group"]

# Products in fp32 of what is exact otherwise.
_ROUNDING = 1e-6


class Difference(NamedTuple):
    """Of a matrix from its source.

    relative_l2: of the matrix. excess: 0, or by how many steps of its block a value is further from the source than
    rounding to the nearest e2m1 value explains; infinite where a matrix of MXFP4 (is_mxfp4) has not the same bits.
    """

    module: str
    relative_l2: float
    excess: float
    is_mxfp4: bool = False

    @property
    def key(self) -> tuple[float, float]:
        return self.excess, self.relative_l2


def open_shard(folder: Path, shard: Shard) -> TensorFiles:
    """A shard as any reader would find it."""
    return TensorFiles(read_header(folder / shard.name))


def worst_of_group(source: Source, files: TensorFiles, group: Group, spelling: Spelling) -> Difference:
    """The matrix of a group that is furthest from its source."""
    worst = Difference("", 0.0, 0.0)
    assert spelling.global_scale is not None
    for part in group.parts:
        codes, scale, stored = (
            files.whole(files.tensors[part.name + leaf])
            for leaf in (spelling.data, spelling.scale, spelling.global_scale)
        )
        global_scale = stored.reshape(())
        if spelling.reciprocal:
            global_scale = reciprocal_global_scale(global_scale)
        weight = NVFP4Weight(codes, scale, global_scale)
        if part.weight.is_mxfp4 and _has_same_bits(mxfp4_matrix(source, part), weight):
            relative, excess = 0.0, 0.0
        else:
            relative, excess = difference(dense(source, part), weight)
            if part.weight.is_mxfp4:
                excess = math.inf
        if math.isnan(relative):
            info = files.tensors[part.name + spelling.scale]
            raise tensor_error(info.file, info.name, "finite values", "NaN")
        worst = max(worst, Difference(part.name, relative, excess, part.weight.is_mxfp4), key=lambda each: each.key)
    return worst


def _has_same_bits(original: MXFP4Weight, weight: NVFP4Weight) -> bool:
    rows = max(1, (1 << 18) // (2 * original.data.shape[1]))
    for begin in range(0, len(original.data), rows):
        chunk = slice(begin, begin + rows)
        expected = mxfp4.dequantize(MXFP4Weight(*(part[chunk] for part in original)), torch.float64)
        values = dequantize(NVFP4Weight(weight.data[chunk], weight.scale[chunk], weight.global_scale), torch.float64)
        if not torch.equal(values.view(torch.int64), expected.view(torch.int64)):
            return False
    return True


def difference(original: Tensor, weight: NVFP4Weight) -> tuple[float, float]:
    """(relative L2 error, excess) as in `Difference`; the error of a matrix of zeros is 0 or infinite.

    A value lies at most one step from its source, the half of the widest gap of e2m1 (4 to 6), where the largest of
    its block is at most 6 steps; a block whose scale was rounded down loses what is above that. Rounding a scale to
    E4M3 takes away at most a 16th of it, or half of the smallest subnormal: one that is smaller is wrong.
    """
    total, wrong, excess = 0.0, 0.0, 0.0
    rows = max(1, (1 << 18) // original.shape[1])
    for begin in range(0, len(original), rows):
        chunk = slice(begin, begin + rows)
        expected = original[chunk].to(torch.float32)
        scale = weight.scale[chunk]
        values = dequantize(NVFP4Weight(weight.data[chunk], scale, weight.global_scale))
        error = values.sub_(expected).abs_()
        total += float(torch.linalg.vector_norm(expected, dtype=torch.float64)) ** 2
        wrong += float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2
        step = scale.to(torch.float32).mul_(weight.global_scale)
        blocks = expected.unflatten(-1, (-1, GROUP_SIZE)).abs().amax(-1)
        rounded_down = (blocks / 16).clamp_(min=E2M1_MAX * E4M3_MIN_SUBNORMAL / 2 * float(weight.global_scale))
        lost = torch.minimum(blocks - E2M1_MAX * step, rounded_down)
        allowed = torch.maximum(step, lost) + _ROUNDING * blocks
        largest = error.unflatten(-1, (-1, GROUP_SIZE)).amax(-1)
        over = torch.where(largest > allowed, (largest - allowed) / step, 0.0)  # infinite for a step of zero
        excess = max(excess, float(over.amax()))
    if total == 0:
        return (0.0 if wrong == 0 else math.inf), excess
    return math.sqrt(wrong / total), excess
