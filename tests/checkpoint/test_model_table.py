"""Small checkpoints with the config of each model family: opened, summarised, inspected, and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from torch_nvfp4.checkpoint import Checkpoint, write_checkpoint
from torch_nvfp4.cli.inspect import collect_checkpoint
from torch_nvfp4.cli.verify import verify_layer


class Model(NamedTuple):
    """A family: the layout that it is published in, what its config has, and what follows from it.

    `config` replaces the written one where its keys are; None removes a key.
    """

    layout: Any
    config: dict[str, Any]
    gate: str
    top_k: int = 2
    sizes: tuple[int, int] = (64, 32)  # K, I


CPU = torch.device("cpu")
QWEN = {"model_type": "qwen3_moe", "swiglu_limit": None}
MODELS = {
    "DeepSeek-V4-Flash": Model("deepseek", {"swiglu_limit": 10.0}, "silu, clamp_limit 10"),
    "DeepSeek-V4-Flash as published": Model("deepseek-mxfp4", {"swiglu_limit": 10.0}, "silu, clamp_limit 10"),
    "DeepSeek-V4-Pro": Model("deepseek", {"n_routed_experts": 4, "swiglu_limit": 7.0}, "silu, clamp_limit 7"),
    "MiniMax-M3": Model(
        "modelopt",
        {"model_type": "minimax_m3", "hidden_act": "swigluoai", "swiglu_limit": 7.0, "num_local_experts": 4},
        "silu (alpha 1.702, beta 1), clamp_limit 7",
    ),
    "GLM-5": Model("modelopt", {"model_type": "glm_moe_dsa", "swiglu_limit": None}, "silu, no clamp"),
    "GLM-5.3-Flash": Model("modelopt", {"model_type": "glm_moe_dsa", "swiglu_limit": 10.0}, "silu, clamp_limit 10"),
    "Qwen3.6-35B-A3B": Model("compressed-tensors-parameters", {"swiglu_limit": None}, "silu, no clamp"),
    "Qwen3-30B-A3B": Model("modelopt", QWEN, "silu, no clamp"),
    "Gemma-4-26B-A4B": Model(
        "compressed-tensors-parameters",
        {
            "model_type": "gemma4_text", "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh",
            "num_experts_per_tok": None, "top_k_experts": 2, "swiglu_limit": None,
        },
        "gelu_tanh, no clamp", sizes=(64, 176),
    ),
    "Nemotron-3-Nano-30B": Model("nemotron", {}, "relu2 without a gate", sizes=(96, 464)),
    "Nemotron-3-Super": Model(
        "nemotron", {"hidden_size": 256, "moe_latent_size": 64}, "relu2 without a gate"
    ),
    "Step-3.7-Flash": Model("modelopt-stack", {}, "swiglustep, clamp_limit 2", sizes=(64, 160)),
    "Kimi-K3": Model("compressed-tensors-mxfp4", {}, "situ (alpha 4, beta 25), no clamp", sizes=(64, 96)),
    "gpt-oss-120b": Model(
        "gpt-oss", {"swiglu_limit": 7.0, "hidden_act": "silu"}, "silu (alpha 1.702, beta 1), clamp_limit 7, biases",
        sizes=(96, 96),
    ),
}  # fmt: skip


def write(path: Path, model: Model) -> Path:
    k, i = model.sizes
    write_checkpoint(
        path, layout=model.layout, hidden_size=k, moe_intermediate_size=i, n_routed_experts=4,
        num_experts_per_tok=model.top_k, num_hidden_layers=2, swiglu_limit=2.0,
    )  # fmt: skip
    config = json.loads((path / "config.json").read_text())
    section = config.get("text_config", config)
    for key, value in model.config.items():
        section.pop(key, None)
        if value is not None:
            section[key] = value
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    k, i = model.sizes
    checkpoint = Checkpoint.open(write(tmp_path, model))
    summary = checkpoint.summary()
    assert (summary.layout, summary.layers) == (model.layout, (0, 1))
    assert (summary.num_experts, summary.hidden_size, summary.intermediate_size) == (4, k, i)
    assert (summary.top_k, checkpoint.top_k) == (model.top_k, model.top_k)
    weights = checkpoint.experts(1)
    rows = 2 * i if weights.gated else i
    assert weights.w13.data.shape == (4, rows, k // 2)
    assert weights.w2.data.shape == (4, k, i // 2)
    facts = collect_checkpoint(checkpoint, CPU)
    json.dumps({key: value for key, value in facts.items() if key != "categories"})
    assert facts["gates"] == [{"gate": model.gate, "layers": [0, 1]}]
    assert facts["refused"] == []
    assert facts["backend"] is not None
    check = verify_layer(checkpoint, 1, dtype=torch.float32, device=CPU)
    assert check.passed, check.problem
    assert check.experts_hit == 4
