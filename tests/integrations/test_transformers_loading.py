"""What may surround a checkpoint when transformers loads it: configs, other formats, other files, other libraries."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.hf_models import prompt, relative
from torch_nvfp4 import quantize
from torch_nvfp4.errors import CheckpointError

transformers = pytest.importorskip("transformers", minversion="5.23")

from torch_nvfp4.integrations.transformers import (  # noqa: E402
    TorchNVFP4Config,
    from_pretrained,
    placement,
    register,
    unregister,
)
from torch_nvfp4.integrations.transformers.modules import PackedExperts, PackedLinear  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
Tensors = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def changed(packed_models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint in one file, with other tensors."""

    def make(change: Callable[[Tensors], None], layout: str = "modelopt") -> Path:
        path = tmp_path / "changed"
        path.mkdir()
        tensors: Tensors = {}
        for shard in packed_models[layout].glob("*.safetensors"):
            tensors |= load_file(shard)
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(packed_models[layout] / "config.json", path)
        return path

    return make


def load(path: Path, **kwargs: Any) -> Any:
    return AutoModel.from_pretrained(path, **{"dtype": torch.float32} | kwargs).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt()).logits


LAYER = "model.layers.1.mlp.experts."


def stacks_in_fp8(tensors: Tensors) -> None:
    """A layer whose experts are stacks of FP8 values with scales."""
    for name in [name for name in tensors if name.startswith(LAYER)]:
        del tensors[name]
    for name, shape in (("gate_up_proj", (8, 128, 128)), ("down_proj", (8, 128, 64))):
        tensors[LAYER + name] = torch.ones(shape).to(torch.float8_e4m3fn)
        tensors[f"{LAYER}{name}_scale_inv"] = torch.full((8, 1, 1), 0.01)


def int8_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = torch.ones(384, 128, dtype=torch.int8)
    tensors["lm_head.weight_scale"] = torch.full((384, 1), 0.01)


def experts_in_int8(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(LAYER)]:
        value = tensors.pop(name)
        if name.endswith(".weight"):
            tensors[name] = torch.ones(value.shape[0], 2 * value.shape[1], dtype=torch.int8)


def int4_linear(tensors: Tensors) -> None:
    """compressed-tensors' weights of 4-bit integers, eight in an int32."""
    module = "model.layers.1.self_attn.q_proj"
    for name in [name for name in tensors if name.startswith(f"{module}.")]:
        del tensors[name]
    tensors[f"{module}.weight_packed"] = torch.zeros(256, 16, dtype=torch.int32)


@pytest.mark.parametrize(("change", "name", "got"), [
    (stacks_in_fp8, f"{LAYER}down_proj", r"F8_E4M3 \[8, 128, 64\]"), (int8_head, "lm_head.weight", r"I8 \[384, 128\]"),
    (experts_in_int8, f"{LAYER}0.down_proj.weight", r"I8 \[128, 64\]"),
    (int4_linear, "model.layers.1.self_attn.q_proj.weight_packed", r"I32 \[256, 16\]"),
])  # fmt: skip
def test_codes_of_other_formats_are_not_taken_for_values(
    changed: Callable[..., Path], change: Callable[[Tensors], None], name: str, got: str
) -> None:
    """transformers would load them without their scales, or leave random weights in their place."""
    with pytest.raises(CheckpointError, match=f"tensor '{name}': expected NVFP4, FP8 .* got {got}; this format is not"):
        load(changed(change))


@pytest.mark.parametrize(("layout", "name"), [
    ("modelopt", "self_attn.q_proj.weight"), ("deepseek", "self_attn.q_a_proj.weight"),
])  # fmt: skip
def test_a_weight_that_transformers_rearranges(
    packed_models: dict[str, Path], layout: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the rows of q and k of models with another order of RoPE's pairs: packed rows would stay as they lie."""
    loading, mapping = transformers.core_model_loading, placement.get_model_conversion_mapping
    converter = loading.WeightConverter([name], [name], [loading.Transpose(0, 1)])
    monkeypatch.setattr(placement, "get_model_conversion_mapping", lambda model: [*mapping(model), converter])
    with pytest.raises(CheckpointError, match="expected a weight that transformers loads as it is, got one that it"):
        load(packed_models[layout])


def test_an_fp8_weight_of_another_size(packed_models: dict[str, Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(packed_models["deepseek"])
    config.q_lora_rank = 64
    words = r"'layers.0.attn.wq_a.weight': expected shape \[64, 128\], as model.layers.0.self_attn.q_a_proj.weight has"
    with pytest.raises(CheckpointError, match=words):
        load(packed_models["deepseek"], config=config)


@pytest.mark.parametrize(("layout", "head"), [("deepseek", "head"), ("modelopt", "lm_head")])
def test_an_nvfp4_head(changed: Callable[..., Path], packed_models: dict[str, Path], layout: str, head: str) -> None:
    def pack(tensors: Tensors) -> None:
        weight = quantize(tensors[f"{head}.weight"].float())
        leaves = (".weight", ".weight_scale", ".weight_scale_2")
        tensors.update({head + leaf: part for leaf, part in zip(leaves, weight, strict=True)})

    model, info = AutoModel.from_pretrained(changed(pack, layout), dtype=torch.float32, output_loading_info=True)
    assert isinstance(model.lm_head, PackedLinear)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert 0.05 < relative(logits(model.eval()), logits(load(packed_models[layout]))) < 0.15


def test_two_models_in_a_directory(packed_models: dict[str, Path], changed: Callable[..., Path]) -> None:
    """transformers takes model.safetensors, and readers of the index its shards: not half of each."""
    path = changed(lambda tensors: tensors["model.norm.weight"].mul_(2))
    for file in packed_models["modelopt"].glob("model*safetensors*"):
        shutil.copy(file, path)
    words = "expected one model in a directory, got model.safetensors, which transformers reads, and an index"
    with pytest.raises(CheckpointError, match=words):
        load(path)


def test_saving_in_place(packed_models: dict[str, Path], tmp_path: Path) -> None:
    """transformers writes one file, removes the shards and leaves their index."""
    path = tmp_path / "copy"
    shutil.copytree(packed_models["modelopt"], path)
    model = load(path)
    model.save_pretrained(path)
    assert not list(path.glob("model-*.safetensors"))
    assert (path / "model.safetensors.index.json").exists()
    assert torch.equal(logits(load(path)), logits(model))


@pytest.mark.parametrize("layout", ["deepseek", "modelopt"])
def test_a_config_stays_as_it_is(packed_models: dict[str, Path], layout: str) -> None:
    path = packed_models[layout]
    config = transformers.AutoConfig.from_pretrained(path)
    before = copy.deepcopy(config.quantization_config)
    expected = logits(load(path))
    for loader in (AutoModel.from_pretrained, from_pretrained):
        for _ in range(2):
            assert torch.equal(logits(loader(path, config=config, dtype=torch.float32)), expected)
            assert config.quantization_config == before


@pytest.mark.parametrize("loader", [AutoModel.from_pretrained, from_pretrained])
def test_the_config_of_a_loaded_model(packed_models: dict[str, Path], loader: Callable[..., Any]) -> None:
    model = load(packed_models["modelopt"], quantization_config=TorchNVFP4Config("reference"))
    again = loader(packed_models["modelopt"], config=model.config, dtype=torch.float32)
    assert relative(logits(again), logits(model)) < 1e-5
    again.config.to_json_string()
    expected = json.loads((packed_models["modelopt"] / "config.json").read_text())["quantization_config"]
    assert again.config.to_dict()["quantization_config"] == expected


def test_a_config_object_without_the_checkpoints_section(packed_models: dict[str, Path], tmp_path: Path) -> None:
    """What is saved says what it is all the same."""
    config = transformers.AutoConfig.from_pretrained(packed_models["modelopt"])
    config.quantization_config = TorchNVFP4Config()
    load(packed_models["modelopt"], config=config).save_pretrained(tmp_path)
    expected = json.loads((packed_models["modelopt"] / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == expected


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_hf_quant_config(packed_models: dict[str, Path], changed: Callable[..., Path], content: str) -> None:
    path = changed(lambda tensors: None)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "hf_quant_config.json").write_text(content)
    for loader in (AutoModel.from_pretrained, from_pretrained):
        with pytest.raises(CheckpointError, match=r"hf_quant_config.json: expected .* JSON, got"):
            loader(path)


def test_keywords_of_from_pretrained(packed_models: dict[str, Path]) -> None:
    path = packed_models["modelopt"]
    expected = logits(load(path))
    assert torch.equal(logits(from_pretrained(path, config=str(path), dtype=torch.float32)), expected)
    kind = transformers.AutoModelForSequenceClassification
    model = from_pretrained(path, auto_class=kind, num_labels=3, dtype="auto", attn_implementation="eager")
    assert (model.score.out_features, model.dtype) == (3, torch.bfloat16)
    assert model.config._attn_implementation == "eager"


def test_inside_another_default_device_and_dtype(packed_models: dict[str, Path]) -> None:
    expected = logits(load(packed_models["deepseek"]))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("cpu"):
            model = load(packed_models["deepseek"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("wraps", [functools.wraps, lambda _: lambda function: function])
def test_another_library_wraps_the_choice(
    packed_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, wraps: Callable[..., Any]
) -> None:
    """Registered twice or taken back in the middle, its function stays and ours does nothing."""
    unregister()
    names = ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")
    auto, calls = transformers.quantizers.auto, []
    before = [dict(getattr(auto, name)) for name in names]
    register()
    inner = transformers.modeling_utils.get_hf_quantizer

    @wraps(inner)
    def other(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(config, quantization_config, *args, **kwargs)

    try:
        monkeypatch.setattr(transformers.modeling_utils, "get_hf_quantizer", other)
        register()
        assert not [each for each in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.values()
                    if type(getattr(each, "original", None)).__name__ == "_Dispatch"]  # fmt: skip
        model = load(packed_models["modelopt"])
        assert any(isinstance(module, PackedExperts) for module in model.modules())
        unregister()
        assert transformers.modeling_utils.get_hf_quantizer is other
        assert [dict(getattr(auto, name)) for name in names] == before
        from_pretrained(packed_models["modelopt"])
        assert len(calls) == 2
    finally:
        monkeypatch.undo()
        unregister()
        transformers.modeling_utils.get_hf_quantizer = inner.__wrapped__
