"""The synthetic checkpoints are what their layouts say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoint_files import INDEX, SHARD_1, SHARD_2, SPELLINGS, assert_equal
from torch_nvfp4.checkpoint import Checkpoint, write_checkpoint
from torch_nvfp4.format import dequantize
from torch_nvfp4.gate import Gate


@pytest.mark.parametrize("layout", ["deepseek", "modelopt", "compressed-tensors"])
def test_demo_checkpoint(layout: Any, tmp_path: Path) -> None:
    """What write_checkpoint writes is what its layout says, and the reader finds it."""
    write_checkpoint(
        tmp_path,
        hidden_size=128,
        moe_intermediate_size=64,
        n_routed_experts=3,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        swiglu_limit=5.0,
        layout=layout,
    )
    tensors = load_file(tmp_path / SHARD_1) | load_file(tmp_path / SHARD_2)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == tensors.keys()
    assert set(weight_map.values()) == {SHARD_1, SHARD_2}
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.layout == layout
    assert checkpoint.layers == (0, 1, 2, 3)
    assert (checkpoint.hidden_size, checkpoint.intermediate_size) == (128, 64)
    assert (checkpoint.num_experts, checkpoint.top_k) == (3, 2)
    assert [checkpoint.activation(layer) for layer in range(4)] == [Gate("silu", 5.0, 1.0, 0.0)] * 4
    module, names, kind = SPELLINGS[layout.replace("-tensors", "")]
    data, global_scale = (
        ("weight", "weight_scale_2") if kind == "modelopt" else ("weight_packed", "weight_global_scale")
    )
    for layer in range(4):
        w13, w2 = checkpoint.experts(layer)
        for expert in range(3):
            w1, w3, down = (module.format(layer, expert) + name for name in names)
            assert_equal(w13.data[expert], torch.cat((tensors[f"{w1}.{data}"], tensors[f"{w3}.{data}"])))
            assert_equal(w2.data[expert], tensors[f"{down}.{data}"])
            assert_equal(w2.scale[expert], tensors[f"{down}.weight_scale"])
            scales = torch.stack([tensors[f"{name}.{global_scale}"].reshape(()) for name in (w1, w3, down)])
            expected = scales if kind == "modelopt" else 1 / scales
            assert_equal(torch.stack((*w13.global_scale[expert], w2.global_scale[expert])), expected)
            assert not torch.equal(w13.global_scale[expert, 0], w13.global_scale[expert, 1])


def test_demo_limit_bites(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path,
        hidden_size=256,
        moe_intermediate_size=256,
        n_routed_experts=2,
        num_experts_per_tok=1,
        swiglu_limit=0.5,
    )
    w13, w2 = Checkpoint.open(tmp_path).experts(3)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    gate, up = (x @ dequantize(w13)[1].T).chunk(2, dim=-1)
    assert 0.2 < (gate > 0.5).float().mean() < 0.3
    assert 0.14 < (up.abs() > 0.5).float().mean() < 0.23
    assert (w2.global_scale > 0).all()


def test_demo_deepseek_dtypes(tmp_path: Path) -> None:
    """The leaves beside the experts have the names, dtypes and block shapes of the published checkpoint."""
    write_checkpoint(tmp_path, hidden_size=192, moe_intermediate_size=64, n_routed_experts=2, num_experts_per_tok=1)
    tensors = load_file(tmp_path / SHARD_1) | load_file(tmp_path / SHARD_2)
    block_scaled = [name.removesuffix(".scale") for name in tensors if name.endswith(".scale") and "mtp" not in name]
    assert {name.split(".", 2)[2] for name in block_scaled} == {
        *(f"attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")),
        *(f"ffn.shared_experts.{name}" for name in ("w1", "w2", "w3")),
    }
    for name in block_scaled:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
        assert (weight.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float8_e8m0fnu)
        assert scale.shape == tuple(math.ceil(size / 128) for size in weight.shape)
        assert weight.float().isfinite().all()
        # Dequantized, a weight with standard deviation in^-0.5 again.
        blocks = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        dense = weight.float() * blocks[: weight.shape[0], : weight.shape[1]]
        assert 0.9 < dense.std() * weight.shape[1] ** 0.5 < 1.1
    expected = {
        "layers.0.ffn.experts.0.w1.weight": torch.uint8,
        "layers.0.ffn.experts.0.w1.weight_scale": torch.float8_e4m3fn,
        "layers.0.ffn.experts.0.w1.weight_scale_2": torch.float32,
        "layers.0.ffn.experts.0.w1.input_scale": torch.float32,
        "layers.0.ffn.gate.weight": torch.bfloat16,
        "layers.0.ffn.gate.tid2eid": torch.int64,
        "layers.1.ffn.gate.bias": torch.float32,
        "layers.1.attn.compressor.wkv.weight": torch.bfloat16,
        "layers.1.attn.indexer.weights_proj.weight": torch.bfloat16,
        "layers.0.attn.attn_sink": torch.float32,
        "layers.0.hc_attn_fn": torch.float32,
        "layers.0.attn_norm.weight": torch.bfloat16,
        "embed.weight": torch.bfloat16,
        "head.weight": torch.bfloat16,
        "norm.weight": torch.bfloat16,
        "mtp.0.ffn.experts.0.w1.weight": torch.int8,
        "mtp.0.ffn.experts.0.w1.scale": torch.float8_e8m0fnu,
    }
    assert {name: tensors[name].dtype for name in expected} == expected
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["swiglu_limit"] == 10.0
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert config["quantization_config"]["moe_quant_algo"] == "NVFP4"


def test_demo_same_arguments_same_bytes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 2, "num_experts_per_tok": 1}
    one, two, other = (
        write_checkpoint(tmp_path / name, **sizes, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()
    assert (one / SHARD_1).read_bytes() != (other / SHARD_1).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 100}, "hidden_size to be a positive multiple of 16, got 100"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size to be a positive multiple of 16, got 0"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok <= 32, got 33"),
        ({"num_hidden_layers": 0}, "num_hidden_layers >= 1, got 0"),
        ({"layout": "gguf"}, "gpt-oss, got 'gguf'"),
        ({"swiglu_limit": math.nan}, "positive and finite, or None, got nan"),
        ({"swiglu_limit": 0.0}, "positive and finite, or None, got 0.0"),
    ],
)
def test_demo_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_checkpoint(tmp_path, **arguments)
