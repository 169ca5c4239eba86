"""Writes the model that is served: a Qwen3-MoE with random NVFP4 experts, as ModelOpt stores them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.checkpoint.writer import write_json, write_shards
from torch_nvfp4.format import GROUP_SIZE

__all__ = ["TINY", "Sizes", "config_of", "write_model"]

# Where block scales lie, and the root mean squares that follow for values of random codes and random scales.
_SCALES = (60.0, 260.0)
_CODE_RMS, _SCALE_RMS = 2.93, 170.0
_GAIN = 2.0  # by which the experts' matrices enlarge an input
# Standard deviations of logits: of the router, so that the last expert of a token weighs some percent and another in
# its place changes little; of the vocabulary, so that a token is neither certain nor as likely as all others.
_ROUTER_LOGITS, _LOGITS = 4.0, 2.2
# What attention and experts add to the residual stream, over the square root of the number of layers. With 24 layers
# that all add as much as they read, bf16 alone leaves nothing of the fp32 model's tokens (KL 1.1 for transformers in
# bf16 at 512 wide); with this, 0.04.
_BRANCH = 0.5


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
    tell = progress or (lambda _: None)
    complete = path / "complete.json"
    content = {**asdict(sizes), "seed": seed, "device": device.type, "branch": _BRANCH}
    if complete.is_file() and complete.read_text() == _as_written(content):
        return path
    path.mkdir(parents=True, exist_ok=True)
    complete.unlink(missing_ok=True)
    write_shards(path, _shards(sizes, torch.Generator(device).manual_seed(seed), tell))
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
    complete.write_text(_as_written(content))
    return path


def _as_written(content: dict[str, Any]) -> str:
    return repr(sorted(content.items()))


def _shards(
    sizes: Sizes, generator: torch.Generator, tell: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for layer in range(sizes.layers):
        tell(f"writing layer {layer + 1} of {sizes.layers}")
        yield f"layer-{layer:03}.safetensors", dict(_layer(sizes, layer, generator))
    yield (
        "outer.safetensors",
        {
            "model.embed_tokens.weight": _normal(generator, sizes.vocab, sizes.hidden, std=1.0),
            "lm_head.weight": _normal(generator, sizes.vocab, sizes.hidden, std=_LOGITS * sizes.hidden**-0.5),
            "model.norm.weight": _ones(sizes.hidden),
        },
    )


def _layer(sizes: Sizes, layer: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    prefix = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", _ones(sizes.hidden)
    for norm in ("q_norm", "k_norm"):
        yield f"{prefix}.self_attn.{norm}.weight", _ones(sizes.head_dim)
    attention = sizes.heads * sizes.head_dim
    key_value = sizes.kv_heads * sizes.head_dim
    shapes = {"q": (attention, sizes.hidden), "k": (key_value, sizes.hidden), "v": (key_value, sizes.hidden)}
    branch = _BRANCH * sizes.layers**-0.5
    for name, (rows, columns) in {**shapes, "o": (sizes.hidden, attention)}.items():
        gain = branch if name == "o" else 1.0
        yield f"{prefix}.self_attn.{name}_proj.weight", _normal(generator, rows, columns, std=gain * columns**-0.5)
    yield (
        f"{prefix}.mlp.gate.weight",
        _normal(generator, sizes.experts, sizes.hidden, std=_ROUTER_LOGITS * sizes.hidden**-0.5),
    )
    expert = {"gate_proj": (sizes.intermediate, sizes.hidden), "up_proj": (sizes.intermediate, sizes.hidden)}
    for name, (rows, columns) in {**expert, "down_proj": (sizes.hidden, sizes.intermediate)}.items():
        gain = _GAIN * (branch if name == "down_proj" else 1.0)
        yield from _projection(sizes.experts, rows, columns, f"{prefix}.mlp.experts.{{}}.{name}", generator, gain)


def _projection(
    experts: int, rows: int, columns: int, module: str, generator: torch.Generator, gain: float
) -> Iterator[tuple[str, Tensor]]:
    """One matrix [rows, columns] per expert, made at once: all codes, block scales in ``_SCALES``."""
    device = generator.device
    codes = torch.randint(
        0, 256, (experts, rows, columns // 2), dtype=torch.uint8, generator=generator, device=device
    ).cpu()
    low, high = _SCALES
    scales = torch.rand(experts, rows, columns // GROUP_SIZE, generator=generator, device=device)
    scales = scales.mul_(high - low).add_(low).to(torch.float8_e4m3fn).cpu()
    global_scale = torch.tensor(gain / (math.sqrt(columns) * _CODE_RMS * _SCALE_RMS))
    for expert in range(experts):
        name = module.format(expert)
        yield f"{name}.weight", codes[expert]
        yield f"{name}.weight_scale", scales[expert]
        yield f"{name}.weight_scale_2", global_scale.clone()
        yield f"{name}.input_scale", torch.ones(())


def _normal(generator: torch.Generator, *shape: int, std: float) -> Tensor:
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.mul_(std).to(torch.bfloat16).cpu()


def _ones(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bfloat16)
