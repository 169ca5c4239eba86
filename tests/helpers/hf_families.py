"""Tiny checkpoints of models of transformers whose experts have no gate, biases or MXFP4, as they are published.

Each has the tensors of a random model of transformers' own class, in bf16, and experts that ``write_checkpoint`` wrote
in the model's layout. The dense copies hold the experts decoded value by value in fp64, without the package's reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from helpers.fp64_loop import Matrices, dense, experts_of, raw_tensors
from helpers.hf_models import write_dense, write_model
from torch_nvfp4.checkpoint import write_checkpoint
from torch_nvfp4.checkpoint.layouts import MODELOPT
from torch_nvfp4.checkpoint.writer import module_leaves, write_json, write_shards
from torch_nvfp4.format import quantize

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 64, 4, 2
VOCABULARY = 384


class Family(NamedTuple):
    """A model: the layout of its experts, the layers that have them, its config, and how its experts are fused."""

    layout: str
    layers: tuple[int, ...]
    config: dict[str, Any]
    fuse: Callable[[list[Matrices]], dict[str, Tensor]]
    limit: float | None = None
    published: tuple[str, str] = ("", "")  # what the name of a tensor begins with in the model, and in the checkpoint
    mix: Callable[[dict[str, Tensor], dict[str, Tensor]], None] | None = None  # changes (packed, dense) tensors


def _fused(experts: list[Matrices]) -> dict[str, Tensor]:
    """gate_up_proj [E, 2I, K], gate rows first, and down_proj [E, K, I]."""
    gate_up = [torch.cat(expert.weights[:2]) for expert in experts]
    return {"gate_up_proj": torch.stack(gate_up), "down_proj": torch.stack([expert.down for expert in experts])}


def _up_alone(experts: list[Matrices]) -> dict[str, Tensor]:
    """up_proj [E, I, K] and down_proj [E, K, I]."""
    return {name: torch.stack([getattr(e, name[:-5]) for e in experts]) for name in ("up_proj", "down_proj")}


def _gpt_oss(experts: list[Matrices]) -> dict[str, Tensor]:
    """gate_up_proj [E, K, 2I] (gate 0, up 0, gate 1, ...), down_proj [E, I, K], and biases."""

    def turns(gate: Any, up: Any) -> Tensor:
        return torch.stack([gate, up], 1).flatten(0, 1)

    return {
        "gate_up_proj": torch.stack([turns(*expert.weights[:2]).t() for expert in experts]),
        "gate_up_proj_bias": torch.stack([turns(expert.gate_bias, expert.up_bias) for expert in experts]),
        "down_proj": torch.stack([expert.down.t() for expert in experts]),
        "down_proj_bias": torch.stack([expert.down_bias for expert in experts if expert.down_bias is not None]),
    }


def _fp8_and_nvfp4_linears(packed: dict[str, Tensor], dense_copy: dict[str, Tensor]) -> None:
    """Nemotron-3 beside its experts: FP8 with one scale in Mamba's layers, an NVFP4 linear, an FP8 KV cache."""
    module, own = "backbone.layers.0.mixer.in_proj", "model.layers.0.mixer.in_proj.weight"
    weight, scale = packed[f"{module}.weight"].float(), torch.tensor(2.0**-8)
    packed[f"{module}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    packed |= {f"{module}.weight_scale": scale, f"{module}.input_scale": torch.tensor(0.01)}
    dense_copy[own] = packed[f"{module}.weight"].double() * scale
    module, own = "backbone.layers.1.mixer.shared_experts.up_proj", "model.layers.1.mixer.shared_experts.up_proj.weight"
    quantized = quantize(packed[f"{module}.weight"].float())
    packed |= dict(module_leaves(module, MODELOPT, quantized))
    dense_copy[own] = dense(*quantized)
    packed["backbone.layers.2.mixer.k_proj.k_scale"] = torch.tensor(0.01)
    packed["mtp.layers.0.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)


_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts_per_tok": TOP_K, "initializer_range": 0.1, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_GPT_OSS = _COMMON | {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 2, "swiglu_limit": 0.6,
    "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "sliding_window": 16,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}  # fmt: skip
_NEMOTRON = _COMMON | {
    "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "ME*E",
    "num_hidden_layers": 4, "n_routed_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE,
    "moe_shared_expert_intermediate_size": 32, "intermediate_size": 96, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8, "mlp_hidden_act": "relu2", "routed_scaling_factor": 2.5,
    "quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
        "backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"},
        "backbone.layers.1.mixer.experts": {"quant_algo": "NVFP4"},
    }},
}  # fmt: skip
_QWEN = _COMMON | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2, "hidden_act": "silu",
    "num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 96, "norm_topk_prob": True,
    "quantization_config": {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0"}},
    },
}  # fmt: skip
_MINIMAX = {
    "model_type": "minimax_m3_vl", "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "projector_hidden_size": 32, "image_token_index": 380, "video_token_index": 381, "tie_word_embeddings": False,
    "text_config": _COMMON | {
        "num_hidden_layers": 2, "num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE, "rotary_dim": 8,
        "dense_intermediate_size": 64, "shared_intermediate_size": 64, "index_n_heads": 2, "index_head_dim": 16,
        "swiglu_limit": 0.6, "mlp_layer_types": ["sparse", "sparse"],
    },
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "swiglu_limit": 10.0,  # as GLM-5.3-Flash's, whose experts it is not about
    },
    "quantization_config": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
}  # fmt: skip
FAMILIES = {
    "gpt-oss": Family("gpt-oss", (0, 1), _GPT_OSS, _gpt_oss, 0.6),
    "nemotron": Family(
        "nemotron", (1, 3), _NEMOTRON, _up_alone, published=("model.", "backbone."), mix=_fp8_and_nvfp4_linears
    ),
    "qwen3 in Quark's MXFP4": Family("quark-mxfp4", (0, 1), _QWEN, _fused),
    "minimax-m3 in compressed-tensors' MXFP4": Family("compressed-tensors-mxfp4", (0, 1), _MINIMAX, _fused, 0.6),
}
"""DeepSeek-V4 in MXFP4, as it was published first, is one of ``write_model``."""


def write_family(path: Path, name: str) -> Path:
    """``path/packed``, the checkpoint as published, and ``path/dense``, the same model in fp32."""
    if name == "deepseek-v4 in MXFP4":
        return write_model(path, "deepseek-mxfp4")
    family = FAMILIES[name]
    write_checkpoint(
        path / "written", layout=family.layout, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, num_hidden_layers=max(family.layers) + 1,
        swiglu_limit=family.limit,
    )  # type: ignore[arg-type]  # fmt: skip
    written = raw_tensors(path / "written")
    rest = _random_model(family)
    oracle = dict(rest)
    modules = {layer: _experts_module(rest, layer) for layer in family.layers}
    for layer, module in modules.items():
        experts = experts_of(written, family.layout, layer, EXPERTS, INTERMEDIATE)
        oracle |= {f"{module}.{leaf}": value for leaf, value in family.fuse(experts).items()}
    inside = tuple(f"{module}." for module in modules.values())
    tensors = {_renamed(key, family.published): rest[key] for key in rest if not key.startswith(inside)}
    for key, value in written.items():
        if ".experts." in key and any(f".layers.{layer}." in key for layer in family.layers):
            tensors[key] = value
    if family.mix is not None:
        family.mix(tensors, oracle)
    write_dense(path / "dense", oracle, family.config)
    (path / "packed").mkdir()
    write_shards(path / "packed", [("model-00001-of-00001.safetensors", tensors)])
    write_json(path / "packed" / "config.json", family.config | {"torch_dtype": "bfloat16"})
    return path


def auto_class(config: dict[str, Any]) -> Any:
    """The class of transformers that builds a model."""
    return transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM


def _random_model(family: Family) -> dict[str, Tensor]:
    config = {key: value for key, value in family.config.items() if key != "quantization_config"}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        built = auto_class(config).from_config(transformers.AutoConfig.for_model(config.pop("model_type"), **config))
    generator = torch.Generator().manual_seed(12)
    state: dict[str, Tensor] = {}
    for name, value in built.state_dict().items():
        if value.is_floating_point() and name.endswith("bias"):  # zeros at first, which hide a bias that is dropped
            value = torch.randn(value.shape, generator=generator) * 0.1
        state[name] = value.bfloat16().contiguous() if value.is_floating_point() else value
    return state


def _experts_module(state: dict[str, Tensor], layer: int) -> str:
    return next(
        key.rpartition(".")[0] for key in state if f"layers.{layer}." in key and key.endswith(".experts.down_proj")
    )


def _renamed(name: str, prefixes: tuple[str, str]) -> str:
    old, new = prefixes
    return new + name.removeprefix(old) if name.startswith(old) else name


def config_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content
