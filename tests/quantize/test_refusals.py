"""What torch-nvfp4 quantize refuses, in which words, and that nothing is lost by it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from helpers import dense_checkpoint as source
from torch_nvfp4.checkpoint import CheckpointError
from torch_nvfp4.cli import app
from torch_nvfp4.convert import open_conversion, run

Tensors = dict[str, Tensor]
EXPERT = "model.layers.1.mlp.experts.2."


def quantize(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def refused(arguments: tuple[object, ...], *parts: str) -> None:
    """Exit code 2 and one line that has the parts in this order."""
    code, _, err = quantize(*arguments)
    assert code == 2, err
    assert err.startswith("torch-nvfp4 quantize: ")
    assert err.count("\n") == 1
    position = 0
    for part in parts:
        assert part in err[position:], err
        position = err.index(part, position) + len(part)


def small() -> Tensors:
    return source.per_expert(source.experts()) | source.others()


def set_value(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][3, 7] = value

    return change


def replace(name: str, values: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: values})


def remove(part: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def fp8_without_scale(tensors: Tensors) -> None:
    name = f"{EXPERT}up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def fp8_with_scale(shape: tuple[int, ...], value: float = 1.0) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        fp8_without_scale(tensors)
        tensors[f"{EXPERT}up_proj.weight_scale_inv"] = torch.full(shape, value)

    return change


def int8(tensors: Tensors) -> None:
    name = f"{EXPERT}up_proj.weight"
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)
    tensors[f"{EXPERT}up_proj.weight_scale"] = torch.ones(len(tensors[name]), 1)


def nvfp4(tensors: Tensors) -> None:
    name = f"{EXPERT}up_proj.weight"
    rows, cols = tensors[name].shape
    tensors[name] = torch.zeros(rows, cols // 2, dtype=torch.uint8)
    tensors[f"{name}_scale"] = torch.ones(rows, cols // 16).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_2"] = torch.tensor(1.0)


def nvfp4_beside_fp8(tensors: Tensors) -> None:
    nvfp4(tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


BAD_SOURCES: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "NaN": (
        set_value(f"{EXPERT}up_proj.weight", float("nan")),
        (f"{EXPERT}up_proj.weight", "expected finite values, got nan at row 3, column 7"),
    ),
    "infinity": (
        set_value(f"{EXPERT}down_proj.weight", float("-inf")),
        (f"{EXPERT}down_proj.weight", "expected finite values, got -inf at row 3, column 7"),
    ),
    "NaN in a block's scale": (
        fp8_with_scale((1, 1), float("nan")),
        (f"{EXPERT}up_proj.weight", "expected finite values, got nan at row 0, column 0"),
    ),
    "columns": (
        lambda tensors: [
            replace(f"{source.ROOT.format(layer)}{e}.down_proj.weight", torch.ones(48, 40))(tensors)
            for layer in range(2) for e in range(4)
        ],
        ("down_proj.weight", "expected a positive multiple of 16 inputs, got 40 (shape [48, 40])", "--exclude"),
    ),
    "another size": (
        replace(f"{EXPERT}up_proj.weight", torch.ones(16, 48)),
        (f"{EXPERT}up_proj.weight", "expected the up projection [32, 48]", "got [16, 48]"),
    ),
    "no such projection": (
        remove(f"{EXPERT}up_proj"),
        ("layers.1.mlp.experts.*", "expected gate, up and down of experts 0..3, got no up projection of expert 2"),
    ),
    "no such expert": (
        remove("layers.0.mlp.experts.3."),
        ("expected gate, up and down of experts 0..3", "got no gate and no up and no down projection of expert 3"),
    ),
    "more experts": (
        replace("model.layers.0.mlp.experts.4.up_proj.weight", torch.ones(32, 48)),
        ("expected experts 0..3 (from config.json), got expert 4 too",),
    ),
    "a leaf": (
        replace(f"{EXPERT}up_proj.zero_point", torch.ones(32)),
        (f"{EXPERT}up_proj.weight", "expected experts without other leaves", "got 'zero_point' too"),
    ),
    "a bias": (
        replace(f"{EXPERT}up_proj.bias", torch.ones(32)),
        (f"{EXPERT}up_proj.bias", "expected a bias for gate and up of every expert, or for none"),
    ),
    "no MoE layer": (
        remove(".experts."),
        ("expected tensors ...layers.N...experts.M.gate_proj.weight", "got no MoE layer"),
    ),
    "FP8 without scale": (
        fp8_without_scale,
        (f"{EXPERT}up_proj.weight", "expected bf16, fp16, fp32, MXFP4, or E4M3 with", "got F8_E4M3 with no scale"),
    ),
    "blocks": (
        fp8_with_scale((2, 1)),
        (f"{EXPERT}up_proj.weight_scale_inv", "expected shape [1, 1], one per block 128 x 128", "got [2, 1]"),
    ),
    "NVFP4": (nvfp4, (f"{EXPERT}up_proj.weight", "got U8 with", "in NVFP4 already, and inspect, verify, generate")),
    "NVFP4 beside FP8": (
        nvfp4_beside_fp8,
        ("self_attn.q_proj.weight", "got F8_E4M3 with no scale", "its experts are in NVFP4 already"),
    ),
    "INT8": (int8, (f"{EXPERT}up_proj.weight", "fp32, MXFP4, or E4M3", "got I8 with weight_scale F32 [32, 1]")),
    "stacks beside experts": (
        lambda tensors: tensors.update(source.stacks(source.experts())),
        ("model.layers.0.mlp.experts.*", "expected single experts or stacks of experts, got both"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_source_that_cannot_be_quantized(tmp_path: Path, case: str) -> None:
    change, parts = BAD_SOURCES[case]
    tensors = small()
    change(tensors)
    path = source.write(tmp_path / "source", tensors)
    before = source.contents(path)
    refused((path, tmp_path / "result"), *parts)
    assert source.contents(path) == before
    assert not (tmp_path / "result" / "config.json").exists()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(("key", "what", "got"), [
    ("hidden_size", "hidden size", 48), ("moe_intermediate_size", "intermediate size", 32),
])  # fmt: skip
def test_sizes_that_the_config_does_not_declare(tmp_path: Path, key: str, what: str, got: int) -> None:
    """Before hours of work, after which no reader would take the result."""
    path = source.write(tmp_path / "source", small(), source.CONFIG | {key: 64})
    refused((path, tmp_path / "result"), f"layers.0.mlp.experts.*: expected {what} 64 (from config.json), got {got}")
    assert not (tmp_path / "result").exists()


def test_a_result_that_no_reader_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no config.json, and the run may go on."""
    path = source.write(tmp_path / "source", small())
    refusal = SimpleNamespace(reason="no reason")
    monkeypatch.setattr(run.Checkpoint, "refusals", lambda self: [refusal])
    refused((path, tmp_path / "result"), "result: expected layers that can be loaded, got no reason")
    names = {file.name for file in (tmp_path / "result").iterdir()}
    assert "config.json" not in names
    assert "quantize.journal.json" in names
    monkeypatch.undo()
    assert quantize(path, tmp_path / "result")[0] == 0


def test_places(tmp_path: Path) -> None:
    path = source.write(tmp_path / "source", small())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(path)
    before = source.contents(tmp_path)
    refused((tmp_path / "none", tmp_path / "result"), "none: expected a checkpoint directory, got no such path")
    refused((path / "config.json", tmp_path / "result"), "expected a checkpoint directory, got a file")
    refused((tmp_path / "full", tmp_path / "result"), "expected config.json in the directory, got notes.txt")
    refused((path, tmp_path / "full"), "full: expected a new or empty directory", "got notes.txt")
    refused((path, tmp_path / "file"), "file: expected a new or empty directory, got a file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    refused((path, tmp_path / "dangling"), "expected a new or empty directory, got a symbolic link whose target is")
    (tmp_path / "dangling").unlink()
    refused((path, path), "expected a directory beside the source, got the source itself")
    refused((path, tmp_path / "link" / "result"), "expected a directory beside the source, got one inside the other")
    refused((path, tmp_path), "expected a directory beside the source, got one inside the other")
    assert source.contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert quantize(path, tmp_path / "empty")[0] == 0
    refused((path, tmp_path / "empty"), "expected a new or empty directory", "got assets, config.json")


def test_options(tmp_path: Path) -> None:
    path, result = source.write(tmp_path / "source", small()), tmp_path / "result"
    refused((path, result, "--layout", "gguf"), "layout: expected one of modelopt, compressed-tensors, got 'gguf'")
    refused(
        (path, result, "--include", "*.expert.*"), "--include: expected a glob that matches one of", "got '*.expert.*'"
    )
    refused((path, result, "--exclude", "nothing"), "--exclude: expected a glob that matches one of", "got 'nothing'")
    refused((path, result, "--exclude", "*"), "expected globs that leave something to quantize, got none")
    refused(
        (path, result, "--exclude", "*.layers.1.*.up_proj"),
        "model.layers.1.mlp.experts.*: expected globs that take all experts of a layer, or none",
        "got 8 of 12 modules, without 'model.layers.1.mlp.experts.0.up_proj'",
    )
    refused((path, result, "--threads", "0"), "expected what torch-nvfp4 quantize --help lists")
    assert not result.exists()


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source.write(tmp_path / "source", small())
    monkeypatch.setattr(run, "free_bytes", lambda path: 100_000)
    for options in ((), ("--dry-run",)):
        refused((path, tmp_path / "result", *options), "result: expected ", "bytes of free disk, got 100,000 bytes")
    assert not (tmp_path / "result").exists()


def test_a_disk_that_becomes_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source.write(tmp_path / "source", small())
    write, count = os.pwrite, [0]

    def full(*arguments: object) -> int:
        count[0] += 1
        if count[0] == 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    parts = ("model-00002-of-00004.safetensors: expected to write", "got No space left on device", "goes on from here")
    refused((path, tmp_path / "result"), *parts)
    names = sorted(file.name for file in (tmp_path / "result").iterdir())
    assert names == ["model-00001-of-00004.safetensors", "quantize.journal.json"]
    code, out, _ = quantize(path, tmp_path / "result")
    assert code == 0
    assert "1 of 4 shards are there" in out
    assert quantize(path, tmp_path / "other")[0] == 0
    assert source.contents(tmp_path / "result") == source.contents(tmp_path / "other")


def interrupt(path: Path, destination: Path) -> None:
    """Leaves a run that has written its shards."""
    conversion = open_conversion(path, destination)
    conversion.write()
    conversion.close()


def touch(path: Path) -> None:
    os.utime(path / source.SHARDS[1], ns=(1, 1))


def edit_config(path: Path) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 2.0}))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "time": (touch, f"the source's {source.SHARDS[1]} as it was when the run began, got another time of change"),
    "config": (edit_config, "the source's config.json as it was when the run began, got another size and time of"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_source_that_changed(tmp_path: Path, case: str) -> None:
    change, text = CHANGES[case]
    path = source.write(tmp_path / "source", small())
    interrupt(path, tmp_path / "result")
    before = source.contents(tmp_path / "result")
    change(path)
    refused((path, tmp_path / "result"), "quantize.journal.json: expected", text, "delete", "to begin again")
    assert source.contents(tmp_path / "result") == before


def test_a_header_that_changed(tmp_path: Path) -> None:
    """Neither the size nor the time of the file tells it."""
    tensors = small() | {"model.norm_a.weight": torch.ones(4)}
    path = source.write(tmp_path / "source", tensors)
    interrupt(path, tmp_path / "result")
    for file in (path / source.SHARDS[0], path / source.SHARDS[1], path / "model.safetensors.index.json"):
        status = file.stat()
        file.write_bytes(file.read_bytes().replace(b"model.norm_a.weight", b"model.norm_b.weight"))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    refused((path, tmp_path / "result"), "as it was when the run began, got another header")


def test_a_run_goes_on_with_the_same_options_only(tmp_path: Path) -> None:
    path = source.write(tmp_path / "source", small())
    interrupt(path, tmp_path / "result")
    refused(
        (path, tmp_path / "result", "--layout", "compressed-tensors"),
        "expected layout 'modelopt', with which the run began, got 'compressed-tensors'",
    )
    refused(
        (path, tmp_path / "result", "--exclude", "*.layers.1.mlp.*"), "expected exclude []", "got ['*.layers.1.mlp.*']"
    )
    assert quantize(path, tmp_path / "result", "--layout", "modelopt")[0] == 0


def test_two_runs_at_once(tmp_path: Path) -> None:
    path = source.write(tmp_path / "source", small())
    first = open_conversion(path, tmp_path / "result")
    first.write()
    refused((path, tmp_path / "result"), "result: expected one run at a time, got another process that writes here")
    first.close()


def test_another_run_that_is_done_meanwhile(tmp_path: Path) -> None:
    """Its result is not written over, shard by shard, by a run with other options that began before it."""
    path = source.write(tmp_path / "source", small())
    late = open_conversion(path, tmp_path / "result", layout="compressed-tensors")
    assert quantize(path, tmp_path / "result")[0] == 0
    before = source.contents(tmp_path / "result")
    with pytest.raises(CheckpointError, match="result: expected a new or empty directory, or an interrupted run's"):
        late.write()
    late.close()
    assert source.contents(tmp_path / "result") == before


def test_a_source_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source.write(tmp_path / "source", small())
    truncate = os.truncate

    def change(*arguments: object) -> None:
        touch(path)
        truncate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "truncate", change)
    refused((path, tmp_path / "result"), f"{source.SHARDS[1]}: expected a file that does not change meanwhile")
    assert not list((tmp_path / "result").glob("*.safetensors*"))


def test_a_source_that_goes_away(tmp_path: Path) -> None:
    """The message is about the source, not about what is written."""
    path = source.write(tmp_path / "source", small())
    conversion = open_conversion(path, tmp_path / "result")
    (path / source.SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{source.SHARDS[1]}: .*expected a file that can be read, got No such"):
        conversion.write()
    conversion.close()


def test_a_source_that_goes_away_while_it_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source.write(tmp_path / "source", small())
    fsync, count = os.fsync, [0]

    def remove_shard(descriptor: int) -> None:
        fsync(descriptor)
        count[0] += 1
        if count[0] == 3:  # of the journal, its directory and the first shard
            (path / source.SHARDS[1]).unlink()

    monkeypatch.setattr(os, "fsync", remove_shard)
    refused((path, tmp_path / "result"), f"source/{source.SHARDS[1]}: expected a file that does not change meanwhile")


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize(("leaf", "change"), [
    (0, "halves"), (0, 0), (1, 24), (1, 4), (1, -4), (1, -8), (1, 0), (2, 1.5), (2, 0.75),
])  # fmt: skip
def test_a_result_that_is_not_what_was_written(tmp_path: Path, leaf: int, change: Any, layout: str) -> None:
    """A disk that changes codes, block scales or a global scale: the comparison fails, and no config is written.

    A change of 0 is a part of the file that was lost. Smaller scales saturate what lies above 6 steps.
    """
    leaves = (".weight", ".weight_scale", ".weight_scale_2")
    if layout == "compressed-tensors":
        leaves = (".weight_packed", ".weight_scale", ".weight_global_scale")
    path, result = source.write(tmp_path / "source", small()), tmp_path / "result"
    conversion = open_conversion(path, result, layout=layout)
    conversion.write()
    conversion.close()
    name = f"{EXPERT}up_proj"
    file = next(file for file in result.glob("*.safetensors") if name + leaves[leaf] in load_file(file))
    content, values = bytearray(file.read_bytes()), load_file(file)[name + leaves[leaf]]
    entry = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[name + leaves[leaf]]
    begin = 8 + int.from_bytes(content[:8], "little") + entry["data_offsets"][0]
    if change == 0:
        content[begin + 8 : begin + 16] = bytes(8)
    elif leaf == 0:  # the halves of a byte exchanged
        index = int(((values & 15) != (values >> 4)).reshape(-1).nonzero()[5])
        byte = content[begin + index]
        content[begin + index] = byte >> 4 | (byte & 15) << 4
    elif leaf == 1:  # an 8th of an octave is 1
        content[begin + 7] = min(0x7E, content[begin + 7] + change)
    else:
        content[begin : begin + 4] = (values * change).numpy().tobytes()
    file.write_bytes(content)
    code, out, err = quantize(path, result, "--layout", layout)
    assert code == 1
    assert "layer 1: expected values within the rounding of NVFP4, got: a value of " + name in err
    assert err.count("\n") == 1
    assert "FAILED" in out
    assert not (result / "config.json").exists()
