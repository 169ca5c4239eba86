"""A shard that changes after opening, or while it is read, is an error, and neither other values nor a signal."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.checkpoint_files import SHARD_1, assert_equal, entry, make_tensors, raises, write, write_raw
from torch_nvfp4.checkpoint import Checkpoint, weights

AS_OPENED = "expected the file as it was when it was opened, got"


def same_time(file: Path, change: Callable[[Path], object]) -> None:
    """Changes a file and gives it back its time of change."""
    status = file.stat()
    change(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def as_int32(file: Path) -> None:
    tensors = load_file(file)
    save_file({n: t.view(torch.int32) if n.endswith("weight_scale_2") else t for n, t in tensors.items()}, file)


def shift_names(file: Path) -> None:
    """The same bytes under other names: two experts of equal shapes change places."""
    content = file.read_bytes()
    for old, new in (
        (b"experts.0.w1", b"experts.X.w1"),
        (b"experts.1.w1", b"experts.0.w1"),
        (b"experts.X", b"experts.1"),
    ):
        content = content.replace(old, new)
    file.write_bytes(content)


def flip_a_byte(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: same_time(file, as_int32), f"{AS_OPENED} another header; open the checkpoint again"),
        (lambda file: same_time(file, shift_names), f"{AS_OPENED} another header"),
        (flip_a_byte, f"{AS_OPENED} one that was written since"),
        (lambda file: os.truncate(file, 4096), f"{AS_OPENED} 4096 bytes where"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "expected a regular file, got a named pipe"),
        (lambda file: (file.unlink(), file.mkdir()), "expected a regular file, got a directory"),
        (lambda file: file.unlink(), "expected a file, got no such file"),
    ],
)
def test_changed_after_opening(damaged: Path, change: Callable[[Path], object], words: str) -> None:
    checkpoint = Checkpoint.open(damaged)
    change(damaged / SHARD_1)
    for read in (
        lambda: checkpoint.experts(0),
        lambda: checkpoint.linear("layers.0.ffn.experts.0.w1"),
        lambda: checkpoint.tensor("layers.0.attn_norm.weight"),
    ):
        with raises(damaged / SHARD_1, words):
            read()
    checkpoint.experts(1)


def test_the_same_file_under_another_inode(damaged: Path) -> None:
    checkpoint = Checkpoint.open(damaged)
    file = damaged / SHARD_1
    same_time(file, lambda file: (content := file.read_bytes(), file.unlink(), file.write_bytes(content)))
    assert_equal(checkpoint.experts(0).w2.data[0], make_tensors()[1][0, 0, "down"][0])


def test_cut_short_while_it_is_read(damaged: Path) -> None:
    checkpoint = Checkpoint.open(damaged)
    with raises(damaged / SHARD_1, "'layers.0.ffn.experts.", "expected", "bytes at", "the file was cut short"):
        checkpoint.experts(0, progress=lambda done, total: os.truncate(damaged / SHARD_1, 4096))


def test_written_while_it_is_read(damaged: Path) -> None:
    checkpoint = Checkpoint.open(damaged)
    later = (damaged / SHARD_1).stat().st_mtime_ns + 10**9

    def write_last(done: int, total: int) -> None:
        if done == total:
            flip_a_byte(damaged / SHARD_1)
            os.utime(damaged / SHARD_1, ns=(later, later))

    with raises(damaged / SHARD_1, f"{AS_OPENED} one that was written since"):
        checkpoint.experts(0, progress=write_last)


def test_no_descriptor_stays_open(damaged: Path) -> None:
    checkpoint = Checkpoint.open(damaged)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint.experts(0)
    with raises("cut short"):
        checkpoint.experts(0, progress=lambda done, total: os.truncate(damaged / SHARD_1, 4096))
    with raises(AS_OPENED):
        checkpoint.experts(0)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("block", "gap"), [(1, 0), (7, 1), (100, 2**14), (2**20, 0), (2**20, 2**14)])
@pytest.mark.parametrize("swapped", [False, True])
def test_blocks_of_a_matrix(
    damaged: Path, swapped: bool, block: int, gap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every size of the pieces in which some columns are read gives the slice of the whole."""
    monkeypatch.setattr(weights, "_BLOCK", block)
    monkeypatch.setattr(weights, "_GAP", gap)
    checkpoint = Checkpoint.open(damaged)
    info = checkpoint.tensors["layers.0.ffn.experts.1.w3.weight"]
    whole = make_tensors()[0][info.name]
    width = whole.shape[1]
    for rows, cols in ((slice(0, 96), slice(0, width)), (slice(3, 50), slice(5, 9)), (slice(95, 96), slice(0, 1))):
        shape = rows.stop - rows.start, cols.stop - cols.start
        out = torch.empty(shape[::-1], dtype=torch.uint8).t() if swapped else torch.empty(shape, dtype=torch.uint8)
        with weights.Shards() as shards:
            shards.read_block(info, rows.start * width, width, cols, out)
        assert torch.equal(out, whole[rows, cols])


DTYPES: dict[str, Any] = {
    "BOOL": torch.tensor([True, False, True]),
    "I16": torch.tensor([[1, -2]], dtype=torch.int16),
    "U64": torch.tensor([2**40], dtype=torch.uint64),
    "C64": torch.tensor([1 + 2j]),
    "F8_E8M0": torch.tensor([0.5, 4.0]).to(torch.float8_e8m0fnu),
    "F8_E5M2": torch.tensor([0.5, 4.0]).to(torch.float8_e5m2),
    "F16": torch.zeros(0, 4, dtype=torch.float16),
    "F64": torch.tensor(1.25, dtype=torch.float64),
    "F4": torch.tensor([[0x21, 0x43], [0x65, 0x07]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_other_dtypes(dtype: str, tmp_path: Path) -> None:
    """As the safetensors library returns them, F4 with two values per element."""
    stored: Tensor = DTYPES[dtype]
    tensors = {"odd": torch.zeros(3, dtype=torch.uint8), "x": stored, "y": torch.ones(2)}
    checkpoint = Checkpoint.open(write(tmp_path, tensors))
    assert checkpoint.tensors["x"].dtype == dtype
    actual = checkpoint.tensor("x")
    assert (actual.dtype, actual.shape) == (stored.dtype, stored.shape)
    same = [tensor.reshape(-1).view(torch.uint8) for tensor in (actual, stored)]
    assert torch.equal(*same)


def test_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_raw(tmp_path / "model.safetensors", {"x": entry(0, 3, "F6_E2M3", [4])}, b"abc")
    with raises("model.safetensors", "'x'", "expected a tensor that torch can hold, got F6_E2M3 [4]"):
        Checkpoint.open(tmp_path).tensor("x")


def test_memory_is_that_of_the_result(tmp_path: Path) -> None:
    """Reading some columns of 64 MB takes the columns and a block, not the matrix."""
    rows, cols = 2**13, 2**13
    tensors = {"x": torch.ones(rows, cols, dtype=torch.uint8)}
    checkpoint = Checkpoint.open(write(tmp_path, tensors))
    del tensors
    out = torch.empty(rows, 16, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with weights.Shards() as shards:
        shards.read_block(checkpoint.tensors["x"], 0, cols, slice(32, 48), out)
    assert bool((out == 1).all())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 2**10
