"""Copies NVFP4 matrices, or slices of them, out of memory-mapped shards."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torch_nvfp4.checkpoint.headers import TensorInfo, read_header, tensor_error
from torch_nvfp4.checkpoint.layouts import UNIT_LEAVES, Matrix, Unsupported
from torch_nvfp4.errors import CheckpointError, shown
from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight, reciprocal_global_scale

__all__ = ["Shards", "check_other_leaves", "copy_matrix", "empty_bytes", "read_matrix"]


class Shards:
    """The shards opened during one read, memory-mapped: only what is copied out of a tensor is read."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._handles: dict[Path, Any] = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.clear()
        self._stack.close()

    def tensor(self, info: TensorInfo) -> Tensor:
        try:
            if info.file not in self._handles:
                self._handles[info.file] = self._stack.enter_context(safe_open(info.file, framework="pt", device="cpu"))
            tensor: Tensor = self._handles[info.file].get_tensor(info.name)
        except (OSError, SafetensorError) as error:
            raise self._error(info, error) from error
        if (tuple(tensor.shape), tensor.nbytes) != (info.shape, info.nbytes):
            expected = f"{info.dtype} {list(info.shape)} as when it was opened"
            raise tensor_error(info.file, info.name, expected, f"{tensor.dtype} {list(tensor.shape)}")
        return tensor

    def _error(self, info: TensorInfo, error: Exception) -> CheckpointError:
        """The file has changed, or the safetensors library cannot read what its format allows."""
        try:
            same = read_header(info.file).get(info.name) == info
        except CheckpointError:
            same = False
        expected = "a file that the safetensors library can read" if same else "the file as it was when it was opened"
        return tensor_error(info.file, info.name, expected, str(error))


def check_other_leaves(shards: Shards, others: Iterable[tuple[str, TensorInfo]], allowed: tuple[str, ...] = ()) -> None:
    """Refuses leaves that `moe` could not apply. Activation scales (AWQ) that are all ones change nothing."""
    refused = []
    for leaf, info in others:
        if leaf.endswith(UNIT_LEAVES):
            got = _other_than_ones(shards, info)
            if got is not None:
                expected = "ones, since nothing would apply other activation scales (AWQ)"
                advice = "fold the scales into the layer before, or quantize without AWQ"
                raise tensor_error(info.file, info.name, expected, got, advice, kind=Unsupported)
        elif leaf not in allowed:
            refused.append((leaf.lstrip("._"), info))
    if refused:
        info, names = refused[0][1], " and ".join(shown(leaf) for leaf, _ in refused[:4])
        got = f"{'a leaf' if len(refused) == 1 else 'leaves'} {names} that nothing would apply"
        advice = "fold what they stand for into the weights before they are quantized"
        if any("bias" in leaf for leaf, _ in refused):
            advice = "biases of experts are not supported"
        raise tensor_error(info.file, info.name, "only codes, scales and input scales", got, advice, kind=Unsupported)


def _other_than_ones(shards: Shards, info: TensorInfo) -> str | None:
    if info.dtype not in ("BF16", "F16", "F32", "F64"):
        return f"dtype {info.dtype}"
    values = shards.tensor(info).reshape(-1)
    other = values != 1
    return f"{float(values[int(other.byte().argmax())]):g}" if bool(other.any()) else None


def copy_matrix(
    shards: Shards, matrix: Matrix, rows: slice, cols: slice, data: Tensor, scale: Tensor, global_scale: Tensor
) -> None:
    """Copies rows and cols (in values; a multiple of 16 at both ends) into data, scale (both uint8), global_scale."""
    module = matrix.stored
    groups = slice(cols.start // GROUP_SIZE, cols.stop // GROUP_SIZE)
    data.copy_(_values(shards, matrix, module.data)[rows, cols.start // 2 : cols.stop // 2])
    scale.copy_(_values(shards, matrix, module.scale)[rows, groups])
    nan = (scale & 0x7F) == 0x7F
    if nan.any():
        row, group = nan.nonzero()[0].tolist()
        place = f"at row {matrix.first_row + rows.start + row}, group {groups.start + group}"
        place += "" if module.kind == "matrix" else f" of expert {matrix.expert}"
        got = f"NaN ({scale[row, group].item():#04x}) {place}"
        raise tensor_error(module.scale.file, module.scale.name, "finite F8_E4M3 scales", got)
    global_scale.copy_(_global_scale(shards, matrix))


def _values(shards: Shards, matrix: Matrix, info: TensorInfo) -> Tensor:
    """The rows of a matrix in a tensor of its module, as bytes [rows, bytes]."""
    module, tensor = matrix.stored, shards.tensor(info).view(torch.uint8)
    if module.kind == "rows":
        tensor = tensor.unflatten(0, (module.num, module.rows))
    if module.kind != "matrix":
        tensor = tensor[matrix.expert]
    if module.swapped:
        tensor = tensor.t()
    return tensor[matrix.first_row : matrix.first_row + matrix.rows]


def _global_scale(shards: Shards, matrix: Matrix) -> Tensor:
    module = matrix.stored
    info, stored = module.global_scale, shards.tensor(module.global_scale).reshape(-1)
    if len(stored) > 1:
        per_expert = stored.reshape(module.num, -1)[matrix.expert]
        stored = per_expert[matrix.half if len(per_expert) > 1 else 0]
    stored = stored.reshape(())
    if not torch.isfinite(stored):
        raise tensor_error(info.file, info.name, "a finite global scale", f"{stored.item()}")
    if not module.spelling.reciprocal:
        return stored
    try:
        return reciprocal_global_scale(stored)
    except ValueError as error:
        expected = "a global scale with a finite reciprocal"
        raise tensor_error(info.file, info.name, expected, f"{stored.item()}") from error


def read_matrix(shards: Shards, matrix: Matrix) -> NVFP4Weight:
    """A whole matrix: data [rows, cols / 2], scale [rows, cols / 16], global_scale 0-d."""
    rows, cols = matrix.rows, matrix.stored.cols
    weight = NVFP4Weight(empty_bytes(rows, cols // 2), empty_bytes(rows, cols // GROUP_SIZE), torch.empty(()))
    copy_matrix(shards, matrix, slice(0, rows), slice(0, cols), *weight)
    return NVFP4Weight(weight.data, weight.scale.view(torch.float8_e4m3fn), weight.global_scale)


def empty_bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)
