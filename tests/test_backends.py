"""The choice of a backend, on hardware that is here and that is not; each backend against the fp64 reference; and the
gate on its way from a model config.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_nvfp4 import backends, reference, testing
from torch_nvfp4.backends import (
    Libraries,
    MoEBackend,
    MoEBackendConfig,
    explain_moe_backends,
    flashinfer_trtllm,
    moe_backend,
    select_moe_backend,
)
from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.gate import Gate
from torch_nvfp4.ops.moe_fp8 import MAX_EXPERTS
from torch_nvfp4.quant_config import MoEQuantConfig

ALL = Libraries(cpu_ops=True, cuda_ops=True, flashinfer=True)
NO_FLASHINFER = Libraries(cpu_ops=True, cuda_ops=True, flashinfer=False)
NOTHING = Libraries(cpu_ops=False, cuda_ops=False, flashinfer=False)
# A clamped DeepSeek-V4-Flash layer on an H100.
SM90 = MoEBackendConfig("cuda", 4096, 2048, (9, 0), gate=Gate(clamp_limit=10.0), libraries=ALL)
CPU = dataclasses.replace(SM90, device_type="cpu", compute_capability=None)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_logged", set())


def on(capability: tuple[int, int], **kwargs: Any) -> MoEBackendConfig:
    return dataclasses.replace(SM90, compute_capability=capability, **kwargs)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (on((8, 0)), "marlin"),
        (on((8, 9)), "marlin"),
        (on((9, 0)), "marlin"),
        (CPU, "cpu"),
        (on((10, 0)), "flashinfer_trtllm"),
        (on((10, 3)), "flashinfer_trtllm"),
        (on((10, 0), gate=Gate()), "flashinfer_trtllm"),
        (on((10, 0), gate=Gate("silu", 10.0, 1.702, 1.0)), "flashinfer_trtllm"),
        (on((10, 0), libraries=NO_FLASHINFER), "marlin"),
        (on((10, 0), gate=Gate("swiglustep", 10.0)), "marlin"),
        (on((10, 0), gate=Gate("gelu")), "marlin"),
        (on((10, 0), dtype=torch.float16), "marlin"),
        (on((10, 0), expert_map=True), "marlin"),
        (on((10, 0), apply_router_weight_on_input=True), "marlin"),
        (on((10, 0), equal_gate_up_scales=False), "marlin"),
        (on((10, 0), equal_gate_up_scales=False, gate=Gate()), "flashinfer_trtllm"),
        (on((10, 0), intermediate_size=192), "marlin"),
        (on((12, 0)), "marlin"),
        (on((7, 5)), "reference"),
        (on((9, 0), libraries=NOTHING), "reference"),
        (on((9, 0), dtype=torch.float32), "reference"),
        (dataclasses.replace(CPU, dtype=torch.float32), "cpu"),
        (dataclasses.replace(CPU, dtype=torch.float64), "reference"),
        (dataclasses.replace(CPU, libraries=NOTHING), "reference"),
        (dataclasses.replace(CPU, device_type="mps"), "reference"),
    ],
    ids=str,
)
def test_selection(config: MoEBackendConfig, expected: str) -> None:
    chosen = select_moe_backend(config)
    assert chosen.name == expected
    reasons = explain_moe_backends(config)
    assert list(reasons) == ["flashinfer_trtllm", "marlin", "cpu", "reference", "wgmma_fp8"]
    assert reasons["wgmma_fp8"] == "expected a layer with input_quant='fp8', got None"  # never chosen by itself
    assert reasons[expected] is None
    before = list(reasons)[: list(reasons).index(expected)]
    # Every reason against a better backend says what was expected and what was got.
    assert all("expected" in (reasons[name] or "") and "got" in (reasons[name] or "") for name in before)
    assert select_moe_backend(config, expected) is chosen


def test_this_machine_has_a_backend() -> None:
    config = MoEBackendConfig.for_device("cpu", 64, 32, gate=Gate(clamp_limit=10.0))
    assert config.libraries.cpu_ops
    assert select_moe_backend(config).name == "cpu"


@pytest.mark.parametrize("on", ["expert_map", "apply_router_weight_on_input", "equal_gate_up_scales", "biases"])
def test_config_for_a_device_has_every_field(on: str) -> None:
    fields: dict[str, Any] = {"dtype": torch.float16, "gate": Gate("silu", 7.0, 1.702, 1.0), "libraries": NOTHING}
    flags = ("expert_map", "apply_router_weight_on_input", "equal_gate_up_scales", "biases")
    fields |= dict.fromkeys(flags, False) | {on: True, "input_quant": "fp8"}
    assert MoEBackendConfig.for_device("cpu", 64, 32, **fields) == MoEBackendConfig("cpu", 64, 32, **fields)
    assert MoEBackendConfig.for_device("cpu", 64, 32) == MoEBackendConfig("cpu", 64, 32)
    of_the_device = {"device_type", "hidden_size", "intermediate_size", "compute_capability"}
    assert {field.name for field in dataclasses.fields(MoEBackendConfig)} == of_the_device | set(fields)


@pytest.mark.parametrize(
    ("config", "backend", "reason"),
    [
        (on((10, 0), gate=Gate("swiglustep", 10.0)), "flashinfer_trtllm", "clamp_limit 10 to swiglustep, got one"),
        (on((10, 0), equal_gate_up_scales=False), "flashinfer_trtllm", "equal global scales of gate and up"),
        (on((9, 0)), "flashinfer_trtllm", r"compute capability 10.x .*, got 9.0"),
        (on((10, 0), libraries=NO_FLASHINFER), "flashinfer_trtllm", "expected the package flashinfer, got none"),
        (CPU, "marlin", "expected a cuda device, got cpu"),
        (on((7, 5)), "marlin", "compute capability 8.0 or later, got 7.5"),
        (on((9, 0), libraries=NOTHING), "marlin", r"_C_cuda.so\), got none"),
        (on((9, 0)), "cpu", "expected a cpu device, got cuda"),
        (dataclasses.replace(CPU, hidden_size=72), "cpu", "multiples of 16, got 72, 2048"),
        (dataclasses.replace(CPU, dtype=torch.float64), "cpu", "bfloat16 or float16 or float32, got float64"),
    ],
)
def test_explicit_backend_that_cannot_run(config: MoEBackendConfig, backend: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run.*{reason}"):
        select_moe_backend(config, backend)


FP8 = on((9, 0), input_quant="fp8", libraries=NO_FLASHINFER)


@pytest.mark.parametrize(
    "config",
    [
        FP8,
        dataclasses.replace(FP8, gate=Gate("silu", 7.0, 1.702, 1.0), dtype=torch.float16),
        dataclasses.replace(FP8, expert_map=True, apply_router_weight_on_input=True, equal_gate_up_scales=False),
    ],
    ids=str,
)
def test_fp8_activations_where_they_are_asked_for(config: MoEBackendConfig) -> None:
    assert select_moe_backend(config).name == select_moe_backend(config, "wgmma_fp8").name == "wgmma_fp8"
    others = {name: reason for name, reason in explain_moe_backends(config).items() if name != "wgmma_fp8"}
    assert set(others.values()) == {"expected a layer with input_quant=None, got 'fp8'"}
    assert select_moe_backend(dataclasses.replace(config, input_quant=None)).name == "marlin"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (dataclasses.replace(CPU, input_quant="fp8"), "expected a GPU of compute capability 9.0, got cpu"),
        (dataclasses.replace(FP8, compute_capability=(8, 9)), "expected compute capability 9.0, got 8.9"),
        (dataclasses.replace(FP8, compute_capability=(10, 0), libraries=ALL), "compute capability 9.0, got 10.0"),
        (dataclasses.replace(FP8, libraries=NOTHING), r"_C_cuda.so\), got none; build it with"),
        (dataclasses.replace(FP8, dtype=torch.float32), "hidden_states in bfloat16 or float16, got float32"),
        (dataclasses.replace(FP8, gate=Gate("gelu")), "expected activation silu, got gelu"),
        (
            dataclasses.replace(FP8, gate=Gate("swiglustep", 7.0)),
            "a backend that applies clamp_limit 7 to swiglustep, got one that clamps silu",
        ),
        (dataclasses.replace(FP8, gate=Gate("silu", gated=False)), "expected experts with a gate, got some without"),
        (dataclasses.replace(FP8, biases=True), "expected experts without biases, got some with"),
        (dataclasses.replace(FP8, hidden_size=72), "multiples of 16, got 72, 2048"),
    ],
)
def test_fp8_activations_are_never_left_out(config: MoEBackendConfig, reason: str) -> None:
    advice = "leave input_quant out to run it with activations in 16 bits"
    with pytest.raises(ValueError, match=rf"input_quant='fp8' cannot run .*input_quant fp8\): .*{reason}.*; {advice}"):
        select_moe_backend(config)
    with pytest.raises(ValueError, match=f"backend='wgmma_fp8' cannot run.*{reason}"):
        select_moe_backend(config, "wgmma_fp8")


def test_fp8_activations_beside_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend='marlin' cannot run.*with input_quant=None, got 'fp8'"):
        select_moe_backend(FP8, "marlin")
    with pytest.raises(ValueError, match=r"backend='wgmma_fp8' cannot run.*with input_quant='fp8', got None"):
        select_moe_backend(SM90, "wgmma_fp8")
    monkeypatch.setenv("TORCH_NVFP4_BACKEND", "wgmma_fp8")
    with pytest.raises(ValueError, match=r"TORCH_NVFP4_BACKEND='wgmma_fp8' cannot run.*='fp8', got None"):
        select_moe_backend(SM90)
    monkeypatch.delenv("TORCH_NVFP4_BACKEND")
    monkeypatch.setenv("TORCH_NVFP4_ARCH", "80")
    with pytest.raises(ValueError, match="expected TORCH_NVFP4_ARCH to be unset, got 80, whose kernels have no FP8"):
        select_moe_backend(FP8)
    with pytest.raises(ValueError, match="input_quant: expected None or 'fp8', got 'int8'"):
        dataclasses.replace(FP8, input_quant="int8")


def test_fp8_has_no_batched_form_and_a_limit_of_experts() -> None:
    fp8 = moe_backend("wgmma_fp8")
    with pytest.raises(NotImplementedError, match=r"^wgmma_fp8: expected tokens with a routing, got a batch"):
        fp8.apply_batched({}, MoEQuantConfig(), torch.zeros(1, 1, 16), torch.zeros(1))
    with pytest.raises(ValueError, match="input_quant='fp8': expected at most 2048 experts, got 2049"):
        fp8.prepare(*layer(experts=2049, k=16, i=16))
    source = Path(__file__).parent.parent / "csrc" / "kernels.h"
    assert f"constexpr int64_t kFp8MaxExperts = {MAX_EXPERTS};" in source.read_text()


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend: expected a backend of flashinfer.*, got 'triton'"):
        select_moe_backend(CPU, "triton")


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_BACKEND", "reference")
    assert select_moe_backend(CPU).name == "reference"
    assert select_moe_backend(CPU, "cpu").name == "cpu"  # an argument is stronger
    monkeypatch.setenv("TORCH_NVFP4_BACKEND", "marlin")
    with pytest.raises(ValueError, match=r"TORCH_NVFP4_BACKEND='marlin' cannot run.*got cpu"):
        select_moe_backend(CPU)
    monkeypatch.setenv("TORCH_NVFP4_BACKEND", "nope")
    with pytest.raises(ValueError, match="TORCH_NVFP4_BACKEND: expected a backend of"):
        select_moe_backend(CPU)
    monkeypatch.setenv("TORCH_NVFP4_BACKEND", "")
    assert select_moe_backend(CPU).name == "cpu"


def test_nothing_left_lists_every_reason() -> None:
    config = on((8, 0), gate=Gate("relu2"), hidden_size=72)
    with pytest.raises(NotImplementedError) as error:
        select_moe_backend(config)
    for name, reason in explain_moe_backends(config).items():
        assert reason is not None
        assert f"{name}: {reason}" in str(error.value)


def test_clamp_leaves_only_backends_that_clamp(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = SimpleNamespace(name="fast", CLAMP_ACTIVATIONS=frozenset(), INPUT_QUANT=None, supports=lambda config: None)
    monkeypatch.setattr(backends, "BACKENDS", (fast, *backends.BACKENDS))
    assert select_moe_backend(dataclasses.replace(CPU, gate=Gate())) is fast
    assert select_moe_backend(CPU).name == "cpu"
    with pytest.raises(ValueError, match="applies clamp_limit 10 to silu, got one that clamps no activation"):
        select_moe_backend(CPU, "fast")
    monkeypatch.setattr(backends, "BACKENDS", (fast,))
    with pytest.raises(NotImplementedError, match="fast: expected a backend that applies clamp_limit 10"):
        select_moe_backend(CPU)


def test_each_decision_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="torch_nvfp4.backends"):
        for _ in range(2):
            select_moe_backend(SM90)
            select_moe_backend(CPU)
        select_moe_backend(CPU, "reference")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert messages[0].startswith("MoE backend marlin for cuda SM90, K 4096, I 2048, silu, clamp_limit 10; passed")
    assert "flashinfer_trtllm: expected compute capability 10.x" in messages[0]
    assert messages[1].startswith("MoE backend cpu for cpu")
    assert "marlin: expected a cuda device, got cpu" in messages[1]
    assert messages[2].startswith("MoE backend reference, asked for by backend")


def layer(
    experts: int = 4, k: int = 64, i: int = 48, equal: bool = False, device: str = "cpu"
) -> tuple[NVFP4Weight, NVFP4Weight]:
    generator = torch.Generator().manual_seed(0)
    w13 = testing.random_weight((experts, 2 * i, k), gated=True, generator=generator, device=device)
    if equal:
        w13 = w13._replace(global_scale=w13.global_scale[:, :1].repeat(1, 2))
    return w13, testing.random_weight((experts, k, i), generator=generator, device=device)


GATES = [
    MoEQuantConfig.make("silu"),
    MoEQuantConfig.make("silu", 1.0),
    MoEQuantConfig.make("silu", 1.0, 1.702, 1.0),
    MoEQuantConfig.make("swiglustep", 0.7),
    MoEQuantConfig.make("gelu"),
    MoEQuantConfig.make("gelu_tanh"),
    MoEQuantConfig.make("relu2"),
]


@pytest.fixture(params=["kernels", "reference"])
def backend(request: pytest.FixtureRequest, device: str) -> MoEBackend:
    """Each backend that runs on ``device``."""
    return moe_backend({"cpu": "cpu", "cuda": "marlin"}[device] if request.param == "kernels" else "reference")


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.activation.name}-{gate.gemm1_clamp_limit}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_apply_against_the_fp64_reference(
    backend: MoEBackend, device: str, gate: MoEQuantConfig, dtype: torch.dtype
) -> None:
    if backend.supports(MoEBackendConfig.for_device(device, 64, 48, dtype=dtype)) is not None:
        pytest.skip(f"{backend.name} takes no {dtype}")
    w13, w2 = layer(device=device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 64, generator=generator).to(device, dtype)
    topk_weights, topk_ids = testing.random_routing(9, 8, 3, generator=generator, device=device)
    expert_map = torch.tensor([-1, 2, 0, -1, 1, 3, -1, -1], dtype=torch.int32, device=device)
    kwargs = {
        "activation": gate.activation,
        "clamp_limit": gate.gemm1_clamp_limit,
        "alpha": gate.gemm1_alpha,
        "beta": gate.gemm1_beta,
    }
    for on_input in (False, True):
        out = backend.apply(backend.prepare(w13, w2), gate, x, topk_weights, topk_ids, expert_map, on_input)
        expected, share = reference.moe_with_clamped_share(
            x, w13, w2, topk_weights, topk_ids, expert_map, apply_router_weight_on_input=on_input, **kwargs
        )
        assert out.dtype == dtype
        testing.assert_accurate(out, expected)
        assert (share > 0.05) == (gate.gemm1_clamp_limit is not None)  # the limits bite


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.activation.name}-{gate.gemm1_clamp_limit}")
def test_apply_batched_against_the_fp64_reference(backend: MoEBackend, device: str, gate: MoEQuantConfig) -> None:
    w13, w2 = layer(device=device)
    x = torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)
    counts = torch.tensor([6, 0, 1, 3], dtype=torch.int32, device=device)
    for rows, count in zip(x, counts.tolist(), strict=True):
        rows[count:] = torch.nan
    out = backend.apply_batched(backend.prepare(w13, w2), gate, x, counts)
    assert out.dtype == torch.bfloat16
    testing.assert_accurate(out, reference.batched_moe(x, w13, w2, counts, **gate.gate.kwargs()))


def test_flashinfer_has_no_batched_form() -> None:
    expected = r"^flashinfer_trtllm: expected tokens with a routing, got a batch with a count for each expert; ask for"
    with pytest.raises(NotImplementedError, match=expected):
        moe_backend("flashinfer_trtllm").apply_batched({}, MoEQuantConfig(), torch.zeros(1, 1, 16), torch.zeros(1))


def test_reference_applies_the_clamp() -> None:
    w13, w2 = layer()
    x = torch.randn(5, 64)
    routing = testing.random_routing(5, 4, 2)
    backend = moe_backend("reference")
    tensors = backend.prepare(w13, w2)
    free = backend.apply(tensors, MoEQuantConfig(), x, *routing)
    clamped = backend.apply(tensors, MoEQuantConfig.make("silu", 0.5), x, *routing)
    assert testing.relative_l2(clamped, free) > 0.1


def test_restore_is_the_inverse_of_prepare(backend: MoEBackend, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w13 = testing.random_weight((3, 64, 80), gated=True, all_scales=True, generator=generator, device=device)
    w2 = testing.random_weight((3, 80, 32), all_scales=True, generator=generator, device=device)
    for restored, original in zip(backend.restore(backend.prepare(w13, w2), 80, 32), (w13, w2), strict=True):
        assert_same_weight(restored, original)


def assert_same_weight(got: NVFP4Weight, expected: NVFP4Weight) -> None:
    assert torch.equal(got.data, expected.data)
    assert torch.equal(got.scale.view(torch.uint8), expected.scale.view(torch.uint8))
    assert torch.equal(got.global_scale, expected.global_scale)


def test_prepare_rejects_nan_scales(backend: MoEBackend, device: str) -> None:
    w13, w2 = layer(device=device)
    w2.scale.view(torch.uint8)[1, 2, 0] = 0x7F
    with pytest.raises(ValueError, match=r"scale: expected finite E4M3 values, got NaN .* at index \[1, 2, 0\]"):
        backend.prepare(w13, w2)


def test_reference_op_passes_opcheck() -> None:
    w13, w2 = layer()
    topk_weights, topk_ids = testing.random_routing(5, 4, 2)
    args = (torch.randn(5, 64), *w13, *w2, topk_weights, topk_ids, None, 0, 1.0, 1.0, 0.0, False)
    # test_schema compares inputs before and after, for which torch has no kernel in E4M3.
    tests = ("test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.nvfp4_reference.moe.default, args, test_utils=tests)
    args = (torch.randn(4, 5, 64), *w13, *w2, torch.tensor([0, 5, 2, 1], dtype=torch.int32), 0, 1.0, 1.0, 0.0)
    torch.library.opcheck(torch.ops.nvfp4_reference.batched_moe.default, args, test_utils=tests)


class FlashinferStandIn(ModuleType):
    """Records the call of the MoE kernel; the layout functions do what flashinfer's do, by its documentation.

    The row shuffle is another permutation than flashinfer's, which is its own business.
    """

    def __init__(self) -> None:
        super().__init__("flashinfer")
        self.calls: list[dict[str, Any]] = []

    @staticmethod
    def shuffle_matrix_a(matrix: Tensor, epilogue_tile_m: int) -> Tensor:
        assert epilogue_tile_m == 128
        return matrix.reshape(-1, 2, 16, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)

    @classmethod
    def shuffle_matrix_sf_a(cls, scale: Tensor, epilogue_tile_m: int) -> Tensor:
        assert scale.dtype == torch.uint8
        n, groups = scale.shape
        out = torch.empty(n * groups, dtype=torch.uint8)
        shuffled = cls.shuffle_matrix_a(scale, epilogue_tile_m)
        m, k = torch.meshgrid(torch.arange(n), torch.arange(groups), indexing="ij")
        offset = (m // 128) * (groups // 4) * 512 + (k // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4
        out[offset.flatten()] = shuffled.flatten()
        return out

    @staticmethod
    def fp4_quantize(x: Tensor, global_scale: Tensor, sf_vec_size: int, is_sf_swizzled_layout: bool) -> Any:
        assert (sf_vec_size, is_sf_swizzled_layout) == (16, False)
        tokens, k = x.shape
        return torch.zeros(tokens, k // 2, dtype=torch.uint8), torch.zeros(tokens * k // 16, dtype=torch.uint8)

    def trtllm_fp4_block_scale_routed_moe(self, **kwargs: Any) -> list[Tensor]:
        self.calls.append(kwargs)
        return [torch.zeros(kwargs["hidden_states"].shape[0], kwargs["gemm2_weights"].shape[1], dtype=torch.bfloat16)]


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> FlashinferStandIn:
    stand_in = FlashinferStandIn()
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    return stand_in


def test_flashinfer_receives_the_limit_in_its_units(flashinfer: FlashinferStandIn) -> None:
    w13, w2 = layer(experts=2, k=128, i=128, equal=True)
    quant = MoEQuantConfig(Gate("silu", 7.0, 1.702, 1.0), a13_scale=0.5, a2_scale=0.25)
    tensors = flashinfer_trtllm.prepare(w13, w2)
    topk_weights, topk_ids = testing.random_routing(3, 2, 2)
    topk_ids[1, 1] = 2  # no such expert
    out = flashinfer_trtllm.apply(tensors, quant, torch.zeros(3, 128, dtype=torch.bfloat16), topk_weights, topk_ids)
    assert out.shape == (3, 128)
    (call,) = flashinfer.calls
    accumulator = 0.5 * w13.global_scale[:, 0]
    torch.testing.assert_close(call["gemm1_clamp_limit"] * accumulator, torch.full((2,), 7.0))
    torch.testing.assert_close(call["gemm1_beta"] * accumulator, torch.full((2,), 1.0))
    torch.testing.assert_close(call["gemm1_alpha"], torch.full((2,), 1.702))
    torch.testing.assert_close(call["output1_scale_gate_scalar"], accumulator)
    torch.testing.assert_close(call["output1_scale_scalar"], accumulator / 0.25)
    torch.testing.assert_close(call["output2_scale_scalar"], w2.global_scale * 0.25)
    ids, slot_weights = call["topk_ids"]
    assert ids.dtype == torch.int32
    assert ids.max() < 2
    assert slot_weights[1, 1] == 0
    assert call["activation_type"] == 3
    assert (call["intermediate_size"], call["num_experts"], call["top_k"]) == (128, 2, 2)
    assert call["hidden_states_scale"].shape == (3, 8)


def test_flashinfer_without_a_limit(flashinfer: FlashinferStandIn) -> None:
    w13, w2 = layer(experts=2, k=128, i=128)
    x = torch.zeros(3, 128, dtype=torch.bfloat16)
    flashinfer_trtllm.apply(flashinfer_trtllm.prepare(w13, w2), MoEQuantConfig(), x, *testing.random_routing(3, 2, 2))
    (call,) = flashinfer.calls
    assert call["gemm1_clamp_limit"] is None
    torch.testing.assert_close(call["output1_scale_gate_scalar"], w13.global_scale[:, 0])
    torch.testing.assert_close(call["output1_scale_scalar"], w13.global_scale[:, 1])


def test_flashinfer_layout_and_its_inverse(flashinfer: FlashinferStandIn) -> None:
    w13, w2 = layer(experts=2, k=256, i=128)
    tensors = flashinfer_trtllm.prepare(w13, w2)
    # Row 0 is the first up row, row 2 of the stand-in's shuffle the second: up 0, gate 0, up 1, ...
    order = FlashinferStandIn.shuffle_matrix_a(torch.arange(256).unsqueeze(1), 128).flatten()
    rows = [128 + int(row) // 2 if row % 2 == 0 else int(row) // 2 for row in order]
    assert torch.equal(tensors["w13_data"], w13.data[:, rows])
    for restored, original in zip(flashinfer_trtllm.restore(tensors, 256, 128), (w13, w2), strict=True):
        assert_same_weight(restored, original)


class ClassAttribute:
    swiglu_limit = 10.0


class TransformersLike:
    def __init__(self, **values: Any) -> None:
        self._values = values

    def to_dict(self) -> dict[str, Any]:
        return self._values


SILU_10 = MoEQuantConfig.make("silu", 10.0)
GPT_OSS = MoEQuantConfig.make("silu", 7.0, 1.702, 1.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, MoEQuantConfig()),
        ({"hidden_act": "gelu_pytorch_tanh"}, MoEQuantConfig.make("gelu_tanh")),
        ({"model_type": "deepseek_v4", "hidden_act": "silu", "swiglu_limit": 10.0}, SILU_10),
        ({"model_type": "deepseek_v4", "swiglu_limit": 0}, MoEQuantConfig()),
        ({"model_type": "gpt_oss", "swiglu_limit": 7.0}, GPT_OSS),
        ({"model_type": "minimax_m3", "hidden_act": "swigluoai", "swiglu_limit": 7.0}, GPT_OSS),
        ({"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}, GPT_OSS),
        ({"model_type": "step3p5", "swiglu_limits": [None, 7.0, 16]}, MoEQuantConfig.make("swiglustep", 7.0)),
        ({"text_config": {"swiglu_limit": 10.0}}, SILU_10),
        (SimpleNamespace(swiglu_limit=10.0), SILU_10),
        (SimpleNamespace(text_config=SimpleNamespace(swiglu_limit=10.0)), SILU_10),
        (ClassAttribute(), SILU_10),
        (TransformersLike(swiglu_limit=10.0), SILU_10),
    ],
)
def test_gate_of_a_config(config: Any, expected: MoEQuantConfig) -> None:
    assert MoEQuantConfig.from_config(config, 1) == expected


def test_layers_with_different_limits_need_the_layer() -> None:
    config = {"model_type": "step3p5", "num_hidden_layers": 3, "swiglu_limits": [None, 7.0, 16]}
    limits = [MoEQuantConfig.from_config(config, layer).gemm1_clamp_limit for layer in range(3)]
    assert limits == [None, 7.0, 16.0]
    with pytest.raises(ValueError, match="expected the layer, as layers differ in their gate, got layer=None"):
        MoEQuantConfig.from_config(config)
    assert MoEQuantConfig.from_config({"num_hidden_layers": 3, "swiglu_limit": 10.0}) == SILU_10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mlp_clamp_value": 7.0}, "mlp_clamp_value: expected a limit of the gate to be swiglu_limit"),
        ({"swiglu_clamp": 7.0}, "swiglu_clamp: expected a limit of the gate"),
        ({"text_config": {"act_limit": [7.0]}}, "act_limit: expected a limit of the gate"),
        (SimpleNamespace(swiglu_clip=7.0), "swiglu_clip: expected a limit of the gate"),
        ({"swiglu_limit": "ten"}, "swiglu_limit: expected a positive, finite number, .* got 'ten'"),
        ({"swiglu_limit": -1.0}, "swiglu_limit: expected a positive, finite number"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit: expected a positive, finite number"),
        ({"swiglu_limit": 10.0, "hidden_act": "gelu"}, "expected hidden_act 'silu' beside a swiglu limit, got 'gelu'"),
        ({"hidden_act": "tanh"}, "hidden_act: expected one of .*, got 'tanh'"),
        ({"swiglu_limits": [7.0], "model_type": "step3p5"}, "expected a swiglu limit for layer 1"),
    ],
)
def test_limit_that_is_not_understood_raises(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEQuantConfig.from_config(config, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("gelu", 7.0), "expected clamp_limit to be None for activation gelu"),
        (("silu", 0.0), "expected clamp_limit to be finite and positive"),
        (("silu", float("nan")), "expected clamp_limit to be finite and positive"),
        (("swiglustep", 7.0, 1.702), "expected alpha=1, beta=0 for activation swiglustep"),
        (("swish",), "expected activation to be one of silu"),
    ],
)
def test_gate_that_makes_no_sense_raises(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEQuantConfig.make(*args)
