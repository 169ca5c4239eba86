"""Reads NVFP4 and MXFP4 matrices, or slices of them, out of shards: as NVFP4."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from torch_nvfp4 import mxfp4
from torch_nvfp4.checkpoint.experts import Expert, LayerExperts
from torch_nvfp4.checkpoint.headers import Stamp, TensorInfo, check_stamp, open_again, tensor_error
from torch_nvfp4.checkpoint.layouts import UNIT_LEAVES, Matrix, Unsupported
from torch_nvfp4.checkpoint.records import ExpertWeights
from torch_nvfp4.errors import refusal, shown
from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight, has_values, reciprocal_global_scale

__all__ = ["Shards", "check_other_leaves", "empty_bytes", "read_experts", "read_matrix"]

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
        if not has_values(empty_bytes(1)):
            advice = "read before, or make the layer without values, as NVFP4Experts(E, K, I)"
            raise RuntimeError(refusal("checkpoint", "to read outside FakeTensorMode", "one that is active", advice))
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
        raise tensor_error(
            info.file, info.name, "only codes, scales, biases and input scales", got, advice, kind=Unsupported
        )


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


def read_experts(
    shards: Shards, content: LayerExperts, experts: Sequence[Expert], rows: slice, adds_w2_bias: bool,
    progress: Callable[[int, int], None] | None = None,
) -> ExpertWeights:  # fmt: skip
    """The experts with these rows of gate and up and columns of down; zeros as w2_bias where another rank adds it."""
    num, halves, i, k = len(experts), 2 if content.gated else 1, rows.stop - rows.start, content.hidden_size
    w13 = NVFP4Weight(
        empty_bytes(num, halves, i, k // 2), empty_bytes(num, halves, i, k // GROUP_SIZE), empty_scales(num, halves)
    )
    w2 = NVFP4Weight(empty_bytes(num, 1, k, i // 2), empty_bytes(num, 1, k, i // GROUP_SIZE), empty_scales(num, 1))
    w13_bias = empty_scales(num, halves, i) if content.has_w13_bias else None
    w2_bias = empty_scales(num, 1, k).zero_() if content.has_w2_bias else None
    every_k = slice(0, k)

    def read(shards: Shards, index: int) -> None:
        expert = experts[index]
        copy_matrices(shards, expert.first, rows, every_k, *(part[index] for part in w13))
        copy_matrices(shards, [expert.down], every_k, rows, *(part[index] for part in w2))
        if w13_bias is not None:
            _copy_biases(shards, expert.first, rows, w13_bias[index])
        if w2_bias is not None and adds_w2_bias:
            _copy_biases(shards, [expert.down], every_k, w2_bias[index])
        if progress is not None:
            progress(index + 1, num)

    read_each(shards, read, num, threads=1 if progress is not None else torch.get_num_threads())
    fp8 = torch.float8_e4m3fn
    return ExpertWeights(
        NVFP4Weight(
            w13.data.flatten(1, 2),
            w13.scale.flatten(1, 2).view(fp8),
            w13.global_scale if content.gated else w13.global_scale[:, 0],
        ),
        NVFP4Weight(w2.data[:, 0], w2.scale[:, 0].view(fp8), w2.global_scale[:, 0]),
        None if w13_bias is None else w13_bias.flatten(1),
        None if w2_bias is None else w2_bias.flatten(1),
        content.gated,
    )


def copy_matrices(
    shards: Shards, matrices: Sequence[Matrix], rows: slice, cols: slice, data: Tensor, scale: Tensor,
    global_scale: Tensor,
) -> None:  # fmt: skip
    """Copies rows and cols (in values; a multiple of 16 at both ends) of each matrix.

    data[i] and scale[i] (both uint8) and global_scale[i] take them. Matrices of MXFP4 get the same global scale where
    they can.
    """
    if not matrices[0].stored.spelling.is_mxfp4:
        for index, matrix in enumerate(matrices):
            _copy(shards, matrix, matrix.stored.data, rows, slice(cols.start // 2, cols.stop // 2), data[index])
            _copy_scales(shards, matrix, rows, cols, scale[index])
            global_scale[index].copy_(_global_scale(shards, matrix))
        return
    # A slice may begin or end within a group of 32.
    group_size = matrices[0].stored.spelling.group_size
    groups = slice(cols.start // group_size, -(-cols.stop // group_size))
    first_block = (cols.start - groups.start * group_size) // GROUP_SIZE
    spread = []
    for index, matrix in enumerate(matrices):
        _copy(shards, matrix, matrix.stored.data, rows, slice(cols.start // 2, cols.stop // 2), data[index])
        stored = empty_bytes(rows.stop - rows.start, groups.stop - groups.start)
        _copy(shards, matrix, matrix.stored.scale, rows, groups, stored)
        spread.append(mxfp4.spread_scales(stored)[:, first_block : first_block + scale.shape[-1]])
    try:
        exponents = mxfp4.global_exponents(data, torch.stack(spread), first_block)
    except (mxfp4.SpanError, mxfp4.NaNScaleError) as error:
        matrix = matrices[error.matrix]
        if isinstance(error, mxfp4.SpanError):
            got = " and ".join(
                f"2^{place.exponent} {_place(matrix, rows, place.row, groups.start + place.group)}"
                for place in (error.low, error.high)
            )
        else:
            got = f"NaN (0xff) {_place(matrix, rows, error.row, groups.start + error.group)}"
        info = matrix.stored.scale
        raise tensor_error(info.file, info.name, error.expected, got) from None
    for index, exponent in enumerate(exponents):
        scale[index] = mxfp4.e4m3_scales(spread[index], exponent)
        global_scale[index] = math.ldexp(1.0, exponent)


def _copy_scales(shards: Shards, matrix: Matrix, rows: slice, cols: slice, scale: Tensor) -> None:
    info, groups = matrix.stored.scale, slice(cols.start // GROUP_SIZE, cols.stop // GROUP_SIZE)
    _copy(shards, matrix, info, rows, groups, scale)
    magnitude = scale & 0x7F
    if magnitude.amax() == 0x7F:  # a twentieth of the time of comparing all
        row, group = (magnitude == 0x7F).nonzero()[0].tolist()
        got = f"NaN ({scale[row, group].item():#04x}) {_place(matrix, rows, row, groups.start + group)}"
        raise tensor_error(info.file, info.name, "finite F8_E4M3 scales", got)


def _place(matrix: Matrix, rows: slice, row: int, group: int) -> str:
    """Where a scale stands in its tensor; `row` counts from the first of the rows that were read."""
    one = rows.start + row
    place = f"at row {matrix.stored_rows(slice(one, one + 1)).start}, group {group}"
    return place + ("" if matrix.stored.kind == "matrix" else f" of expert {matrix.expert}")


def _copy(shards: Shards, matrix: Matrix, info: TensorInfo, rows: slice, cols: slice, out: Tensor) -> None:
    """Rows of a matrix and columns (in bytes) of them out of a tensor of its module, [..., bytes] or swapped."""
    module = matrix.stored
    width = info.nbytes // (module.num * module.rows)
    begin = matrix.expert * module.rows * width
    if matrix.interleaved and not module.swapped:
        # A gate row and an up row behind each other are one row of twice the width.
        cols = slice(matrix.half * width + cols.start, matrix.half * width + cols.stop)
        width *= 2
    elif matrix.interleaved:
        both = empty_bytes(cols.stop - cols.start, 2 * (rows.stop - rows.start))
        whole = slice(2 * rows.start, 2 * rows.stop)
        shards.read_block(info, begin + cols.start * module.rows, module.rows, whole, both)
        out.copy_(both[:, matrix.half :: 2].t())
        return
    else:
        rows = matrix.stored_rows(rows)
    if module.swapped:
        rows, cols, width, out = cols, rows, module.rows, out.t()
    shards.read_block(info, begin + rows.start * width, width, cols, out)


def _copy_biases(shards: Shards, matrices: Sequence[Matrix], rows: slice, out: Tensor) -> None:
    """The biases of these rows of each matrix into out[i], in fp32."""
    for index, matrix in enumerate(matrices):
        module, info = matrix.stored, matrix.stored.bias
        assert info is not None
        row_bytes = info.nbytes // module.num
        stored = empty_bytes(row_bytes)
        shards.read(info, matrix.expert * row_bytes, stored)
        out[index] = stored.view(_TORCH_DTYPES[info.dtype])[matrix.stored_rows(rows)]
        if not bool(torch.isfinite(out[index]).all()):
            place = f"in row {int((~torch.isfinite(out[index])).byte().argmax())} of {rows.start}..{rows.stop - 1}"
            place += "" if module.kind == "matrix" else f" of expert {matrix.expert}"
            raise tensor_error(info.file, info.name, "finite biases", f"NaN or infinity {place}")


def _global_scale(shards: Shards, matrix: Matrix) -> Tensor:
    module, info = matrix.stored, matrix.stored.global_scale
    assert info is not None
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
    weight = NVFP4Weight(empty_bytes(1, rows, cols // 2), empty_bytes(1, rows, cols // GROUP_SIZE), empty_scales(1))
    copy_matrices(shards, [matrix], slice(0, rows), slice(0, cols), *weight)
    return NVFP4Weight(weight.data[0], weight.scale[0].view(torch.float8_e4m3fn), weight.global_scale[0])


def empty_bytes(*shape: int) -> Tensor:
    """Where files are read into: memory of the CPU, whatever torch's default device is."""
    return torch.empty(shape, dtype=torch.uint8, device="cpu")


def empty_scales(*shape: int) -> Tensor:
    """As `empty_bytes`, for global scales and biases: fp32, whatever torch's default dtype is."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")
