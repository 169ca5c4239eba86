"""Small checkpoints before quantization, and a quantizer that shares nothing with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, BLOCK = 48, 32, 4, 2, 32
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": LAYERS,
}  # fmt: skip
ROOT = "model.layers.{}.mlp.experts."
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

Dense = dict[tuple[int, int, str], Tensor]


def e4m3_values() -> NDArray[np.float64]:
    """The values of bytes 0..0x7E, from the bits: 4 of exponent with bias 7, 3 of mantissa."""
    code = np.arange(0x7F)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


def nearest(values: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Index of the nearest entry of an ascending table, an even one where two are equally near; saturating."""
    distance = np.abs(values[..., None] - table)
    candidates = distance == distance.min(-1, keepdims=True)
    odd = np.arange(len(table)) % 2
    return np.argmin(np.where(candidates, odd, 2), -1).astype(np.uint8)


def oracle(
    matrices: list[Tensor],
) -> tuple[np.float32, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]]:
    """Global scale of all, and per matrix codes [rows, cols / 2] (low nibble = even column), scale bytes."""
    dense = [matrix.float().numpy() for matrix in matrices]
    amax = max(np.abs(matrix).max() for matrix in dense)
    global_scale = np.float32(amax) / np.float32(6 * 448) if amax else np.float32(1)
    result = []
    for matrix in dense:
        blocks = matrix.reshape(len(matrix), -1, 16)
        largest = np.abs(blocks).max(-1)
        wanted = largest / (np.float32(6) * global_scale)  # in fp32, as the published formula has it
        wanted = np.clip(np.where(wanted == 0, 1.0, wanted).astype(np.float64), 2.0**-9, 448.0)
        scale = nearest(wanted, e4m3_values())
        step = e4m3_values()[scale].astype(np.float32) * global_scale
        codes = nearest(np.abs(blocks / step[..., None]).astype(np.float64), E2M1)
        codes |= (blocks < 0).astype(np.uint8) << 3
        codes = codes.reshape(len(matrix), -1)
        result.append((codes[:, 0::2] | codes[:, 1::2] << 4, scale))
    return global_scale, result


def experts(dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS) -> Dense:
    """(layer, expert, gate/up/down) -> matrix; gate and up differ in size, and a few blocks are special."""
    generator = torch.Generator().manual_seed(5)
    dense: Dense = {}
    for layer in range(layers):
        for expert in range(EXPERTS):
            for role, factor in (("gate", 0.02), ("up", 0.3), ("down", 0.05)):
                shape = (HIDDEN, INTERMEDIATE) if role == "down" else (INTERMEDIATE, HIDDEN)
                dense[layer, expert, role] = (torch.randn(shape, generator=generator) * factor).to(dtype)
    dense[0, 0, "gate"][0, :16] = 0
    dense[0, 1, "up"][3, 5] = -9.0
    dense[0, 1, "down"][2, :16] *= 1e-6
    dense[layers - 1, 2, "down"][:] = 0
    return dense


def others(layers: int = LAYERS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(10, HIDDEN), "lm_head.weight": normal(10, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}mlp.gate.weight"] = normal(EXPERTS, HIDDEN)
        tensors[f"{prefix}input_layernorm.weight"] = normal(HIDDEN)
        tensors[f"{prefix}self_attn.rotary.ids"] = torch.arange(3)
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = normal(HIDDEN, HIDDEN)
    return tensors


def per_expert(dense: Dense, names: dict[str, str] = NAMES, root: str = ROOT) -> dict[str, Tensor]:
    return {f"{root.format(layer)}{e}.{names[role]}.weight": matrix for (layer, e, role), matrix in dense.items()}


def stacks(dense: Dense, *, swapped: bool = False, fused: bool = True) -> dict[str, Tensor]:
    """experts.gate_up_proj [E, 2I, K] (or gate_proj, up_proj) and down_proj [E, K, I]; swapped: the last two."""
    tensors = {}
    for layer in sorted({layer for layer, _, _ in dense}):
        stack = {role: torch.stack([dense[layer, e, role] for e in range(EXPERTS)]) for role in NAMES}
        named = {NAMES[role]: values for role, values in stack.items()}
        if fused:
            named = {"gate_up_proj": torch.cat((stack["gate"], stack["up"]), 1), "down_proj": stack["down"]}
        for name, values in named.items():
            tensors[ROOT.format(layer) + name] = values.transpose(1, 2).contiguous() if swapped else values
    return tensors


def to_fp8(tensors: dict[str, Tensor], match: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors with E4M3 values and a scale per block where a name contains `match`, and what these mean in fp32."""
    stored, meant = {}, {}
    for name, values in tensors.items():
        if match not in name:
            stored[name] = values
            continue
        rows, cols = values.shape[-2:]
        padded = torch.zeros(*values.shape[:-2], -(-rows // BLOCK) * BLOCK, -(-cols // BLOCK) * BLOCK)
        padded[..., :rows, :cols] = values.float()
        blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        scale = blocks.abs().amax((-3, -1)).clamp(min=1e-4) / 448
        spread = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :cols]
        codes = (values.float() / spread).to(torch.float8_e4m3fn)
        stored[name] = codes
        stored[f"{name}_scale_inv"] = scale
        meant[name] = codes.float() * spread
    return stored, meant


def write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """Two shards over which gate and up of an expert are spread, an index, the config and other files."""
    path.mkdir()
    names = sorted(tensors)
    parts = [names[0::2], names[1::2]]
    for shard, part in zip(SHARDS, parts, strict=True):
        save_file({name: tensors[name].contiguous() for name in part}, path / shard)
    weight_map = {name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "assets").mkdir()
    (path / "assets" / "chat.jinja").write_text("{{ messages }}")
    (path / "pytorch_model.bin").write_bytes(b"weights of another format")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
