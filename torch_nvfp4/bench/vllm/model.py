"""Writes the model that is served: a Qwen3-MoE with random NVFP4 experts, as ModelOpt stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.bench.random_model import BRANCH, LOGITS, ROUTER_LOGITS, normal, ones, projections, write_once
from torch_nvfp4.checkpoint.writer import write_json, write_shards
from torch_nvfp4.format import GROUP_SIZE

__all__ = ["TINY", "WIDE", "Sizes", "config_of", "write_model"]

_GAIN = 2.0  # by which the experts' matrices enlarge an input


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Qwen3-MoE; the defaults have the width of Qwen3-30B-A3B and half of its layers."""

    layers: int = 24
    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 32000
    positions: int = 4096

    @property
    def gigabytes(self) -> float:
        """About what the checkpoint takes: experts in NVFP4, the rest in bf16."""
        experts = 3 * self.experts * self.hidden * self.intermediate
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return (self.layers * (0.5625 * experts + 2 * attention) + 4 * self.vocab * self.hidden) * 1e-9


WIDE = Sizes(layers=12, hidden=4096, intermediate=1536, heads=64)
"""The width of Qwen3-235B-A22B, with 12 of its 94 layers: a rank of 8 has 192 columns of an expert, not 96."""

TINY = Sizes(
    layers=2, hidden=128, intermediate=64, experts=8, top_k=2, heads=4, kv_heads=2, head_dim=32, vocab=512,
    positions=1024,
)  # fmt: skip


def config_of(sizes: Sizes) -> dict[str, Any]:
    """config.json: what vLLM and transformers read."""
    ignored = ["lm_head", *(f"model.layers.{layer}.self_attn*" for layer in range(sizes.layers))]
    ignored += [f"model.layers.{layer}.mlp.gate" for layer in range(sizes.layers)]
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": sizes.hidden,
        "intermediate_size": 4 * sizes.intermediate,
        "moe_intermediate_size": sizes.intermediate,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": sizes.positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "kv_cache_scheme": None,
            "group_size": GROUP_SIZE,
            "ignore": ignored,
            "producer": {"name": "modelopt", "version": "0.40"},
        },
    }


def write_model(
    path: Path, sizes: Sizes, *, device: torch.device, seed: int = 0, progress: Callable[[str], None] | None = None
) -> Path:
    """Writes one shard per layer and one for the rest. Random numbers are made on ``device``.

    A directory that already holds a model of these sizes and this seed is left as it is.
    """
    content = {**asdict(sizes), "seed": seed, "device": device.type, "branch": BRANCH}
    generator = torch.Generator(device).manual_seed(seed)
    return write_once(path, content, lambda: _write(path, sizes, generator, progress or (lambda _: None)))


def _write(path: Path, sizes: Sizes, generator: torch.Generator, tell: Callable[[str], None]) -> None:
    write_shards(path, _shards(sizes, generator, tell))
    config = config_of(sizes)
    write_json(path / "config.json", config)
    quantization = config["quantization_config"]
    write_json(
        path / "hf_quant_config.json",
        {
            "producer": quantization["producer"],
            "quantization": {
                "quant_algo": quantization["quant_algo"],
                "kv_cache_quant_algo": None,
                "group_size": GROUP_SIZE,
                "exclude_modules": quantization["ignore"],
            },
        },
    )


def _shards(
    sizes: Sizes, generator: torch.Generator, tell: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for layer in range(sizes.layers):
        tell(f"writing layer {layer + 1} of {sizes.layers}")
        yield f"layer-{layer:03}.safetensors", dict(_layer(sizes, layer, generator))
    yield (
        "outer.safetensors",
        {
            "model.embed_tokens.weight": normal(generator, sizes.vocab, sizes.hidden, std=1.0),
            "lm_head.weight": normal(generator, sizes.vocab, sizes.hidden, std=LOGITS * sizes.hidden**-0.5),
            "model.norm.weight": ones(sizes.hidden),
        },
    )


def _layer(sizes: Sizes, layer: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    prefix = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", ones(sizes.hidden)
    for norm in ("q_norm", "k_norm"):
        yield f"{prefix}.self_attn.{norm}.weight", ones(sizes.head_dim)
    attention = sizes.heads * sizes.head_dim
    key_value = sizes.kv_heads * sizes.head_dim
    shapes = {"q": (attention, sizes.hidden), "k": (key_value, sizes.hidden), "v": (key_value, sizes.hidden)}
    branch = BRANCH * sizes.layers**-0.5
    for name, (rows, columns) in {**shapes, "o": (sizes.hidden, attention)}.items():
        gain = branch if name == "o" else 1.0
        yield f"{prefix}.self_attn.{name}_proj.weight", normal(generator, rows, columns, std=gain * columns**-0.5)
    yield (
        f"{prefix}.mlp.gate.weight",
        normal(generator, sizes.experts, sizes.hidden, std=ROUTER_LOGITS * sizes.hidden**-0.5),
    )
    expert = {"gate_proj": (sizes.intermediate, sizes.hidden), "up_proj": (sizes.intermediate, sizes.hidden)}
    for name, (rows, columns) in {**expert, "down_proj": (sizes.hidden, sizes.intermediate)}.items():
        gain = _GAIN * (branch if name == "down_proj" else 1.0)
        yield from projections(sizes.experts, rows, columns, f"{prefix}.mlp.experts.{{}}.{name}", generator, gain)
