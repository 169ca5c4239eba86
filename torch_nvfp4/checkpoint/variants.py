"""Turns a written checkpoint into variants that published ones come in: for the tests and the fuzzer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torch_nvfp4.checkpoint.headers import INDEX_NAME
from torch_nvfp4.checkpoint.writer import write_json

__all__ = ["add_leaves", "add_stack", "add_stale_tensors", "change_config", "move_to_overlay"]

OVERLAY = "model-overlay-00001.safetensors"


def change_config(path: Path, **changes: Any) -> None:
    """Sets keys of config.json; inside its text_config where it has one."""
    config = json.loads((path / "config.json").read_text())
    config.get("text_config", config).update(changes)
    write_json(path / "config.json", config)


def move_to_overlay(path: Path, names: Iterable[str]) -> None:
    """Puts the tensors into a shard of their own, which the index names, and leaves stale copies where they were."""
    weight_map = _weight_map(path)
    overlay: dict[str, Tensor] = {}
    for shard, held in _by_shard(weight_map, names).items():
        tensors = load_file(path / shard)
        for name in held:
            overlay[name] = tensors[name].clone()
            stale = tensors[name].reshape(-1).view(torch.uint8)
            stale.copy_(stale.flip(0))  # other values that are as valid
        save_file(tensors, path / shard, metadata={"format": "pt"})
    save_file(overlay, path / OVERLAY, metadata={"format": "pt"})
    _write_index(path, weight_map | dict.fromkeys(overlay, OVERLAY))


def add_stale_tensors(path: Path, rename: Callable[[str], str | None]) -> int:
    """Adds copies of tensors under other names that the index does not name; None: no copy. Returns how many."""
    count = 0
    for shard in sorted(set(_weight_map(path).values())):
        tensors = load_file(path / shard)
        copies = {new: tensor.clone() for name, tensor in tensors.items() if (new := rename(name)) is not None}
        count += len(copies.keys() - tensors.keys())
        save_file(copies | tensors, path / shard, metadata={"format": "pt"})
    return count


def add_stack(path: Path, root: str, num_experts: int = 2) -> None:
    """Adds unquantized experts beside NVFP4 ones, as Qwen3-Omni's talker beside its thinker."""
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    add_tensors(
        path,
        {
            f"{root}.{expert}.{name}.weight": torch.full(shape, 0.5, dtype=torch.bfloat16)
            for expert in range(num_experts)
            for name, shape in shapes.items()
        },
    )


def add_leaves(path: Path, leaf: str, value: Callable[[str, Tensor], Tensor | None]) -> None:
    """Adds a leaf beside the codes of modules: ``value(module, codes)``, None for none."""
    added: dict[str, Tensor] = {}
    for shard in sorted(set(_weight_map(path).values())):
        for name, tensor in load_file(path / shard).items():
            module = name.removesuffix(".weight_packed").removesuffix(".weight")
            if module != name and tensor.dtype == torch.uint8 and (new := value(module, tensor)) is not None:
                added[module + leaf] = new.clone()
    add_tensors(path, added)


def add_tensors(path: Path, added: Mapping[str, Tensor]) -> None:
    """Adds tensors to the first shard and to the index."""
    weight_map = _weight_map(path)
    shard = min(weight_map.values())
    save_file(load_file(path / shard) | dict(added), path / shard, metadata={"format": "pt"})
    _write_index(path, weight_map | dict.fromkeys(added, shard))


def _by_shard(weight_map: Mapping[str, str], names: Iterable[str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name in names:
        shards.setdefault(weight_map[name], []).append(name)
    return shards


def _weight_map(path: Path) -> dict[str, str]:
    return dict(json.loads((path / INDEX_NAME).read_text())["weight_map"])


def _write_index(path: Path, weight_map: Mapping[str, str]) -> None:
    write_json(path / INDEX_NAME, {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
