"""The parts of the SGLang plug-in that need no SGLang."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

import torch_nvfp4_sglang
from torch_nvfp4 import Gate
from torch_nvfp4.backends import Libraries
from torch_nvfp4.format import NVFP4Weight, quantize
from torch_nvfp4.integrations.sglang import report as report_module
from torch_nvfp4.integrations.sglang import versions
from torch_nvfp4.integrations.sglang.report import report
from torch_nvfp4.integrations.sglang.support import Process, device_error, layer_error, layer_gate
from torch_nvfp4.integrations.sglang.weights import PACKED, pack_layer
from torch_nvfp4.ops import unpack

ALL = Libraries(cpu_ops=True, cuda_ops=True, flashinfer=False)
HOPPER = Process("cuda", (9, 0), libraries=ALL)


def config(**changes: Any) -> types.SimpleNamespace:
    """The fields of SGLang's MoeRunnerConfig that are read, with its defaults."""
    fields = {
        "activation": "silu", "is_gated": True, "swiglu_limit": None, "gemm1_alpha": None, "gemm1_beta": None,
        "gemm1_clamp_limit": None, "gate_up_interleaved": True, "no_combine": False, "routed_scaling_factor": None,
        "hidden_size": 256, "intermediate_size_per_partition": 128,
    }  # fmt: skip
    return types.SimpleNamespace(**fields | changes)


SITU = {"activation": "situ", "gemm1_alpha": 4.0}


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ({}, Gate()),
        ({"swiglu_limit": 10.0}, Gate(clamp_limit=10.0)),
        ({"gemm1_clamp_limit": 7.0}, Gate("swiglustep", clamp_limit=7.0)),
        (
            {"swiglu_limit": 7.0, "gemm1_clamp_limit": 7.0, "gemm1_alpha": 1.5, "gate_up_interleaved": False},
            Gate(clamp_limit=7.0, alpha=1.5, beta=1.0),
        ),
        (
            {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "gate_up_interleaved": False},
            Gate(clamp_limit=7.0, alpha=1.702, beta=1.0),
        ),
        ({"activation": "gelu_tanh"}, Gate("gelu_tanh")),
        ({"activation": "relu2", "is_gated": False}, Gate("relu2", gated=False)),
        ({"activation": "silu", "is_gated": False}, Gate("silu", gated=False)),
        ({"activation": "gelu", "is_gated": False}, Gate("gelu", gated=False)),
        (SITU | {"gemm1_clamp_limit": 25.0}, Gate("situ", alpha=4.0, beta=25.0)),
        (SITU, Gate("situ", alpha=4.0)),
    ],
)
def test_layer_gate(changes: dict[str, Any], gate: Gate) -> None:
    assert layer_gate(config(**changes)) == gate


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"activation": "relu2"}, "expected an activation of silu, gelu, gelu_tanh, situ, got relu2"),
    ({"activation": "gelu_tanh", "is_gated": False}, "of silu, gelu, relu2 for experts without a gate, got gelu_tanh"),
    ({"activation": "situ", "is_gated": False}, "of silu, gelu, relu2 for experts without a gate, got situ"),
    ({"is_gated": False, "swiglu_limit": 7.0}, "expected no swiglu_limit for experts without a gate, got 7"),
    ({"is_gated": False, "gemm1_clamp_limit": 7.0}, "expected no gemm1_clamp_limit for experts without a gate, got 7"),
    ({"is_gated": False, "gemm1_alpha": 1.5}, "expected no gemm1_alpha for experts without a gate, got 1.5"),
    ({"is_gated": False, "gemm1_beta": 1.0}, "expected no gemm1_beta for experts without a gate, got 1"),
    ({"activation": "situ"}, "expected a gemm1_alpha with situ, as SGLang's models give, got none"),
    (SITU | {"swiglu_limit": 7.0}, "expected no swiglu_limit with situ, got 7"),
    (SITU | {"gemm1_beta": 1.0}, "expected no gemm1_beta with situ, got 1"),
    (SITU | {"gemm1_clamp_limit": 0.0}, "expected a gemm1_clamp_limit above 0 with situ, or none, got 0"),
    (SITU | {"gemm1_alpha": -4.0}, "expected alpha > 0"),
    ({"swiglu_limit": 7.0, "gemm1_clamp_limit": 8.0}, "swiglu_limit 7 and gemm1_clamp_limit 8"),
    # One clamps before SiLU and the other behind it.
    ({"swiglu_limit": 7.0, "gemm1_clamp_limit": 7.0}, "expected one limit per layer, got swiglu_limit 7 and gemm1_c"),
    ({"swiglu_limit": 7.0, "gemm1_clamp_limit": 8.0, "gemm1_alpha": 2.0}, "swiglu_limit 7 and gemm1_clamp_limit 8"),
    ({"gemm1_clamp_limit": 7.0, "activation": "gelu"}, "expected no gemm1_clamp_limit with gelu, got 7"),
    ({"gemm1_beta": 1.0}, "expected no gemm1_beta without gemm1_alpha, got 1"),
    ({"gemm1_alpha": 2.0}, "expected a gemm1_clamp_limit with gemm1_alpha, as SGLang's runners do, got none"),
    ({"gemm1_alpha": 2.0, "gemm1_clamp_limit": 7.0}, "expected gate rows first with gemm1_alpha, got gate_up_interl"),
    ({"gemm1_alpha": 2.0, "gemm1_clamp_limit": 7.0, "gemm1_beta": 0.5}, "expected gemm1_beta 1, .* got 0.5"),
    ({"gemm1_alpha": 2.0, "activation": "gelu"}, "expected no gemm1_alpha with gelu, got 2"),
    ({"swiglu_limit": -1.0}, "expected clamp_limit to be finite and positive .* got -1"),
    ({"swiglu_limit": 7.0, "activation": "gelu"}, "expected clamp_limit to be None for activation gelu"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_gates_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_gate(config(**changes))
    assert layer_error(config(**changes), HOPPER, torch.bfloat16) is not None


@pytest.mark.parametrize(
    ("process", "changes", "message"),
    [
        (HOPPER, {}, None),
        (Process("cuda", (8, 0), libraries=ALL), {"swiglu_limit": 10.0, "routed_scaling_factor": 2.5}, None),
        (Process("cpu", libraries=ALL), {"swiglu_limit": 10.0}, None),
        (Process("cpu", libraries=ALL), {"routed_scaling_factor": 2.5}, "expected a routed_scaling_factor of 1"),
        (Process("cuda", (10, 0), libraries=ALL), {}, "expected a GPU without FP4 tensor cores"),
        (Process("hip", libraries=ALL), {}, "expected a cpu or cuda device, got hip"),
        (Process("cuda", (9, 0), "triton", libraries=ALL), {}, "expected --moe-runner-backend auto, got triton"),
        (Process("cuda", (9, 0), all_to_all="deepep", libraries=ALL), {}, "expected --moe-a2a-backend none, got deep"),
        (Process("cuda", (9, 0), lora=True, libraries=ALL), {}, "expected no LoRA"),
        (Process("cuda", (9, 0), load_balancing=True, libraries=ALL), {}, "expected no load balancing"),
        (Process("cuda", (9, 0), paged_experts=True, libraries=ALL), {}, "expected no paged experts"),
        (Process("cuda", (9, 0), replicated_weights=True, libraries=ALL), {}, "expected no weights replicated"),
        (Process("cuda", (9, 0), cpu_experts=True, libraries=ALL), {}, "expected no experts on the CPU beside those"),
        (HOPPER, {"no_combine": True}, "expected no outputs per expert"),
        (HOPPER, {"hidden_size": 250}, "expected K and I to be multiples of 16, got 250, 128"),
    ],
)
def test_layer_error(process: Process, changes: dict[str, Any], message: str | None) -> None:
    error = layer_error(config(**changes), process, torch.bfloat16)
    assert error is None if message is None else error is not None and message in error, error


def test_layers_with_biases_and_a_missing_library_are_refused() -> None:
    words = "expected no biases, for which SGLang's NVFP4 layers have no parameters, got some"
    assert layer_error(config(), HOPPER, torch.bfloat16, with_bias=True) == words
    nothing = Libraries(cpu_ops=False, cuda_ops=False, flashinfer=False)
    assert device_error("cuda", (9, 0), nothing) is not None


def layer_of(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    layer = torch.nn.Module()
    for name, tensor in tensors.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    return layer


@pytest.mark.parametrize("scale_shape", [(3, 2), (3, 1), (3,)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_pack_layer(gated: bool, scale_shape: tuple[int, ...]) -> None:
    experts, hidden, intermediate = 3, 64, 32
    torch.manual_seed(0)
    rows = intermediate * (2 if gated else 1)
    w13, w2 = quantize(torch.randn(experts, rows, hidden)), quantize(torch.randn(experts, hidden, intermediate))
    w13_global = torch.rand(scale_shape)
    tensors = {
        "w13_weight": w13.data, "w13_weight_scale": w13.scale, "w2_weight": w2.data, "w2_weight_scale": w2.scale,
        "w13_weight_scale_2": w13_global, "w13_input_scale": torch.ones(experts, 2),
    }  # fmt: skip
    layer = layer_of(tensors)
    if not gated and scale_shape == (3, 2):
        with pytest.raises(RuntimeError, match=r"w13 with 32 rows without a gate, got 32 and global scales \[3, 2\]"):
            pack_layer(layer, ("w13_weight", "w2_weight"), (w13_global, w2.global_scale), 2.5, gated=False)
        return
    pack_layer(layer, ("w13_weight", "w2_weight"), (w13_global, w2.global_scale), 2.5, gated=gated)

    packed13, global13, packed2, global2 = (getattr(layer, name) for name in PACKED)
    for packed, k, wanted, packed_gated in ((packed13, hidden, w13, gated), (packed2, intermediate, w2, False)):
        got = unpack(packed, k, wanted.global_scale, gated=packed_gated)
        assert isinstance(got, NVFP4Weight)
        assert torch.equal(got.data, wanted.data)
        assert torch.equal(got.scale.view(torch.uint8), wanted.scale.view(torch.uint8))
    columns = w13_global.reshape(experts, -1)
    assert torch.equal(global13, columns.expand(-1, 2) if gated else columns[:, 0])
    torch.testing.assert_close(global2, w2.global_scale * 2.5, rtol=0, atol=0)
    for name in tensors:
        assert getattr(layer, name).numel() == 0
        with pytest.raises(RuntimeError, match="expected no new weights after loading, got some"):
            getattr(layer, name).weight_loader(getattr(layer, name), tensors[name])


@pytest.mark.parametrize("gated", [True, False])
def test_rows_that_do_not_fit_the_gate(gated: bool) -> None:
    w13, w2 = quantize(torch.randn(3, 32 if gated else 64, 64)), quantize(torch.randn(3, 64, 32))
    layer = layer_of(
        {"w13_weight": w13.data, "w13_weight_scale": w13.scale, "w2_weight": w2.data, "w2_weight_scale": w2.scale}
    )
    words = "expected w13 with 64 rows with a gate, got 32" if gated else "with 32 rows without a gate, got 64"
    with pytest.raises(RuntimeError, match=words):
        pack_layer(layer, ("w13_weight", "w2_weight"), (torch.ones(3), w2.global_scale), 1.0, gated=gated)


def test_versions() -> None:
    assert versions.unknown_version("0.5.23+cu130") is None
    assert versions.unknown_version("0.5.24") == "expected sglang 0.5.23, got 0.5.24"

    def nothing(name: str) -> types.ModuleType:
        return types.ModuleType(name)

    with pytest.raises(RuntimeError, match=r"register_moe_runner_core: expected .backend_name, factory., got nothing"):
        versions.check_installed("0.5.23", nothing)
    with pytest.raises(RuntimeError, match=r"does not know this SGLang \(0.4.0\): expected sglang 0.5.23, got 0.4.0"):
        versions.check_installed("0.4.0", nothing)


@pytest.mark.parametrize("value", ["", "auto", "require", "off"])
def test_mode(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_SGLANG", value)
    assert torch_nvfp4_sglang.mode() == (value or "auto")


def test_a_failure_is_kept_for_the_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer:
        def __init__(self) -> None:
            pass

    module = types.ModuleType("stand_in")
    module.Layer = Layer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setattr(
        torch_nvfp4_sglang, "NVFP4_CLASSES", (("stand_in", "Gone"), ("gone", "Layer"), ("stand_in", "Layer"))
    )
    monkeypatch.setenv("TORCH_NVFP4_SGLANG", "always")
    message = "expected auto, require or off, got 'always'"
    with pytest.raises(ValueError, match=message):
        torch_nvfp4_sglang.register()
    with pytest.raises(RuntimeError, match=message):
        Layer()
    monkeypatch.setattr(torch_nvfp4_sglang, "NVFP4_CLASSES", (("stand_in", "Gone"),))
    with pytest.raises(SystemExit, match=message):
        torch_nvfp4_sglang.register()


def test_the_entry_point_imports_the_standard_library_alone() -> None:
    script = "import sys, torch_nvfp4_sglang; print(sorted({'torch', 'torch_nvfp4', 'sglang'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_distribution(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.delenv("TORCH_NVFP4_SGLANG", raising=False)
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.metadata, "version", no_distribution)
    assert report() == (None, False, "not installed")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.23")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert "expected the entry point torch_nvfp4" in report()[2]
    entry = types.SimpleNamespace(name="torch_nvfp4", value="torch_nvfp4_sglang:register")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [entry] if group == "sglang.srt.plugins" else []
    )
    assert report() == ("0.5.23", False, "expected a CUDA device or SGLANG_USE_CPU_ENGINE=1, got neither")
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setattr(report_module, "device_error", lambda device, capability: None)
    assert report() == ("0.5.23", True, "TORCH_NVFP4_SGLANG=auto")
    for with_this in ("", "other, torch_nvfp4"):
        monkeypatch.setenv("SGLANG_PLUGINS", with_this)
        assert report() == ("0.5.23", True, "TORCH_NVFP4_SGLANG=auto")
    monkeypatch.setenv("SGLANG_PLUGINS", " , ")  # with SGLang, none at all
    assert report()[1:] == (False, "expected torch_nvfp4 in SGLANG_PLUGINS, got ''")
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert report()[1:] == (False, "expected torch_nvfp4 in SGLANG_PLUGINS, got 'other'")
    monkeypatch.setenv("TORCH_NVFP4_SGLANG", "off")
    assert report() == ("0.5.23", False, "TORCH_NVFP4_SGLANG=off")
