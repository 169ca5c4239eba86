"""SGLang's own layer with torch_nvfp4's runner, against the layer in fp64: ``make test-sglang``."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from engines import sglang_layer, sglang_stubs
from engines.sglang_layer import load, make_layer, random_experts, random_inputs, reference, run, sglang_process
from helpers.recorded import RecordedOps

sglang_stubs.install()

import torch_nvfp4_sglang  # noqa: E402

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Of the largest error, relative to the largest value."""
LAYOUTS = ("modelopt", "mixed", "w4a16", "w4a4")
LIMIT = 0.75


@pytest.fixture(autouse=True, scope="module")
def plugin() -> None:
    torch_nvfp4_sglang.register()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_nvfp4.integrations.sglang import hooks

    monkeypatch.delenv("TORCH_NVFP4_SGLANG", raising=False)
    hooks._logged.clear()


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_layer_is_that_of_fp64_with_the_limit_and_two_scales(layout: str, dtype: torch.dtype) -> None:
    experts, (x, weights, ids) = random_experts(), random_inputs()
    x = x.to(dtype)
    with sglang_process():
        layer = make_layer(layout, dtype, swiglu_limit=LIMIT)
        load(layer, experts, layout)
        assert layer.runner_backend.value == "torch_nvfp4"
        got = run(layer, x, weights, ids)
    assert got.dtype == dtype
    assert error(got, reference(experts, x, weights, ids, limit=LIMIT)) < TOLERANCE[dtype]
    assert error(got, reference(experts, x, weights, ids)) > 0.1, "the limit does not bite"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_packed_once_and_the_loaded_tensors_freed(layout: str) -> None:
    experts, inputs = random_experts(), random_inputs()
    with sglang_process():
        layer = make_layer(layout)
        load(layer, experts, layout)
        first = run(layer, *inputs)
        held = sum(p.numel() * p.element_size() for p in layer.parameters())
        layer.quant_method.process_weights_after_loading(layer)
        torch.testing.assert_close(run(layer, *inputs), first, rtol=0, atol=0)
        values = sglang_layer.EXPERTS * 3 * sglang_layer.HIDDEN * sglang_layer.INTERMEDIATE
        assert held < 1.4 * 0.5625 * values  # I of 96 is padded to 128 in w2
        with pytest.raises(RuntimeError, match="expected no new weights after loading, got some"):
            load(layer, experts, layout)


GATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no limit": ({}, {}),
    "gemm1_clamp_limit": ({"gemm1_clamp_limit": LIMIT}, {"step": LIMIT}),
    "alpha": (
        {"gemm1_alpha": 1.702, "gemm1_clamp_limit": LIMIT, "gate_up_interleaved": False},
        {"alpha": 1.702, "limit": LIMIT},
    ),
    "gelu": ({"activation": "gelu"}, {"activation": "gelu"}),
    "router weight on the input": (
        {"apply_router_weight_on_input": True, "swiglu_limit": LIMIT},
        {"on_input": True, "limit": LIMIT},
    ),
}


@pytest.mark.parametrize("case", GATES)
@pytest.mark.parametrize("layout", ["modelopt", "w4a16"])
def test_gates(case: str, layout: str) -> None:
    config, wanted = GATES[case]
    experts, inputs = random_experts(), random_inputs()
    with sglang_process():
        layer = make_layer(layout, **config)
        load(layer, experts, layout)
        assert error(run(layer, *inputs), reference(experts, *inputs, **wanted)) < TOLERANCE[torch.float32]


PLAIN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "relu2": ({"activation": "relu2"}, {"activation": "relu2"}),  # Nemotron-3
    "silu": ({"activation": "silu"}, {}),
    "gelu": ({"activation": "gelu"}, {"activation": "gelu"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", PLAIN)
def test_experts_without_a_gate(case: str, layout: str) -> None:
    config, wanted = PLAIN[case]
    experts, inputs = random_experts(gated=False), random_inputs()
    with sglang_process():
        layer = make_layer(layout, is_gated=False, **config)
        load(layer, experts, layout)
        got = run(layer, *inputs)
        layer.quant_method.process_weights_after_loading(layer)  # SGLang calls it again after an update of weights
        assert torch.equal(run(layer, *inputs), got)
    assert layer.runner_backend.value == "torch_nvfp4"
    assert error(got, reference(experts, *inputs, **wanted)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("linear_beta", [1.5, None])
@pytest.mark.parametrize("layout", ["modelopt", "w4a16"])
def test_situ(layout: str, linear_beta: float | None) -> None:
    """Its constants come as those of gpt-oss's gate (Kimi-K3)."""
    experts, inputs = random_experts(), random_inputs()
    with sglang_process():
        layer = make_layer(layout, activation="situ", gemm1_alpha=2.0, gemm1_clamp_limit=linear_beta)
        load(layer, experts, layout)
        got = run(layer, *inputs)
    assert error(got, reference(experts, *inputs, situ=(2.0, linear_beta))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", ["tp", "ep"])
@pytest.mark.parametrize("layout", ["modelopt", "w4a4"])
def test_two_ranks_add_up(kind: str, layout: str) -> None:
    experts, inputs = random_experts(), random_inputs()
    total = torch.zeros(inputs[0].shape)
    for rank in range(2):
        with sglang_process(
            **{f"moe_{kind}_size": 2, f"moe_{kind}_rank": rank, "tp_size": 2, "tp_rank": rank, "attn_tp_size": 2}
        ):
            layer = make_layer(layout, swiglu_limit=LIMIT)
            load(layer, experts, layout)
            part = run(layer, *inputs)
            assert part.abs().max() > 0
            total += part
    assert error(total, reference(experts, *inputs, limit=LIMIT)) < 2 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_inference(deterministic: bool) -> None:
    """--enable-deterministic-inference reaches the op, and a token's row has the bits that it has alone."""
    experts, (x, weights, ids) = random_experts(), random_inputs()
    with sglang_process({"enable_deterministic_inference": deterministic}):
        layer = make_layer("modelopt", swiglu_limit=LIMIT)
        load(layer, experts, "modelopt")
        with RecordedOps("batch_invariant") as seen:
            whole = run(layer, x.clone(), weights, ids)
        rows = [run(layer, x[[t]], weights[[t]], ids[[t]]) for t in range(len(x))]
    assert seen.values == [deterministic]
    assert error(whole, reference(experts, x, weights, ids, limit=LIMIT)) < TOLERANCE[torch.float32]
    if deterministic:
        assert torch.equal(torch.cat(rows), whole)


def test_ids_of_dropped_tokens() -> None:
    experts, (x, weights, ids) = random_experts(), random_inputs()
    ids[2:5] = -1
    with sglang_process():
        layer = make_layer("modelopt")
        load(layer, experts, "modelopt")
        got = run(layer, x, weights, ids)
    assert torch.equal(got[2:5], torch.zeros_like(got[2:5]))


def test_routing_that_is_cut_out_of_more() -> None:
    """Columns of wider tensors, whose rows lie apart."""
    experts, (x, weights, ids) = random_experts(), random_inputs()
    with sglang_process():
        layer = make_layer("modelopt")
        load(layer, experts, "modelopt")
        wide = torch.cat((weights, weights), dim=1)[:, : sglang_layer.TOP_K]
        got = run(layer, x, wide, ids.T.contiguous().T)
        assert torch.equal(got, run(layer, x, weights, ids))


def test_the_scaling_factor_that_the_runner_owes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ModelOpt SGLang multiplies the router's weights; with compressed-tensors, on CUDA, the runner has to."""
    from torch_nvfp4.integrations.sglang import support

    real, experts, inputs = support.layer_error, random_experts(), random_inputs()
    monkeypatch.setattr("torch_nvfp4.integrations.sglang.hooks.layer_error", lambda *a, **k: None)
    for layout, factor in (("modelopt", 1.0), ("w4a16", 2.5)):
        with sglang_process():
            layer = make_layer(layout, routed_scaling_factor=2.5)
            load(layer, experts, layout)
            assert error(run(layer, *inputs), factor * reference(experts, *inputs)) < TOLERANCE[torch.float32]
            assert "expected a routed_scaling_factor of 1 off CUDA" in str(
                real(layer.moe_runner_config, support.Process("cpu"), None)
            )


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "two limits": ({"swiglu_limit": 7.0, "gemm1_clamp_limit": 8.0}, {}, "expected one limit per layer, got .* 7 .* 8"),
    "gated relu2": ({"activation": "relu2"}, {}, "expected an activation of silu, gelu, gelu_tanh, situ, got relu2"),
    "a limit without a gate": (
        {"is_gated": False, "swiglu_limit": 7.0},
        {},
        "expected no swiglu_limit for experts wit",
    ),
    "situ": ({"activation": "situ"}, {}, "expected a gemm1_alpha with situ"),
    "biases": ({"with_bias": True}, {}, "expected no biases, for which SGLang's NVFP4 layers have no parameters, got"),
    "interleaved": (
        {"gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0},
        {},
        "expected gate rows first .* got gate_up_inter",
    ),
    "no combine": ({"no_combine": True}, {}, "expected no outputs per expert"),
    "EPLB": ({}, {"enable_eplb": True}, "expected no load balancing of experts"),
    "LoRA": ({}, {"enable_lora": True}, "expected no LoRA"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("layout", ["modelopt", "w4a16"])
def test_what_cannot_be_run_is_refused(case: str, layout: str) -> None:
    config, server, message = REFUSED[case]
    with sglang_process(server), pytest.raises(ValueError, match=message):
        make_layer(layout, **config)


# SGLang's own backend on a GPU with FP4 tensor cores, and with --moe-runner-backend marlin on an older one.
OWN: dict[str, tuple[str, str, tuple[int, int], str]] = {
    "FP4 tensor cores, ModelOpt": ("modelopt", "auto", (10, 0), "expected a GPU without FP4 tensor cores"),
    "FP4 tensor cores, compressed-tensors": ("w4a16", "auto", (10, 0), "expected a GPU without FP4 tensor cores"),
    "asked for, ModelOpt": ("modelopt", "marlin", (9, 0), "expected --moe-runner-backend auto, got marlin"),
    "asked for, compressed-tensors": ("w4a16", "marlin", (9, 0), "expected --moe-runner-backend auto, got marlin"),
}


@pytest.mark.parametrize("case", OWN)
def test_what_is_sglangs_is_left_to_it(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In auto mode with one warning, however many layers; with require it is an error."""
    from sglang.srt.layers.moe.utils import MoeRunnerBackend
    from sglang.srt.runtime_context import get_flags, override_platform

    from torch_nvfp4.integrations.sglang import hooks, platform

    layout, asked, capability, reason = OWN[case]
    for module in (hooks, platform):
        monkeypatch.setattr(module, "device", lambda: ("cuda", capability))
    monkeypatch.setattr(get_flags().moe, "runner_backend", MoeRunnerBackend(asked), raising=False)
    caplog.set_level(logging.INFO, "sglang.torch_nvfp4")
    with sglang_process(), override_platform(is_blackwell=capability >= (10, 0)):
        for _ in range(2):
            assert make_layer(layout).runner_backend.value != "torch_nvfp4"
        messages = [r.getMessage() for r in caplog.records if r.name == "sglang.torch_nvfp4"]
        assert len(messages) == 1
        assert messages[0].startswith(f"torch_nvfp4 leaves NVFP4 experts to SGLang: {reason}")
        monkeypatch.setenv("TORCH_NVFP4_SGLANG", "require")
        with pytest.raises(ValueError, match=f"TORCH_NVFP4_SGLANG=require: .* {reason}"):
            make_layer(layout)


def test_off_leaves_sglang_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_SGLANG", "off")
    with sglang_process(), pytest.raises(ValueError, match="Current platform does not support NVFP4"):
        make_layer("modelopt")


def test_another_sglang_class_is_not_taken_silently(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod
    from sglang.srt.runtime_context import override_platform

    class Derived(ModelOptNvFp4FusedMoEMethod):
        pass

    with sglang_process(), override_platform(is_blackwell=True):
        Derived(sglang_layer.quant_config("modelopt"))
        assert "expected a layer of ModelOptNvFp4FusedMoEMethod, got one of" in caplog.text
        monkeypatch.setenv("TORCH_NVFP4_SGLANG", "require")
        with pytest.raises(ValueError, match="expected a layer of ModelOptNvFp4FusedMoEMethod"):
            Derived(sglang_layer.quant_config("modelopt"))


def test_the_formulas_are_those_of_sglangs_triton_runner() -> None:
    """Its own functions, called with the same limit."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    from torch_nvfp4.integrations.sglang.support import layer_gate

    x = torch.linspace(-6, 6, 64).repeat(64, 1)
    x = torch.cat((x, x.T), dim=1)
    gate, up = x.chunk(2, dim=1)
    limit_only, with_alpha = fused_moe._swiglu_silu_clamp_mul, fused_moe.swiglu_no_interleaved_with_alpha_and_limit
    cases: list[tuple[dict[str, Any], Any, tuple[float, ...]]] = [
        ({"gemm1_clamp_limit": LIMIT}, limit_only, (LIMIT,)),
        (GATES["alpha"][0], with_alpha, (1.702, LIMIT)),
    ]
    for config, function, values in cases:
        with sglang_process():
            ours = layer_gate(make_layer("modelopt", **config).moe_runner_config)
        wanted = function.__wrapped__(x, *values)
        got = ours(gate, up)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["modelopt", "w4a4"])
def test_packed_routing(layout: str) -> None:
    """int32 of an id and the bits of a weight in bfloat16, which a fused gate hands out."""
    from sglang.srt.layers.moe.topk import PackedTopKOutput

    experts, (x, weights, ids) = random_experts(), random_inputs()
    weights = weights.to(torch.bfloat16)
    ids[2:4, 1] = -1
    packed = (ids << 16) | (weights.view(torch.int16).to(torch.int32) & 0xFFFF)
    logits = torch.zeros(x.shape[0], sglang_layer.EXPERTS)
    with sglang_process():
        layer = make_layer(layout)
        load(layer, experts, layout)
        got = layer(x, PackedTopKOutput(packed, logits))
        assert torch.equal(got, run(layer, x, weights.float(), ids))
    with sglang_process(moe_ep_size=2, moe_ep_rank=0, tp_size=2, tp_rank=0, attn_tp_size=2):
        layer = make_layer(layout)
        load(layer, experts, layout)
        with pytest.raises(RuntimeError, match=r"expected topk_weights .* a rank has 3 of 6 experts, got PackedTopK"):
            layer(x, PackedTopKOutput(packed, logits))


def test_formats_that_the_runner_does_not_read() -> None:
    from sglang.srt.layers.moe.topk import BypassedTopKOutput

    experts, (x, _, _) = random_experts(), random_inputs()
    with sglang_process():
        layer = make_layer("modelopt")
        load(layer, experts, "modelopt")
        with pytest.raises(RuntimeError, match="expected topk_weights and topk_ids, got BypassedTopKOutput"):
            layer(x, BypassedTopKOutput(x, torch.zeros(x.shape[0], sglang_layer.EXPERTS), None))


def test_registering_twice_changes_nothing() -> None:
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod

    before = ModelOptNvFp4FusedMoEMethod.__init__
    torch_nvfp4_sglang.register()
    assert ModelOptNvFp4FusedMoEMethod.__init__ is before


def test_this_sglang_is_known() -> None:
    from torch_nvfp4.integrations.sglang.versions import KNOWN, unmet

    assert list(unmet(KNOWN[-1])) == []
