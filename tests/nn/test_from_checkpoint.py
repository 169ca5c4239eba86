"""Modules made from a checkpoint: the limit's way from its config to the kernel, and the slices of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.modules import (
    LIMIT,
    TOP_K,
    E,
    I,
    K,
    inputs,
    weights,
)
from torch_nvfp4 import reference, testing
from torch_nvfp4.checkpoint import Checkpoint, CheckpointError
from torch_nvfp4.format import NVFP4Weight, quantize
from torch_nvfp4.nn import NVFP4Experts, NVFP4Linear
from torch_nvfp4.quant_config import MoEQuantConfig


def write_checkpoint(path: Path, **config: Any) -> tuple[NVFP4Weight, NVFP4Weight]:
    """Two layers in DeepSeek-V4's layout; returns the weights of layer 1."""
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        w13, w2 = weights()
        for e in range(E):
            gate, up = (tuple(part[e].chunk(2)[half] for part in w13) for half in (0, 1))
            for name, leaves in (("w1", gate), ("w3", up), ("w2", tuple(part[e] for part in w2))):
                prefix = f"layers.{layer}.ffn.experts.{e}.{name}."
                values = zip(("weight", "weight_scale", "weight_scale_2"), leaves, strict=True)
                tensors.update({prefix + leaf: value.contiguous() for leaf, value in values})
                tensors[prefix + "weight_scale_2"] = tensors[prefix + "weight_scale_2"].reshape(())
    dense = quantize(torch.randn(32, K))
    names = ("weight", "weight_scale", "weight_scale_2")
    tensors |= {f"layers.0.attn.proj.{leaf}": value for leaf, value in zip(names, dense, strict=True)}
    tensors["layers.0.attn.proj.bias"] = torch.randn(32)
    save_file(tensors, path / "model.safetensors")
    base = {"model_type": "deepseek_v4", "hidden_act": "silu", "num_hidden_layers": 2, "num_experts_per_tok": TOP_K}
    (path / "config.json").write_text(json.dumps(base | config))
    return w13, w2


class Calls(TorchDispatchMode):
    """The keyword arguments of every call of an MoE op, as they arrive at the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.limits: list[float | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.nvfp4.moe.default:
            self.limits.append((kwargs or {}).get("clamp_limit"))
        elif func is torch.ops.nvfp4_reference.moe.default:
            self.limits.append(args[11])
        return func(*args, **(kwargs or {}))


CONFIGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"swiglu_limit": LIMIT}, {"clamp_limit": LIMIT}),
    ({"swiglu_limit": 0.3}, {"clamp_limit": 0.3}),
    ({"model_type": "gpt_oss", "swiglu_limit": LIMIT}, {"clamp_limit": LIMIT, "alpha": 1.702, "beta": 1.0}),
    (
        {"model_type": "step3p5", "swiglu_limits": [0.1, LIMIT]},
        {"activation": "swiglustep", "clamp_limit": LIMIT},
    ),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("config", "gate"), CONFIGS)
def test_declared_limit_is_the_limit_that_the_kernel_applies(
    tmp_path: Path, backend: str, config: dict[str, Any], gate: dict[str, Any]
) -> None:
    w13, w2 = write_checkpoint(tmp_path, **config)
    args = inputs()
    expected, share = reference.moe_with_clamped_share(args[0], w13, w2, *args[1:], **gate)
    assert share > 0.1
    for module in (
        NVFP4Experts.from_checkpoint(tmp_path, 1, backend=backend),
        NVFP4Experts.from_weights(w13, w2, quant_config=MoEQuantConfig.from_config(config, 1), backend=backend),
    ):
        assert module.backend == backend
        assert module.clamp_limit == gate["clamp_limit"]
        with Calls() as calls:
            out = module(*args)
        assert calls.limits == [gate["clamp_limit"]]
        testing.assert_accurate(out, expected)


def test_tensor_and_expert_parallel_sums(tmp_path: Path) -> None:
    w13, w2 = write_checkpoint(tmp_path, swiglu_limit=LIMIT)
    checkpoint = Checkpoint.open(tmp_path)
    x, topk_weights, topk_ids = inputs(dtype=torch.float32)
    expected = reference.moe(x, w13, w2, topk_weights, topk_ids, clamp_limit=LIMIT)
    for kind, size in (("tp", 3), ("ep", 2)):
        ranks = [
            NVFP4Experts.from_checkpoint(checkpoint, 1, **{f"{kind}_rank": rank, f"{kind}_size": size})
            for rank in range(size)
        ]
        assert ranks[0].intermediate_size == (I // size if kind == "tp" else I)
        assert ranks[0].num_experts == (E // size if kind == "ep" else E)
        partial = sum(module(x, topk_weights, topk_ids).double() for module in ranks)
        testing.assert_accurate(partial, expected, dtype=torch.float32)


def test_linear_from_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    module = NVFP4Linear.from_checkpoint(tmp_path, "layers.0.attn.proj")
    checkpoint = Checkpoint.open(tmp_path)
    x = torch.randn(3, K)
    expected = reference.linear(
        x, checkpoint.linear("layers.0.attn.proj"), checkpoint.tensor("layers.0.attn.proj.bias")
    )
    testing.assert_accurate(module(x), expected)
    with pytest.raises(CheckpointError, match="expected a layer with NVFP4 or MXFP4 experts"):
        NVFP4Experts.from_checkpoint(tmp_path, 5)
