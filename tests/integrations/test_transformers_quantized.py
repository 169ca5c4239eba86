"""What ``torch-nvfp4 quantize`` writes from models that transformers saved or that are published, in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.fp64_loop import dense
from helpers.hf_models import greedy, prompt, relative, write_dense, write_model
from torch_nvfp4.convert import open_conversion

transformers = pytest.importorskip("transformers", minversion="5.23")

from torch_nvfp4.integrations.transformers import register, unregister  # noqa: E402

LEAVES = (".weight_scale", ".weight_scale_2", ".weight_global_scale", ".input_scale", ".input_global_scale")
AutoModel = transformers.AutoModelForCausalLM


@pytest.fixture(scope="module", params=["qwen3", "deepseek"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16: Qwen3-MoE as transformers saves it, DeepSeek-V4 under its published names."""
    path = tmp_path_factory.mktemp(request.param)
    layout = {"qwen3": "modelopt", "deepseek": "deepseek"}[request.param]
    made = write_model(path, layout, num_hidden_layers=2) / "dense"
    if request.param == "qwen3":
        model = AutoModel.from_pretrained(made, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".experts." in name:  # values that no NVFP4 weight had
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(path / "source")
        return path / "source"
    tensors = {name: value.bfloat16() if value.is_floating_point() else value for name, value in load(made).items()}
    generator = torch.Generator().manual_seed(7)
    for name in tensors:
        if ".ffn.experts." in name:
            noise = torch.randn(tensors[name].shape, generator=generator) * 0.1
            tensors[name] = noise.bfloat16()
    (path / "source").mkdir()
    save_file(tensors, path / "source" / "model.safetensors", metadata={"format": "pt"})
    (path / "source" / "config.json").write_text((made / "config.json").read_text())
    return path / "source"


def load(path: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that NVFP4 tensors stand for, by the names that they had before."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight_packed").removesuffix(".weight")
        if name.endswith(LEAVES):
            continue
        if f"{module}.weight_scale" not in tensors:
            result[name] = tensor
        elif name == f"{module}.weight_packed":
            scale = 1.0 / tensors[f"{module}.weight_global_scale"].double()
            result[f"{module}.weight"] = dense(tensor, tensors[f"{module}.weight_scale"], float(scale))
        elif name == f"{module}.weight":
            scale = tensors[f"{module}.weight_scale_2"].double()
            result[name] = dense(tensor, tensors[f"{module}.weight_scale"], float(scale))
    return result


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_transformers_computes_what_was_quantized(source: Path, tmp_path: Path, layout: str) -> None:
    conversion = open_conversion(source, tmp_path / "result", layout=layout)
    try:
        conversion.write(1)
        conversion.compare(1)
        conversion.finish()
    finally:
        conversion.close()
    # The same model with the dequantized weights, without this package's reader; each is near what it was made from.
    before, meant = load(source), dequantized(load(tmp_path / "result"))
    assert meant.keys() == before.keys()
    experts = [name for name in meant if ".experts." in name]
    assert len(experts) == 2 * 8 * 3
    for name, values in meant.items():
        if name in experts:
            assert 0.05 < relative(values, before[name]) < 0.15, name
        else:
            assert torch.equal(values, before[name]), name
    write_dense(tmp_path / "dense", meant, json.loads((source / "config.json").read_text()))
    register()
    try:
        model = AutoModel.from_pretrained(tmp_path / "result", dtype=torch.float32).eval()
    finally:
        unregister()
    oracle = AutoModel.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    packed = [name for name, _ in model.named_modules() if name.endswith(".packed")]
    assert len(packed) == 2
    with torch.no_grad():
        got, expected = model(prompt()).logits, oracle(prompt()).logits
    assert relative(got, expected) < 1e-5
    assert torch.equal(greedy(model, prompt()), greedy(oracle, prompt()))
