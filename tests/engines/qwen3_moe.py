"""A tiny Qwen3-MoE with random NVFP4 experts, in the layouts that engines read, and what transformers makes of it.

The weights are random codes and block scales, among them negative and subnormal ones, so that nothing quantizes them;
the reference reads them with a table of its own and runs transformers' model in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, TOP_K = 128, 64, 8, 2, 4, 2, 32, 512, 2
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
WORDS = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"t{token}": token for token in range(3, VOCABULARY)}
LAYOUTS = ("modelopt", "w4a16", "w4a4")  # the last two: compressed-tensors


class NVFP4(NamedTuple):
    """One matrix as a checkpoint holds it."""

    codes: Tensor  # uint8 [N, K / 2]
    scale: Tensor  # float8_e4m3fn [N, K / 16]
    global_scale: Tensor  # float32 []

    def dequantized(self) -> Tensor:
        nibbles = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2).long()
        values = torch.tensor(E2M1)[nibbles] * self.scale.float().repeat_interleave(16, -1)
        return values * self.global_scale


def random_matrix(rows: int, columns: int, gain: float, generator: torch.Generator) -> NVFP4:
    """Of standard deviation gain / sqrt(columns), with block scales over four octaves, some of them odd."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scale = torch.exp2(torch.randint(-2, 3, (rows, columns // 16), generator=generator).float()) * 1.25
    scale[torch.rand(scale.shape, generator=generator) < 0.05] *= -1.0
    scale[torch.rand(scale.shape, generator=generator) < 0.02] = 2.0**-8  # subnormal
    rms = torch.tensor(E2M1).square().mean().sqrt() * scale.square().mean().sqrt()
    return NVFP4(codes, scale.to(torch.float8_e4m3fn), (gain * columns**-0.5 / rms).clone())


def write(folder: Path, layout: str, *, up_gain: float = 1.0, seed: int = 0, seeded: str = "float32") -> None:
    """``folder/quantized``, in a layout of ``LAYOUTS``, and ``folder/dense``, the same weights in fp32.

    Args:
        up_gain: standard deviation of up over that of gate. Where it is not 1, their global scales differ.
        seeded: the dtype that config.json names, in which every weight that is not quantized is exact.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, seeded)
    dense: dict[str, Tensor] = {}
    quantized: dict[str, Tensor] = {}

    def put(name: str, *shape: int, std: float | None) -> None:
        value = torch.ones(shape) if std is None else torch.randn(shape, generator=generator) * std
        quantized[name] = value.to(dtype)
        dense[name] = quantized[name].float()

    put("model.embed_tokens.weight", VOCABULARY, HIDDEN, std=1.0)
    put("lm_head.weight", VOCABULARY, HIDDEN, std=0.3)
    put("model.norm.weight", HIDDEN, std=None)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            put(f"{prefix}{name}.weight", HIDDEN, std=None)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            put(f"{prefix}self_attn.{name}_proj.weight", heads * HEAD_DIM, HIDDEN, std=HIDDEN**-0.5)
        put(f"{prefix}self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_DIM, std=(HEADS * HEAD_DIM) ** -0.5)
        for name in ("q_norm", "k_norm"):
            put(f"{prefix}self_attn.{name}.weight", HEAD_DIM, std=None)
        put(f"{prefix}mlp.gate.weight", EXPERTS, HIDDEN, std=0.3)
        for expert in range(EXPERTS):
            gate = random_matrix(INTERMEDIATE, HIDDEN, 2.0, generator)
            up = random_matrix(INTERMEDIATE, HIDDEN, 2.0, generator)
            up = up._replace(global_scale=gate.global_scale * up_gain)
            down = random_matrix(HIDDEN, INTERMEDIATE, 1.0, generator)
            for name, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                module = f"{prefix}mlp.experts.{expert}.{name}"
                dense[f"{module}.weight"] = matrix.dequantized()
                quantized |= _stored(module, matrix, layout)
    _save(folder / "dense", dense, _config("float32"))
    _save(folder / "quantized", quantized, _config(seeded) | {"quantization_config": _quantization(layout)})


def write_unquantized(folder: Path, *, seed: int = 0) -> None:
    """``folder/source``: such a model in bf16 with experts that no NVFP4 weight is equal to."""
    write(folder, "modelopt", seed=seed, seeded="bfloat16")
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = {name: value.bfloat16() for name, value in load_file(folder / "dense" / "model.safetensors").items()}
    for name, value in tensors.items():
        if ".experts." in name:
            gain = 1.0 if "down_proj" in name else 2.0
            value.copy_(torch.randn(value.shape, generator=generator) * gain * value.shape[1] ** -0.5)
    _save(folder / "source", tensors, _config("bfloat16"))


def write_dense(folder: Path, quantized: Path) -> None:
    """``folder/dense``: what the experts of a quantized checkpoint stand for, and the rest of it, in fp32."""
    tensors: dict[str, Tensor] = {}
    for file in quantized.glob("*.safetensors"):
        tensors |= load_file(file)
    dense = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight_packed").removesuffix(".weight")
        if name.endswith(".weight_packed"):
            global_scale = 1.0 / tensors[f"{module}.weight_global_scale"].reshape(())
        elif value.dtype == torch.uint8:
            global_scale = tensors[f"{module}.weight_scale_2"]
        elif ".experts." in name:
            continue  # the scales
        else:
            dense[name] = value.float()
            continue
        dense[f"{module}.weight"] = NVFP4(value, tensors[f"{module}.weight_scale"], global_scale).dequantized()
    _save(folder / "dense", dense, _config("float32"))


def _stored(module: str, matrix: NVFP4, layout: str) -> dict[str, Tensor]:
    if layout == "modelopt":
        return {
            f"{module}.weight": matrix.codes,
            f"{module}.weight_scale": matrix.scale,
            f"{module}.weight_scale_2": matrix.global_scale.clone(),
            f"{module}.input_scale": torch.tensor(1.0),
        }
    stored = {
        f"{module}.weight_packed": matrix.codes,
        f"{module}.weight_scale": matrix.scale,
        f"{module}.weight_global_scale": (1.0 / matrix.global_scale).reshape(1),
    }
    return stored if layout == "w4a16" else stored | {f"{module}.input_global_scale": torch.ones(1)}


def _config(dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN,
        "intermediate_size": 4 * INTERMEDIATE, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCABULARY,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "attention_bias": False, "dtype": dtype, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip


def _quantization(layout: str) -> dict[str, Any]:
    if layout == "modelopt":
        ignore = ["lm_head"]
        for layer in range(LAYERS):
            ignore += [f"model.layers.{layer}.self_attn*", f"model.layers.{layer}.mlp.gate"]
        return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ignore,
                "kv_cache_scheme": None, "producer": {"name": "modelopt"}}  # fmt: skip
    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    weights = {**arguments, "dynamic": False}
    activations = {**arguments, "dynamic": "local"} if layout == "w4a4" else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "kv_cache_scheme": None,
            "quantization_status": "compressed", "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
            "config_groups": {"group_0": group}}  # fmt: skip


def _save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<pad>"},
                 "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names})
    )


def prompts(count: int = 4) -> list[list[int]]:
    """Of different lengths, the same every time."""
    generator = torch.Generator().manual_seed(1)
    lengths = [9 + 5 * index for index in range(count)]
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


class Reference:
    """transformers' model in fp32 on the dequantized weights; ``limit`` clamps the gate as DeepSeek-V4 does."""

    def __init__(self, folder: Path, limit: float | None = None) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        self.model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
        self.clamped = 0  # pre-activations that the limit changed
        for module in self.model.modules():
            if isinstance(module, Qwen3MoeExperts):
                module.forward = self._experts(module, limit)

    def _experts(self, module: Any, limit: float | None) -> Any:
        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            out = torch.zeros_like(hidden_states)
            for token, row in enumerate(hidden_states):
                for expert, weight in zip(top_k_index[token].tolist(), top_k_weights[token], strict=True):
                    gate, up = (module.gate_up_proj[expert] @ row).chunk(2)
                    if limit is not None:
                        self.clamped += int((gate > limit).sum() + (up.abs() > limit).sum())
                        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                    out[token] += weight * (module.down_proj[expert] @ (gate * torch.sigmoid(gate) * up))
            return out

        return forward

    def log_probabilities(self, prompt: list[int], tokens: list[int]) -> Tensor:
        """Of every next token after the prompt and after each of ``tokens`` but the last: [len(tokens), vocabulary]."""
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + tokens])).logits[0]
        return torch.log_softmax(logits[len(prompt) - 1 : -1].double(), -1)
