"""The plug-in inside a stand-in for each version of vLLM: which layers it takes, and the values that come out.

``tests/engines`` runs it inside the real vLLM.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import fake_vllm
from helpers.fake_vllm import VERSIONS, moe_config
from helpers.layers import activations, make_layer, routed
from helpers.recorded import RecordedOps
from helpers.vllm_layers import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Plugin, apply, build, close, select, vllm_layer
from torch_nvfp4 import reference
from torch_nvfp4.backends import Libraries
from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.gate import Gate
from torch_nvfp4.integrations.vllm import versions
from torch_nvfp4.integrations.vllm.support import device_error, layer_error, layer_gate
from torch_nvfp4.integrations.vllm.weights import gate_up_scales

BOTH = Libraries(cpu_ops=True, cuda_ops=True, flashinfer=False)
NONE = Libraries(cpu_ops=False, cuda_ops=False, flashinfer=False)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("version", VERSIONS)
def test_values_in_every_version(make_plugin: Callable[..., Plugin], version: str, layout: str) -> None:
    plugin = make_plugin(version)
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    assert not torch.equal(layer.w13.global_scale[:, 0], layer.w13.global_scale[:, 1])
    limit = 0.7
    experts, w13, w2 = build(plugin, layer, layout, moe_config(in_dtype=torch.float32, swiglu_limit=limit))
    x = activations(9, HIDDEN, seed=2).float()
    weights, ids, _, _ = routed(9, EXPERTS, TOP_K, seed=3)
    assert -1 in ids
    output = torch.full((9, HIDDEN), torch.nan)
    apply(experts, output, x, w13, w2, weights, ids)
    expected = reference.moe(x.double(), *layer, weights, ids, clamp_limit=limit)
    close(output, expected)
    unclamped = reference.moe(x.double(), *layer, weights, ids)
    assert float((expected - unclamped).abs().max()) > 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("version", VERSIONS)
def test_selected_in_every_version(make_plugin: Callable[..., Plugin], version: str) -> None:
    """On a CPU from 0.30 on: vLLM's buffers need an accelerator before."""
    plugin = make_plugin(version)
    plugin.mode = "require"
    if versions.release(version) >= (0, 30):
        assert select(plugin) == (plugin.module.Backend.TORCH_NVFP4, plugin.module.NVFP4Experts)
        assert select(plugin, batched=True)[1] is plugin.module.NVFP4BatchedExperts
        return
    with pytest.raises(ValueError, match=f"expected vllm 0.30 or later on a CPU, got {version}"):
        select(plugin)


@pytest.mark.parametrize("rank", [0, 1])
def test_expert_parallel(make_plugin: Callable[..., Plugin], rank: int) -> None:
    """The layer holds experts of this rank, the ids are global."""
    plugin = make_plugin()
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    experts, w13, w2 = build(plugin, layer, "modelopt", moe_config(in_dtype=torch.float32))
    x = activations(9, HIDDEN, seed=2).float()
    weights, ids, _, _ = routed(9, 2 * EXPERTS, TOP_K, seed=3)
    expert_map = torch.full((2 * EXPERTS,), -1, dtype=torch.int32)
    expert_map[rank * EXPERTS : (rank + 1) * EXPERTS] = torch.arange(EXPERTS, dtype=torch.int32)
    output = torch.full((9, HIDDEN), torch.nan)
    apply(experts, output, x, w13, w2, weights, ids, expert_map=expert_map)
    close(output, reference.moe(x.double(), *layer, weights, ids, expert_map))
    assert float(output.abs().max()) > 0


def test_router_weight_on_the_input(make_plugin: Callable[..., Plugin]) -> None:
    """vLLM multiplies the input before it calls, with one expert per token; the output must not be weighted again."""
    plugin = make_plugin()
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    experts, w13, w2 = build(plugin, layer, "modelopt", moe_config(in_dtype=torch.float32, swiglu_limit=0.7))
    x = activations(9, HIDDEN, seed=2).float()
    _, ids, _, _ = routed(9, EXPERTS, 1, seed=3)
    weights = torch.linspace(0.1, 0.9, 9).unsqueeze(1)
    output = torch.full((9, HIDDEN), torch.nan)
    apply(experts, output, x * weights, w13, w2, weights, ids, on_input=True)
    options = {"clamp_limit": 0.7, "apply_router_weight_on_input": True}
    close(output, reference.moe(x.double(), *layer, weights, ids, **options))


ACTIVATIONS: list[tuple[str, dict[str, float], dict[str, Any]]] = [
    ("SILU", {}, {}),
    ("SILU", {"swiglu_limit": 2.0}, {"clamp_limit": 2.0}),
    ("SWIGLUOAI_UNINTERLEAVE", {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
     {"clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0}),
    ("SWIGLUSTEP", {}, {"activation": "swiglustep", "clamp_limit": 7.0}),
    ("GELU", {}, {"activation": "gelu"}),
    ("GELU_TANH", {}, {"activation": "gelu_tanh"}),
    ("RELU2", {}, {"activation": "relu2"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "of_vllm", "of_reference"), ACTIVATIONS)
@pytest.mark.parametrize("version", ["0.24.0", "0.28.0", "0.33.0"])
def test_every_activation(
    make_plugin: Callable[..., Plugin], version: str, name: str, of_vllm: dict[str, float], of_reference: dict[str, Any]
) -> None:
    """alpha and beta reach the experts in versions whose quantization config does not carry them, too."""
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    config = moe_config(in_dtype=torch.float32, activation=name, **of_vllm)
    experts, w13, w2 = build(make_plugin(version), layer, "modelopt", config)
    x = activations(9, HIDDEN, seed=2, scale=3.0).float()
    weights, ids, _, _ = routed(9, EXPERTS, TOP_K, seed=3)
    output = torch.full((9, HIDDEN), torch.nan)
    apply(experts, output, x, w13, w2, weights, ids)
    result = reference.moe_with_clamped_share(x.double(), *layer, weights, ids, **of_reference)
    close(output, result.output)
    assert (result.clamped_share > 0.01) is ("clamp_limit" in of_reference)


@pytest.mark.parametrize("version", ["0.24.0", "0.33.0"])
def test_batched_activations(make_plugin: Callable[..., Plugin], version: str) -> None:
    """Rows past an expert's count may hold anything and do not count."""
    plugin = make_plugin(version)
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    experts, w13, w2 = build(
        plugin, layer, "modelopt", moe_config(in_dtype=torch.float32, batched=True, swiglu_limit=0.7)
    )
    counts = torch.tensor([3, 0, 8, 1], dtype=torch.int32)
    x = activations(EXPERTS, 8, HIDDEN, seed=2).float()
    for expert, count in enumerate(counts.tolist()):
        x[expert, count:] = torch.nan
    shapes = experts.workspace_shapes(8, 0, HIDDEN, 1, EXPERTS, EXPERTS, None, None)
    assert shapes == ((0,), (0,), (EXPERTS, 8, HIDDEN))
    output = torch.full(shapes[2], torch.nan)
    meta = SimpleNamespace(expert_num_tokens=counts)
    apply(experts, output, x, w13, w2, torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.int32), meta=meta)
    for expert, count in enumerate(counts.tolist()):
        ids = torch.full((count, 1), expert)
        expected = reference.moe(x[expert, :count].double(), *layer, torch.ones(count, 1), ids, clamp_limit=0.7)
        if count:
            close(output[expert, :count], expected)
    with pytest.raises(RuntimeError, match="expected expert_num_tokens with batched activations, got none"):
        apply(experts, output, x, w13, w2, torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.int32))


def test_batch_invariance(make_plugin: Callable[..., Plugin], monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM_BATCH_INVARIANT reaches the op, so that a token's row has the bits that it has alone."""
    plugin = make_plugin()
    monkeypatch.setattr(sys.modules["vllm.envs"], "VLLM_BATCH_INVARIANT", True)
    plugin.mode = "require"
    assert select(plugin)[1] is plugin.module.NVFP4Experts
    with pytest.raises(ValueError, match="kernel does not support batch invariance"):
        select(plugin, batched=True)
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    config = moe_config(in_dtype=torch.float32, swiglu_limit=0.7)
    x = activations(40, HIDDEN, seed=2).float()
    weights, ids, _, _ = routed(40, EXPERTS, TOP_K, seed=3)
    for asked in (True, False):
        monkeypatch.setattr(sys.modules["vllm.envs"], "VLLM_BATCH_INVARIANT", asked)
        experts, w13, w2 = build(plugin, layer, "modelopt", config)
        whole, row = torch.full_like(x, torch.nan), torch.full_like(x[:1], torch.nan)
        with RecordedOps("batch_invariant") as seen:
            apply(experts, whole, x, w13, w2, weights, ids)
        assert seen.values == [asked]
        close(whole, reference.moe(x.double(), *layer, weights, ids, clamp_limit=0.7))
        for token in range(40 if asked else 0):
            one = slice(token, token + 1)
            apply(experts, row, x[one], w13, w2, weights[one], ids[one])
            assert torch.equal(row, whole[one])


def test_moe_problem_size(make_plugin: Callable[..., Plugin]) -> None:
    experts, w13, w2 = build(make_plugin(), make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1), "modelopt", moe_config())
    ids = torch.zeros(9, TOP_K)
    size = experts.moe_problem_size(torch.zeros(9, HIDDEN), w13, w2, ids)
    assert size == (EXPERTS, 9, 2 * INTERMEDIATE, HIDDEN, TOP_K)
    size = experts.moe_problem_size(torch.zeros(EXPERTS, 5, HIDDEN), w13, w2, ids)
    assert size == (EXPERTS, 5, 2 * INTERMEDIATE, HIDDEN, TOP_K)
    assert experts.workspace_shapes(9, 0, HIDDEN, TOP_K, EXPERTS, EXPERTS, None, None) == ((0,), (0,), (9, HIDDEN))


def test_two_limits_for_one_layer_are_an_error(make_plugin: Callable[..., Plugin]) -> None:
    plugin = make_plugin()
    _, cls = select(plugin, swiglu_limit=7.0)
    quant = fake_vllm.QuantConfig(gemm1_clamp_limit=10.0)
    with pytest.raises(
        RuntimeError, match=r"expected one clamp_limit per layer, got 7 \(moe\) and 10 \(quantization\)"
    ):
        cls(moe_config(swiglu_limit=7.0), quant)


def test_other_backends_go_through_untouched(make_plugin: Callable[..., Plugin]) -> None:
    plugin = make_plugin("0.28.0")
    name, given = plugin.user.convert_to_nvfp4_moe_kernel_format("MARLIN", "layer", "w13", is_act_and_mul=True)
    assert name == "convert_to_nvfp4_moe_kernel_format"
    assert {key: value for key, value in given.items() if value is not None} == {
        "nvfp4_backend": "MARLIN", "layer": "layer", "w13": "w13", "is_act_and_mul": True,
    }  # fmt: skip
    name, given = plugin.user.make_nvfp4_moe_quant_config("MARLIN", swiglu_alpha=1.5)
    assert (name, given["backend"], given["swiglu_alpha"]) == ("make_nvfp4_moe_quant_config", "MARLIN", 1.5)


def test_installing_again_changes_nothing(make_plugin: Callable[..., Plugin]) -> None:
    plugin = make_plugin()
    before = plugin.oracle.select_nvfp4_moe_backend
    assert before is plugin.user.select_nvfp4_moe_backend
    plugin.module.install(lambda: "off")
    assert plugin.oracle.select_nvfp4_moe_backend is before
    assert select(plugin)[0] is plugin.module.Backend.TORCH_NVFP4


def test_an_unknown_vllm_is_refused_and_left_alone(make_plugin: Callable[..., Plugin]) -> None:
    plugin = make_plugin()
    original = plugin.oracle.select_nvfp4_moe_backend.__wrapped__
    plugin.oracle.select_nvfp4_moe_backend = original
    sys.modules["vllm"].__version__ = "0.34.0"  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"expected vllm 0.24 to 0.33, got 0.34.0"):
        plugin.module.install(lambda: "auto")
    assert plugin.oracle.select_nvfp4_moe_backend is original


def test_off_and_a_bad_mode_are_seen_per_layer(make_plugin: Callable[..., Plugin]) -> None:
    plugin = make_plugin()
    plugin.mode = "off"
    name, given = select(plugin)
    assert name == "select_nvfp4_moe_backend"
    assert given["weight_key"] == "static"


def test_what_is_left_to_vllm_is_logged_once_per_reason(
    make_plugin: Callable[..., Plugin], caplog: pytest.LogCaptureFixture
) -> None:
    plugin = make_plugin()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert select(plugin, enable_eplb=True)[0] == "select_nvfp4_moe_backend"
            assert select(plugin, is_lora_enabled=True)[0] == "select_nvfp4_moe_backend"
            assert select(plugin, swiglu_limit=7.0)[0] is plugin.module.Backend.TORCH_NVFP4
    left = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert left == [
        "torch_nvfp4 leaves NVFP4 experts to vLLM's own kernels: expected no load balancing of experts (enable_eplb), "
        "which moves rows of vLLM's own layouts, got it",
        "torch_nvfp4 leaves NVFP4 experts to vLLM's own kernels: kernel does not support LoRA",
    ]
    taken = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert len(taken) == 1
    assert taken[0].endswith("for NVFP4 experts (NVFP4Experts, silu, clamp_limit 7)")
    assert {record.name for record in caplog.records} == {"vllm.torch_nvfp4"}


@pytest.mark.parametrize("changes", [
    {"has_bias": True}, {"moe_backend": "marlin"}, {"activation_key": "token"}, {"weight_key": None},
])  # fmt: skip
def test_require_raises(make_plugin: Callable[..., Plugin], changes: dict[str, Any]) -> None:
    plugin = make_plugin()
    plugin.mode = "require"
    assert select(plugin)[0] is plugin.module.Backend.TORCH_NVFP4
    with pytest.raises(
        ValueError, match=r"TORCH_NVFP4_VLLM=require: torch_nvfp4 cannot run .*: .* TORCH_NVFP4_VLLM=auto"
    ):
        select(plugin, **changes)


def test_a_class_derived_from_a_quantization_method_keeps_its_backend(make_plugin: Callable[..., Plugin]) -> None:
    plugin = make_plugin()

    class ModelOptNvFp4FusedMoE:
        def __init__(self) -> None:
            self.backend = plugin.user.select_nvfp4_moe_backend(moe_config(), "static", None)[0]

    class Derived(ModelOptNvFp4FusedMoE):
        pass

    assert ModelOptNvFp4FusedMoE().backend is plugin.module.Backend.TORCH_NVFP4
    assert Derived().backend == "select_nvfp4_moe_backend"


# Changes to a layer that is taken, the device, and the reason.
REFUSED: list[tuple[dict[str, Any], str, tuple[int, int] | None, str]] = [
    ({"moe_backend": "marlin"}, "cpu", None, "expected --moe-backend auto, got marlin"),
    ({"has_bias": True}, "cpu", None, "for experts with biases, got one that is not known"),
    ({"enable_eplb": True}, "cpu", None, "expected no load balancing of experts (enable_eplb)"),
    ({"use_all2all_kernels": True, "all2all_backend": "flashinfer_nvlink_two_sided"}, "cuda", (9, 0),
     "expected an --all2all-backend of allgather_reducescatter, deepep_high_throughput, deepep_low_latency, deepep_v2, "
     "nixl_ep, got flashinfer_nvlink_two_sided"),
    ({"use_all2all_kernels": True, "all2all_backend": "moonep"}, "cuda", (9, 0), "nixl_ep, got moonep"),
    # vLLM does without its own exchange here, however many ranks there are.
    ({"all2all_backend": "passthrough"}, "cuda", (9, 0), "nixl_ep, got passthrough"),
    ({"hidden_dim": 72}, "cpu", None, "expected K and I to be multiples of 16, got 72, 32"),
    ({"intermediate_size_per_partition": 40}, "cuda", (9, 0), "expected K and I to be multiples of 16, got 64, 40"),
    ({"in_dtype": torch.float32}, "cuda", (9, 0), "expected hidden_states in bfloat16 or float16, got float32"),
    ({}, "cuda", (10, 0), "expected a GPU without FP4 tensor cores, for which vLLM has kernels, got compute cap"),
    ({}, "cuda", (12, 0), "got compute capability 12.0"),
    ({}, "cuda", (7, 5), "expected compute capability 8.0 or later, got 7.5"),
    ({}, "rocm", None, "expected a cpu or cuda device, got rocm"),
    ({"activation": "SWIGLUOAI"}, "cpu", None, "for experts with SWIGLUOAI, got one that is not known"),
    ({"activation": "SITU"}, "cpu", None, "expected an activation_situ_beta with SITU"),
    ({"activation": "RELU"}, "cpu", None, "expected an activation of SILU, SWIGLUOAI, SWIGLUOAI_UNINTERLEAVE"),
    ({"activation": "RELU_NO_MUL"}, "cpu", None, "SILU_NO_MUL, GELU_NO_MUL, GELU_TANH_NO_MUL, RELU2_NO_MUL, got RELU_"),
    ({"swiglu_alpha": 1.702}, "cpu", None, "expected SILU without swiglu_alpha and swiglu_beta"),
    ({"activation": "GELU", "swiglu_limit": 7.0}, "cpu", None, "expected clamp_limit to be None for activation gelu"),
    ({"swiglu_limit": 0.0}, "cpu", None, "expected clamp_limit to be finite and positive"),
    ({"activation": "SWIGLUOAI_UNINTERLEAVE"}, "cpu", None, "expected a swiglu_limit with SWIGLUOAI_UNINTERLEAVE"),
    ({"activation": "SWIGLUSTEP", "swiglu_limit": 5.0}, "cpu", None, "expected swiglu_limit 7.0 with SWIGLUSTEP"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "device", "capability", "reason"), REFUSED)
def test_refused(changes: dict[str, Any], device: str, capability: tuple[int, int] | None, reason: str) -> None:
    got = layer_error(moe_config(**changes), device, capability, step_limit=7.0, libraries=BOTH)
    assert got is not None
    assert reason in got


def test_taken() -> None:
    for device, capability in (("cpu", None), ("cuda", (8, 0)), ("cuda", (9, 0))):
        # Of the exchanges, the one that is named does not matter where there is none.
        for changes in ({}, {"use_all2all_kernels": True, "all2all_backend": "nixl_ep"}, {"all2all_backend": "moonep"}):
            config = moe_config(**changes)
            assert layer_error(config, device, capability, step_limit=7.0, libraries=BOTH) is None
        assert device_error(device, capability, BOTH) is None
        missing = device_error(device, capability, NONE)
        assert missing is not None
        assert "expected the C" in missing


@pytest.mark.parametrize(("name", "limit", "alpha", "beta", "gate"), [
    ("SILU", None, None, None, Gate()),
    ("SILU", 10.0, 1.0, 0.0, Gate(clamp_limit=10.0)),
    ("SWIGLUOAI_UNINTERLEAVE", 7.0, 1.702, 1.0, Gate(clamp_limit=7.0, alpha=1.702, beta=1.0)),
    ("SWIGLUOAI_UNINTERLEAVE", 7.0, None, None, Gate(clamp_limit=7.0)),
    ("SWIGLUSTEP", None, None, None, Gate("swiglustep", 7.0)),
    ("SWIGLUSTEP", 7.0, None, None, Gate("swiglustep", 7.0)),
    ("GELU", None, None, None, Gate("gelu")),
    ("GELU_TANH", None, None, None, Gate("gelu_tanh")),
    ("RELU2", None, None, None, Gate("relu2")),
])  # fmt: skip
def test_the_gate(name: str, limit: Any, alpha: Any, beta: Any, gate: Gate) -> None:
    assert layer_gate(name, limit, alpha, beta, 7.0) == gate


def test_global_scales_off_the_layer() -> None:
    both = torch.tensor([[0.5, 2.0], [3.0, 3.0]])
    gate = both[:, 0].contiguous()
    assert torch.equal(gate_up_scales(SimpleNamespace(w13_weight_scale_2=both), gate), both)
    inverse = torch.tensor([[3.0, 7.0], [0.1, 11.0]])
    got = gate_up_scales(SimpleNamespace(w13_weight_global_scale=inverse), 1.0 / inverse[:, 0].contiguous())
    assert torch.equal(got, 1.0 / inverse)
    # Loaded again: the layer of compressed-tensors keeps what the first load was converted to.
    again = SimpleNamespace(w13_weight_global_scale=inverse, w13_weight_scale_2=both)
    assert torch.equal(gate_up_scales(again, 1.0 / inverse[:, 0].contiguous()), 1.0 / inverse)
    for layer, words in (
        (SimpleNamespace(), r"w13_weight_global_scale \[2, 2\] \(gate, up\), got neither"),
        (SimpleNamespace(w13_weight_scale_2=gate), r"got shape \[2\]"),
        (SimpleNamespace(w13_weight_scale_2=both.flip(1)), "expected w13_scale_2 to be the first column"),
    ):
        with pytest.raises(RuntimeError, match=words):
            gate_up_scales(layer, gate)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_global_scales_that_are_not_finite_are_refused(make_plugin: Callable[..., Plugin], value: float) -> None:
    """And not taken for the sign of a vLLM that hands on something else."""
    w13, w2 = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    for column in (0, 1):
        scales = w13.global_scale.clone()
        scales[2, column] = value
        broken = (NVFP4Weight(w13.data, w13.scale, scales), w2)
        with pytest.raises(ValueError, match=rf"expected finite values, got {value} at index \[2, {column}\]"):
            build(make_plugin(), broken, "modelopt", moe_config())


def test_converting_what_is_converted_is_an_error(make_plugin: Callable[..., Plugin]) -> None:
    """As with a second process_weights_after_loading, which leaves nothing to convert."""
    plugin = make_plugin()
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    held, handed = vllm_layer(layer, "modelopt")
    backend = plugin.module.Backend.TORCH_NVFP4
    keywords: dict[str, Any] = {"nvfp4_backend": backend, "layer": held, "is_act_and_mul": True}
    w13, w13_scale, both, _, w2, w2_scale, _, _ = plugin.user.convert_to_nvfp4_moe_kernel_format(**keywords, **handed)
    held.w13_weight_scale_2 = both
    again = handed | {"w13": w13, "w13_scale": w13_scale, "w2": w2, "w2_scale": w2_scale}
    with pytest.raises(RuntimeError) as raised:
        plugin.user.convert_to_nvfp4_moe_kernel_format(**keywords, **again)
    assert (
        f"expected w13 as the checkpoint has it, [E, 2I, K / 2], got shape {list(w13.shape)}, which is packed"
        in str(raised.value)
    )
    assert "vLLM's reload_weights" in str(raised.value)


@pytest.mark.parametrize("value", ["1", "true", "0", ""])
@pytest.mark.parametrize("version", ["0.24.0", "0.28.0", "0.29.0", "0.33.0"])
def test_vllm_is_left_the_backend_that_its_environment_forces(
    make_plugin: Callable[..., Plugin], monkeypatch: pytest.MonkeyPatch, version: str, value: str
) -> None:
    monkeypatch.setenv("VLLM_TEST_FORCE_FP8_MARLIN", value)
    reason = versions.marlin_error(version)
    forced = value in ("1", "true") and version < "0.29"
    assert reason == ("expected VLLM_TEST_FORCE_FP8_MARLIN not to be set, got 1" if forced else None)
    if forced:
        plugin = make_plugin(version)
        assert select(plugin)[0] == "select_nvfp4_moe_backend"
        plugin.mode = "require"
        with pytest.raises(ValueError, match="expected VLLM_TEST_FORCE_FP8_MARLIN not to be set, got 1"):
            select(plugin)


def test_nan_scales_are_refused(make_plugin: Callable[..., Plugin]) -> None:
    w13, w2 = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    scale = w2.scale.clone()
    scale.view(torch.uint8)[1, 2, 0] = 0x7F
    with pytest.raises(ValueError, match=r"expected finite E4M3 values, got NaN \(byte 0x7F\) at index \[1, 2, 0\]"):
        build(make_plugin(), (w13, NVFP4Weight(w2.data, scale, w2.global_scale)), "modelopt", moe_config())
