"""The sizes of a synthetic checkpoint, and the configs of the models whose layouts it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch_nvfp4.checkpoint.writer import ROWS, WRITTEN
from torch_nvfp4.format import GROUP_SIZE

__all__ = ["Sizes", "config_of", "deepseek_quantization", "has_hf_quant_config", "hf_quant_config", "is_plain"]

VOCAB_SIZE = 384
HEADS = 4
HEAD_DIM = 64
LORA_RANK = 128
HYPER_CONNECTIONS = 2
FP8_BLOCK = 128  # side of an FP8 block
# DeepSeek-V4 alternates them; 0 has no compressor, 4 has an indexer too.
COMPRESS_RATIOS = (0, 4, 128, 4)


class Sizes(NamedTuple):
    """The sizes of a synthetic checkpoint; intermediate and num_experts have one entry per layer."""

    hidden: int
    intermediate: tuple[int, ...]
    num_experts: tuple[int, ...]
    top_k: int
    num_layers: int
    limit: float | None


def is_plain(layout: str) -> bool:
    """Whether the tensors beside the experts are bf16, under names that are like the model's and not the model's."""
    written = WRITTEN[layout]
    return written.model in ("nemotron", "kimi", "gpt-oss") or (
        ROWS[layout].spelling.is_mxfp4 and written.model == "qwen"
    )


def has_hf_quant_config(layout: str) -> bool:
    """Whether there is ModelOpt's own file beside config.json."""
    spelling = ROWS[layout].spelling
    return not spelling.reciprocal and not spelling.is_mxfp4


def config_of(sizes: Sizes, layout: str) -> dict[str, Any]:
    """config.json of the model that a layout is written as."""
    model = WRITTEN[layout].model
    if model == "deepseek":
        config = _deepseek_config(sizes)
        if ROWS[layout].spelling.is_mxfp4:
            kept = ("quant_method", "activation_scheme", "fmt", "scale_fmt", "weight_block_size")
            config["quantization_config"] = {key: config["quantization_config"][key] for key in kept}
        return config
    if model in _OTHERS:
        return _OTHERS[model](sizes)
    config = _qwen_config(sizes, layout)
    quantization = config.pop("quantization_config")
    if model == "step":
        # Step-3.7: other names, and one limit per layer, which acts after the silu.
        config = _renamed(config, num_experts="moe_num_experts", num_experts_per_tok="moe_top_k")
        config.pop("swiglu_limit", None)
        limits = [sizes.limit or 0.0] * sizes.num_layers
        config |= {"model_type": "step3p5", "swiglu_limits": limits, "swiglu_limits_shared": [0.0] * sizes.num_layers}
        config = {"model_type": "step3p7", "text_config": config}
    elif model == "llama4":
        config = _renamed(config, num_experts="num_local_experts")
        config = {"model_type": "llama4", "text_config": config | {"model_type": "llama4_text"}}
    elif ".language_model." in WRITTEN[layout].experts:
        config = {"model_type": "qwen3_5_moe", "text_config": config | {"model_type": "qwen3_5_moe_text"}}
    return config | {"quantization_config": quantization}


def _renamed(config: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in config.items()}


def _one_or_list(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _deepseek_config(sizes: Sizes) -> dict[str, Any]:
    ratios = [COMPRESS_RATIOS[layer % len(COMPRESS_RATIOS)] for layer in range(sizes.num_layers)]
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "compress_ratios": ratios,
        "expert_dtype": "fp4",
        "head_dim": HEAD_DIM,
        "hc_eps": 1e-6,
        "hc_mult": HYPER_CONNECTIONS,
        "hc_sinkhorn_iters": 20,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "index_head_dim": HEAD_DIM,
        "index_n_heads": HEADS,
        "index_topk": 4,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": _one_or_list(sizes.intermediate),
        "n_routed_experts": _one_or_list(sizes.num_experts),
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_experts_per_tok": sizes.top_k,
        "num_hash_layers": 1,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 2,
        "o_lora_rank": LORA_RANK,
        "q_lora_rank": LORA_RANK,
        "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 16,
        "swiglu_limit": sizes.limit,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "quantization_config": deepseek_quantization(sizes.num_layers, ignore=["mtp.*"]),
    }


def deepseek_quantization(layers: int, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The section of config.json of the published DeepSeek-V4-Flash-NVFP4, for a number of MoE layers.

    ``ignore``: patterns of further modules without NVFP4.
    """
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "expert_dtype": "fp4",
        "group_size": GROUP_SIZE,
        "kv_cache_quant_algo": None,
        "config_groups": _config_groups(),
        "quantized_layers": {
            f"layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", "group_size": GROUP_SIZE} for layer in range(layers)
        },
        "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", *ignore],
        "producer": {"name": "modelopt"},
    }


def _qwen_config(sizes: Sizes, layout: str) -> dict[str, Any]:
    quantization: dict[str, Any] = {
        "config_groups": _config_groups(),
        "ignore": ["lm_head", "model.layers.*.mlp.gate"],
    }
    if ROWS[layout].spelling.is_mxfp4:
        weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
        quantization = {"quant_method": "quark", "global_quant_config": {"weight": weight}}
    elif not ROWS[layout].spelling.reciprocal:
        quantization |= {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8}}
    else:
        quantization |= {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": 3 * sizes.hidden,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": _one_or_list(sizes.intermediate),
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_experts": _one_or_list(sizes.num_experts),
        "num_experts_per_tok": sizes.top_k,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "quantization_config": quantization,
    } | ({} if sizes.limit is None else {"swiglu_limit": sizes.limit})


def _nemotron_config(sizes: Sizes) -> dict[str, Any]:
    """Nemotron-3's experts have no gate: relu2 of up."""
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hidden_size": sizes.hidden,
        "mamba_hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "moe_intermediate_size": _one_or_list(sizes.intermediate),
        "moe_latent_size": None,
        "n_routed_experts": _one_or_list(sizes.num_experts),
        "num_experts_per_tok": sizes.top_k,
        "num_hidden_layers": sizes.num_layers,
        "vocab_size": VOCAB_SIZE,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "config_groups": _config_groups(),
            "ignore": ["lm_head"],
        },
    }


def _kimi_config(sizes: Sizes) -> dict[str, Any]:
    """Kimi-K3's experts work in a space of half the model's width, with the activation situ."""
    text = {
        "model_type": "kimi_linear",
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "hidden_act": "situ",
        "hidden_size": 2 * sizes.hidden,
        "moe_intermediate_size": _one_or_list(sizes.intermediate),
        "num_experts": _one_or_list(sizes.num_experts),
        "num_experts_per_token": sizes.top_k,
        "num_hidden_layers": sizes.num_layers,
        "routed_expert_hidden_size": sizes.hidden,
        "vocab_size": VOCAB_SIZE,
    }
    weights = {"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    return {
        "architectures": ["KimiK3ForConditionalGeneration"],
        "model_type": "kimi_k3",
        "text_config": text | {"quantization_config": quantization},
    }


def _gpt_oss_config(sizes: Sizes) -> dict[str, Any]:
    """gpt-oss does not declare alpha and beta, and its intermediate_size is that of the experts."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "experts_per_token": sizes.top_k,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate[0],
        "num_experts_per_tok": sizes.top_k,
        "num_hidden_layers": sizes.num_layers,
        "num_local_experts": _one_or_list(sizes.num_experts),
        "swiglu_limit": sizes.limit or 0.0,
        "vocab_size": VOCAB_SIZE,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }


_OTHERS = {"nemotron": _nemotron_config, "kimi": _kimi_config, "gpt-oss": _gpt_oss_config}


def hf_quant_config(quantization: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt's own file, which says the same as `quantization_config`."""
    keys = ("quant_algo", "group_size", "quantized_layers", "kv_cache_quant_algo")
    section = {key: quantization[key] for key in keys if key in quantization}
    section["exclude_modules"] = quantization["ignore"]
    return {"producer": {"name": "modelopt"}, "quantization": section}


def _config_groups() -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "float", "group_size": GROUP_SIZE, "dynamic": False}
    return {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": scheme}}
