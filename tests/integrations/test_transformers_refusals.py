"""What the integration with transformers refuses, in which words, and that it leaves others alone."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.hf_models import prompt
from torch_nvfp4.errors import CheckpointError
from torch_nvfp4.quant_config import MoEQuantConfig

transformers = pytest.importorskip("transformers", minversion="5.23")

from torch_nvfp4.integrations.transformers import TorchNVFP4Config, from_pretrained, register, unregister  # noqa: E402
from torch_nvfp4.integrations.transformers.config import is_mxfp4_config, is_nvfp4_config  # noqa: E402
from torch_nvfp4.integrations.transformers.fp8 import FP8Weight  # noqa: E402
from torch_nvfp4.integrations.transformers.modules import PackedExperts, PackedLinear, Part, expert_parts  # noqa: E402
from torch_nvfp4.integrations.transformers.versions import HOOKS, unknown_version, unmet  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
auto = transformers.quantizers.auto


pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def copy(packed_models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint whose config.json and tensors are changed; the index names what the shards then hold."""

    def make(layout: str, tensors: Callable[[dict[str, torch.Tensor]], None] | None = None, **config: Any) -> Path:
        path = tmp_path / "copy"
        shutil.copytree(packed_models[layout], path)
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        weight_map = {}
        for shard in sorted(path.glob("*.safetensors")):
            content = load_file(shard)
            if tensors is not None:
                tensors(content)
            save_file(content, shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(content, shard.name)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return path

    return make


def test_every_hook_is_there() -> None:
    """Run on the newest release, this names the hook that broke."""
    assert list(unmet()) == []
    assert unknown_version(transformers.__version__) is None


class Without:
    """An object as it is, but for one attribute, which may be inside another."""

    def __init__(self, found: Any, path: str) -> None:
        self._found = found
        self._name, _, self._rest = path.partition(".")

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._found, name)
        if not self._rest:
            raise AttributeError(f"no attribute {name}")
        return Without(getattr(self._found, name), self._rest)


@pytest.mark.parametrize("hook", HOOKS, ids=".".join)
def test_a_hook_that_broke_is_named(hook: tuple[str, str]) -> None:
    module, path = hook

    def load(wanted: str) -> Any:
        found = importlib.import_module(wanted)
        return Without(found, path) if wanted == module else found

    expected = f"at least ({', '.join(HOOKS[hook])})" if HOOKS[hook] else "it to be there"
    assert list(unmet(load)) == [f"{module}.{path}: expected {expected}, got nothing"]


def test_a_hook_with_other_parameters_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.core_model_loading, "rename_source_key", lambda key, mapping: key)
    expected = "source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict"
    problem = f"rename_source_key: expected at least ({expected}), got (key, mapping)"
    assert [text.partition("core_model_loading.")[2] for text in unmet()] == [problem]
    unregister()
    with pytest.raises(
        RuntimeError, match=f"torch_nvfp4 with transformers {transformers.__version__}: .*{re.escape(problem)}"
    ):
        register()
    assert "torch_nvfp4" not in auto.AUTO_QUANTIZER_MAPPING


@pytest.mark.parametrize("version", ["5.22.1", "6.0.0", "4.57.0", "unknown"])
def test_another_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown_version(version) == f"expected transformers >= 5.23, < 6, got {version}"
    unregister()
    # transformers replaces its module while it is imported.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(RuntimeError, match=f"expected transformers >= 5.23, < 6, got {version}"):
        register()
    assert "torch_nvfp4" not in auto.AUTO_QUANTIZER_MAPPING


def test_unregister_leaves_nothing() -> None:
    unregister()
    names = ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING", "LOADING_ATTRIBUTES_CONFIG_TYPES")
    before = [type(value)(value) for value in (getattr(auto, name) for name in names)]
    chooser = transformers.modeling_utils.get_hf_quantizer
    register()
    register()
    unregister()
    unregister()
    for name, value in zip(names, before, strict=True):
        assert getattr(auto, name) == value
    assert transformers.modeling_utils.get_hf_quantizer is chooser


def test_other_checkpoints_go_to_transformers() -> None:
    for method, kind in (("fp8", "FineGrainedFP8Config"), ("compressed-tensors", "CompressedTensorsConfig")):
        declared = {"quant_method": method, "format": "float-quantized"}
        if method == "fp8":
            assert type(auto.AutoQuantizationConfig.from_dict(declared)).__name__ == kind
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method].original.__name__ == kind
    with pytest.raises(ValueError, match="expected NVFP4 weights beside quant_method 'modelopt', got quant_algo 'FP8'"):
        auto.AutoQuantizationConfig.from_dict({"quant_method": "modelopt", "quant_algo": "FP8"})


@pytest.mark.parametrize(("config", "expected"), [
    ({"quant_method": "fp8", "moe_quant_algo": "NVFP4"}, True),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, True),
    ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, True),
    ({"quantization": {"quant_algo": "NVFP4"}}, True),
    ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4"}}}, True),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, True),
    ({"quant_method": "compressed-tensors", "format": "mixed-precision",
      "config_groups": {"g": {"format": "nvfp4-pack-quantized"}}}, True),
    ({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": {}}}, False),
    ({"quant_method": "fp8"}, False), ({"quant_method": "modelopt", "quant_algo": "FP8"}, False),
    ({"quant_algo": None, "quantized_layers": ["a"], "config_groups": 3}, False), (None, False), ("NVFP4", False),
])  # fmt: skip
def test_which_configs_are_nvfp4(config: Any, expected: bool) -> None:
    assert is_nvfp4_config(config) is expected


def test_a_gate_that_the_model_does_not_compute(copy: Callable[..., Path]) -> None:
    """Qwen3-MoE's code has no clamp, so one in its config is neither dropped nor added."""
    words = (
        r"model.layers.0.mlp.experts \(Qwen3MoeExperts\): expected the gate that its config declares "
        r"\(silu, clamp_limit 7\), got another one \(silu, no clamp\); a clamp is neither dropped nor added"
    )
    with pytest.raises(CheckpointError, match=words):
        AutoModel.from_pretrained(copy("modelopt", swiglu_limit=7.0))


def test_the_models_default_limit_counts(copy: Callable[..., Path], packed_models: dict[str, Path]) -> None:
    path = copy("deepseek")
    config = json.loads((path / "config.json").read_text())
    del config["swiglu_limit"]
    (path / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_pretrained(path)
    assert {experts.packed.clamp_limit for experts in model.modules() if isinstance(experts, PackedExperts)} == {10.0}


def test_experts_that_the_model_does_not_have(copy: Callable[..., Path]) -> None:
    """Pruned layers have other numbers of experts, and transformers' class has one number for all."""

    def prune(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.2.mlp.experts.7." in name]:
            del tensors[name]

    path = copy("modelopt", prune)
    with pytest.raises(
        CheckpointError, match=r"expected experts 0\.\.7 in layer 2 \(from config.json\), got no expert 7"
    ):
        AutoModel.from_pretrained(path)


def test_sizes_that_the_model_does_not_have(copy: Callable[..., Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(copy("modelopt"))
    config.moe_intermediate_size = 32
    words = r"expected \[E, K, I\] \[8, 128, 32\] in layer 0, as the model has, got \[8, 128, 64\]"
    with pytest.raises(CheckpointError, match=words):
        AutoModel.from_pretrained(config._name_or_path, config=config)


def test_a_linear_that_the_model_does_not_have(copy: Callable[..., Path]) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1.self_attn.q_proj" in name]:
            tensors[name.replace("q_proj", "query")] = tensors.pop(name)

    path = copy("modelopt", rename)
    words = (
        "NVFP4 linear 'model.layers.1.self_attn.query': expected a linear model.layers.1.self_attn.query in Qwen3Moe"
    )
    with pytest.raises(CheckpointError, match=words):
        AutoModel.from_pretrained(path)


@pytest.mark.parametrize(("config", "expected"), [
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, True),
    ({"quant_method": "fp8", "expert_dtype": "fp4", "weight_block_size": [128, 128]}, True),
    ({"quant_method": "fp8", "expert_dtype": "fp4", "moe_quant_algo": "NVFP4"}, False),
    ({"quant_method": "fp8"}, False),
    ({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}, True),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": {"format": "mxfp4-pack-quantized"}}}, True),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, False),
    ({"quant_method": "quark", "global_quant_config":
      {"weight": {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0"}}}, True),
    ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, False),
    ({"quant_method": "quark", "global_quant_config": {"weight": [3]}}, False), ({"quant_method": "quark"}, False),
    ({"format": "mxfp4-pack-quantized"}, False), (None, False), ("mxfp4", False),
])  # fmt: skip
def test_which_configs_are_mxfp4(config: Any, expected: bool) -> None:
    assert is_mxfp4_config(config) is expected


@pytest.mark.parametrize("device_map", [
    {"": "disk"}, {"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}, {"model": 0, "lm_head": 1},
])  # fmt: skip
def test_several_devices_and_offloading(
    packed_models: dict[str, Path], device_map: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"device_map: expected one device, got .*; pass device_map='cuda:0'.*tp_plan"):
        AutoModel.from_pretrained(packed_models["modelopt"], device_map=device_map, offload_folder=tmp_path)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
def test_one_device(packed_models: dict[str, Path], device_map: Any) -> None:
    if device_map == "auto" and torch.accelerator.is_available():
        return
    model = AutoModel.from_pretrained(packed_models["modelopt"], device_map=device_map, dtype=torch.float32)
    expected = AutoModel.from_pretrained(packed_models["modelopt"], dtype=torch.float32)
    assert torch.equal(model(prompt()).logits, expected(prompt()).logits)


def test_auto_over_several_gpus(monkeypatch: pytest.MonkeyPatch, packed_models: dict[str, Path]) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="expected one device, got 'auto' over 2 devices"):
        AutoModel.from_pretrained(packed_models["modelopt"], device_map="auto")


def test_from_pretrained_of_a_checkpoint_without_nvfp4(copy: Callable[..., Path]) -> None:
    path = copy("modelopt", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"expected a config that declares NVFP4 .*, got {'quant_method': 'fp8'}"):
        from_pretrained(path)


def test_a_backend_is_a_name() -> None:
    with pytest.raises(TypeError, match="backend: expected a string or None, got int"):
        TorchNVFP4Config(backend=3)  # type: ignore[arg-type]


def test_fp8_activations_are_never_left_out(packed_models: dict[str, Path]) -> None:
    words = (
        r"input_quant='fp8' cannot run this MoE layer \(cpu, .*\): expected a GPU of compute capability 9\.0, got cpu"
    )
    path, asked = packed_models["modelopt"], TorchNVFP4Config(input_quant="fp8")
    with pytest.raises(ValueError, match=words):
        AutoModel.from_pretrained(path, dtype=torch.bfloat16, quantization_config=asked)
    with pytest.raises(ValueError, match=words):
        from_pretrained(path, dtype=torch.bfloat16, input_quant="fp8")
    with pytest.raises(ValueError, match="input_quant: expected None or 'fp8', got 'int8'"):
        from_pretrained(path, input_quant="int8")
    config = transformers.AutoConfig.from_pretrained(path)
    config.quantization_config = asked  # as that of a loaded model
    with pytest.raises(ValueError, match=words):
        AutoModel.from_pretrained(path, config=config, dtype=torch.bfloat16)


def test_saving_changed_weights(packed_models: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(packed_models["deepseek"], dtype=torch.bfloat16)
    linear = model.model.layers[1].self_attn.q_a_proj.weight
    with torch.no_grad():
        linear[0, 0] += 1.0
    with pytest.raises(
        ValueError, match=r"layers.1.attn.wq_a.weight: expected the weight as it was loaded, to be written"
    ):
        model.save_pretrained(tmp_path)
    with torch.no_grad():
        linear[0, 0] -= 1.0
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    state = experts.packed.state_dict()  # type: ignore[union-attr]
    state["w2_weight"][0, 0, 0] ^= 1
    experts.packed.load_state_dict(state)  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match=r"mlp.experts: expected the packed weights and biases of .*, to write them again, got others"
    ):
        model.save_pretrained(tmp_path)


def test_fp8_blocks_at_an_edge() -> None:
    """The last block of a matrix whose size is no multiple of 128 is smaller; other grids are refused."""
    codes = torch.ones(192, 130, dtype=torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    tensors = {"w": codes, "s": scale}
    checkpoint: Any = SimpleNamespace(tensor=tensors.__getitem__)
    expected = torch.ones(192, 130)
    expected[:, 128:] *= 2
    expected[128:] *= 4
    weight = FP8Weight("w", "s", (128, 128))
    assert torch.equal(weight.dequantized(checkpoint, torch.float32), expected)
    tensors["s"] = torch.full((), 3.0)
    assert torch.equal(weight.dequantized(checkpoint, torch.float32), torch.full((192, 130), 3.0))
    tensors["s"] = torch.arange(192.0)
    assert torch.equal(weight.dequantized(checkpoint, torch.float32)[:, 7], torch.arange(192.0))
    tensors["s"] = torch.ones(3, 2)
    with pytest.raises(CheckpointError, match=r"s: expected shape \[2, 2\] for blocks of 128 x 128.*, got \[3, 2\]"):
        weight.dequantized(checkpoint, torch.float32)


def test_a_packed_linear_has_no_dense_weight(packed_models: dict[str, Path]) -> None:
    model = AutoModel.from_pretrained(packed_models["modelopt"])
    linear = next(module for module in model.modules() if isinstance(module, PackedLinear))
    assert (linear.weight.device, linear.weight.dtype) == (torch.device("cpu"), torch.uint8)
    with pytest.raises(ValueError, match="expected a linear with a dense weight to merge an adapter into"):
        linear.weight.data += 1


@pytest.mark.parametrize(("kind", "expected"), [
    ("Qwen3MoeConfig", "silu, no clamp"), ("DeepseekV4Config", "silu, clamp_limit 10"),
    ("GptOssConfig", "silu (alpha 1.702, beta 1), clamp_limit 7"), ("Qwen3_5MoeConfig", "silu, no clamp"),
    ("Gemma4TextConfig", "gelu_tanh, no clamp"), ("Llama4TextConfig", "silu, no clamp"),
])  # fmt: skip
def test_a_config_object_gives_its_gate(kind: str, expected: str) -> None:
    """Objects have what no config.json has: id2label with integers as keys, and the defaults of their class."""
    config = getattr(transformers, kind)(num_labels=3)
    config.id2label = {0: "a", 1: "b", 2: "c"}
    assert str(MoEQuantConfig.from_config(config, 0).gate) == expected


def test_plans_for_parallelism() -> None:
    def parts(gate_up: Part, down: Part) -> dict[str, Part]:
        return {"gate_up_proj": gate_up, "down_proj": down}

    assert expert_parts(parts(Part(), Part())) == {"ep_rank": 0, "ep_size": 1}
    assert expert_parts(parts(Part(0, 1, 4), Part(0, 1, 4))) == {"ep_rank": 1, "ep_size": 4}
    assert expert_parts(parts(Part(1, 1, 4, blocks=2), Part(2, 1, 4))) == {"tp_rank": 1, "tp_size": 4}
    others = [
        (Part(1, 1, 4), Part(2, 1, 4)),  # rows of gate and up in one piece: gate alone on half of the ranks
        (Part(1, 1, 4, blocks=2), Part()), (Part(), Part(2, 1, 4)), (Part(2, 1, 4), Part(1, 1, 4)),
        (Part(0, 1, 4), Part(0, 0, 4)), (Part(0, 1, 4), Part(2, 1, 4)),
    ]  # fmt: skip
    for gate_up, down in others:
        with pytest.raises(
            NotImplementedError, match=r"parallel plan: expected experts sharded by expert .*, got gate_up_proj Part"
        ):
            expert_parts(parts(gate_up, down))
