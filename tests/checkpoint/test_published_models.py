"""gpt-oss, Nemotron-3 and Kimi-K3 as published: files spelled out here, against the models' own formulas in fp64.

Nothing that the package decodes or computes is used for what is expected.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torch_nvfp4 import NVFP4Experts
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.cli.inspect import collect_checkpoint
from torch_nvfp4.convert import open_conversion
from torch_nvfp4.testing import relative_l2

E, TOP_K, K, I, TOKENS = 4, 2, 64, 96, 9  # noqa: E741 (the intermediate size, as everywhere)
FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]

GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": TOP_K,
    "hidden_act": "silu", "hidden_size": K, "intermediate_size": I, "num_experts_per_tok": TOP_K,
    "num_hidden_layers": 1, "num_local_experts": E, "swiglu_limit": 7.0, "swa": None, "initial_context_length": 4096,
    "layer_types": ["sliding_attention"], "router_aux_loss_coef": 0.9, "vocab_size": 128,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False},
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]},
}  # fmt: skip
NEMOTRON = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "ME",
    "hidden_size": K, "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "mlp_bias": False,
    "intermediate_size": I, "moe_intermediate_size": I, "moe_shared_expert_intermediate_size": 2 * I,
    "n_routed_experts": E, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": TOP_K,
    "num_hidden_layers": 2, "routed_scaling_factor": 2.5, "use_bias": False, "use_conv_bias": True,
    "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
}  # fmt: skip
KIMI = {
    "architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3",
    "text_config": {
        "model_type": "kimi_linear", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0,
        "first_k_dense_replace": 1, "hidden_act": "situ", "hidden_size": 2 * K, "latent_moe_use_norm": True,
        "moe_intermediate_size": I, "moe_renormalize": True, "moe_router_activation_func": "sigmoid",
        "num_experts": E, "num_experts_per_token": TOP_K, "num_hidden_layers": 2, "num_shared_experts": 2,
        "routed_expert_hidden_size": K,
        "quantization_config": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
    },
}  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def exponents(generator: torch.Generator, *shape: int) -> Tensor:
    """E8M0 bytes, so that pre-activations reach the limits of each gate."""
    return torch.randint(121, 126, shape, generator=generator, dtype=torch.uint8)


def decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks [..., groups, 16] and E8M0 bytes [..., groups] -> fp64 [..., 32 * groups], low nibbles first."""
    table = torch.tensor(FP4_VALUES, dtype=torch.float64)
    values = torch.stack((table[(blocks & 0x0F).long()], table[(blocks >> 4).long()]), -1).flatten(-2)
    return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2)


Expert = Callable[[Tensor, int], Tensor]  # (rows of hidden states, expert) -> its output


def gpt_oss() -> tuple[dict[str, Tensor], Expert]:
    """transformers' GptOssExperts: products with [E, K, 2I], of which every second column is up, and [E, I, K]."""
    g, root = seeded(1), "model.layers.0.mlp.experts."
    up_blocks, up_scales = codes(g, E, 2 * I, K // 32, 16), exponents(g, E, 2 * I, K // 32)
    down_blocks, down_scales = codes(g, E, K, I // 32, 16), exponents(g, E, K, I // 32)
    up_bias, down_bias = torch.randn(E, 2 * I, generator=g).bfloat16(), torch.randn(E, K, generator=g).bfloat16()
    tensors = {
        f"{root}gate_up_proj_blocks": up_blocks, f"{root}gate_up_proj_scales": up_scales,
        f"{root}gate_up_proj_bias": up_bias, f"{root}down_proj_blocks": down_blocks,
        f"{root}down_proj_scales": down_scales, f"{root}down_proj_bias": down_bias * 20,
        "model.layers.0.mlp.router.weight": torch.zeros(E, K, dtype=torch.bfloat16),
        "model.layers.0.mlp.router.bias": torch.zeros(E, dtype=torch.bfloat16),
    }  # fmt: skip
    gate_up_proj, down_proj = (
        decoded(*pair).transpose(1, 2) for pair in ((up_blocks, up_scales), (down_blocks, down_scales))
    )

    def expert(x: Tensor, e: int) -> Tensor:
        gate_up = x @ gate_up_proj[e] + up_bias[e].double()
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
        glu = gate * torch.sigmoid(gate * 1.702)
        return ((up + 1) * glu) @ down_proj[e] + (down_bias[e] * 20).double()

    return tensors, expert


def nemotron() -> tuple[dict[str, Tensor], Expert]:
    """down_proj(relu(up_proj(x))^2) in layer 1 alone; layer 0 is Mamba's."""
    g, matrices = seeded(2), []
    tensors = {"backbone.layers.0.mixer.A_log": torch.ones(4), "backbone.layers.1.mixer.gate.weight": torch.ones(E, K)}
    for e in range(E):
        for name, rows, cols in (("up_proj", I, K), ("down_proj", K, I)):
            data = codes(g, rows, cols // 2)
            scale = (torch.randint(1, 16, (rows, cols // 16), generator=g) / 4).to(torch.float8_e4m3fn)
            factor = torch.rand((), generator=g) / 16
            root = f"backbone.layers.1.mixer.experts.{e}.{name}."
            tensors |= {f"{root}weight": data, f"{root}weight_scale": scale, f"{root}weight_scale_2": factor}
            tensors[f"{root}input_scale"] = torch.ones(())
            table = torch.tensor(FP4_VALUES, dtype=torch.float64)
            values = torch.stack((table[(data & 15).long()], table[(data >> 4).long()]), -1).flatten(1)
            matrices.append(values * scale.double().repeat_interleave(16, 1) * factor.double())

    def expert(x: Tensor, e: int) -> Tensor:
        up, down = matrices[2 * e : 2 * e + 2]
        return torch.relu(x @ up.T).square() @ down.T

    return tensors, expert


def kimi() -> tuple[dict[str, Tensor], Expert]:
    """Layer 0 is dense. beta tanh(g / beta) sigmoid(g) times linear_beta tanh(u / linear_beta)."""
    g, matrices = seeded(3), []
    tensors = {"language_model.model.layers.0.mlp.gate_proj.weight": torch.zeros(8, 2 * K, dtype=torch.bfloat16)}
    for e in range(E):
        for name, rows, cols in (("w1", I, K), ("w3", I, K), ("w2", K, I)):
            data, scale = codes(g, rows, cols // 2), exponents(g, rows, cols // 32)
            root = f"language_model.model.layers.1.block_sparse_moe.experts.{e}.{name}."
            tensors |= {f"{root}weight_packed": data, f"{root}weight_scale": scale}
            matrices.append(decoded(data.unflatten(1, (-1, 16)), scale))

    def expert(x: Tensor, e: int) -> Tensor:
        w1, w3, w2 = matrices[3 * e : 3 * e + 3]
        gate, up = x @ w1.T, x @ w3.T
        return (4.0 * torch.tanh(gate / 4.0) * torch.sigmoid(gate) * 25.0 * torch.tanh(up / 25.0)) @ w2.T

    return tensors, expert


class Model(NamedTuple):
    config: dict[str, Any]
    make: Callable[[], tuple[dict[str, Tensor], Expert]]
    layer: int
    mxfp4: bool


MODELS = {
    "gpt-oss": Model(GPT_OSS, gpt_oss, 0, True),
    "Nemotron-3": Model(NEMOTRON, nemotron, 1, False),
    "Kimi-K3": Model(KIMI, kimi, 1, True),
}


def written(path: Path, model: Model) -> Expert:
    path.mkdir()
    tensors, expert = model.make()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(model.config))
    return expert


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Router weights are the softmax of the chosen logits, as gpt-oss has it; any would do."""
    g = seeded(4)
    values, ids = torch.randn(TOKENS, E, generator=g).topk(TOP_K)
    return torch.randn(TOKENS, K, generator=g), values.softmax(-1), ids


def expected_of(expert: Expert, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros(TOKENS, K, dtype=torch.float64)
    for e in range(E):
        token, slot = torch.where(ids == e)
        y.index_add_(0, token, expert(x.double()[token], e) * weights.double()[token, slot, None])
    return y


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_what_the_model_computes(name: str, tmp_path: Path) -> None:
    model, args = MODELS[name], inputs()
    expected = expected_of(written(tmp_path / "model", model), *args)
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert (checkpoint.layers, checkpoint.refusals()) == ((model.layer,), ())

    def run(**part: int) -> Tensor:
        return NVFP4Experts.from_checkpoint(checkpoint, model.layer, **part)(*args)

    whole = run()
    assert relative_l2(whole, expected) < 1e-5
    for kind in ("tp", "ep"):
        parts = [run(**{f"{kind}_rank": rank, f"{kind}_size": 2}) for rank in range(2)]
        assert relative_l2(sum(parts), expected) < 1e-5, kind


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.mxfp4])
def test_quantized_gives_the_same_bits(name: str, layout: Any, tmp_path: Path) -> None:
    """quantize of MXFP4, then the layer of the result: no bit differs from the layer of the source."""
    model, args = MODELS[name], inputs()
    written(tmp_path / "model", model)
    conversion = open_conversion(tmp_path / "model", tmp_path / "result", layout=layout)
    try:
        conversion.write()
        assert all(error.problem is None for error in conversion.compare())
        conversion.finish()
    finally:
        conversion.close()
    before, after = (NVFP4Experts.from_checkpoint(tmp_path / part, model.layer) for part in ("model", "result"))
    assert before.quant_config == after.quant_config
    for x in (args[0], args[0].bfloat16()):
        assert torch.equal(before(x, *args[1:]), after(x, *args[1:]))


# The sizes of the published models, whose headers alone are real: the values are holes in the file.

Entry = tuple[str, list[int]]  # dtype and shape
BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "BF16": 2, "F32": 4}


def hollow(path: Path, entries: dict[str, Entry]) -> None:
    """A safetensors file whose bytes are zeros but for ones in F32 tensors. It takes no space."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + BYTES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in entries.items():
            if dtype == "F32":
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(struct.pack("<f", 1.0) * torch.Size(shape).numel())
        file.truncate(8 + len(text) + end)


def nvfp4(module: str, rows: int, cols: int) -> dict[str, Entry]:
    return {
        f"{module}.weight": ("U8", [rows, cols // 2]), f"{module}.weight_scale": ("F8_E4M3", [rows, cols // 16]),
        f"{module}.weight_scale_2": ("F32", []),
    }  # fmt: skip


def mxfp4(module: str, rows: int, cols: int) -> dict[str, Entry]:
    return {
        f"{module}.weight_packed": ("U8", [rows, cols // 2]), f"{module}.weight_scale": ("U8", [rows, cols // 32]),
    }  # fmt: skip


def matrices(
    root: str, names: tuple[str, ...], leaves: Callable[[str, int, int], dict[str, Entry]] = nvfp4
) -> Callable[[int, int, int], dict[str, Entry]]:
    def entries(e: int, k: int, i: int) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for expert in range(e):
            for name in names:
                rows, cols = (k, i) if name in ("w2", "down_proj") else (i, k)
                found |= leaves(f"{root}{expert}.{name}", rows, cols)
        return found

    return entries


def parameters(e: int, k: int, i: int) -> dict[str, Entry]:
    root = "model.language_model.layers.0.mlp.experts."
    found: dict[str, Entry] = {}
    for name, rows, cols, halves in (("gate_up_proj", 2 * i, k, 2), ("down_proj", k, i, 1)):
        found[f"{root}{name}_packed"] = ("U8", [e, rows, cols // 2])
        found[f"{root}{name}_scale"] = ("F8_E4M3", [e, rows, cols // 16])
        found[f"{root}{name}_global_scale"] = ("F32", [e, halves])
    return found


def step(e: int, k: int, i: int) -> dict[str, Entry]:
    root = "model.layers.0.moe."
    found: dict[str, Entry] = {}
    for name, rows, cols in (("gate_proj", i, k), ("up_proj", i, k), ("down_proj", k, i)):
        found[f"{root}{name}.weight"] = ("U8", [e, rows, cols // 2])
        found[f"{root}{name}.weight_scale"] = ("F8_E4M3", [e, rows, cols // 16])
        found[f"{root}{name}.weight_scale_2"] = ("F32", [e])
    return found


def blocks(e: int, k: int, i: int) -> dict[str, Entry]:
    root = "model.layers.0.mlp.experts."
    return {
        f"{root}gate_up_proj_blocks": ("U8", [e, 2 * i, k // 32, 16]),
        f"{root}gate_up_proj_scales": ("U8", [e, 2 * i, k // 32]), f"{root}gate_up_proj_bias": ("BF16", [e, 2 * i]),
        f"{root}down_proj_blocks": ("U8", [e, k, i // 32, 16]),
        f"{root}down_proj_scales": ("U8", [e, k, i // 32]), f"{root}down_proj_bias": ("BF16", [e, k]),
    }  # fmt: skip


W, PROJ = ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")
HF = "model.layers.0.mlp.experts."


class Published(NamedTuple):
    sizes: tuple[int, int, int, int]  # E, K, I, top-k
    config: dict[str, Any]
    entries: Callable[[int, int, int], dict[str, Entry]]
    gate: str
    tp_size: int = 8


PUBLISHED = {
    "DeepSeek-V4-Flash": Published(
        (256, 4096, 2048, 6), {"model_type": "deepseek_v4", "swiglu_limit": 10.0},
        matrices("layers.0.ffn.experts.", W), "silu, clamp_limit 10",
    ),
    "DeepSeek-V4-Pro": Published(
        (384, 7168, 3072, 6), {"model_type": "deepseek_v4", "swiglu_limit": 10.0},
        matrices("layers.0.ffn.experts.", W), "silu, clamp_limit 10",
    ),
    "MiniMax-M3": Published(
        (128, 6144, 3072, 4), {"model_type": "minimax_m3", "hidden_act": "swigluoai", "swiglu_limit": 7.0},
        matrices("model.layers.0.block_sparse_moe.experts.", W), "silu (alpha 1.702, beta 1), clamp_limit 7",
    ),
    "GLM-5": Published((256, 6144, 2048, 8), {"model_type": "glm_moe_dsa"}, matrices(HF, PROJ), "silu, no clamp"),
    "GLM-5.3-Flash": Published(
        (288, 4096, 2048, 8), {"model_type": "glm_moe_dsa", "swiglu_limit": 10.0}, matrices(HF, PROJ),
        "silu, clamp_limit 10",
    ),
    "Qwen3.6-35B-A3B": Published((256, 2048, 512, 8), {"model_type": "qwen3_5_moe"}, parameters, "silu, no clamp"),
    "Qwen3-30B-A3B": Published((128, 2048, 768, 8), {"model_type": "qwen3_moe"}, matrices(HF, PROJ), "silu, no clamp"),
    "Gemma-4-26B-A4B": Published(
        (128, 2816, 704, 8), {"model_type": "gemma4_text", "hidden_act": "gelu_pytorch_tanh"}, parameters,
        "gelu_tanh, no clamp", tp_size=4,
    ),
    "Nemotron-3-Nano-30B": Published(
        (128, 2688, 1856, 6), {"model_type": "nemotron_h", "hidden_act": None, "mlp_hidden_act": "relu2"},
        matrices("backbone.layers.0.mixer.experts.", ("up_proj", "down_proj")), "relu2 without a gate", tp_size=4,
    ),
    "Step-3.7-Flash": Published(
        (288, 4096, 1280, 8), {"model_type": "step3p5", "swiglu_limits": [7.0]}, step, "swiglustep, clamp_limit 7"
    ),
    "Kimi-K3": Published(
        (896, 3584, 3072, 16),
        {"model_type": "kimi_linear", "hidden_act": "situ", "activation_situ_beta": 4.0,
         "activation_situ_linear_beta": 25.0},
        matrices("language_model.model.layers.0.block_sparse_moe.experts.", W, mxfp4),
        "situ (alpha 4, beta 25), no clamp",
    ),
    "gpt-oss-120b": Published(
        (128, 2880, 2880, 4), {"model_type": "gpt_oss", "swiglu_limit": 7.0}, blocks,
        "silu (alpha 1.702, beta 1), clamp_limit 7, biases", tp_size=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str, tmp_path: Path) -> None:
    """Opened and inspected whole; of one expert, the slice that a rank has is read, and packed for this machine."""
    model = PUBLISHED[name]
    e, k, i, top_k = model.sizes
    hollow(tmp_path / "model.safetensors", model.entries(e, k, i))
    config = {
        "hidden_act": "silu", "hidden_size": k, "moe_intermediate_size": i, "num_experts": e,
        "num_experts_per_tok": top_k, "num_hidden_layers": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | model.config))
    checkpoint = Checkpoint.open(tmp_path)
    facts = collect_checkpoint(checkpoint, torch.device("cpu"))
    assert (facts["refused"], facts["left_out"], facts["backend"]) == ([], 0, "cpu")
    assert facts["gates"] == [{"gate": model.gate, "layers": [0]}]
    assert (facts["num_experts"], facts["hidden_size"], facts["intermediate_size"], facts["top_k"]) == model.sizes
    rank = e // 2 * model.tp_size + model.tp_size - 1  # the last slice of an expert in the middle
    ranks = {"ep_rank": rank // model.tp_size, "ep_size": e, "tp_rank": rank % model.tp_size, "tp_size": model.tp_size}
    weights = checkpoint.experts(0, **ranks)
    rows = i // model.tp_size * (1 + weights.gated)
    assert weights.w13.data.shape == (1, rows, k // 2)
    assert weights.w2.data.shape == (1, k, i // model.tp_size // 2)
    layer = NVFP4Experts.from_checkpoint(checkpoint, 0, **ranks)
    x, ids = torch.ones(1, k), torch.full((1, top_k), e // 2)
    assert torch.equal(layer(x, torch.ones(1, top_k), ids), torch.zeros(1, k))
