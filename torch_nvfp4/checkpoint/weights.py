"""Reads NVFP4 matrices, or slices of them, out of shards."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from torch_nvfp4.checkpoint.headers import Stamp, TensorInfo, check_stamp, open_again, tensor_error
from torch_nvfp4.checkpoint.layouts import UNIT_LEAVES, Matrix, Unsupported
from torch_nvfp4.errors import shown
from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight, reciprocal_global_scale

__all__ = ["Shards", "check_other_leaves", "copy_matrix", "empty_bytes", "read_each", "read_matrix"]

_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
_BLOCK = 2**20  # bytes that are read at a time where only some of each row are wanted
_THREADS = 8  # that read at a time: more do not read memory or a disk faster
_GAP = 2**14  # bytes between them; copying these takes as long as a call


class Shards:
    """The shards opened during one read. What is asked for is read from their descriptors, and nothing is mapped.

    A map of a file that shrinks meanwhile kills the process; a read that ends early is an error. Each shard must be
    the one whose header was read, when it is opened here and when the block ends.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: dict[Path, tuple[BinaryIO, Stamp]] = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        with self._stack:
            if error is None:
                for file, (stream, stamp) in self._open.items():
                    check_stamp(file, stream, stamp)

    def tensor(self, info: TensorInfo) -> Tensor:
        """A whole tensor as it is stored. F4 comes as torch holds it, two values per element of the last dimension."""
        dtype = _TORCH_DTYPES.get(info.dtype)
        shape = info.shape
        if info.dtype == "F4" and shape and shape[-1] % 2 == 0:
            dtype, shape = getattr(torch, "float4_e2m1fn_x2", None), (*shape[:-1], shape[-1] // 2)
        if dtype is None:
            expected = "a tensor that torch can hold"
            raise tensor_error(info.file, info.name, expected, f"{info.dtype} {list(info.shape)}", kind=Unsupported)
        data = empty_bytes(info.nbytes)
        self.read(info, 0, data)
        # A view of another size needs a storage that is aligned to it, which that of a new tensor is.
        return data.view(dtype).reshape(shape)

    def read(self, info: TensorInfo, begin: int, out: Tensor) -> None:
        """Fills `out`, contiguous bytes, with those of a tensor from `begin` on."""
        if not out.numel():
            return
        assert info.stamp is not None
        assert out.is_contiguous()
        assert 0 <= begin <= begin + out.nbytes <= info.nbytes
        buffer = memoryview((ctypes.c_char * out.nbytes).from_address(out.data_ptr())).cast("B")
        try:
            if info.file not in self._open:
                stream = self._stack.enter_context(open_again(info.file, info.stamp))
                self._open[info.file] = stream, info.stamp
            stream, done = self._open[info.file][0], 0
            stream.seek(info.begin + begin)
            while done < len(buffer):
                count = stream.readinto(buffer[done:])  # type: ignore[attr-defined]
                if not count:
                    got = f"{done}: the file was cut short"
                    raise tensor_error(info.file, info.name, f"{len(buffer)} bytes at {info.begin + begin}", got)
                done += count
        except OSError as error:
            got = error.strerror or str(error)
            raise tensor_error(info.file, info.name, "a file that can be read", got) from error

    def read_block(self, info: TensorInfo, begin: int, width: int, cols: slice, out: Tensor) -> None:
        """Fills `out` [rows, bytes] with the bytes `cols` of rows of `width` bytes, the first of them at `begin`."""
        if cols == slice(0, width) and out.is_contiguous():
            self.read(info, begin, out)
            return
        # Rows are skipped over where that saves more than a call costs.
        apart = width - out.shape[1] > _GAP
        kept = slice(0, out.shape[1]) if apart else cols
        step = max(1, _BLOCK // (out.shape[1] if apart else width))
        block = empty_bytes(min(step, len(out)), out.shape[1] if apart else width)
        for first in range(0, len(out), step):
            part = out[first : first + step]
            if apart:
                for row in range(len(part)):
                    self.read(info, begin + (first + row) * width + cols.start, block[row])
            else:
                self.read(info, begin + first * width, block[: len(part)])
            part.copy_(block[: len(part), kept])


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


def read_each(shards: Shards, read: Callable[[Shards, int], None], count: int, *, threads: int) -> None:
    """Calls ``read(shards, index)`` for each index below ``count``, in up to 8 threads.

    One thread reads in order from ``shards``. Several have shards of their own, opened and checked like those, and
    read consecutive parts; where more than one fails, the error is that of the lowest indices.
    """
    threads = min(threads, _THREADS, count)
    if threads <= 1:
        for index in range(count):
            read(shards, index)
        return

    # Each thread has a mode of its own, and outside inference mode may not write what was allocated inside.
    inference = torch.is_inference_mode_enabled()

    def read_part(part: int) -> None:
        with torch.inference_mode(inference):
            read_indices(part)

    def read_indices(part: int) -> None:
        for index in range(count * part // threads, count * (part + 1) // threads):
            read(sources[part], index)

    with ExitStack() as stack:
        sources = [stack.enter_context(Shards()) for _ in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read_part, range(threads)))


def copy_matrix(
    shards: Shards, matrix: Matrix, rows: slice, cols: slice, data: Tensor, scale: Tensor, global_scale: Tensor
) -> None:
    """Copies rows and cols (in values; a multiple of 16 at both ends) into data, scale (both uint8), global_scale."""
    module = matrix.stored
    groups = slice(cols.start // GROUP_SIZE, cols.stop // GROUP_SIZE)
    _copy(shards, matrix, module.data, rows, slice(cols.start // 2, cols.stop // 2), data)
    _copy(shards, matrix, module.scale, rows, groups, scale)
    magnitude = scale & 0x7F
    if magnitude.amax() == 0x7F:  # a twentieth of the time of comparing all
        row, group = (magnitude == 0x7F).nonzero()[0].tolist()
        place = f"at row {matrix.first_row + rows.start + row}, group {groups.start + group}"
        place += "" if module.kind == "matrix" else f" of expert {matrix.expert}"
        got = f"NaN ({scale[row, group].item():#04x}) {place}"
        raise tensor_error(module.scale.file, module.scale.name, "finite F8_E4M3 scales", got)
    global_scale.copy_(_global_scale(shards, matrix))


def _copy(shards: Shards, matrix: Matrix, info: TensorInfo, rows: slice, cols: slice, out: Tensor) -> None:
    """Rows of a matrix and columns (in bytes) of them out of a tensor of its module, [..., bytes] or swapped."""
    module = matrix.stored
    width = info.nbytes // (module.num * module.rows)
    begin = matrix.expert * module.rows * width
    rows = slice(matrix.first_row + rows.start, matrix.first_row + rows.stop)
    if module.swapped:
        rows, cols, width, out = cols, rows, module.rows, out.t()
    shards.read_block(info, begin + rows.start * width, width, cols, out)


def _global_scale(shards: Shards, matrix: Matrix) -> Tensor:
    module, info = matrix.stored, matrix.stored.global_scale
    count = info.nbytes // 4
    index = 0
    if count > 1:  # [num], or [num, 2] of gate and up
        index = matrix.expert * (count // module.num) + (matrix.half if count > module.num else 0)
    stored = empty_scales()
    shards.read(info, 4 * index, stored.reshape(1).view(torch.uint8))
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
    weight = NVFP4Weight(empty_bytes(rows, cols // 2), empty_bytes(rows, cols // GROUP_SIZE), empty_scales())
    copy_matrix(shards, matrix, slice(0, rows), slice(0, cols), *weight)
    return NVFP4Weight(weight.data, weight.scale.view(torch.float8_e4m3fn), weight.global_scale)


def empty_bytes(*shape: int) -> Tensor:
    """Where files are read into: memory of the CPU, whatever torch's default device is."""
    return torch.empty(shape, dtype=torch.uint8, device="cpu")


def empty_scales(*shape: int) -> Tensor:
    """As `empty_bytes`, for global scales: fp32, whatever torch's default dtype is."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")
