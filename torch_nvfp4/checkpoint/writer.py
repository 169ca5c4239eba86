"""Stores experts in each of the layouts that the reader knows, for `write_checkpoint`.

Each row of `layouts.LAYOUTS` has one in `WRITTEN`: under which names a published model has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from torch_nvfp4 import mxfp4
from torch_nvfp4.checkpoint.headers import INDEX_NAME
from torch_nvfp4.checkpoint.layouts import (
    COMPRESSED_TENSORS,
    DEEPSEEK_MXFP4,
    GPT_OSS,
    LAYOUTS,
    MODELOPT,
    Layout,
    Spelling,
)
from torch_nvfp4.format import E2M1_MAX, E4M3_MAX, NVFP4Weight, quantize, reciprocal_global_scale
from torch_nvfp4.mxfp4 import MXFP4Weight

__all__ = ["WRITTEN", "Written", "module_leaves", "mxfp4_leaves", "stacked_experts", "write_json", "write_shards"]

_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_up_proj", "down_proj")


class Written(NamedTuple):
    """A layout under the names of one published model."""

    experts: str  # the module of a layer's experts, {} for the layer
    projections: tuple[str, ...]  # gate, up, down; or gate_up, down; or up, down
    model: Literal["deepseek", "qwen", "step", "llama4", "nemotron", "kimi", "gpt-oss"] = "qwen"  # whose config it is
    shares: Literal["half", "expert", "layer"] = "half"  # how much of a stack one global scale is for
    swapped: bool = False  # a stack [E, in, out]


WRITTEN: dict[str, Written] = {
    "deepseek": Written("layers.{}.ffn.experts", ("w1", "w3", "w2"), "deepseek"),
    "modelopt": Written("model.layers.{}.mlp.experts", _GATE_UP_DOWN),
    "compressed-tensors": Written("model.layers.{}.mlp.experts", _GATE_UP_DOWN),
    "modelopt-stack": Written("model.language_model.layers.{}.moe", _GATE_UP_DOWN, "step", "expert"),
    "compressed-tensors-stack": Written("model.layers.{}.mlp.experts", _FUSED, shares="expert"),
    "modelopt-parameters": Written(
        "language_model.model.layers.{}.feed_forward.experts", _FUSED, "llama4", "layer", swapped=True
    ),
    "compressed-tensors-parameters": Written("model.language_model.layers.{}.mlp.experts", _FUSED),
    "modelopt-rows": Written("model.language_model.layers.{}.mlp.experts", _FUSED, shares="layer"),
    "compressed-tensors-rows": Written("model.language_model.layers.{}.mlp.experts", _FUSED, shares="layer"),
    "nemotron": Written("backbone.layers.{}.mixer.experts", ("up_proj", "down_proj"), "nemotron"),
    "deepseek-mxfp4": Written("layers.{}.ffn.experts", ("w1", "w3", "w2"), "deepseek"),
    "quark-mxfp4": Written("model.layers.{}.mlp.experts", _GATE_UP_DOWN),
    "compressed-tensors-mxfp4": Written(
        "language_model.model.layers.{}.block_sparse_moe.experts", ("w1", "w3", "w2"), "kimi"
    ),
    "gpt-oss": Written("model.layers.{}.mlp.experts", _FUSED, "gpt-oss"),
}
ROWS: dict[str, Layout] = {layout.name: layout for layout in LAYOUTS}


def dense_spelling(layout: str) -> Spelling:
    """How the linears beside experts in a layout are spelled."""
    return COMPRESSED_TENSORS if ROWS[layout].spelling.reciprocal else MODELOPT


def module_leaves(module: str, spelling: Spelling, weight: NVFP4Weight) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one module. Input scales are those of activations with amax 8."""
    assert spelling.global_scale is not None
    input_scale = torch.full_like(weight.global_scale, 8.0 / (E2M1_MAX * E4M3_MAX))
    yield module + spelling.data, weight.data
    yield module + spelling.scale, weight.scale
    if spelling.reciprocal:
        stored = reciprocal_global_scale(weight.global_scale)
        # compressed-tensors keeps a scalar as [1].
        yield module + spelling.global_scale, stored if stored.dim() else stored.reshape(1)
        yield module + spelling.input_scale, input_scale.reciprocal().reshape(stored.shape or (1,))
    else:
        yield module + spelling.global_scale, weight.global_scale.clone()
        yield module + spelling.input_scale, input_scale


def mxfp4_leaves(module: str, spelling: Spelling, weight: MXFP4Weight) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one MXFP4 module, in the dtypes of the model that is spelled so."""
    data, scale = weight
    if spelling == DEEPSEEK_MXFP4:
        yield module + spelling.data, data.view(torch.int8)
        yield module + spelling.scale, scale
        return
    blocks = data.unflatten(-1, (-1, mxfp4.GROUP_SIZE // 2)) if spelling == GPT_OSS else data
    yield module + spelling.data, blocks
    yield module + spelling.scale, scale.view(torch.uint8)


def stacked_experts(layout: str, layer: int, gate: Tensor, up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer's experts in a layout that stacks them, from dense [E, I, K] (gate, up) and [E, K, I]."""
    written, row = WRITTEN[layout], ROWS[layout]
    if row.spelling.is_mxfp4:
        interleaved = torch.stack((gate, up), 2).flatten(1, 2)  # gate 0, up 0, gate 1, ...
        for name, values in zip(written.projections, (interleaved, down), strict=True):
            module = f"{written.experts.format(layer)}.{name}"
            yield from mxfp4_leaves(module, row.spelling, mxfp4.quantize(values))
        return
    fused = len(written.projections) == 2
    dense = (torch.cat((gate, up), 1), down) if fused else (gate, up, down)
    for name, values in zip(written.projections, dense, strict=True):
        gated = fused and written.shares == "half" and name == written.projections[0]
        shared = None
        if written.shares == "layer":
            shared = (values.abs().amax() / (E2M1_MAX * E4M3_MAX)).expand(len(values))
        data, scale, global_scale = quantize(values, global_scale=shared, gated=gated)
        if shared is not None:
            global_scale = global_scale[0]
        scale_bytes = scale.view(torch.uint8)
        if row.kind == "rows":
            data, scale_bytes = data.flatten(0, 1), scale_bytes.flatten(0, 1)
        if written.swapped:
            data, scale_bytes = (part.transpose(1, 2).contiguous() for part in (data, scale_bytes))
        weight = NVFP4Weight(data, scale_bytes.view(torch.float8_e4m3fn), global_scale)
        yield from module_leaves(f"{written.experts.format(layer)}.{name}", row.spelling, weight)


def write_shards(path: Path, shards: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
    """Writes each shard before the next one is made, and the index."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for name, tensors in shards:
        save_file(tensors, path / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        tensors.clear()
    write_json(
        path / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    )


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
