"""Writes a checkpoint again with its NVFP4 and FP8 weights dequantized to bf16: what is loaded beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from torch_nvfp4.bench.random_model import FP8_BLOCK, write_once
from torch_nvfp4.checkpoint.writer import write_json, write_shards
from torch_nvfp4.format import NVFP4Weight, dequantize

__all__ = ["write_dense"]

_SCALE_2, _FP8_SCALE = ".weight_scale_2", ".scale"


def write_dense(path: Path, source: Path, *, device: torch.device, progress: Callable[[str], None]) -> Path:
    """Writes ``source`` (one shard after the other, dequantized on ``device``) without quantization to ``path``.

    A directory that already holds it is left as it is.
    """

    def write() -> None:
        write_shards(path, _shards(source, device, progress))
        config = json.loads((source / "config.json").read_text())
        write_json(
            path / "config.json",
            {key: value for key, value in config.items() if key not in ("quantization_config", "expert_dtype")},
        )

    return write_once(path, {"source": (source / "complete.json").read_text()}, write)


def _shards(
    source: Path, device: torch.device, progress: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for file in sorted(source.glob("*.safetensors")):
        progress(f"dequantizing {file.name}")
        yield file.name, dict(_dequantized(file, device))


def _dequantized(file: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt", device="cpu") as shard:
        names = set(shard.keys())

        def read(name: str) -> Tensor:
            return shard.get_tensor(name).to(device)

        for name in sorted(names):
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and module + _SCALE_2 in names:
                parts = (read(module + leaf) for leaf in (".weight", ".weight_scale", _SCALE_2))
                yield name, dequantize(NVFP4Weight(*parts), torch.bfloat16).cpu()
            elif name.endswith(".weight") and module + _FP8_SCALE in names:
                codes, scale = read(name), read(module + _FP8_SCALE).float()
                scale = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
                yield name, (codes.float() * scale[: codes.shape[0], : codes.shape[1]]).to(torch.bfloat16).cpu()
            elif not _is_scale(name, names):
                yield name, shard.get_tensor(name)


def _is_scale(name: str, names: set[str]) -> bool:
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight_scale", "weight_scale_2", "input_scale"):
        return True
    return leaf == "scale" and f"{module}.weight" in names
