"""The files of a checkpoint: configs, index, shards' headers, and everything that can be wrong with them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoint_files import (
    CONFIG,
    HIDDEN,
    INDEX,
    INTERMEDIATE,
    SHARD_1,
    SHARD_2,
    assert_equal,
    change_index,
    entry,
    make_tensors,
    raises,
    write_raw,
)
from torch_nvfp4.checkpoint import Checkpoint, open_checkpoint


def test_single_file_without_index(tmp_path: Path) -> None:
    tensors, weights = make_tensors()
    for name in ("model.safetensors", "anything.safetensors"):
        path = tmp_path / name
        path.mkdir()
        save_file(tensors, path / name)
        (path / "config.json").write_text(json.dumps(CONFIG))
        assert_equal(open_checkpoint(str(path)).experts(1).w2.data[3], weights[1, 3, "down"][0])


def test_several_files_without_index(damaged: Path) -> None:
    (damaged / INDEX).unlink()
    assert Checkpoint.open(damaged).layers == (0, 1)


@pytest.mark.parametrize("shard", [SHARD_1, SHARD_2])
def test_missing_shard_without_an_index(damaged: Path, shard: str) -> None:
    """What a download that stopped leaves behind."""
    for name in (INDEX, shard):
        (damaged / name).unlink()
    with raises(damaged / shard, "expected every shard", "got no such file; 1 of 2 shards are there, and no", INDEX):
        Checkpoint.open(damaged)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("a-00000-of-00002", "a-00001-of-00002"), None),
        (("a-1-of-2", "a-2-of-2"), None),
        (("1-of-2", "2-of-2"), None),
        (("a-1-of-1", "a-00001-of-00002"), "a-00002-of-00002"),
        (("a-00000-of-00003", "a-00002-of-00003"), "a-00001-of-00003"),
        (("a-00001-of-00002", "b-00002-of-00002"), "a-00002-of-00002"),
        (("a-1-of-" + "9" * 200, "a-3-of-" + "9" * 200), "2-of-999"),
        (("a-of-2", "b-1-of-x"), None),
    ],
)
def test_shards_that_count_themselves(damaged: Path, names: tuple[str, str], missing: str | None) -> None:
    (damaged / INDEX).unlink()
    for old, new in zip((SHARD_1, SHARD_2), names, strict=True):
        (damaged / old).rename(damaged / f"{new}.safetensors")
    if missing is None:
        assert Checkpoint.open(damaged).layers == (0, 1)
        return
    with raises(missing, "expected every shard that the names of the others count"):
        Checkpoint.open(damaged)


def test_symlinked_shards(damaged: Path, tmp_path: Path) -> None:
    """The Hugging Face cache links each file of a snapshot to a blob outside of it."""
    blob = tmp_path / "blob"
    (damaged / SHARD_1).rename(blob)
    (damaged / SHARD_1).symlink_to(blob)
    assert_equal(Checkpoint.open(damaged).experts(0).w2.data[0], make_tensors()[1][0, 0, "down"][0])


def test_missing_directory(tmp_path: Path) -> None:
    with raises(tmp_path / "none", "expected a checkpoint directory, got no such path"):
        Checkpoint.open(tmp_path / "none")
    (tmp_path / "file").touch()
    with raises(tmp_path / "file", "expected a checkpoint directory, got a file"):
        Checkpoint.open(tmp_path / "file")


def test_missing_config(damaged: Path) -> None:
    (damaged / "config.json").unlink()
    with raises(damaged, "expected config.json in the directory, got", SHARD_1):
        Checkpoint.open(damaged)


@pytest.mark.parametrize("name", ["config.json", INDEX, "hf_quant_config.json"])
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"a": 1', ("expected valid JSON", "JSONDecodeError")),
        (b"\xff\xfe\xfd", ("expected valid JSON", "UnicodeDecodeError")),
        (b"[" * 100_000, ("expected valid JSON", "RecursionError")),
        (b"[1]", ("expected an object in the JSON, got list",)),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', ("'b'", "each key of the JSON once, got it twice")),
    ],
)
def test_bad_json(damaged: Path, name: str, content: bytes, parts: tuple[str, ...]) -> None:
    (damaged / name).write_bytes(content)
    with raises(damaged / name, *parts):
        Checkpoint.open(damaged)


def test_pickle_is_not_read(damaged: Path) -> None:
    for name in (INDEX, SHARD_1, SHARD_2):
        (damaged / name).unlink()
    torch.save({}, damaged / "pytorch_model.bin")
    with raises(damaged, f"expected {INDEX}", "got config.json, pytorch_model.bin", "pickled checkpoints are not read"):
        Checkpoint.open(damaged)


@pytest.mark.parametrize(
    "shard",
    [
        *("../outside.safetensors", "/etc/outside.safetensors", "sub/a.safetensors", "..\\a.safetensors"),
        *("c:a.safetensors", "a\0.safetensors", "pytorch_model.bin", "", "..", None, 3),
    ],
)
def test_index_names_no_shard_beside_it(damaged: Path, shard: object) -> None:
    change_index(damaged, lambda weight_map: weight_map.update({"norm.weight": shard}))
    with raises(damaged / INDEX, "'norm.weight'", "expected the name of a *.safetensors file", f"got {shard!r}"):
        Checkpoint.open(damaged)


@pytest.mark.parametrize(
    ("content", "got"), [({}, "no such key"), ({"weight_map": []}, "[]"), ({"weight_map": {}}, "{}")]
)
def test_index_without_weight_map(damaged: Path, content: Any, got: str) -> None:
    (damaged / INDEX).write_text(json.dumps(content))
    with raises(damaged / INDEX, "expected an object weight_map", f"got {got}"):
        Checkpoint.open(damaged)


def test_index_names_a_tensor_that_no_shard_holds(damaged: Path) -> None:
    change_index(damaged, lambda weight_map: weight_map.update({"head.weight": SHARD_2}))
    with raises(
        damaged / SHARD_2, "'head.weight'", f"expected in this shard, which {INDEX} names", "got no such tensor"
    ):
        Checkpoint.open(damaged)


def test_index_names_the_wrong_shard(damaged: Path) -> None:
    name = "layers.0.ffn.experts.0.w1.weight"
    change_index(damaged, lambda weight_map: weight_map.update({name: SHARD_2}))
    with raises(damaged / SHARD_2, f"'{name}'", "expected in this shard", f"got it in {SHARD_1}"):
        Checkpoint.open(damaged)


def test_index_names_a_tensor_twice(damaged: Path) -> None:
    text = (damaged / INDEX).read_text().replace('"weight_map": {', '"weight_map": {"layers.0.attn_norm.weight": "x",')
    (damaged / INDEX).write_text(text)
    with raises(damaged / INDEX, "'layers.0.attn_norm.weight'", "expected each key of the JSON once, got it twice"):
        Checkpoint.open(damaged)


def test_missing_shard(damaged: Path) -> None:
    (damaged / SHARD_2).unlink()
    with raises(damaged / SHARD_2, "layers.1.", "got no such file; 1 of 2 shards are missing"):
        Checkpoint.open(damaged)


def test_tensor_in_two_shards_without_an_index(damaged: Path) -> None:
    second = load_file(damaged / SHARD_2)
    second["layers.0.ffn.experts.1.w2.weight"] = torch.zeros(HIDDEN, INTERMEDIATE // 2, dtype=torch.uint8)
    save_file(second, damaged / SHARD_2)
    (damaged / INDEX).unlink()
    with raises(
        damaged / SHARD_2, "'layers.0.ffn.experts.1.w2.weight'", "each tensor in one shard", f"it in {SHARD_1} too"
    ):
        Checkpoint.open(damaged)


@pytest.mark.parametrize(
    ("header", "data", "length", "parts"),
    [
        (b"", b"", 2**40, ("expected a header of at most 100000000 bytes, got 1099511627776",)),
        (b"{}", b"", 100, ("expected a header of 100 bytes, got 2 bytes after its length", "truncated")),
        (b"{", b"", None, ("expected valid JSON in the header",)),
        (b"[]", b"", None, ("expected an object in the header, got list",)),
        (b'{"a": 1, "a": 2}', b"", None, ("'a'", "expected each key of the header once, got it twice")),
        ({"a": 1}, b"", None, ("'a'", "expected an object with dtype, shape, data_offsets, got 1")),
        ({"a": entry(0, 1, "Q4")}, b"1", None, ("'a'", "expected dtype one of", "got 'Q4'")),
        ({"a": entry(0, 1, ["U8"])}, b"1", None, ("'a'", "expected dtype one of", "got ['U8']")),
        ({"a": entry(0, 1, shape=[-1])}, b"1", None, ("'a'", "expected a shape of non-negative integers, got [-1]")),
        ({"a": entry(0, 1, shape=[True])}, b"1", None, ("'a'", "a shape of non-negative integers, got [True]")),
        ({"a": entry(0, 1, shape=[2**62] * 8)}, b"1", None, ("'a'", "as many bytes as U8", "data_offsets [0, 1]")),
        ({"a": entry(0, 1, shape=[1] * 100_000)}, b"1", None, ("'a'", "at most 8 dimensions, got 100000")),
        ({"a": entry(0, 6, "F32", [2])}, b"123456", None, ("'a'", "as many bytes as F32 [2]", "data_offsets [0, 6]")),
        ({"a": entry(0, -1)}, b"", None, ("'a'", "expected a shape")),
        ({"a": entry(0, 1) | {"data_offsets": [0]}}, b"1", None, ("'a'", "expected two data_offsets, got [0]")),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"123", None, ("'b'", "expected data at offset 2", "got offset 1")),
        ({"a": entry(0, 2), "b": entry(3, 4)}, b"1234", None, ("'b'", "expected data at offset 2", "got offset 3")),
        ({"a": entry(0, 2)}, b"123", None, ("expected 2 bytes of tensor data, got 3",)),
    ],
)  # fmt: skip
def test_bad_header(damaged: Path, header: Any, data: bytes, length: int | None, parts: tuple[str, ...]) -> None:
    write_raw(damaged / SHARD_1, header, data, length)
    with raises(damaged / SHARD_1, *parts):
        Checkpoint.open(damaged)


def test_git_lfs_pointer(damaged: Path) -> None:
    (damaged / SHARD_1).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with raises(damaged / SHARD_1, "got a Git LFS pointer"):
        Checkpoint.open(damaged)


def test_truncated_data(damaged: Path) -> None:
    content = (damaged / SHARD_2).read_bytes()
    (damaged / SHARD_2).write_bytes(content[:-1])
    last = max(
        (value["data_offsets"][1], name)
        for name, value in json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]).items()
    )[1]
    size = len(content)
    with raises(
        damaged / SHARD_2, f"'{last}'", f"up to byte {size} of", f"got a file of {size - 1} bytes", "truncated"
    ):
        Checkpoint.open(damaged)


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_truncated_header(damaged: Path, size: int) -> None:
    (damaged / SHARD_1).write_bytes((damaged / SHARD_1).read_bytes()[:size])
    with raises(damaged / SHARD_1, "expected", "header", "truncated"):
        Checkpoint.open(damaged)


def test_truncated_after_opening(damaged: Path) -> None:
    checkpoint = Checkpoint.open(damaged)
    (damaged / SHARD_1).write_bytes((damaged / SHARD_1).read_bytes()[:-1])
    with raises(damaged / SHARD_1, "expected the file as it was when it was opened"):
        checkpoint.experts(0)


def test_replaced_after_opening(damaged: Path) -> None:
    checkpoint = Checkpoint.open(damaged)
    tensors = load_file(damaged / SHARD_1)
    save_file(
        {name: tensor[:1] if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}, damaged / SHARD_1
    )
    with raises(damaged / SHARD_1, "expected the file as it was when it was opened, got", "bytes where"):
        checkpoint.experts(0)
