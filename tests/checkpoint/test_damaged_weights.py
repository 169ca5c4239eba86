"""Checkpoints whose files are sound and whose NVFP4 modules are not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.checkpoint_files import (
    CONFIG,
    HIDDEN,
    INTERMEDIATE,
    SHARD_1,
    SHARD_2,
    SPELLINGS,
    drop,
    leaves_of,
    raises,
    random_leaves,
    write_changed,
)
from torch_nvfp4.checkpoint import Checkpoint


@pytest.mark.parametrize("spelling", ["deepseek", "compressed"])
@pytest.mark.parametrize("leaf", ["data", "scale", "global_scale"])
def test_missing_leaf(spelling: str, leaf: str, tmp_path: Path) -> None:
    module, names, kind = SPELLINGS[spelling]
    leaves = {
        "modelopt": {"data": "weight", "scale": "weight_scale", "global_scale": "weight_scale_2"},
        "compressed": {"data": "weight_packed", "scale": "weight_scale", "global_scale": "weight_global_scale"},
    }[kind]
    name = f"{module.format(1, 2)}{names[2]}.{leaves[leaf]}"
    write_changed(tmp_path, lambda tensors: tensors.pop(name), spelling)
    with raises(SHARD_2, f"'{name}'", "expected in a shard, got no such tensor"):
        Checkpoint.open(tmp_path)


def test_missing_input_scale_is_fine(tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "input_scale" in name])
    assert Checkpoint.open(tmp_path).layers == (0, 1)


def test_missing_projection(tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: drop(tensors, "layers.1.ffn.experts.2.w3."))
    with raises(tmp_path, "'layers.1.ffn.experts.2.w3.weight'", "expected in a shard, got no such tensor"):
        Checkpoint.open(tmp_path)


def test_experts_without_a_gate(tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: drop(tensors, ".w1."))
    with raises(
        tmp_path, "layers.0.ffn.experts.0.*", "expected a gate projection (w1 or gate_proj)", "['w2', 'w3'] only"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("expert", "got"), [(0, "no expert 0"), (3, "no expert 3")])
def test_missing_expert(expert: int, got: str, tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: drop(tensors, f"layers.1.ffn.experts.{expert}."))
    with raises(
        tmp_path, "layers.1.ffn.experts.M.*", "expected experts 0..3 in layer 1 (from config.json)", f"got {got}"
    ):
        Checkpoint.open(tmp_path)


def test_missing_expert_that_the_config_does_not_count(tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: drop(tensors, "layers.1.ffn.experts.1."))
    (tmp_path / "config.json").write_text("{}")
    with raises("expected experts 0..3 in layer 1 (from the largest id), got no expert 1"):
        Checkpoint.open(tmp_path)
    write_changed(tmp_path, lambda tensors: drop(tensors, "layers.1.ffn.experts.3."))
    (tmp_path / "config.json").write_text("{}")
    with raises("layer 1: expected 4 experts, got 3"):
        Checkpoint.open(tmp_path)


def test_more_experts_than_the_config_declares(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {"n_routed_experts": 2}))
    with raises("expected experts 0..1 in layer 0 (from config.json), got also expert 2..3"):
        Checkpoint.open(damaged)


def test_one_expert_that_is_not_quantized(tmp_path: Path) -> None:
    def unquantize(tensors: dict[str, Tensor]) -> None:
        drop(tensors, "layers.0.ffn.experts.1.w1.")
        tensors["layers.0.ffn.experts.1.w1.weight"] = torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.bfloat16)

    write_changed(tmp_path, unquantize)
    checkpoint = Checkpoint.open(tmp_path)
    words = (SHARD_1, "'layers.0.ffn.experts.1.w1.weight'", "expected NVFP4 like other", "got BF16 (unquantized)")
    with raises(*words):
        checkpoint.experts(0)
    checkpoint.experts(1)


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ("model.layers.0.ffn.experts.0.w1", ("'layers.0.ffn.experts.'", "'model.layers.0.ffn.experts.' too")),
        ("layers.0.ffn.experts.0.gate_proj", ("one gate projection, got 'layers.0.ffn.experts.0.", "' too")),
        ("layers.0.ffn.experts.00.w1", ("one gate projection, got 'layers.0.ffn.experts.0", ".w1' too")),
    ],
)
def test_two_spellings_of_one_expert(other: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    leaves = random_leaves(torch.Generator(), INTERMEDIATE, HIDDEN)
    write_changed(tmp_path, lambda tensors: tensors.update(leaves_of("modelopt", other, *leaves)))
    with raises(SHARD_1, "expected", *parts):
        Checkpoint.open(tmp_path)


NAME = "layers.1.ffn.experts.3.w2"


@pytest.mark.parametrize(
    ("leaf", "tensor", "expected", "got"),
    [
        ("weight", torch.zeros(64, 48, dtype=torch.int8), "dtype U8", "I8"),
        ("weight", torch.zeros(64, 96, dtype=torch.bfloat16), "dtype U8", "BF16"),
        ("weight_scale", torch.ones(64, 6), "dtype F8_E4M3", "F32"),
        ("weight_scale_2", torch.ones((), dtype=torch.bfloat16), "dtype F32", "BF16"),
        ("weight", torch.zeros(64, 44, dtype=torch.uint8), "shape [out, in / 2] with in a multiple of 16", "[64, 44]"),
        ("weight", torch.zeros(64 * 48, dtype=torch.uint8), "shape [out, in / 2]", "[3072]"),
        ("weight_scale", torch.ones(64, 5).to(torch.float8_e4m3fn), "shape [64, 6] (out, in / 16)", "[64, 5]"),
        ("weight_scale", torch.ones(6, 64).to(torch.float8_e4m3fn), "shape [64, 6] (out, in / 16)", "[6, 64]"),
        ("weight_scale_2", torch.ones(2), "shape [] or [1]", "[2]"),
    ],
)
def test_wrong_leaf(leaf: str, tensor: Tensor, expected: str, got: str, tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: tensors.update({f"{NAME}.{leaf}": tensor}))
    with raises(tmp_path / SHARD_2, f"'{NAME}.{leaf}'", f"expected {expected}", f"got {got}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("rows", "cols"), [(HIDDEN, INTERMEDIATE + 16), (HIDDEN + 1, INTERMEDIATE)])
def test_expert_of_another_shape(rows: int, cols: int, tmp_path: Path) -> None:
    leaves = random_leaves(torch.Generator(), rows, cols)
    write_changed(tmp_path, lambda tensors: tensors.update(leaves_of("modelopt", NAME, *leaves)))
    expected = "shape [64, 48] for hidden size 64, intermediate size 96"
    with raises(tmp_path / SHARD_2, f"'{NAME}.weight'", f"expected {expected}", f"got [{rows}, {cols // 2}]"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "moe_intermediate_size"])
def test_experts_of_another_shape_than_the_config(damaged: Path, key: str) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {key: 128}))
    with raises(damaged / SHARD_1, "'layers.0.ffn.experts.0.w1.weight'", "expected shape", "128", "got [96, 32]"):
        Checkpoint.open(damaged)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
@pytest.mark.parametrize("tp_rank", [0, 1])
def test_nan_scale(byte: int, tp_rank: int, tmp_path: Path) -> None:
    """Row and group are those of the whole tensor, also when a slice is read; a slice without the NaN loads."""
    write_changed(tmp_path, lambda tensors: tensors[f"{NAME}.weight_scale"].view(torch.uint8).__setitem__((5, 4), byte))
    checkpoint = Checkpoint.open(tmp_path)
    message = ("expected finite F8_E4M3 scales", f"got NaN ({byte:#x}) at row 5, group 4")
    with raises(tmp_path / SHARD_2, f"'{NAME}.weight_scale'", *message):
        checkpoint.experts(1)
    if tp_rank == 1:
        with raises(tmp_path / SHARD_2, f"'{NAME}.weight_scale'", *message):
            checkpoint.experts(1, tp_rank=1, tp_size=2)
    else:
        checkpoint.experts(1, tp_rank=0, tp_size=2)
    checkpoint.experts(0)


def test_nan_scale_of_sliced_rows(tmp_path: Path) -> None:
    name = "layers.0.ffn.experts.1.w3.weight_scale"
    write_changed(tmp_path, lambda tensors: tensors[name].view(torch.uint8).__setitem__((50, 3), 0x7F))
    with raises(f"'{name}'", "at row 50, group 3"):
        Checkpoint.open(tmp_path).experts(0, tp_rank=1, tp_size=2)


@pytest.mark.parametrize(
    ("spelling", "value", "expected"),
    [
        ("deepseek", math.nan, "a finite global scale, got nan"),
        ("deepseek", math.inf, "a finite global scale, got inf"),
        ("compressed", -math.inf, "a finite global scale, got -inf"),
        ("compressed", 0.0, "a global scale with a finite reciprocal, got 0.0"),
    ],
)
def test_bad_global_scale(spelling: str, value: float, expected: str, tmp_path: Path) -> None:
    module, names, kind = SPELLINGS[spelling]
    leaf = "weight_scale_2" if kind == "modelopt" else "weight_global_scale"
    name = f"{module.format(0, 1)}{names[1]}.{leaf}"
    write_changed(tmp_path, lambda tensors: tensors[name].fill_(value), spelling)
    with raises(tmp_path / SHARD_1, f"'{name}'", f"expected {expected}"):
        Checkpoint.open(tmp_path).experts(0)


def test_leaf_that_nothing_would_apply(tmp_path: Path) -> None:
    name = "layers.0.ffn.experts.1.w3.pre_quant_scale"
    write_changed(tmp_path, lambda tensors: tensors.update({name: torch.full((HIDDEN,), 1.5)}))
    checkpoint = Checkpoint.open(tmp_path)
    with raises(f"'{name}'", "expected ones", "got 1.5"):
        checkpoint.experts(0)
    with raises(f"'{name}'", "expected ones", "got 1.5"):
        checkpoint.linear("layers.0.ffn.experts.1.w3")
    checkpoint.experts(1)
