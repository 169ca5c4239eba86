"""A MoE layer from the raw tensors of a written checkpoint, in fp64, one token and one expert at a time.

Independent of the reader: it is told where each expert's matrices stand and decodes them value by value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


class Matrices(NamedTuple):
    """Dense fp64 gate [I, K] (None: no gate), up [I, K] and down [K, I] of one expert, and its biases."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down of an expert that has a gate."""
        assert self.gate is not None
        return self.gate, self.up, self.down


def raw_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor that the index names, from the shard that it names."""
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {shard: load_file(path / shard) for shard in set(weight_map.values())}
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def dense(codes: Tensor, scale: Tensor, global_scale: Tensor | float) -> Tensor:
    """[rows, cols / 2] bytes, low nibble = even column, and [rows, cols / 16] scales -> fp64 [rows, cols]."""
    values = torch.stack((E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]), -1).flatten(-2)
    return values * scale.double().repeat_interleave(16, 1) * float(global_scale)


def dense_mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """[rows, cols / 2] bytes, low nibble = even column, and [rows, cols / 32] E8M0 bytes -> fp64 [rows, cols]."""
    codes, scale = codes.view(torch.uint8), scale.view(torch.uint8)
    values = torch.stack((E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]), -1).flatten(-2)
    return values * torch.exp2(scale.double() - 127).repeat_interleave(32, 1)


def mxfp4_experts_of(t: dict[str, Tensor], layout: str, layer: int, num: int) -> list[Matrices]:
    """Those of the layouts of MXFP4."""
    if layout == "gpt-oss":
        root = f"model.layers.{layer}.mlp.experts."
        gate_up, gate_up_scale, bias = (t[f"{root}gate_up_proj_{leaf}"] for leaf in ("blocks", "scales", "bias"))
        down, down_scale, down_bias = (t[f"{root}down_proj_{leaf}"] for leaf in ("blocks", "scales", "bias"))
        result = []
        for e in range(num):
            both = dense_mxfp4(gate_up[e].flatten(1), gate_up_scale[e])
            last = dense_mxfp4(down[e].flatten(1), down_scale[e])
            b = bias[e].double()
            result.append(Matrices(both[0::2], both[1::2], last, b[0::2], b[1::2], down_bias[e].double()))
        return result
    root, names, (data, scale) = {
        "deepseek-mxfp4": (f"layers.{layer}.ffn.experts.", ("w1", "w3", "w2"), ("weight", "scale")),
        "quark-mxfp4": (
            f"model.layers.{layer}.mlp.experts.", ("gate_proj", "up_proj", "down_proj"), ("weight", "weight_scale")
        ),
        "compressed-tensors-mxfp4": (
            f"language_model.model.layers.{layer}.block_sparse_moe.experts.", ("w1", "w3", "w2"),
            ("weight_packed", "weight_scale"),
        ),
    }[layout]  # fmt: skip
    return [
        Matrices(*(dense_mxfp4(t[f"{root}{e}.{name}.{data}"], t[f"{root}{e}.{name}.{scale}"]) for name in names))
        for e in range(num)
    ]


def experts_of(
    source: Path | dict[str, Tensor], layout: str, layer: int, num: int, intermediate: int
) -> list[Matrices]:
    """The experts of a layer that `write_checkpoint` wrote in a layout, from its directory or its tensors."""
    t = raw_tensors(source) if isinstance(source, Path) else source

    if layout == "gpt-oss" or layout.endswith("-mxfp4"):
        return mxfp4_experts_of(t, layout, layer, num)

    def module(name: str, style: str, pick: Callable[[Tensor], Tensor] = lambda x: x, one: int | None = None) -> Tensor:
        data, scale, last, inverse = {
            "modelopt": (".weight", ".weight_scale", ".weight_scale_2", False),
            "ct": (".weight_packed", ".weight_scale", ".weight_global_scale", True),
            "modelopt-p": ("", "_weight_scale", "_weight_scale_2", False),
            "ct-p": ("_packed", "_scale", "_global_scale", True),
        }[style]
        g = t[name + last].reshape(-1)
        g = g[0] if one is None else g[one]
        return dense(pick(t[name + data]), pick(t[name + scale]), (1 / g) if inverse else g)

    def expert(e: int) -> Matrices:
        i = intermediate
        gate_rows, up_rows = slice(0, i), slice(i, 2 * i)
        if layout == "nemotron":
            root = f"backbone.layers.{layer}.mixer.experts.{e}."
            return Matrices(None, *(module(root + name, "modelopt") for name in ("up_proj", "down_proj")))
        if layout in ("deepseek", "modelopt", "compressed-tensors"):
            root = (
                f"layers.{layer}.ffn.experts.{e}." if layout == "deepseek" else f"model.layers.{layer}.mlp.experts.{e}."
            )
            names = ("w1", "w3", "w2") if layout == "deepseek" else ("gate_proj", "up_proj", "down_proj")
            style = "ct" if layout == "compressed-tensors" else "modelopt"
            return Matrices(*(module(root + name, style) for name in names))
        if layout == "modelopt-stack":
            root = f"model.language_model.layers.{layer}.moe."
            names = ("gate_proj", "up_proj", "down_proj")
            return Matrices(*(module(root + name, "modelopt", lambda x: x[e], e) for name in names))
        if layout == "compressed-tensors-stack":
            root = f"model.layers.{layer}.mlp.experts."
            both = module(root + "gate_up_proj", "ct", lambda x: x[e], e)
            return Matrices(both[gate_rows], both[up_rows], module(root + "down_proj", "ct", lambda x: x[e], e))
        if layout == "modelopt-parameters":
            root = f"language_model.model.layers.{layer}.feed_forward.experts."
            both = module(root + "gate_up_proj", "modelopt-p", lambda x: x[e].t())
            return Matrices(
                both[gate_rows], both[up_rows], module(root + "down_proj", "modelopt-p", lambda x: x[e].t())
            )
        root = f"model.language_model.layers.{layer}.mlp.experts."
        if layout == "compressed-tensors-parameters":
            gate = module(root + "gate_up_proj", "ct-p", lambda x: x[e, gate_rows], 2 * e)
            up = module(root + "gate_up_proj", "ct-p", lambda x: x[e, up_rows], 2 * e + 1)
            return Matrices(gate, up, module(root + "down_proj", "ct-p", lambda x: x[e], e))
        style = "ct" if layout == "compressed-tensors-rows" else "modelopt"
        first = 2 * i * e
        k = t[root + "down_proj" + (".weight_packed" if style == "ct" else ".weight")].shape[0] // num
        return Matrices(
            module(root + "gate_up_proj", style, lambda x: x[first : first + i]),
            module(root + "gate_up_proj", style, lambda x: x[first + i : first + 2 * i]),
            module(root + "down_proj", style, lambda x: x[k * e : k * (e + 1)]),
        )

    return [expert(e) for e in range(num)]


def activation(gate: Tensor | None, up: Tensor, kind: str, limit: float | None) -> Tensor:
    if gate is None:
        assert kind == "relu2"
        return up.clamp(min=0) ** 2
    if kind == "situ":  # Kimi-K3's constants
        return 4.0 * torch.tanh(gate / 4.0) * torch.sigmoid(gate) * 25.0 * torch.tanh(up / 25.0)
    if kind == "gpt-oss":
        assert limit is not None
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if kind == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    if kind == "swiglustep":
        h = gate * torch.sigmoid(gate)
        return h * up if limit is None else h.clamp(max=limit) * up.clamp(-limit, limit)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up


def moe(
    x: Tensor,
    experts: list[Matrices],
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    kind: str = "silu",
    limit: float | None = None,
    on_input: bool = False,
) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64)
    for m, token in enumerate(x.double()):
        for j, e in enumerate(topk_ids[m].tolist()):
            weight = float(topk_weights[m, j])
            v = token * weight if on_input else token
            expert = experts[e]
            gate = None if expert.gate is None else expert.gate @ v
            up, zero = expert.up @ v, torch.zeros(())
            if gate is not None:
                gate = gate + (zero if expert.gate_bias is None else expert.gate_bias)
            h = activation(gate, up + (zero if expert.up_bias is None else expert.up_bias), kind, limit)
            out = expert.down @ h + (zero if expert.down_bias is None else expert.down_bias)
            y[m] += (1.0 if on_input else weight) * out
    return y
