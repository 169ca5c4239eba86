"""Files that must be refused: quickly, in one printable paragraph, and without allocating what they declare."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoint_files import CONFIG, INDEX, SHARD_1, change_index, entry, raises, write_raw
from torch_nvfp4 import NVFP4Experts
from torch_nvfp4.checkpoint import Checkpoint, CheckpointError
from torch_nvfp4.checkpoint.contents import id_spans
from torch_nvfp4.checkpoint.headers import load_json
from torch_nvfp4.errors import CheckpointError as Error
from torch_nvfp4.errors import printable, refusal, shown
from torch_nvfp4.quant_config import MoEQuantConfig

FILES = ("config.json", INDEX, SHARD_1, "hf_quant_config.json")


def bind_socket(file: Path) -> None:
    here = Path.cwd()
    os.chdir(file.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(file.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda file: file.mkdir(), "got a directory"),
        (lambda file: os.mkfifo(file), "got a named pipe"),
        (bind_socket, "got No such device or address"),
        (lambda file: file.symlink_to("/dev/zero"), "got a device"),
        (lambda file: file.symlink_to(file.name), "got Too many levels of symbolic links"),
        (lambda file: file.symlink_to("nowhere"), "got a symbolic link whose target is missing"),
    ],
)
def test_not_a_regular_file(damaged: Path, name: str, make: Callable[[Path], object], got: str) -> None:
    (damaged / name).unlink(missing_ok=True)
    make(damaged / name)
    with raises(damaged / name, "expected", got):
        Checkpoint.open(damaged)


@pytest.mark.parametrize("name", FILES)
def test_sparse_file(damaged: Path, name: str) -> None:
    """6 GiB of nothing is refused by its size, and not read."""
    (damaged / name).touch()
    os.truncate(damaged / name, 6 << 30)
    tracemalloc.start()
    try:
        with raises(damaged / name, "expected"):
            Checkpoint.open(damaged)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("name", "limit"), [("config.json", 67108864), (INDEX, 268435456)])
def test_size_limits(damaged: Path, name: str, limit: int) -> None:
    os.truncate(damaged / name, limit + 1)
    with raises(damaged / name, f"expected a file of at most {limit} bytes, got {limit + 1} bytes"):
        Checkpoint.open(damaged)


def test_small_files_are_not_read_into_large_buffers(original: Path) -> None:
    tracemalloc.start()
    try:
        Checkpoint.open(original)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "\ud800", "\x1b[31m"])
def test_odd_paths(path: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path / path)
    assert str(caught.value).isprintable()
    with pytest.raises(CheckpointError):
        NVFP4Experts.from_checkpoint(tmp_path / path, 0)


@pytest.mark.parametrize("shard", ["x" * 300 + ".safetensors", "\ud800.safetensors", "\x1b[31m.safetensors"])
def test_odd_shard_names(damaged: Path, shard: str) -> None:
    change_index(damaged, lambda weight_map: weight_map.update({"norm.weight": shard}))
    with raises("expected") as caught:
        Checkpoint.open(damaged)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 2000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("\x1b]0;owned\x07\x1b[31mx", "'\\x1b]0;owned\\x07\\x1b[31mx'"),
        ("a\nb", "'a\\nb'"),
        ("\u202eabc", "'\\u202eabc'"),
        ("\ud800", "expected a name that UTF-8 can hold"),
        ("x" * 1_000_000, "xxx...xxx"),
    ],
)
def test_odd_tensor_names_in_errors(damaged: Path, name: str, words: str) -> None:
    write_raw(damaged / SHARD_1, {name: entry(0, 2, "U8", [3])}, b"12")
    with raises(damaged / SHARD_1, words) as caught:
        Checkpoint.open(damaged)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 2000


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, {"a": "\ud800"}, {"\ud800": "a"}, [], "x", 0])
def test_metadata_that_the_safetensors_library_refuses(damaged: Path, metadata: Any) -> None:
    write_raw(damaged / SHARD_1, {"__metadata__": metadata})
    with raises(damaged / SHARD_1, "__metadata__: expected an object of texts, got"):
        Checkpoint.open(damaged)


def test_deeply_nested_config(damaged: Path) -> None:
    """As deep as the JSON parser allows: nothing after it recurses."""

    def write(depth: int) -> None:
        text = json.dumps(CONFIG)[:-1] + ', "a": ' + '{"a": ' * depth + "1" + "}" * depth + "}"
        (damaged / "config.json").write_text(text)

    write(400)
    assert Checkpoint.open(damaged).layers == (0, 1)
    write(100_000)
    with raises(damaged / "config.json", "expected valid JSON", "RecursionError"):
        Checkpoint.open(damaged)


def test_names_without_quadratic_time(damaged: Path) -> None:
    name = "layers.1." * 100_000 + "experts.1.w1"
    content = {f"{name}{number}": entry(0, 0) for number in range(3)} | {name: entry(0, 0)}
    write_raw(damaged / "model.safetensors", content)
    (damaged / INDEX).unlink()
    started = time.perf_counter()
    Checkpoint.open(damaged)
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize("unit", [b"[]", b"{}", b'{"a":[]}'])
@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD_1])
def test_json_of_brackets(damaged: Path, name: str, unit: bytes) -> None:
    """3 MB of empty lists took 70 MB."""
    text = b'{"a":[' + b",".join([unit] * (3_000_000 // len(unit))) + b"]}"
    if name == SHARD_1:
        write_raw(damaged / name, text)
    else:
        (damaged / name).write_bytes(text)
    tracemalloc.start()
    try:
        with raises(damaged / name, "expected at most one [ or { per 12 bytes of the", "got"):
            Checkpoint.open(damaged)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("unit", ['["aaaaaaaa"]', '{"a":111111}', "1000", '"ab"', "1e9"])
def test_memory_of_other_json(damaged: Path, unit: str) -> None:
    """Within the bound that headers.py states."""
    texts = ['{"a":[' + ",".join([unit] * (500_000 // len(unit))) + "]}"]
    texts.append("{" + ",".join(f'"{key:x}":1' for key in range(60_000)) + "}")
    for text in texts:
        (damaged / "config.json").write_text(text)
        tracemalloc.start()
        try:
            load_json(damaged / "config.json")
            assert tracemalloc.get_traced_memory()[1] < 25 * len(text)
        finally:
            tracemalloc.stop()


def write_stacks(path: Path, count: int, layers: int) -> None:
    """Sparse files of some KB that declare stacks of so many experts."""
    header: dict[str, Any] = {}
    position = 0
    for layer in range(layers):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            for leaf, dtype, shape in (("", "U8", [16, 8]), ("_scale", "F8_E4M3", [16, 1]), ("_scale_2", "F32", [])):
                size = 4 if dtype == "F32" else count * shape[0] * shape[1]
                name = f"layers.{layer}.mlp.experts.{projection}.weight{leaf}"
                header[name] = entry(position, position + size, dtype, [count, *shape] if shape else [1])
                position += size
    write_raw(path / "model.safetensors", header)
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size + position)
    (path / "config.json").write_text("{}")


def test_stacks_of_very_many_experts(tmp_path: Path) -> None:
    write_stacks(tmp_path, 1_000_001, 1)
    with raises("down_proj.weight'", "expected at most 1000000 experts in a layer, got 1000001"):
        Checkpoint.open(tmp_path)


def test_experts_of_stacks_take_no_memory(tmp_path: Path) -> None:
    write_stacks(tmp_path, 1_000_000, 20)
    started = time.perf_counter()
    tracemalloc.start()
    try:
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.summary().expert_counts == dict.fromkeys(range(20), 1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 2.0
    w13, w2 = checkpoint.experts(7, ep_rank=999, ep_size=1000)
    assert (w13.data.shape, w2.data.shape) == ((1000, 32, 8), (1000, 16, 8))
    with raises("expected the name of an NVFP4 module"):
        checkpoint.linear("layers.7.mlp.experts.down_proj")


def test_header_as_long_as_the_file(damaged: Path) -> None:
    (damaged / SHARD_1).write_bytes(struct.pack("<Q", 2**63))
    with raises(damaged / SHARD_1, "expected a header of at most 100000000 bytes, got 9223372036854775808"):
        Checkpoint.open(damaged)


# Numbers and types in config.json.

INTEGERS = ("num_hidden_layers", "hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")


@pytest.mark.parametrize("key", [*INTEGERS, "num_nextn_predict_layers"])
@pytest.mark.parametrize("value", [-1, True, 1.5, float("nan"), float("inf"), "4", {}, 10**11, 10**30, 10**400, 2**31])
def test_odd_integers(damaged: Path, key: str, value: Any) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    started = time.perf_counter()
    with raises(damaged / "config.json", f"{key}: expected", "integer", "got") as caught:
        Checkpoint.open(damaged)
    assert time.perf_counter() - started < 1.0
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("key", ["moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"])
def test_odd_integers_in_lists(damaged: Path, key: str) -> None:
    for value in (-1, True, "4", 10**11, [4]):
        (damaged / "config.json").write_text(json.dumps(CONFIG | {key: [4, value]}))
        with raises(damaged / "config.json", f"{key}[1]: expected", "integer"):
            Checkpoint.open(damaged)


def test_the_key_that_is_there_is_named(damaged: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "n_routed_experts"}
    (damaged / "config.json").write_text(json.dumps({"text_config": config | {"num_local_experts": "4"}}))
    with raises("text_config.num_local_experts: expected a non-negative integer, got '4'"):
        Checkpoint.open(damaged)


@pytest.mark.parametrize("key", ["swiglu_limit", "swiglu_alpha", "swiglu_beta"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 1e39, float("nan"), float("inf"), True, "7", {"a": 1}])
def test_odd_floats(damaged: Path, key: str, value: Any) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    with raises(damaged / "config.json", f"{key}: expected a", "finite number") as caught:
        Checkpoint.open(damaged)
    assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match=f"{key}: expected a"):
        MoEQuantConfig.from_config({key: value})


@pytest.mark.parametrize("value", [1e-45, 1e-320])
def test_limit_that_fp32_rounds_to_zero(value: float) -> None:
    with pytest.raises(ValueError, match="swiglu_limit: expected a positive, finite number"):
        MoEQuantConfig.from_config({"swiglu_limit": value})


@pytest.mark.parametrize("key", ["model_type", "hidden_act"])
@pytest.mark.parametrize("value", [5, True, ["silu"], {}])
def test_odd_strings(damaged: Path, key: str, value: Any) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    with raises(damaged / "config.json", f"{key}: expected a string, got"):
        Checkpoint.open(damaged)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": [1]}, "text_config: expected an object, got [1]"),
        ({"thinker_config": {"text_config": 3}}, "thinker_config.text_config: expected an object, got 3"),
        ({"apply_router_weight_on_input": 1}, "apply_router_weight_on_input: expected true or false, got 1"),
        ({"quantization_config": [1]}, "quantization section: expected an object, got [1]"),
        ({"n_routed_experts": 0}, "expected no experts in layer 0 (from config.json), got also expert 0..3"),
        ({"n_routed_experts": 10**6}, "expected experts 0..999999 in layer 0", ),
    ],
)  # fmt: skip
def test_odd_values(damaged: Path, changes: dict[str, Any], words: str) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | changes))
    with raises(words):
        Checkpoint.open(damaged)


@pytest.mark.parametrize(
    ("top_k", "words"),
    [
        (0, "num_experts_per_tok: expected at least one expert per token, got 0"),
        (5, "expected at most as many experts per token as layer 0 has experts, 4, got 5"),
        ([None, 2], "got num_experts_per_tok [None, 2], which has none for layer 0"),
    ],
)
def test_top_k_that_no_token_can_have(damaged: Path, top_k: Any, words: str) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {"num_experts_per_tok": top_k}))
    checkpoint = Checkpoint.open(damaged)
    checkpoint.experts(0)
    with raises(damaged / "config.json", words) as caught:
        _ = checkpoint.top_k
    refused = [refusal for refusal in checkpoint.refusals() if refusal.what == "top-k of layer 0"]
    assert [refusal.reason for refusal in refused] == ([] if isinstance(top_k, list) else [str(caught.value)])


def test_top_k_of_layers(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {"num_experts_per_tok": [3, 2]}))
    checkpoint = Checkpoint.open(damaged)
    assert [checkpoint.layer_config(layer).top_k for layer in range(2)] == [3, 2]
    assert [checkpoint.layer_top_k(layer) for layer in range(2)] == [3, 2]
    assert (checkpoint.top_k, checkpoint.summary().top_ks, checkpoint.refusals()) == (3, {0: 3, 1: 2}, ())
    (damaged / "config.json").write_text(json.dumps(CONFIG | {"num_experts_per_tok": [3, 5]}))
    checkpoint = Checkpoint.open(damaged)
    assert checkpoint.top_k == 3
    with raises("expected at most as many experts per token as layer 1 has experts, 4, got 5") as caught:
        checkpoint.layer_top_k(1)
    assert checkpoint.refusals() == (("top-k of layer 1", str(caught.value)),)


def test_many_gaps_are_told_in_few_words() -> None:
    assert id_spans(range(0, 100, 2)) == "0, 2, 4, 6, 8, 10, 12, 14 and 42 more spans"


# The words themselves.


def test_errors_are_one_printable_paragraph() -> None:
    text = str(Error("a\x1b[31m\n\ud800\u202e" + "b" * 10_000 + "end"))
    assert text.isprintable()
    assert text.startswith("a\\x1b[31m\\n\\ud800\\u202e")
    assert text.endswith("end")
    assert len(text) == 2000
    assert refusal("f\n", "x", "y", "z") == "f\\n: expected x, got y; z"
    assert printable("é中") == "é中"


def test_shown_is_short_whatever_the_value() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, 10**400, "x" * 10**6, list(range(10**6)), {str(i): i for i in range(10**5)}, b"x" * 10**6):
        assert len(shown(value)) < 500
    assert shown(10**5000) == f"an integer of {(10**5000).bit_length()} bits"
    assert shown("a") == "'a'"
    del deep
