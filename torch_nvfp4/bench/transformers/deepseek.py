"""Writes a DeepSeek-V4 with random weights in the layout of nvidia/DeepSeek-V4-Flash-NVFP4: NVFP4 experts, FP8 rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.bench.random_model import (
    BRANCH,
    LOGITS,
    ROUTER_LOGITS,
    fp8,
    normal,
    ones,
    projections,
    write_once,
)
from torch_nvfp4.checkpoint.synthetic_config import deepseek_quantization
from torch_nvfp4.checkpoint.writer import write_json, write_shards

__all__ = ["TINY", "Sizes", "config_of", "write_model"]

# Gate and up have a standard deviation of half the limit: one value in 22 is clamped. What silu(gate) * up then
# measures, which the down projection takes back.
_CLAMPED, _ACTIVATION_RMS = 0.5, 17.0


@dataclass(frozen=True)
class Sizes:
    """The sizes of a DeepSeek-V4; the defaults have the widths of DeepSeek-V4-Flash and 3 of its 43 layers.

    ``ratios`` are of the layers' compressors, taken in turns: 0 has none, 4 has an indexer too. The first layer takes
    its experts from a table of the tokens, as the published model's first three do.
    """

    layers: int = 3
    hidden: int = 4096
    intermediate: int = 2048
    experts: int = 256
    top_k: int = 6
    limit: float = 10.0
    heads: int = 64
    head_dim: int = 512
    rope_dim: int = 64
    lora: int = 1024
    groups: int = 8
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 512
    window: int = 128
    streams: int = 4
    ratios: tuple[int, ...] = (0, 4, 128)
    hash_layers: int = 1
    vocab: int = 129280
    positions: int = 65536

    def ratio(self, layer: int) -> int:
        return self.ratios[layer % len(self.ratios)]


TINY = Sizes(
    hidden=512, intermediate=256, experts=8, top_k=2, heads=4, head_dim=64, rope_dim=16, lora=128, groups=2,
    index_heads=4, index_dim=64, index_topk=4, window=16, streams=2, vocab=512, positions=4096,
)  # fmt: skip


def config_of(sizes: Sizes) -> dict[str, Any]:
    """config.json, with the keys of the published one."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "compress_ratios": [sizes.ratio(layer) for layer in range(sizes.layers)],
        "expert_dtype": "fp4",
        "head_dim": sizes.head_dim,
        "hc_eps": 1e-6,
        "hc_mult": sizes.streams,
        "hc_sinkhorn_iters": 20,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "index_head_dim": sizes.index_dim,
        "index_n_heads": sizes.index_heads,
        "index_topk": sizes.index_topk,
        "max_position_embeddings": sizes.positions,
        "moe_intermediate_size": sizes.intermediate,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.heads,
        "num_experts_per_tok": sizes.top_k,
        "num_hash_layers": sizes.hash_layers,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 0,
        "o_groups": sizes.groups,
        "o_lora_rank": sizes.lora,
        "q_lora_rank": sizes.lora,
        "qk_rope_head_dim": sizes.rope_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": sizes.window,
        "swiglu_limit": sizes.limit,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.vocab,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "quantization_config": deepseek_quantization(sizes.layers),
    }


def write_model(
    path: Path, sizes: Sizes, *, device: torch.device, seed: int = 0, progress: Callable[[str], None] | None = None
) -> Path:
    """Writes one shard per layer and one for the rest. Random numbers are made on ``device``.

    A directory that already holds a model of these sizes and this seed is left as it is.
    """
    tell = progress or (lambda _: None)
    generator = torch.Generator(device).manual_seed(seed)

    def write() -> None:
        write_shards(path, _shards(sizes, generator, tell))
        write_json(path / "config.json", config_of(sizes))

    return write_once(path, {**asdict(sizes), "seed": seed, "device": device.type, "branch": BRANCH}, write)


def _shards(
    sizes: Sizes, generator: torch.Generator, tell: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for layer in range(sizes.layers):
        tell(f"writing layer {layer + 1} of {sizes.layers}")
        tensors = dict(_attention(sizes, layer, generator))
        tensors.update(_rest_of_layer(sizes, layer, generator))
        tensors.update(_experts(sizes, layer, generator))
        yield f"layer-{layer:03}.safetensors", tensors
    yield (
        "outer.safetensors",
        {
            "embed.weight": normal(generator, sizes.vocab, sizes.hidden, std=1.0),
            "head.weight": normal(generator, sizes.vocab, sizes.hidden, std=LOGITS * sizes.hidden**-0.5),
            "norm.weight": ones(sizes.hidden),
            "hc_head_fn": _small(generator, sizes.streams, sizes.streams * sizes.hidden),
            "hc_head_base": torch.zeros(sizes.streams),
            "hc_head_scale": torch.ones(1),
        },
    )


def _small(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).mul_(0.02).cpu()


def _branch(sizes: Sizes) -> float:
    return float(BRANCH * sizes.layers**-0.5)


def _attention(sizes: Sizes, layer: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    module = f"layers.{layer}.attn"
    width = sizes.heads * sizes.head_dim
    yield f"{module}.attn_sink", torch.zeros(sizes.heads)
    yield f"{module}.q_norm.weight", ones(sizes.lora)
    yield f"{module}.kv_norm.weight", ones(sizes.head_dim)
    yield from fp8(f"{module}.wq_a", sizes.lora, sizes.hidden, generator)
    yield from fp8(f"{module}.wq_b", width, sizes.lora, generator)
    yield from fp8(f"{module}.wkv", sizes.head_dim, sizes.hidden, generator)
    yield from fp8(f"{module}.wo_a", sizes.groups * sizes.lora, width // sizes.groups, generator)
    yield from fp8(f"{module}.wo_b", sizes.hidden, sizes.groups * sizes.lora, generator, _branch(sizes))
    ratio = sizes.ratio(layer)
    if ratio:
        yield from _compressor(f"{module}.compressor", sizes, ratio, sizes.head_dim, generator)
    if ratio == 4:
        yield from fp8(f"{module}.indexer.wq_b", sizes.index_heads * sizes.index_dim, sizes.lora, generator)
        weights = normal(generator, sizes.index_heads, sizes.hidden, std=sizes.hidden**-0.5)
        yield f"{module}.indexer.weights_proj.weight", weights
        yield from _compressor(f"{module}.indexer.compressor", sizes, ratio, sizes.index_dim, generator)


def _compressor(
    module: str, sizes: Sizes, ratio: int, head_dim: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    width = head_dim * (2 if ratio == 4 else 1)  # ratio 4 compresses overlapping windows
    for name in ("wkv", "wgate"):
        yield f"{module}.{name}.weight", normal(generator, width, sizes.hidden, std=sizes.hidden**-0.5)
    yield f"{module}.ape", _small(generator, ratio, width)
    yield f"{module}.norm.weight", ones(head_dim)


def _rest_of_layer(sizes: Sizes, layer: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Norms, hyper-connections, the router and the shared expert."""
    block = f"layers.{layer}"
    mixes = (2 + sizes.streams) * sizes.streams
    for part in ("attn", "ffn"):
        yield f"{block}.{part}_norm.weight", ones(sizes.hidden)
        yield f"{block}.hc_{part}_fn", _small(generator, mixes, sizes.streams * sizes.hidden)
        yield f"{block}.hc_{part}_base", torch.zeros(mixes)
        yield f"{block}.hc_{part}_scale", torch.ones(3)
    router = normal(generator, sizes.experts, sizes.hidden, std=ROUTER_LOGITS * sizes.hidden**-0.5)
    yield f"{block}.ffn.gate.weight", router
    if layer < sizes.hash_layers:
        scores = torch.rand(sizes.vocab, sizes.experts, generator=generator, device=generator.device)
        yield f"{block}.ffn.gate.tid2eid", scores.topk(sizes.top_k).indices.cpu()
    else:
        yield f"{block}.ffn.gate.bias", torch.zeros(sizes.experts)
    for name, rows, columns, gain in _matrices(sizes):
        yield from fp8(f"{block}.ffn.shared_experts.{name}", rows, columns, generator, gain)


def _experts(sizes: Sizes, layer: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, rows, columns, gain in _matrices(sizes):
        module = f"layers.{layer}.ffn.experts.{{}}.{name}"
        yield from projections(sizes.experts, rows, columns, module, generator, gain)


def _matrices(sizes: Sizes) -> tuple[tuple[str, int, int, float], ...]:
    """(name, rows, columns, gain) of gate, up and down."""
    up = _CLAMPED * sizes.limit
    down = _branch(sizes) / _ACTIVATION_RMS
    return (
        ("w1", sizes.intermediate, sizes.hidden, up),
        ("w3", sizes.intermediate, sizes.hidden, up),
        ("w2", sizes.hidden, sizes.intermediate, down),
    )
