"""Writes small checkpoints in the layouts of published ones, for `torch-nvfp4 demo` and the tests.

Names, dtypes and config fields are those of nvidia/DeepSeek-V4-Flash-NVFP4 (`layout="deepseek"`), of Qwen3-30B-A3B
quantized by ModelOpt ("modelopt") and by llm-compressor ("compressed-tensors"); the values are random.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from torch_nvfp4.format import E2M1_MAX, E4M3_MAX, GROUP_SIZE, NVFP4Weight, quantize, reciprocal_global_scale

__all__ = ["Layout", "write_checkpoint"]

Layout = Literal["deepseek", "modelopt", "compressed-tensors"]

_VOCAB_SIZE = 384
_HEADS = 4
_HEAD_DIM = 64
_LORA_RANK = 128
_HYPER_CONNECTIONS = 2
_BLOCK = 128  # side of an FP8 block
# DeepSeek-V4 alternates them; 0 has no compressor, 4 has an indexer too.
_COMPRESS_RATIOS = (0, 4, 128, 4)
_MTP_EXPERTS = 2
# Experts quantized at a time: enough for both cores, without a fp32 copy of the layer.
_BATCH = 8


def write_checkpoint(
    path: str | Path,
    *,
    hidden_size: int = 1024,
    moe_intermediate_size: int = 512,
    n_routed_experts: int = 32,
    num_experts_per_tok: int = 6,
    num_hidden_layers: int = 4,
    swiglu_limit: float | None = 10.0,
    layout: Layout = "deepseek",
    seed: int = 0,
) -> Path:
    """Writes a checkpoint with random weights: two shards, an index and the configs.

    The weights are scaled so that the limit bites: for activations from a standard normal distribution, gate
    pre-activations have a standard deviation of 1.5 limits (a quarter of them clamp) and up pre-activations of 0.75
    limits (18 % clamp). Gate and up therefore differ in their global scales by a factor of about two. Without a limit,
    both deviations are as with a limit of 1.

    Args:
        path: the directory, made when it is not there; files of earlier calls are overwritten.
        hidden_size: K, a multiple of 16.
        moe_intermediate_size: I, a multiple of 16.
        swiglu_limit: the clamp limit that config.json declares, None for no clamp.
        layout: whose names and leaves to write.
        seed: of everything random; the same arguments write the same bytes.

    Returns:
        path.

    Raises:
        ValueError: a size that is not a positive multiple of 16, more experts per token than experts, no layer, an
            unknown layout, a limit that is not positive and finite.
    """
    for name, size in (("hidden_size", hidden_size), ("moe_intermediate_size", moe_intermediate_size)):
        if size < GROUP_SIZE or size % GROUP_SIZE:
            raise ValueError(f"expected {name} to be a positive multiple of {GROUP_SIZE}, got {size}")
    if not 1 <= num_experts_per_tok <= n_routed_experts:
        raise ValueError(f"expected 1 <= num_experts_per_tok <= {n_routed_experts}, got {num_experts_per_tok}")
    if num_hidden_layers < 1:
        raise ValueError(f"expected num_hidden_layers >= 1, got {num_hidden_layers}")
    if layout not in get_args(Layout):
        raise ValueError(f"expected layout to be one of {', '.join(get_args(Layout))}, got {layout!r}")
    if swiglu_limit is not None and not 0 < swiglu_limit < math.inf:
        raise ValueError(f"expected swiglu_limit to be positive and finite, or None, got {swiglu_limit}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    writer = _Writer(
        hidden=hidden_size,
        intermediate=moe_intermediate_size,
        num_experts=n_routed_experts,
        top_k=num_experts_per_tok,
        num_layers=num_hidden_layers,
        limit=swiglu_limit,
        layout=layout,
        seed=seed,
    )
    writer.write(path)
    return path


class _Writer:
    def __init__(
        self,
        *,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        num_layers: int,
        limit: float | None,
        layout: Layout,
        seed: int,
    ) -> None:
        self.hidden = hidden
        self.intermediate = intermediate
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_layers = num_layers
        self.limit = limit
        self.layout = layout
        self.generator = torch.Generator().manual_seed(seed)

    def write(self, path: Path) -> None:
        deepseek = self.layout == "deepseek"
        outer = self._deepseek_outer if deepseek else self._qwen_outer
        layer = self._deepseek_layer if deepseek else self._qwen_layer
        # The first shard is written and let go before the second one is made.
        half = self.num_layers // 2
        shards: list[dict[str, Tensor]] = [{}, {}]
        weight_map: dict[str, str] = {}
        total_size = 0
        for number, tensors in enumerate(shards):
            for index in range(half * number, self.num_layers if number else half):
                tensors.update(layer(index))
            if number == 1:
                tensors.update(outer())
            name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            save_file(tensors, path / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, name))
            total_size += sum(tensor.nbytes for tensor in tensors.values())
            tensors.clear()
        index_file = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        config = self._deepseek_config() if deepseek else self._qwen_config()
        _write_json(path / "model.safetensors.index.json", index_file)
        _write_json(path / "config.json", config)
        if self.layout != "compressed-tensors":
            _write_json(path / "hf_quant_config.json", self._hf_quant_config(config["quantization_config"]))
        else:
            (path / "hf_quant_config.json").unlink(missing_ok=True)

    def _randn(self, *shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=self.generator).mul_(std)

    def _bf16(self, *shape: int) -> Tensor:
        return self._randn(*shape, std=shape[-1] ** -0.5).to(torch.bfloat16)

    def _ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    def _nvfp4_leaves(self, module: str, weight: NVFP4Weight) -> Iterator[tuple[str, Tensor]]:
        """The leaves of one NVFP4 matrix [N, K]. Input scales are those of activations with amax 8."""
        input_scale = torch.tensor(8.0 / (E2M1_MAX * E4M3_MAX))
        if self.layout == "compressed-tensors":
            yield f"{module}.weight_packed", weight.data
            yield f"{module}.weight_scale", weight.scale
            yield f"{module}.weight_global_scale", reciprocal_global_scale(weight.global_scale).reshape(1)
            yield f"{module}.input_global_scale", input_scale.reciprocal().reshape(1)
        else:
            yield f"{module}.weight", weight.data
            yield f"{module}.weight_scale", weight.scale
            yield f"{module}.weight_scale_2", weight.global_scale.clone()
            yield f"{module}.input_scale", input_scale

    def _experts(self, root: str, names: tuple[str, str, str]) -> Iterator[tuple[str, Tensor]]:
        """The routed experts of one layer; names of gate, up and down."""
        limit = 1.0 if self.limit is None else self.limit
        k, i = self.hidden, self.intermediate
        projections = ((i, k, 1.5 * limit), (i, k, 0.75 * limit), (k, i, 2.0))
        for start in range(0, self.num_experts, _BATCH):
            num = min(_BATCH, self.num_experts - start)
            for name, (rows, cols, gain) in zip(names, projections, strict=True):
                weights = quantize(self._randn(num, rows, cols, std=gain * cols**-0.5))
                for expert in range(num):
                    weight = NVFP4Weight(*(part[expert] for part in weights))
                    yield from self._nvfp4_leaves(f"{root}.{start + expert}.{name}", weight)

    def _fp8(self, module: str, rows: int, cols: int) -> Iterator[tuple[str, Tensor]]:
        """An FP8 matrix in 128 x 128 blocks with power-of-two (E8M0) scales."""
        dense = self._randn(rows, cols, std=cols**-0.5)
        grid = (-(-rows // _BLOCK), -(-cols // _BLOCK))
        padded = torch.zeros(grid[0] * _BLOCK, grid[1] * _BLOCK)
        padded[:rows, :cols] = dense
        blocks = padded.reshape(grid[0], _BLOCK, grid[1], _BLOCK)
        scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3)) / E4M3_MAX)))
        codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :cols].contiguous()
        yield f"{module}.weight", codes.to(torch.float8_e4m3fn)
        yield f"{module}.scale", scale.to(torch.float8_e8m0fnu)

    def _mxfp4(self, module: str, rows: int, cols: int) -> Iterator[tuple[str, Tensor]]:
        """Dummy MXFP4 codes and scales (2^-6), the source format of DeepSeek-V4's experts."""
        codes = torch.randint(-128, 128, (rows, cols // 2), generator=self.generator, dtype=torch.int8)
        yield f"{module}.weight", codes
        yield f"{module}.scale", torch.full((rows, -(-cols // 32)), 2.0**-6).to(torch.float8_e8m0fnu)

    def _compressor(self, module: str, ratio: int, head_dim: int) -> Iterator[tuple[str, Tensor]]:
        width = head_dim * (2 if ratio == 4 else 1)  # ratio 4 compresses overlapping windows
        yield f"{module}.wkv.weight", self._bf16(width, self.hidden)
        yield f"{module}.wgate.weight", self._bf16(width, self.hidden)
        yield f"{module}.ape", self._randn(ratio, width, std=0.02)
        yield f"{module}.norm.weight", self._ones(head_dim)

    def _deepseek_attention(self, module: str, ratio: int) -> Iterator[tuple[str, Tensor]]:
        heads = _HEADS * _HEAD_DIM
        yield f"{module}.attn_sink", torch.zeros(_HEADS)
        yield f"{module}.q_norm.weight", self._ones(_LORA_RANK)
        yield f"{module}.kv_norm.weight", self._ones(_HEAD_DIM)
        yield from self._fp8(f"{module}.wq_a", _LORA_RANK, self.hidden)
        yield from self._fp8(f"{module}.wq_b", heads, _LORA_RANK)
        yield from self._fp8(f"{module}.wkv", _HEAD_DIM, self.hidden)
        yield from self._fp8(f"{module}.wo_a", 2 * _LORA_RANK, heads // 2)
        yield from self._fp8(f"{module}.wo_b", self.hidden, 2 * _LORA_RANK)
        if ratio:
            yield from self._compressor(f"{module}.compressor", ratio, _HEAD_DIM)
        if ratio == 4:
            yield from self._fp8(f"{module}.indexer.wq_b", heads, _LORA_RANK)
            yield f"{module}.indexer.weights_proj.weight", self._bf16(_HEADS, self.hidden)
            yield from self._compressor(f"{module}.indexer.compressor", ratio, _HEAD_DIM)

    def _deepseek_block(self, block: str, ratio: int, hash_routed: bool) -> Iterator[tuple[str, Tensor]]:
        """Everything of a decoder block but its routed experts."""
        yield from self._deepseek_attention(f"{block}.attn", ratio)
        mixes = (2 + _HYPER_CONNECTIONS) * _HYPER_CONNECTIONS
        for part in ("attn", "ffn"):
            yield f"{block}.{part}_norm.weight", self._ones(self.hidden)
            yield f"{block}.hc_{part}_fn", self._randn(mixes, _HYPER_CONNECTIONS * self.hidden, std=0.02)
            yield f"{block}.hc_{part}_base", torch.zeros(mixes)
            yield f"{block}.hc_{part}_scale", torch.ones(3)
        yield f"{block}.ffn.gate.weight", self._bf16(self.num_experts, self.hidden)
        if hash_routed:
            ids = torch.arange(_VOCAB_SIZE * self.top_k).reshape(_VOCAB_SIZE, self.top_k) % self.num_experts
            yield f"{block}.ffn.gate.tid2eid", ids
        else:
            yield f"{block}.ffn.gate.bias", torch.zeros(self.num_experts)
        yield from self._fp8(f"{block}.ffn.shared_experts.w1", self.intermediate, self.hidden)
        yield from self._fp8(f"{block}.ffn.shared_experts.w2", self.hidden, self.intermediate)
        yield from self._fp8(f"{block}.ffn.shared_experts.w3", self.intermediate, self.hidden)

    def _deepseek_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        ratio = _COMPRESS_RATIOS[layer % len(_COMPRESS_RATIOS)]
        yield from self._deepseek_block(f"layers.{layer}", ratio, hash_routed=layer == 0)
        yield from self._experts(f"layers.{layer}.ffn.experts", ("w1", "w3", "w2"))

    def _deepseek_outer(self) -> Iterator[tuple[str, Tensor]]:
        yield "embed.weight", self._bf16(_VOCAB_SIZE, self.hidden)
        yield "norm.weight", self._ones(self.hidden)
        yield "head.weight", self._bf16(_VOCAB_SIZE, self.hidden)
        for root in ("", "mtp.0."):
            yield f"{root}hc_head_fn", self._randn(_HYPER_CONNECTIONS, _HYPER_CONNECTIONS * self.hidden, std=0.02)
            yield f"{root}hc_head_base", torch.zeros(_HYPER_CONNECTIONS)
            yield f"{root}hc_head_scale", torch.ones(1)
        yield from self._deepseek_block("mtp.0", 0, hash_routed=False)
        for name in ("e_proj", "h_proj"):
            yield from self._fp8(f"mtp.0.{name}", self.hidden, self.hidden)
        for name in ("enorm", "hnorm", "norm"):
            yield f"mtp.0.{name}.weight", self._ones(self.hidden)
        for expert in range(_MTP_EXPERTS):
            root = f"mtp.0.ffn.experts.{expert}"
            yield from self._mxfp4(f"{root}.w1", self.intermediate, self.hidden)
            yield from self._mxfp4(f"{root}.w2", self.hidden, self.intermediate)
            yield from self._mxfp4(f"{root}.w3", self.intermediate, self.hidden)

    def _qwen_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        root = f"model.layers.{layer}"
        heads = _HEADS * _HEAD_DIM
        for name, rows, cols in (
            ("q_proj", heads, self.hidden),
            ("k_proj", heads, self.hidden),
            ("v_proj", heads, self.hidden),
            ("o_proj", self.hidden, heads),
        ):
            weight = quantize(self._randn(rows, cols, std=cols**-0.5))
            yield from self._nvfp4_leaves(f"{root}.self_attn.{name}", weight)
        if self.layout == "modelopt":
            yield f"{root}.self_attn.k_proj.k_scale", torch.tensor(0.01)
            yield f"{root}.self_attn.v_proj.v_scale", torch.tensor(0.01)
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            yield f"{root}.{name}.weight", self._ones(_HEAD_DIM)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{root}.{name}.weight", self._ones(self.hidden)
        yield f"{root}.mlp.gate.weight", self._bf16(self.num_experts, self.hidden)
        yield from self._experts(f"{root}.mlp.experts", ("gate_proj", "up_proj", "down_proj"))

    def _qwen_outer(self) -> Iterator[tuple[str, Tensor]]:
        yield "model.embed_tokens.weight", self._bf16(_VOCAB_SIZE, self.hidden)
        yield "model.norm.weight", self._ones(self.hidden)
        yield "lm_head.weight", self._bf16(_VOCAB_SIZE, self.hidden)

    def _deepseek_config(self) -> dict[str, Any]:
        ratios = [_COMPRESS_RATIOS[layer % len(_COMPRESS_RATIOS)] for layer in range(self.num_layers)]
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "compress_ratios": ratios,
            "expert_dtype": "fp4",
            "head_dim": _HEAD_DIM,
            "hc_eps": 1e-6,
            "hc_mult": _HYPER_CONNECTIONS,
            "hc_sinkhorn_iters": 20,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "index_head_dim": _HEAD_DIM,
            "index_n_heads": _HEADS,
            "index_topk": 4,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": self.intermediate,
            "n_routed_experts": self.num_experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": _HEADS,
            "num_experts_per_tok": self.top_k,
            "num_hash_layers": 1,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": 1,
            "num_nextn_predict_layers": 1,
            "o_groups": 2,
            "o_lora_rank": _LORA_RANK,
            "q_lora_rank": _LORA_RANK,
            "qk_rope_head_dim": 16,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "routed_scaling_factor": 1.5,
            "scoring_func": "sqrtsoftplus",
            "sliding_window": 16,
            "swiglu_limit": self.limit,
            "tie_word_embeddings": False,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "vocab_size": _VOCAB_SIZE,
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "scale_fmt": "ue8m0",
                "weight_block_size": [_BLOCK, _BLOCK],
                "quant_algo": "MIXED_PRECISION",
                "moe_quant_algo": "NVFP4",
                "expert_dtype": "fp4",
                "group_size": GROUP_SIZE,
                "kv_cache_quant_algo": None,
                "config_groups": _config_groups(),
                "quantized_layers": {
                    f"layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", "group_size": GROUP_SIZE}
                    for layer in range(self.num_layers)
                },
                "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
                "producer": {"name": "modelopt"},
            },
        }

    def _qwen_config(self) -> dict[str, Any]:
        quantization: dict[str, Any] = {
            "config_groups": _config_groups(),
            "ignore": ["lm_head", "model.layers.*.mlp.gate"],
        }
        if self.layout == "modelopt":
            quantization |= {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8}}
        else:
            quantization |= {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": _HEAD_DIM,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "num_attention_heads": _HEADS,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": _HEADS,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": _VOCAB_SIZE,
            "quantization_config": quantization,
        } | ({} if self.limit is None else {"swiglu_limit": self.limit})

    def _hf_quant_config(self, quantization: dict[str, Any]) -> dict[str, Any]:
        """ModelOpt's own file, which says the same as `quantization_config`."""
        keys = ("quant_algo", "group_size", "quantized_layers", "kv_cache_quant_algo")
        section = {key: quantization[key] for key in keys if key in quantization}
        section["exclude_modules"] = quantization["ignore"]
        return {"producer": {"name": "modelopt"}, "quantization": section}


def _config_groups() -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "float", "group_size": GROUP_SIZE, "dynamic": False}
    return {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": scheme}}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
