"""Small checkpoints spelled out by hand, and ways to damage them: for the tests of the reader."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torch_nvfp4.checkpoint import CheckpointError

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 64, 96, 4, 2
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
# Each layout's names, spelled out: module of an expert's gate, up, down, and the four leaves.
SPELLINGS = {
    "deepseek": ("layers.{}.ffn.experts.{}.", ("w1", "w3", "w2"), "modelopt"),
    "modelopt": ("model.layers.{}.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj"), "modelopt"),
    "nested": ("language_model.model.layers.{}.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj"), "modelopt"),
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.", ("w1", "w3", "w2"), "modelopt"),
    "compressed": ("model.layers.{}.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj"), "compressed"),
}
LAYOUT_NAMES = {"nested": "modelopt", "mixtral": "modelopt", "compressed": "compressed-tensors"}
CONFIG = {
    "model_type": "deepseek_v4",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTERMEDIATE,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "swiglu_limit": 7.0,
}


def random_codes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def random_leaves(generator: torch.Generator, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, E4M3 scales of either sign without NaN, and a 0-d global scale that is a power of two times 1.5."""
    scale = random_codes(generator, rows, cols // 16)
    scale[(scale & 0x7F) == 0x7F] = 0x38
    exponent = torch.randint(-13, -9, (), generator=generator)
    return random_codes(generator, rows, cols // 2), scale.view(torch.float8_e4m3fn), 1.5 * torch.exp2(exponent.float())


def leaves_of(kind: str, module: str, codes: Tensor, scale: Tensor, global_scale: Tensor) -> dict[str, Tensor]:
    if kind == "modelopt":
        return {
            f"{module}.weight": codes,
            f"{module}.weight_scale": scale,
            f"{module}.weight_scale_2": global_scale,
            f"{module}.input_scale": torch.tensor(0.25),
        }
    return {
        f"{module}.weight_packed": codes,
        f"{module}.weight_scale": scale,
        f"{module}.weight_global_scale": (1.0 / global_scale).reshape(1),
        f"{module}.input_global_scale": torch.tensor([4.0]),
    }


Weights = dict[tuple[int, int, str], tuple[Tensor, Tensor, Tensor]]


def make_tensors(spelling: str = "deepseek") -> tuple[dict[str, Tensor], Weights]:
    """Every tensor of a small checkpoint, and (layer, expert, gate/up/down) -> the three leaves."""
    generator = torch.Generator().manual_seed(1)
    module, names, kind = SPELLINGS[spelling]
    tensors: dict[str, Tensor] = {}
    weights: Weights = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
            for role, name, (rows, cols) in zip(("gate", "up", "down"), names, shapes, strict=True):
                leaves = random_leaves(generator, rows, cols)
                weights[layer, expert, role] = leaves
                tensors |= leaves_of(kind, module.format(layer, expert) + name, *leaves)
        tensors[f"layers.{layer}.attn_norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return tensors, weights


def write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """Two shards, the second with the names of layer 1, an index and config.json."""
    path.mkdir(exist_ok=True)
    second = {name: tensor for name, tensor in tensors.items() if "layers.1." in name}
    first = {name: tensor for name, tensor in tensors.items() if name not in second}
    save_file(first, path / SHARD_1)
    save_file(second, path / SHARD_2)
    weight_map = dict.fromkeys(first, SHARD_1) | dict.fromkeys(second, SHARD_2)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return path


def write_changed(path: Path, change: Callable[[dict[str, Tensor]], object], spelling: str = "deepseek") -> Path:
    tensors, _ = make_tensors(spelling)
    change(tensors)
    return write(path, tensors)


def raises(*parts: object) -> Any:
    """A CheckpointError whose text has the parts in this order."""
    return pytest.raises(CheckpointError, match=r"[\s\S]*".join(re.escape(str(part)) for part in parts))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits (E4M3 has no comparison on the CPU)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype == torch.float8_e4m3fn:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    assert torch.equal(actual, expected)


def change_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    change(weight_map)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_raw(file: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def drop(tensors: dict[str, Tensor], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]
