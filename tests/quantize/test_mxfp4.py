"""torch-nvfp4 quantize of MXFP4 sources, bit for bit; of experts without a gate, and with biases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.checkpoint_files import raises
from helpers.fp64_loop import Matrices, dense, experts_of, raw_tensors
from torch_nvfp4.checkpoint import Checkpoint, write_checkpoint
from torch_nvfp4.convert import LayerError, open_conversion
from torch_nvfp4.format import dequantize

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 2, 4, 64, 96
ROOTS = {
    "deepseek-mxfp4": ("layers.{}.ffn.experts.", ("w1", "w3", "w2")),
    "quark-mxfp4": ("model.layers.{}.mlp.experts.", ("gate_proj", "up_proj", "down_proj")),
    "compressed-tensors-mxfp4": ("language_model.model.layers.{}.block_sparse_moe.experts.", ("w1", "w3", "w2")),
    "gpt-oss": ("model.layers.{}.mlp.experts.", ("gate_proj", "up_proj", "down_proj")),
}
LEAVES = {
    "modelopt": (".weight", ".weight_scale", ".weight_scale_2"),
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_global_scale"),
}


def make(path: Path, layout: Any, **sizes: int) -> Path:
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS} | sizes
    return write_checkpoint(
        path, layout=layout, num_experts_per_tok=2, num_hidden_layers=LAYERS, swiglu_limit=2.0, **sizes
    )


def convert(path: Path, destination: Path, **options: Any) -> list[LayerError]:
    conversion = open_conversion(path, destination, **options)
    try:
        conversion.write(2)
        errors = conversion.compare(2)
        conversion.finish()
    finally:
        conversion.close()
    return errors


def matrix(tensors: dict[str, Tensor], module: str, layout: str) -> Tensor:
    codes, scale, stored = (tensors[module + leaf] for leaf in LEAVES[layout])
    assert (codes.dtype, scale.dtype, stored.dtype) == (torch.uint8, torch.float8_e4m3fn, torch.float32)
    return dense(codes, scale, stored.item() if layout == "modelopt" else 1 / stored.item())


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.contiguous().view(torch.int64), expected.contiguous().view(torch.int64))


def check_module(tensors: dict[str, Tensor], module: str, expected: Tensor, bias: Tensor | None, layout: str) -> None:
    assert same_bits(matrix(tensors, module, layout), expected), module
    assert (f"{module}.bias" in tensors) == (bias is not None)
    if bias is not None:
        assert torch.equal(tensors[f"{module}.bias"].double(), bias), module


@pytest.mark.parametrize("layout", LEAVES)
@pytest.mark.parametrize("source", ROOTS)
def test_every_bit(source: str, layout: str, tmp_path: Path) -> None:
    make(tmp_path / "source", source)
    errors = convert(tmp_path / "source", tmp_path / "result", layout=layout)
    assert [(error.relative_l2, error.problem, error.matrices) for error in errors] == [(0.0, None, 3 * EXPERTS)] * 2
    before, after = raw_tensors(tmp_path / "source"), raw_tensors(tmp_path / "result")
    root, names = ROOTS[source]
    for layer in range(LAYERS):
        for index, expert in enumerate(experts_of(before, source, layer, EXPERTS, INTERMEDIATE)):
            for name, expected, bias in zip(names, expert[:3], expert[3:], strict=True):
                check_module(after, f"{root.format(layer)}{index}.{name}", expected, bias, layout)
    # What is neither an expert nor FP8 stays, MXFP4 of multi-token prediction too.
    for name, tensor in before.items():
        if ".experts." in name and not name.startswith("mtp."):
            continue
        if name in after and tensor.dtype != torch.float8_e4m3fn:
            assert torch.equal(after[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert {name for name in before if name.startswith("mtp.0.ffn.experts.")} <= after.keys()
    check_reader(tmp_path / "result", before, source, layout)


def check_reader(path: Path, before: dict[str, Tensor], source: str, layout: str) -> None:
    checkpoint = Checkpoint.open(path)
    assert checkpoint.layout == ("deepseek" if (source, layout) == ("deepseek-mxfp4", "modelopt") else layout)
    for layer in checkpoint.layers:
        weights = checkpoint.experts(layer)
        for index, expert in enumerate(experts_of(before, source, layer, EXPERTS, INTERMEDIATE)):
            assert expert.gate is not None
            gate_up = dequantize(weights.w13, torch.float64)[index]
            assert same_bits(gate_up, torch.cat((expert.gate, expert.up)))
            assert same_bits(dequantize(weights.w2, torch.float64)[index], expert.down)
            if expert.down_bias is not None:
                assert weights.w2_bias is not None
                assert torch.equal(weights.w2_bias[index].double(), expert.down_bias)
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == layout
    assert "quantization_config" not in config.get("text_config", {})


def test_excluded_layers_stay_mxfp4(tmp_path: Path) -> None:
    make(tmp_path / "source", "gpt-oss")
    convert(tmp_path / "source", tmp_path / "result", exclude=["model.layers.1.*"])
    before, after = raw_tensors(tmp_path / "source"), raw_tensors(tmp_path / "result")
    for name in ("gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias", "down_proj_bias"):
        name = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(after[name], before[name])
    checkpoint = Checkpoint.open(tmp_path / "result")
    assert checkpoint.layers == (0, 1)
    for layer in checkpoint.layers:
        got = dequantize(checkpoint.experts(layer).w2, torch.float64)
        for index, expert in enumerate(experts_of(before, "gpt-oss", layer, EXPERTS, INTERMEDIATE)):
            assert same_bits(got[index], expert.down)


def rewrite(path: Path, tensors: dict[str, Tensor]) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def test_exponents_that_nvfp4_does_not_have(tmp_path: Path) -> None:
    tensors = raw_tensors(make(tmp_path / "source", "gpt-oss"))
    scales = tensors["model.layers.0.mlp.experts.gate_up_proj_scales"]
    scales[1, 9, 0], scales[1, 3, 1] = 140, 100
    rewrite(tmp_path / "source", tensors)
    words = ("gate_up_proj_scales'", "got 2^-27 at row 3, group 1 and 2^13 at row 9, group 0 of expert 1", "--exclude")
    with raises(*words):
        convert(tmp_path / "source", tmp_path / "result")
    scales[1, 9, 0], scales[1, 3, 1] = 120, 255
    rewrite(tmp_path / "source", tensors)
    with raises("expected finite E8M0 scales, got NaN (0xff) at row 3, group 1 of expert 1"):
        convert(tmp_path / "source", tmp_path / "other")


def test_a_bias_that_is_not_finite(tmp_path: Path) -> None:
    tensors = raw_tensors(make(tmp_path / "source", "gpt-oss"))
    tensors["model.layers.1.mlp.experts.down_proj_bias"][2, 7] = math.inf
    rewrite(tmp_path / "source", tensors)
    with raises("layers.1.mlp.experts.down_proj_bias'", "expected finite biases, got NaN or infinity", "of expert 2"):
        convert(tmp_path / "source", tmp_path / "result")


def test_a_changed_bit_is_found(tmp_path: Path) -> None:
    make(tmp_path / "source", "quark-mxfp4")
    conversion = open_conversion(tmp_path / "source", tmp_path / "result")
    try:
        conversion.write()
        file = next(shard for shard in conversion.shards if shard.label == "layer 1")
        name = "model.layers.1.mlp.experts.2.up_proj.weight"
        with open(tmp_path / "result" / file.name, "r+b") as stream:
            stream.seek(file.entries[name].begin + 5)
            byte = stream.read(1)[0]
            stream.seek(file.entries[name].begin + 5)
            stream.write(bytes([byte ^ 8]))  # the sign of one value
        errors = conversion.compare()
    finally:
        conversion.close()
    assert errors[0].problem is None
    assert "experts.2.up_proj has not the values of the source, which is MXFP4" in str(errors[1].problem)
    assert 0 < errors[1].relative_l2 < math.inf


def unquantized(path: Path, layout: str) -> tuple[dict[str, Tensor], list[list[Matrices]]]:
    """The tensors of a written checkpoint without its experts, and these in fp64."""
    tensors = raw_tensors(make(path, layout))
    experts = [experts_of(tensors, layout, layer, EXPERTS, INTERMEDIATE) for layer in range(LAYERS)]
    return {name: tensor for name, tensor in tensors.items() if ".experts." not in name}, experts


@pytest.mark.parametrize("swapped", [True, False])
def test_gpt_oss_in_bf16(swapped: bool, tmp_path: Path) -> None:
    """transformers' own layout: [E, K, 2I], gate and up in turns, with biases. MXFP4 values are bf16 values."""
    path = tmp_path / "source"
    tensors, experts = unquantized(path, "gpt-oss")
    for layer, matrices in enumerate(experts):
        root = f"model.layers.{layer}.mlp.experts."
        both = torch.stack([torch.stack((e.gate, e.up), 1).flatten(0, 1) for e in matrices])
        down = torch.stack([e.down for e in matrices])
        tensors[f"{root}gate_up_proj"] = (both.transpose(1, 2) if swapped else both).bfloat16()
        tensors[f"{root}down_proj"] = (down.transpose(1, 2) if swapped else down).bfloat16()
        bias = torch.stack([torch.stack((e.gate_bias, e.up_bias), 1).flatten() for e in matrices])
        tensors[f"{root}gate_up_proj_bias"] = bias.bfloat16()
        tensors[f"{root}down_proj_bias"] = torch.stack([e.down_bias for e in matrices]).bfloat16()
    rewrite(path, tensors)
    errors = convert(path, tmp_path / "result")
    assert all(error.problem is None and 0 < error.relative_l2 < 0.1 for error in errors)
    checkpoint = Checkpoint.open(tmp_path / "result")
    for layer, matrices in enumerate(experts):
        weights = checkpoint.experts(layer)
        assert weights.w13_bias is not None
        assert weights.w2_bias is not None
        for index, expert in enumerate(matrices):
            assert expert.gate is not None
            wanted = torch.cat((expert.gate, expert.up))
            got = dequantize(weights.w13, torch.float64)[index]
            assert float((got - wanted).norm() / wanted.norm()) < 0.1
            assert torch.equal(weights.w13_bias[index].double(), torch.cat((expert.gate_bias, expert.up_bias)))
            assert torch.equal(weights.w2_bias[index].double(), expert.down_bias)


def test_experts_without_a_gate(tmp_path: Path) -> None:
    path = tmp_path / "source"
    tensors, experts = unquantized(path, "nemotron")
    for layer, matrices in enumerate(experts):
        for index, expert in enumerate(matrices):
            root = f"backbone.layers.{layer}.mixer.experts.{index}."
            tensors |= {
                f"{root}up_proj.weight": expert.up.bfloat16(),
                f"{root}down_proj.weight": expert.down.bfloat16(),
            }
    rewrite(path, tensors)
    errors = convert(path, tmp_path / "result")
    assert [error.matrices for error in errors] == [2 * EXPERTS] * LAYERS
    checkpoint = Checkpoint.open(tmp_path / "result")
    assert checkpoint.layout == "nemotron"
    for layer, matrices in enumerate(experts):
        weights = checkpoint.experts(layer)
        assert not weights.gated
        for index, expert in enumerate(matrices):
            for got, wanted in ((weights.w13, expert.up), (weights.w2, expert.down)):
                values = dequantize(got, torch.float64)[index]
                assert float((values - wanted).norm() / wanted.norm()) < 0.12
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"mlp_hidden_act": "silu"}))
    with raises("expected gate, up and down of experts 0..3, got no gate projection of expert 0"):
        open_conversion(path, tmp_path / "other")


def test_biases_of_single_matrices(tmp_path: Path) -> None:
    """That of a fused matrix is split with it, here in turns."""
    path = tmp_path / "source"
    tensors, experts = unquantized(path, "gpt-oss")
    for layer, matrices in enumerate(experts):
        for index, expert in enumerate(matrices):
            root = f"model.layers.{layer}.mlp.experts.{index}."
            assert expert.gate is not None
            tensors[f"{root}gate_up_proj.weight"] = torch.stack((expert.gate, expert.up), 1).flatten(0, 1).bfloat16()
            tensors[f"{root}gate_up_proj.bias"] = torch.stack((expert.gate_bias, expert.up_bias), 1).flatten().float()
            tensors[f"{root}down_proj.weight"] = expert.down.bfloat16()
    rewrite(path, tensors)
    convert(path, tmp_path / "result")
    for layer, matrices in enumerate(experts):
        weights = Checkpoint.open(tmp_path / "result").experts(layer)
        assert weights.w2_bias is None
        assert weights.w13_bias is not None
        for index, expert in enumerate(matrices):
            assert torch.equal(weights.w13_bias[index].double(), torch.cat((expert.gate_bias, expert.up_bias)))
    tensors["model.layers.1.mlp.experts.3.gate_up_proj.bias"] = torch.ones(INTERMEDIATE)
    rewrite(path, tensors)
    with raises("3.gate_up_proj.bias'", "expected shape [192], one value per row, got [96]"):
        open_conversion(path, tmp_path / "other")


def test_shards_of_the_result(tmp_path: Path) -> None:
    make(tmp_path / "source", "gpt-oss")
    convert(tmp_path / "source", tmp_path / "result")
    first = load_file(min((tmp_path / "result").glob("*.safetensors")))
    assert len(first) == EXPERTS * 3 * 4  # codes, scale, global scale, bias
    bias = first["model.layers.0.mlp.experts.3.up_proj.bias"]
    assert (bias.dtype, bias.shape) == (torch.bfloat16, (INTERMEDIATE,))
