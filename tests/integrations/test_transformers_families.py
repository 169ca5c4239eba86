"""Models whose experts have no gate, biases or MXFP4, against transformers' own code on the same weights in fp32."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.fp64_loop import dense
from helpers.hf_models import greedy, prompt, relative
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.checkpoint.headers import INDEX_NAME
from torch_nvfp4.convert import open_conversion
from torch_nvfp4.errors import CheckpointError
from torch_nvfp4.format import quantize
from torch_nvfp4.gate import Gate

transformers = pytest.importorskip("transformers", minversion="5.23")

from helpers.hf_families import FAMILIES, auto_class, config_of, write_family  # noqa: E402
from torch_nvfp4.integrations.transformers import (  # noqa: E402
    TorchNVFP4Config,
    from_pretrained,
    register,
    unregister,
)
from torch_nvfp4.integrations.transformers.expert_layout import ExpertLayout  # noqa: E402
from torch_nvfp4.integrations.transformers.gates import gate_of  # noqa: E402
from torch_nvfp4.integrations.transformers.modules import PackedExperts, Part, expert_parts  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
MXFP4 = "deepseek-v4 in MXFP4"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def family(name: str) -> Path:
        if name not in made:
            made[name] = write_family(tmp_path_factory.mktemp("family"), name)
        return made[name]

    return family


def oracle_of(path: Path) -> Any:
    kind = auto_class(config_of(path / "dense"))
    return kind.from_pretrained(path / "dense", dtype=torch.float32, experts_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(prompt()).logits
    return result


def experts_of(model: Any) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


@pytest.mark.parametrize("name", [*FAMILIES, MXFP4])
def test_logits_and_tokens_are_those_of_the_dequantized_model(families: Callable[[str], Path], name: str) -> None:
    path = families(name)
    model, info = from_pretrained(path / "packed", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert len(experts_of(model)) == (4 if name == MXFP4 else 2)
    oracle = oracle_of(path)
    assert relative(logits(model), logits(oracle)) < 1e-5
    assert torch.equal(greedy(model, prompt(), 8), greedy(oracle, prompt(), 8))


@pytest.mark.parametrize("name", ["gpt-oss", "nemotron", MXFP4])
def test_what_is_saved_is_what_was_loaded(families: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    source = families(name) / "packed"
    model = from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path)
    assert after.tensors.keys() == before.tensors.keys()
    for tensor in before.tensors:
        a, b = before.tensor(tensor), after.tensor(tensor)
        assert a.dtype == b.dtype, tensor
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), tensor
    declared = config_of(source)["quantization_config"]
    if name == MXFP4:  # transformers moves it there from beside the section
        declared |= {"expert_dtype": "fp4"}
    assert config_of(tmp_path)["quantization_config"] == declared
    assert torch.equal(logits(from_pretrained(tmp_path, dtype=torch.bfloat16)), logits(model))


def test_saving_changed_biases(families: Callable[[str], Path], tmp_path: Path) -> None:
    model = from_pretrained(families("gpt-oss") / "packed", dtype=torch.bfloat16)
    experts_of(model)[1].packed.w2_bias[0, 0] += 1  # type: ignore[union-attr, index]
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.experts: expected the packed weights and biases of .*, got othe"
    ):
        model.save_pretrained(tmp_path)


# gpt-oss's cache of a window counts steps in a Python int, which torch.compile takes for a variable the second time.
@pytest.mark.parametrize(("name", "count"), [("gpt-oss", 2), ("nemotron", 1)])
def test_a_compiled_step_makes_the_same_tokens(families: Callable[[str], Path], name: str, count: int) -> None:
    model = from_pretrained(families(name) / "packed", dtype=torch.float32).eval()
    ids = prompt(1, 8)
    expected = greedy(model, ids, 3)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    tokens: list[int] = []
    with torch.no_grad():
        last = model(ids, past_key_values=cache, use_cache=True).logits
        for position in range(8, 11):
            tokens.append(int(last[0, -1].argmax()))
            positions = torch.tensor([[position]])
            last = step(
                torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True, position_ids=positions
            ).logits
    torch.compiler.reset()
    assert tokens == expected[0].tolist()
    assert len(graphs) == count
    assert sum("nvfp4.moe" in str(node.target) for node in graphs[0].graph.nodes) == 2


@pytest.mark.parametrize("fault", ["biases dropped", "limit dropped", "gate and up swapped", "second bias dropped"])
def test_a_fault_shows(families: Callable[[str], Path], fault: str) -> None:
    """The comparison of logits is fine enough to see each of the usual mistakes."""
    path = families("gpt-oss")
    model = from_pretrained(path / "packed", dtype=torch.float32)
    layer = experts_of(model)[1]
    packed = layer.packed
    assert packed is not None
    w13, w2 = packed.unpacked_weights()
    biases = {"w13_bias": packed.w13_bias, "w2_bias": packed.w2_bias}
    gate = packed.quant_config.gate
    assert str(gate) == "silu (alpha 1.702, beta 1), clamp_limit 0.6"
    if fault == "biases dropped":
        biases = {}
    elif fault == "second bias dropped":
        del biases["w2_bias"]
    elif fault == "limit dropped":
        gate = Gate(alpha=1.702, beta=1.0)
    else:
        w13 = type(w13)(*(torch.cat(part.chunk(2, 1)[::-1], 1) for part in w13))
    layer.packed = type(packed).from_weights(w13, w2, **biases, gate=gate)
    assert relative(logits(model), logits(oracle_of(path))) > 1e-3


def test_mxfp4_is_transformers_own_unless_it_is_asked_for(families: Callable[[str], Path]) -> None:
    auto = transformers.quantizers.auto
    path = families("gpt-oss") / "packed"
    expected = logits(from_pretrained(path, dtype=torch.float32))
    sections = [
        config_of(families("gpt-oss") / "packed")["quantization_config"], {"quant_method": "fp8", "expert_dtype": "fp4"}
    ]  # fmt: skip
    kinds = ["Mxfp4Config", "FineGrainedFP8Config"]

    def chosen() -> list[str]:
        return [type(auto.AutoQuantizationConfig.from_dict(section)).__name__ for section in sections]

    try:
        register()
        assert chosen() == kinds
        model = AutoModel.from_pretrained(path, dtype=torch.float32, quantization_config=TorchNVFP4Config("reference"))
        assert {experts.packed.backend for experts in experts_of(model)} == {"reference"}  # type: ignore[union-attr]
        assert relative(logits(model), expected) < 1e-5
        register(mxfp4=True)
        assert chosen() == ["TorchNVFP4Config"] * 2
        assert torch.equal(logits(AutoModel.from_pretrained(path, dtype=torch.float32)), expected)
        register()
        assert chosen() == kinds
        # The config of a loaded model says who loaded it.
        again = AutoModel.from_pretrained(path, config=model.config, dtype=torch.float32)
        assert {experts.packed.backend for experts in experts_of(again)} == {"reference"}  # type: ignore[union-attr]
    finally:
        unregister()
    assert chosen() == kinds
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["mxfp4"].__name__ == "Mxfp4Config"


def test_gpt_oss_in_nvfp4(families: Callable[[str], Path], tmp_path: Path) -> None:
    """ModelOpt's stacks [E, in, out], whose rows of gate and up stand in turns as the model's do."""
    source, packed, path = families("gpt-oss"), tmp_path / "packed", tmp_path / "dense"
    tensors = load_file(source / "packed" / "model-00001-of-00001.safetensors")
    oracle = load_file(source / "dense" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_blocks")]:
        module = name.removesuffix("_blocks")
        del tensors[name], tensors[f"{module}_scales"]
        weight = quantize(oracle[module].transpose(1, 2))  # [E, out, in]
        tensors[module] = weight.data.transpose(1, 2).contiguous()
        tensors[f"{module}_weight_scale"] = weight.scale.transpose(1, 2).contiguous()
        tensors[f"{module}_weight_scale_2"] = weight.global_scale
        oracle[module] = torch.stack([dense(*part).t() for part in zip(*weight, strict=True)]).float()
    config = config_of(source / "packed") | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    for folder, content in ((packed, tensors), (path, oracle)):
        folder.mkdir()
        content = {name: value.contiguous() for name, value in content.items()}
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "dense" / "config.json", path)
    (packed / "config.json").write_text(json.dumps(config))
    model = from_pretrained(packed, dtype=torch.float32)
    assert relative(logits(model), logits(oracle_of(tmp_path))) < 1e-5


def test_gpt_oss_as_quantize_writes_it(families: Callable[[str], Path], tmp_path: Path) -> None:
    """Modules of single experts in NVFP4, with biases: the same values as those in MXFP4, bit for bit."""
    source = families("gpt-oss") / "packed"
    conversion = open_conversion(source, tmp_path / "result", layout="modelopt")
    try:
        conversion.write(1)
        conversion.finish()
    finally:
        conversion.close()
    assert "model.layers.0.mlp.experts.0.gate_proj.bias" in Checkpoint.open(tmp_path / "result").tensors
    model = from_pretrained(tmp_path / "result", dtype=torch.float32)
    assert torch.equal(logits(model), logits(from_pretrained(source, dtype=torch.float32)))


@pytest.fixture
def changed(families: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint without the tensors whose names end so, and with other keys in its config.json."""

    def make(name: str, without: str = "\0", **config: Any) -> Path:
        path = tmp_path / "changed"
        shutil.copytree(families(name) / "packed", path)
        (path / INDEX_NAME).unlink()
        file = path / "model-00001-of-00001.safetensors"
        tensors = {key: value for key, value in load_file(file).items() if not key.endswith(without)}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        file.unlink()
        (path / "config.json").write_text(json.dumps(config_of(path) | config))
        return path

    return make


def test_a_checkpoint_without_the_biases_of_the_model(changed: Callable[..., Path]) -> None:
    path = changed("gpt-oss", "proj_bias")
    words = (
        r"layer 0: expected experts with gate and up and with biases, as GptOssExperts has them, got silu \(alpha "
        r"1.702, beta 1\), clamp_limit 0.6; load another class of the model, or the layer alone"
    )
    with pytest.raises(CheckpointError, match=words):
        from_pretrained(path)


def test_an_activation_that_the_model_does_not_compute(changed: Callable[..., Path]) -> None:
    """NemotronH's class takes its activation from the config, but other keys may say another one."""
    path = changed("nemotron", moe_hidden_act="silu")
    with pytest.raises(CheckpointError, match="expected 'relu2', as hidden_act, got 'silu' under a key that is not re"):
        from_pretrained(path)


def test_kernels_that_read_dense_experts(families: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The package kernels gives gpt-oss's block this attribute, and then another forward."""
    block = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss").GptOssMLP
    monkeypatch.setattr(block, "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    words = "use_kernels: expected False for GptOssMLP, whose kernel MegaBlocksMoeMLP reads dense experts, got True"
    with pytest.raises(ValueError, match=words):
        from_pretrained(families("gpt-oss") / "packed", use_kernels=True)


class Situ:
    """A module with Kimi-K3's gate, which no class of transformers has; ``linear`` is the limit of up."""

    def __init__(self, linear: float) -> None:
        self.linear = linear

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * self.linear * torch.tanh(up / self.linear)


SITU = {"hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0}
GPT_OSS = {"model_type": "gpt_oss", "swiglu_limit": 7.0}


def gpt_oss_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(gate * 1.702) * (up + 1)


@pytest.mark.parametrize(("module", "layout", "config", "expected"), [
    (Situ(25.0), ExpertLayout(), SITU, "situ (alpha 4, beta 25), no clamp"),
    (Situ(24.0), ExpertLayout(), SITU, None),
    (SimpleNamespace(act_fn=lambda x: x.clamp(min=0).square()), ExpertLayout(gated=False), {"hidden_act": "relu2"},
     "relu2 without a gate"),
    (SimpleNamespace(act_fn=torch.nn.functional.silu), ExpertLayout(gated=False), {"hidden_act": "relu2"}, None),
    (SimpleNamespace(_apply_gate=lambda x: gpt_oss_gate(x[..., ::2], x[..., 1::2])),
     ExpertLayout(interleaved=True), GPT_OSS, "silu (alpha 1.702, beta 1), clamp_limit 7"),
    (SimpleNamespace(_apply_gate=lambda x: gpt_oss_gate(x[..., 1::2], x[..., ::2])),
     ExpertLayout(interleaved=True), GPT_OSS, None),
    (SimpleNamespace(_apply_gate=lambda x: gpt_oss_gate(*x.chunk(2, -1))), ExpertLayout(), GPT_OSS,
     "silu (alpha 1.702, beta 1), clamp_limit 7"),
])  # fmt: skip
def test_the_gate_is_the_one_that_the_code_computes(
    module: Any, layout: ExpertLayout, config: dict[str, Any], expected: str | None
) -> None:
    if expected is None:
        with pytest.raises(CheckpointError, match=r"expected the gate that its config declares .*, got another one"):
            gate_of(module, config, 0, "experts", layout)
    else:
        assert str(gate_of(module, config, 0, "experts", layout).gate) == expected


def test_plans_for_parallelism() -> None:
    up_alone = ExpertLayout(gated=False)
    assert expert_parts({"up_proj": Part(1, 1, 4), "down_proj": Part(2, 1, 4)}, up_alone) == {
        "tp_rank": 1, "tp_size": 4,
    }  # fmt: skip
    assert expert_parts({"up_proj": Part(0, 1, 4), "down_proj": Part(0, 1, 4)}, up_alone) == {
        "ep_rank": 1, "ep_size": 4,
    }  # fmt: skip
    gpt_oss = ExpertLayout(interleaved=True, transposed=True, biased=True)
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    assert expert_parts(dict.fromkeys(names, Part(0, 3, 4)), gpt_oss) == {"ep_rank": 3, "ep_size": 4}
    by_size = (Part(2, 1, 2), Part(1, 1, 2), Part(1, 1, 2), Part())
    assert expert_parts(dict(zip(names, by_size, strict=True)), gpt_oss) == {"tp_rank": 1, "tp_size": 2}
    others = [
        (up_alone, {"up_proj": Part(1, 1, 4, blocks=2), "down_proj": Part(2, 1, 4)}),
        (gpt_oss, dict(zip(names, (*by_size[:3], Part(1, 1, 2)), strict=True))),  # each rank a part of a sum's bias
        (gpt_oss, dict(zip(names, (Part(1, 1, 2), Part(2, 1, 2), Part(), Part()), strict=True))),
        (gpt_oss, dict(zip(names, (Part(0, 1, 2), Part(0, 1, 2), Part(0, 0, 2), Part(0, 1, 2)), strict=True))),
    ]
    for layout, parts in others:
        with pytest.raises(
            NotImplementedError, match=r"parallel plan: expected .* \(colwise and rowwise\), got (up|gate_up)_proj Part"
        ):
            expert_parts(parts, layout)
