"""Models of transformers from tiny checkpoints in every layout, against the same weights dequantized in fp64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.hf_models import LIMIT, QWEN_LAYOUTS, greedy, prompt, relative, write_model
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.gate import Gate

transformers = pytest.importorskip("transformers", minversion="5.23")

from torch_nvfp4.integrations.transformers import (  # noqa: E402
    TorchNVFP4Config,
    from_pretrained,
    unregister,
)
from torch_nvfp4.integrations.transformers.modules import PackedExperts, PackedLinear  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
LAYOUTS = ("deepseek", *QWEN_LAYOUTS)


pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def model(layout: str) -> Path:
        if layout not in made:
            made[layout] = write_model(tmp_path_factory.mktemp(layout), layout)
        return made[layout]

    return model


def load(path: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return AutoModel.from_pretrained(path, dtype=dtype, **kwargs).eval()


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(prompt() if ids is None else ids).logits
    return result


def experts_of(model: Any) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_tokens_are_those_of_the_dequantized_model(models: Callable[[str], Path], layout: str) -> None:
    path = models(layout)
    model, info = load_with_info(path / "packed")
    assert not any(info.values())
    assert len(experts_of(model)) == 4
    oracle = load(path / "dense", experts_implementation="eager")
    assert relative(logits(model), logits(oracle)) < 1e-5
    assert torch.equal(greedy(model, prompt()), greedy(oracle, prompt()))


def load_with_info(path: Path) -> tuple[Any, dict[str, Any]]:
    model, info = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


@pytest.mark.parametrize("layout", ["deepseek", "modelopt"])
def test_bf16_is_no_worse_than_the_dequantized_model_in_bf16(models: Callable[[str], Path], layout: str) -> None:
    path = models(layout)
    oracle = load(path / "dense", experts_implementation="eager")
    dequantized = load(path / "dense", torch.bfloat16, experts_implementation="eager")
    packed = load(path / "packed", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 128, generator=generator).bfloat16()
    ids = torch.randint(0, 8, (128, 2), generator=generator)
    weights = torch.rand(128, 2, generator=generator).bfloat16()
    with torch.no_grad():
        for layer, experts in enumerate(experts_of(packed)):
            name = f"model.layers.{layer}.mlp.experts"
            expected = oracle.get_submodule(name)(x.float(), ids, weights.float())
            error = relative(dequantized.get_submodule(name)(x, ids, weights), expected)
            assert relative(experts(x, ids, weights), expected) <= error
    # A rounding may send a token to other experts in either model: the median token tells.
    tokens = prompt(8, 64)
    expected, first, second = (logits(model, tokens).double() for model in (oracle, dequantized, packed))
    errors = [((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median() for got in (first, second)]
    assert errors[1] <= 1.25 * errors[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_is_what_was_loaded(models: Callable[[str], Path], layout: str, tmp_path: Path) -> None:
    source = models(layout) / "packed"
    model = load(source, torch.bfloat16)
    model.save_pretrained(tmp_path)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path)
    assert after.tensors.keys() == before.tensors.keys()
    for name in before.tensors:
        a, b = before.tensor(name), after.tensor(name)
        assert a.dtype == b.dtype, name
        if a.dtype == torch.float32 and not torch.equal(a, b):
            a = a.bfloat16().float()  # fp32 in the checkpoint, bf16 in the model
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == json.loads((source / "config.json").read_text())["quantization_config"]
    assert torch.equal(logits(load(tmp_path, torch.bfloat16)), logits(model))


def test_a_layer_that_is_not_quantized(models: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers fuses its experts while it loads, and takes them apart when it saves."""
    path = models("modelopt")
    dense = load_file(path / "dense" / "model.safetensors")
    first = {name: value.bfloat16() for name, value in dense.items() if ".layers.0.mlp.experts." in name}
    tensors = {
        name: value for shard in (path / "packed").glob("*.safetensors") for name, value in load_file(shard).items()
    }
    tensors = {name: value for name, value in tensors.items() if ".layers.0.mlp.experts." not in name} | first
    packed, oracle = tmp_path / "packed", tmp_path / "dense"
    for folder, content in (
        (packed, tensors),
        (oracle, dense | {name: value.float() for name, value in first.items()}),
    ):
        folder.mkdir()
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(path / folder.name / "config.json", folder)
    model = load(packed)
    assert [experts.layer for experts in experts_of(model)] == [1, 2, 3]
    assert relative(logits(model), logits(load(oracle, experts_implementation="eager"))) < 1e-5
    load(packed, torch.bfloat16).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], value) for name, value in first.items())
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_hf_quant_config_alone(models: Callable[[str], Path], tmp_path: Path) -> None:
    path = models("modelopt")
    config = json.loads((path / "packed" / "config.json").read_text())
    section = config.pop("quantization_config")
    for file in (path / "packed").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": section["ignore"]}
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": quantization})
    )
    expected = logits(load(path / "packed"))
    model = load(tmp_path)
    assert torch.equal(logits(model), expected)
    model = load(tmp_path, quantization_config=TorchNVFP4Config(backend="reference"))
    assert {experts.packed.backend for experts in experts_of(model)} == {"reference"}  # type: ignore[union-attr]
    unregister()
    assert torch.equal(logits(from_pretrained(tmp_path, dtype=torch.float32)), expected)


@pytest.mark.parametrize("layout", ["deepseek", "compressed-tensors"])
def test_from_pretrained_changes_nothing_for_others(models: Callable[[str], Path], layout: str) -> None:
    path = models(layout) / "packed"
    expected = logits(load(path))
    unregister()
    model = from_pretrained(path, dtype=torch.float32, backend="reference")
    assert relative(logits(model), expected) < 1e-5
    assert experts_of(model)[0].packed.backend == "reference"  # type: ignore[union-attr]
    auto = transformers.quantizers.auto
    assert type(auto.AUTO_QUANTIZATION_CONFIG_MAPPING["fp8"]) is type
    assert "modelopt" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def test_dense_linears_stay_packed(models: Callable[[str], Path]) -> None:
    model = load(models("modelopt") / "packed")
    linears = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert sorted({name.rpartition(".")[2] for name in linears}) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert len(linears) == 16


@pytest.mark.parametrize("mutation", ["limit dropped", "gate and up swapped", "nibbles swapped", "scale inverted"])
def test_a_fault_shows(models: Callable[[str], Path], mutation: str) -> None:
    """The comparison of logits is fine enough to see each of the usual mistakes."""
    path = models("deepseek")
    model = load(path / "packed")
    layer = experts_of(model)[1]
    packed = layer.packed
    assert packed is not None
    w13, w2 = packed.unpacked_weights()
    gate = Gate(clamp_limit=None if mutation == "limit dropped" else LIMIT)
    if mutation == "gate and up swapped":
        w13 = type(w13)(*(torch.cat(part.chunk(2, 1)[::-1], 1) for part in w13))
    elif mutation == "nibbles swapped":
        w13 = w13._replace(data=(w13.data >> 4) | (w13.data << 4))
    elif mutation == "scale inverted":
        w2 = w2._replace(global_scale=w2.global_scale.reciprocal())
    layer.packed = type(packed).from_weights(w13, w2, gate=gate)
    oracle = load(path / "dense", experts_implementation="eager")
    assert relative(logits(model), logits(oracle)) > 1e-3


@pytest.mark.gpu
def test_fp8_activations(models: Callable[[str], Path]) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    path, options = models("modelopt") / "packed", {"dtype": torch.bfloat16, "device_map": {"": 0}}
    usual = from_pretrained(path, **options)
    model = from_pretrained(path, input_quant="fp8", **options)
    assert {experts.packed.backend for experts in experts_of(model)} == {"wgmma_fp8"}  # type: ignore[union-attr]
    got, expected = (logits(one, prompt().cuda()) for one in (model, usual))
    assert 1e-4 < relative(got, expected) < 0.5  # a token that a router sends elsewhere counts too
