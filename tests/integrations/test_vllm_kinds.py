"""The plug-in for vLLM and experts with biases, without a gate, with rows of gate and up in turn, and with SiTU."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.expert_kinds import Experts, Kind, expected_moe, expert_mlp, hidden_of, make_experts
from helpers.fake_vllm import VERSIONS, moe_config
from helpers.layers import routed
from helpers.vllm_layers import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Plugin, apply, close
from helpers.vllm_methods import METHODS, Layer, load, tensors_of
from torch_nvfp4.gate import Gate
from torch_nvfp4.integrations.vllm.support import config_gate, layer_error, layer_gate
from torch_nvfp4.integrations.vllm.versions import release
from torch_nvfp4.integrations.vllm.weights import gate_up_scales, pack_experts, up_scales

OAI = {"activation": "silu", "clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0}


class Case(NamedTuple):
    """A layer: what vLLM has of it, and what its experts are."""

    of_vllm: dict[str, Any]
    kind: Kind
    interleaved: bool = False


def situ(linear_beta: float | None) -> dict[str, Any]:
    return {"activation": "SITU", "activation_situ_beta": 4.0, "activation_situ_linear_beta": linear_beta}


CASES = {
    "relu2 without a gate": Case({"activation": "RELU2_NO_MUL"}, Kind({"activation": "relu2"}, False, False)),
    "silu without a gate": Case({"activation": "SILU_NO_MUL"}, Kind({"activation": "silu"}, False, False)),
    "gelu without a gate": Case({"activation": "GELU_NO_MUL"}, Kind({"activation": "gelu"}, False, False)),
    "gelu_tanh without a gate": Case(
        {"activation": "GELU_TANH_NO_MUL"}, Kind({"activation": "gelu_tanh"}, False, False)
    ),
    "relu2 without a gate, biases": Case(
        {"activation": "RELU2_NO_MUL", "has_bias": True}, Kind({"activation": "relu2"}, False, True)
    ),
    "silu, biases": Case({"has_bias": True}, Kind({"activation": "silu"}, True, True)),
    "silu, a clamp, biases": Case(
        {"has_bias": True, "swiglu_limit": 1.5}, Kind({"activation": "silu", "clamp_limit": 1.5}, True, True)
    ),
    "gpt-oss": Case({"activation": "SWIGLUOAI", "has_bias": True}, Kind(OAI, True, True), True),
    "gpt-oss without biases": Case({"activation": "SWIGLUOAI"}, Kind(OAI, True, False), True),
    "situ": Case(situ(25.0), Kind({"activation": "situ", "alpha": 4.0, "beta": 25.0}, True, False)),
    "situ, up without a limit": Case(situ(None), Kind({"activation": "situ", "alpha": 4.0}, True, False)),
}
SITU_FROM, BIASES_FROM = (0, 27), (0, 25)


def experts_of(case: Case, seed: int = 1) -> Experts:
    experts = make_experts(case.kind, EXPERTS, HIDDEN, INTERMEDIATE, seed=seed)
    if case.interleaved:  # one scale per tensor
        experts.w13.global_scale[:, 1] = experts.w13.global_scale[:, 0]
    return experts


def made(plugin: Plugin, case: Case, layout: str, **changes: Any) -> tuple[Any, Layer]:
    method = METHODS[layout](plugin, moe_config(in_dtype=torch.float32, **(case.of_vllm | changes)))
    return method, Layer(method)


@pytest.fixture
def on_any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version's own limit on CPUs does not apply: every version's conversion runs here."""
    monkeypatch.setattr("torch_nvfp4.integrations.vllm.versions.FIRST_ON_CPU", (0, 24))


@pytest.mark.usefixtures("on_any_version")
@pytest.mark.parametrize("layout", METHODS)
@pytest.mark.parametrize(("version", "name"), [
    (version, name) for version in ("0.25.1", "0.27.0", "0.33.0") for name in CASES
    if "situ" not in name or release(version) >= SITU_FROM
])  # fmt: skip
def test_values(make_plugin: Callable[..., Plugin], version: str, name: str, layout: str) -> None:
    case = CASES[name]
    plugin = make_plugin(version)
    plugin.mode = "require"
    method, layer = made(plugin, case, layout)
    experts = experts_of(case)
    load(layer, tensors_of(experts, method, interleaved=case.interleaved))
    method.process_weights_after_loading(layer)
    x = hidden_of(experts, 9, seed=2).float()
    weights, ids, _, _ = routed(9, EXPERTS, TOP_K, seed=3)
    output = torch.full((9, HIDDEN), torch.nan)
    apply(method.experts, output, x, *method.weights, weights, ids)
    close(output, expected_moe(experts, x.double(), weights, ids))
    rows = (2 if case.kind.gated else 1) * INTERMEDIATE
    assert method.experts.moe_problem_size(x, *method.weights, ids) == (EXPERTS, 9, rows, HIDDEN, TOP_K)


@pytest.mark.usefixtures("on_any_version")
@pytest.mark.parametrize("version", VERSIONS)
def test_biases_in_every_version(
    make_plugin: Callable[..., Plugin], caplog: pytest.LogCaptureFixture, version: str
) -> None:
    """vLLM 0.24 configures its kernel without the layer, where the biases are."""
    plugin, case = make_plugin(version), CASES["silu, biases"]
    plugin.mode = "require"
    config = moe_config(**case.of_vllm)
    if release(version) < BIASES_FROM:
        words = f"expected vllm 0.25 or later for experts with biases, got {version}"
        with pytest.raises(ValueError, match=re.escape(words)):
            METHODS["modelopt"](plugin, config)
        return
    with caplog.at_level(logging.INFO):
        assert METHODS["modelopt"](plugin, config).backend is plugin.module.Backend.TORCH_NVFP4
    assert caplog.records[-1].message.endswith("(NVFP4Experts, silu, no clamp, biases)")


@pytest.mark.parametrize("name", ["relu2 without a gate, biases", "gpt-oss", "situ"])
def test_batched_activations(make_plugin: Callable[..., Plugin], name: str) -> None:
    case = CASES[name]
    method, layer = made(make_plugin(), case, "modelopt", batched=True)
    experts = experts_of(case)
    load(layer, tensors_of(experts, method, interleaved=case.interleaved))
    method.process_weights_after_loading(layer)
    counts = torch.tensor([3, 0, 8, 1], dtype=torch.int32)
    x = hidden_of(experts, EXPERTS, 8, seed=2).float()
    output = torch.full((EXPERTS, 8, HIDDEN), torch.nan)
    meta = SimpleNamespace(expert_num_tokens=counts)
    apply(method.experts, output, x, *method.weights, torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.int32), meta=meta)
    for expert, count in enumerate(counts.tolist()):
        if count:
            close(output[expert, :count], expert_mlp(experts, expert)(x[expert, :count].double()))


@pytest.mark.parametrize("name", ["silu, biases", "gpt-oss"])
def test_one_tensor_parallel_rank_adds_the_bias_of_w2(make_plugin: Callable[..., Plugin], name: str) -> None:
    """The ranks' outputs are added up, and most of vLLM's loaders copy the bias to each of them."""
    case, parts = CASES[name], []
    experts = experts_of(case)
    x = hidden_of(experts, 9, seed=2).float()
    weights, ids, _, _ = routed(9, EXPERTS, TOP_K, seed=3)
    for rank in (0, 1):
        method, layer = made(make_plugin(), case, "modelopt", tp_rank=rank)
        load(layer, tensors_of(experts, method, interleaved=case.interleaved))
        method.process_weights_after_loading(layer)
        output = torch.full((9, HIDDEN), torch.nan)
        apply(method.experts, output, x, *method.weights, weights, ids)
        parts.append(output)
    with_bias = expected_moe(experts, x.double(), weights, ids)
    without = expected_moe(experts._replace(w2_bias=None), x.double(), weights, ids)
    close(parts[0], with_bias)
    close(parts[1], without)
    assert float((with_bias - without).abs().max()) > 0.1 * float(with_bias.abs().max())


@pytest.mark.parametrize("layout", METHODS)
@pytest.mark.parametrize("name", ["silu, biases", "gpt-oss", "gpt-oss without biases"])
def test_what_no_loader_has_written_is_named(make_plugin: Callable[..., Plugin], name: str, layout: str) -> None:
    """As by vLLM's loader of gpt-oss, which skips the scales of ModelOpt."""
    case = CASES[name]
    plugin = make_plugin()
    method, layer = made(plugin, case, layout)
    every = tensors_of(experts_of(case), method, interleaved=case.interleaved)
    for left_out in [tensor for tensor in every if tensor not in (f"w13_{method.packed}", f"w2_{method.packed}")]:
        layer = Layer(method)
        load(layer, {tensor: value for tensor, value in every.items() if tensor != left_out})
        with pytest.raises(RuntimeError, match=rf"finite values for every part .*, got NaN in {left_out}: vLLM's load"):
            method.process_weights_after_loading(layer)
    layer = Layer(method)
    with pytest.raises(RuntimeError, match="got NaN in w13_weight_scale, "):
        method.process_weights_after_loading(layer)
    if case.kind.biased:  # one expert of all
        load(layer, every)
        layer.w13_bias.data[2, 5] = torch.nan
        with pytest.raises(RuntimeError, match="got NaN in w13_bias: "):
            method.process_weights_after_loading(layer)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_the_parameters_of_biases(make_plugin: Callable[..., Plugin], default: torch.dtype) -> None:
    """Under vLLM's names, with the model's loader, and in fp32, whatever vLLM makes its own parameters in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        _check_parameters_of_biases(make_plugin)
    finally:
        torch.set_default_dtype(before)


def _check_parameters_of_biases(make_plugin: Callable[..., Plugin]) -> None:
    for name, rows in (("silu, biases", 2 * INTERMEDIATE), ("relu2 without a gate, biases", INTERMEDIATE)):
        _, layer = made(make_plugin(), CASES[name], "modelopt")
        for bias, size in ((layer.w13_bias, rows), (layer.w2_bias, HIDDEN)):
            assert isinstance(bias, torch.nn.Parameter)
            assert (bias.shape, bias.dtype, bias.requires_grad) == ((EXPERTS, size), torch.float32, False)
            assert bias.weight_loader is print
        assert layer.w13_input_scale.sum() == 0  # left to vLLM


def test_layers_that_are_as_before_are_made_by_vllm_alone(make_plugin: Callable[..., Plugin]) -> None:
    for changes in ({}, {"activation": "RELU2_NO_MUL"}, situ(25.0)):
        method = METHODS["modelopt"](make_plugin(), moe_config(**changes))
        assert "create_weights" not in vars(method)


def test_padded_experts_with_biases(make_plugin: Callable[..., Plugin]) -> None:
    for changes, kind in (({"has_bias": True}, "biases"), ({"activation": "SWIGLUOAI"}, "SWIGLUOAI")):
        method = METHODS["modelopt"](make_plugin(), moe_config(hidden_dim_unpadded=48, **changes))
        words = rf"experts with {kind} as the checkpoint has them, \[48, 32\], got \[64, 32\], which are padded"
        with pytest.raises(RuntimeError, match=words):
            Layer(method)


def test_a_layer_that_has_lost_its_biases(make_plugin: Callable[..., Plugin]) -> None:
    plugin, case = make_plugin(), CASES["silu, biases"]
    method, layer = made(plugin, case, "modelopt")
    load(layer, tensors_of(experts_of(case), method))
    del layer.w2_bias
    with pytest.raises(RuntimeError, match="expected a layer with w13_bias and w2_bias, got one without them"):
        method.process_weights_after_loading(layer)
    with pytest.raises(RuntimeError, match=r"expected the biases of w13 and w2 .*, got none"):
        method.experts_cls(method.moe, SimpleNamespace(
            gemm1_clamp_limit=None, gemm1_alpha=None, gemm1_beta=None, w1_bias=torch.zeros(1), w2_bias=None
        ))  # fmt: skip


def test_a_method_that_is_not_known(make_plugin: Callable[..., Plugin]) -> None:
    """Nothing could make the parameters of its layers; vLLM goes on as without the plug-in."""
    plugin = make_plugin()
    for changes, what in (({"has_bias": True}, "with biases"), ({"activation": "SWIGLUOAI"}, "with SWIGLUOAI")):
        config = moe_config(**changes)
        words = f"expected a layer of ModelOptNvFp4FusedMoE, .* for experts {what}, got one that is not known"
        assert re.search(words, str(layer_error(config, "cpu", None, step_limit=7.0)))
        assert plugin.user.select_nvfp4_moe_backend(config, "static", None)[0] == "select_nvfp4_moe_backend"


def test_rows_that_do_not_fit_the_activation(make_plugin: Callable[..., Plugin]) -> None:
    gated, plain = CASES["silu, biases"], CASES["relu2 without a gate"]
    w13, w2 = experts_of(plain)[:2]
    scales = [torch.ones(EXPERTS, 2), torch.ones(EXPERTS)]
    with pytest.raises(RuntimeError, match="expected w13 with 64 rows with a gate, got 32"):
        pack_experts(w13.data, w13.scale, scales[0], w2.data, w2.scale, scales[1])
    w13, w2 = experts_of(gated)[:2]
    with pytest.raises(RuntimeError, match="expected w13 with 32 rows without a gate, got 64"):
        pack_experts(w13.data, w13.scale, scales[1], w2.data, w2.scale, scales[1], gated=False)


def test_global_scales() -> None:
    up = torch.tensor([0.5, 3.0])
    assert torch.equal(up_scales(SimpleNamespace(w13_weight_scale_2=up[:, None]), up), up)
    inverse = SimpleNamespace(w13_weight_global_scale=1.0 / up[:, None])
    assert torch.equal(up_scales(inverse, 1.0 / (1.0 / up)), 1.0 / (1.0 / up))
    both = torch.stack((up, up), dim=1)
    with pytest.raises(RuntimeError, match=r"w13_weight_global_scale \[2, 1\] \(up\), got shape \[2, 2\]"):
        up_scales(SimpleNamespace(w13_weight_scale_2=both), up)
    with pytest.raises(RuntimeError, match="expected w13_scale_2 to be the first column"):
        up_scales(SimpleNamespace(w13_weight_scale_2=up[:, None]), up.flip(0))
    for second in (up, torch.tensor([0.5, torch.nan])):
        layer = SimpleNamespace(w13_weight_scale_2=torch.stack((up, second), dim=1))
        assert torch.equal(gate_up_scales(layer, up, interleaved=True), both)
    layer = SimpleNamespace(w13_weight_scale_2=torch.stack((up, torch.tensor([0.5, 4.0])), dim=1))
    with pytest.raises(ValueError, match=r"expected one global scale per expert where rows .* alternate, got two"):
        gate_up_scales(layer, up, interleaved=True)


@pytest.mark.parametrize(("changes", "gate"), [
    ({"activation": "SILU_NO_MUL"}, Gate("silu", gated=False)),
    ({"activation": "GELU_NO_MUL"}, Gate("gelu", gated=False)),
    ({"activation": "GELU_TANH_NO_MUL"}, Gate("gelu_tanh", gated=False)),
    ({"activation": "RELU2_NO_MUL"}, Gate("relu2", gated=False)),
    ({"activation": "SWIGLUOAI"}, Gate("silu", 7.0, 1.702, 1.0)),
    ({"activation": "SWIGLUOAI", "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
     Gate("silu", 7.0, 1.702, 1.0)),
    (situ(25.0), Gate("situ", alpha=4.0, beta=25.0)),
    (situ(None), Gate("situ", alpha=4.0)),
    (situ(-1.0), Gate("situ", alpha=4.0)),
])  # fmt: skip
def test_the_gate(changes: dict[str, Any], gate: Gate) -> None:
    assert config_gate(moe_config(**changes), 7.0) == gate


@pytest.mark.parametrize(("changes", "words"), [
    ({"activation": "RELU2_NO_MUL", "swiglu_limit": 7.0}, "expected clamp_limit to be None for experts without a gate"),
    ({"activation": "SILU_NO_MUL", "swiglu_alpha": 1.702}, "expected alpha=1, beta=0 for experts without a gate"),
    ({"activation": "SITU"}, "expected an activation_situ_beta with SITU, as vLLM does, got none"),
    (situ(25.0) | {"activation_situ_beta": -4.0}, "expected alpha > 0"),
    (situ(25.0) | {"swiglu_limit": 7.0}, "expected clamp_limit to be None for activation situ"),
    (situ(25.0) | {"swiglu_beta": 1.0}, "expected no swiglu_alpha and swiglu_beta with SITU, got None, 1.0"),
    ({"activation_situ_beta": 4.0}, "expected no activation_situ_beta with SILU, got 4.0, None"),
    ({"activation_situ_linear_beta": 4.0}, "expected no activation_situ_beta with SILU, got None, 4.0"),
    ({"activation": "SWIGLUOAI", "swiglu_limit": 10.0}, "expected swiglu_limit 7.0 with SWIGLUOAI, .* got 10.0"),
    ({"activation": "SWIGLUOAI", "swiglu_alpha": 1.0}, "expected swiglu_alpha 1.702 with SWIGLUOAI, .* got 1.0"),
    ({"activation": "SWIGLUOAI", "swiglu_beta": 0.0}, "expected swiglu_beta 1.0 with SWIGLUOAI, .* got 0.0"),
    ({"activation": "SITU_NO_MUL"}, "expected an activation of SILU, .*RELU2_NO_MUL, got SITU_NO_MUL"),
])  # fmt: skip
def test_gates_that_are_refused(changes: dict[str, Any], words: str) -> None:
    """A clamp or a constant that nothing here would apply is never left out."""
    with pytest.raises(ValueError, match=words):
        config_gate(moe_config(**changes), 7.0)
    method = METHODS["modelopt"]
    assert re.search(words, str(layer_error(moe_config(**changes), "cpu", None, step_limit=7.0, quant_method=method)))


def test_vllm_before_situ_has_no_constants_of_it() -> None:
    assert layer_gate("SILU", None, None, None, 7.0) == Gate()


def test_an_error_of_another_layer_is_not_left(make_plugin: Callable[..., Plugin]) -> None:
    """Each method has its own create_weights; another of the class has vLLM's."""
    plugin = make_plugin()
    biased = METHODS["modelopt"](plugin, moe_config(has_bias=True))
    plain = METHODS["modelopt"](plugin, moe_config())
    assert {name for name, _ in Layer(biased).named_parameters()} - {
        name for name, _ in Layer(plain).named_parameters()
    } == {"w13_bias", "w2_bias"}


def test_the_error_of_a_second_conversion(make_plugin: Callable[..., Plugin]) -> None:
    case = CASES["silu, biases"]
    method, layer = made(make_plugin(), case, "modelopt")
    load(layer, tensors_of(experts_of(case), method))
    method.process_weights_after_loading(layer)
    before: Tensor = layer.w13_bias.clone()
    layer.w13_weight = torch.nn.Parameter(method.weights[0], requires_grad=False)
    with pytest.raises(RuntimeError, match="process_weights_after_loading came twice"):
        method.process_weights_after_loading(layer)
    assert torch.equal(layer.w13_bias, before)
