"""Tiny checkpoints that transformers has a model class for, in each layout, and the same weights dequantized.

The dense copies are made tensor by tensor in fp64, without the package's reader and dequantizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.fp64_loop import dense, experts_of, raw_tensors
from torch_nvfp4.checkpoint import write_checkpoint
from torch_nvfp4.checkpoint.layouts import LAYOUTS
from torch_nvfp4.checkpoint.writer import write_shards

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 128, 64, 8, 2, 4
LIMIT = 0.6
QWEN_LAYOUTS = tuple(
    layout.name for layout in LAYOUTS if layout.name not in ("deepseek", "nemotron") and not layout.spelling.is_mxfp4
)
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K, "num_hidden_layers": LAYERS,
}  # fmt: skip


def write_model(path: Path, layout: str, **sizes: Any) -> Path:
    """``path/packed``, NVFP4 in a layout, and ``path/dense``, the same in fp32; DeepSeek-V4 (or MXFP4), Qwen3-MoE."""
    packed, written = path / "packed", path / "written"
    sizes = SIZES | sizes
    deepseek = layout.startswith("deepseek")
    limit = LIMIT if deepseek else None
    write_checkpoint(written, layout=layout, swiglu_limit=limit, **sizes)  # type: ignore[arg-type]
    tensors = raw_tensors(written)
    config = json.loads((written / "config.json").read_text())
    if deepseek:
        shutil.copytree(written, packed)
        write_dense(path / "dense", _dense_deepseek(tensors, layout, sizes), config)
        return path
    section = config["quantization_config"]
    config = config.get("text_config", config)
    config |= {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config |= {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    for key in ("swiglu_limits", "swiglu_limits_shared", "moe_num_experts", "moe_top_k", "num_local_experts"):
        config.pop(key, None)
    packed.mkdir()
    names = {name: _qwen_name(name) for name in tensors}
    parts = [{names[n]: t for i, (n, t) in enumerate(sorted(tensors.items())) if i % 2 == half} for half in range(2)]
    write_shards(packed, [(f"model-{i + 1:05}-of-00002.safetensors", part) for i, part in enumerate(parts)])
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    write_dense(path / "dense", _dense_qwen(tensors, layout, sizes), config)
    return path


def write_dense(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """One shard of fp32 tensors, and a config without a quantization."""
    path.mkdir(parents=True)
    save_file(
        {
            name: tensor.float().contiguous() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        },
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "expert_dtype")}
    (path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))


def _qwen_name(name: str) -> str:
    """The names that layouts of other models are written with, as Qwen3-MoE's."""
    name = name.replace("language_model.model.", "model.").replace("model.language_model.", "model.")
    return name.replace(".feed_forward.", ".mlp.").replace(".moe.", ".mlp.experts.")


def _dense_qwen(tensors: dict[str, Tensor], layout: str, sizes: dict[str, Any]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = _qwen_name(name)
        if ".experts." in new:
            continue
        module, leaf = name.rpartition(".")[::2]
        if leaf == "weight_packed":
            scale = 1.0 / tensors[f"{module}.weight_global_scale"].double()
            result[_qwen_name(module) + ".weight"] = dense(tensor, tensors[f"{module}.weight_scale"], float(scale))
        elif leaf == "weight" and tensor.dtype == torch.uint8:
            scale = tensors[f"{module}.weight_scale_2"].double()
            result[new] = dense(tensor, tensors[f"{module}.weight_scale"], float(scale))
        elif leaf in ("weight", "bias"):
            result[new] = tensor
    for layer in range(sizes["num_hidden_layers"]):
        experts = experts_of(tensors, layout, layer, sizes["n_routed_experts"], sizes["moe_intermediate_size"])
        for index, expert in enumerate(experts):
            for part, matrix in zip(("gate", "up", "down"), expert.weights, strict=True):
                result[f"model.layers.{layer}.mlp.experts.{index}.{part}_proj.weight"] = matrix
    return result


def _dense_deepseek(tensors: dict[str, Tensor], layout: str, sizes: dict[str, Any]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("mtp.") or ".ffn.experts." in name or name.endswith(".scale"):
            continue
        scale = tensors.get(name.removesuffix(".weight") + ".scale")
        result[name] = tensor
        if scale is not None:
            blocks = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
            result[name] = tensor.double() * blocks[: tensor.shape[0], : tensor.shape[1]]
    for layer in range(sizes["num_hidden_layers"]):
        experts = experts_of(tensors, layout, layer, sizes["n_routed_experts"], sizes["moe_intermediate_size"])
        for index, expert in enumerate(experts):
            for part, matrix in zip(("w1", "w3", "w2"), expert.weights, strict=True):
                result[f"layers.{layer}.ffn.experts.{index}.{part}.weight"] = matrix
    return result


def relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in the Frobenius norm."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def prompt(rows: int = 2, length: int = 24, vocabulary: int = 384) -> Tensor:
    """Token ids [rows, length], the same every time; none is special."""
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def greedy(model: Any, ids: Tensor, count: int = 12, **kwargs: Any) -> Tensor:
    """The ``count`` tokens that follow."""
    out = model.generate(
        ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=2, eos_token_id=None, **kwargs
    )
    result: Tensor = out[:, ids.shape[1] :]
    return result


WORDS = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(381))]


def write_tokenizer(path: Path, chat: bool = True) -> None:
    """One word per token, w0 to w380, and a chat template that puts [user] and [answer] around a turn."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"},
               "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "bos_token": "<s>",
                "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}  # fmt: skip
    if chat:
        turns = "{% for m in messages %}w7 {{ m['content'] }} {% endfor %}"
        settings["chat_template"] = turns + "{% if add_generation_prompt %}w8{% endif %}"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
