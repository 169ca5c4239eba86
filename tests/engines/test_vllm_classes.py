"""The plug-in on vLLM's own classes, in this process: values through its kernel interface, and every loud failure."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
import vllm.model_executor.layers.quantization.modelopt as modelopt
import vllm.model_executor.parameter
import vllm.plugins
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle
from vllm.model_executor.layers.fused_moe.prepare_finalize.batched import BatchedPrepareAndFinalize
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4 import (  # noqa: E501
    CompressedTensorsW4A4Nvfp4MoEMethod,
)
from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkNvfp4MoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static
from vllm.models.deepseek_v4.quant_config import DeepseekV4FP8Config
from vllm.v1.worker.workspace import init_workspace_manager

import torch_nvfp4
from helpers.layers import activations, make_layer, routed
from helpers.recorded import RecordedOps
from torch_nvfp4 import reference

WRAPPED = ("select_nvfp4_moe_backend", "convert_to_nvfp4_moe_kernel_format", "make_nvfp4_moe_quant_config")
ORIGINALS = {name: getattr(oracle, name) for name in WRAPPED}
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, LIMIT = 4, 64, 32, 2, 0.7


@pytest.fixture(autouse=True)
def _vllm_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TORCH_NVFP4_VLLM", raising=False)
    vllm.plugins.plugins_loaded = False
    init_workspace_manager(torch.device("cpu"))  # which the kernels' buffers come from before vLLM 0.31
    yield
    for module in [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "vllm"]:
        for name, original in ORIGINALS.items():
            if name in module.__dict__:
                setattr(module, name, original)


def is_wrapped() -> bool:
    """Whether the plug-in is in place, in the oracle and in a module that had imported its functions."""
    states = {getattr(module, name) is not ORIGINALS[name] for module in (oracle, modelopt) for name in WRAPPED}
    assert len(states) == 1
    return states.pop()


def moe_config(**changes: Any) -> FusedMoEConfig:
    fields = {
        "num_experts": EXPERTS, "experts_per_token": TOP_K, "hidden_dim": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_local_experts": EXPERTS, "num_logical_experts": EXPERTS, "activation": MoEActivation.SILU,
        "device": "cpu", "routing_method": RoutingMethodType.TopK, "in_dtype": torch.float32,
        "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
    } | changes  # fmt: skip
    return FusedMoEConfig(**fields)


def load_plugins() -> None:
    """As each process of vLLM does."""
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()


def kernel(layer: Any, config: FusedMoEConfig, batched_rows: int = 0) -> tuple[FusedMoEKernel, Tensor, Tensor]:
    """What a quantization method of vLLM makes of a layer."""
    backend, experts_cls = modelopt.select_nvfp4_moe_backend(config, kNvfp4Static, kNvfp4Dynamic)
    if batched_rows:
        from torch_nvfp4.integrations.vllm.experts import NVFP4BatchedExperts as experts_cls
    w13, w2 = layer
    held = SimpleNamespace(w13_weight_scale_2=w13.global_scale, moe_config=config)
    ones = torch.ones(EXPERTS)
    p13, s13, g13, a13, p2, s2, g2, a2 = modelopt.convert_to_nvfp4_moe_kernel_format(
        nvfp4_backend=backend, layer=held, w13=w13.data, w13_scale=w13.scale,
        w13_scale_2=w13.global_scale[:, 0].contiguous(), a13_scale=ones, w2=w2.data, w2_scale=w2.scale,
        w2_scale_2=w2.global_scale, a2_scale=ones, is_act_and_mul=True,
    )  # fmt: skip
    quant = modelopt.make_nvfp4_moe_quant_config(
        backend=backend, w13_scale=s13, w2_scale=s2, w13_scale_2=g13, w2_scale_2=g2, a13_scale=a13, a2_scale=a2,
        swiglu_limit=config.swiglu_limit,
    )  # fmt: skip
    if not batched_rows:
        return oracle.make_nvfp4_moe_kernel(quant, config, experts_cls, backend), p13, p2
    prepare = BatchedPrepareAndFinalize(batched_rows, EXPERTS, num_dispatchers=1, rank=0)
    return FusedMoEKernel(prepare, experts_cls(config, quant, batched_rows, 1)), p13, p2


class Layer(RoutedExperts):
    """What the quantization methods touch of a layer, without the distributed set-up of a model."""

    def __init__(self, config: FusedMoEConfig) -> None:
        torch.nn.Module.__init__(self)
        self.moe_config = config
        self.swiglu_limit = config.swiglu_limit

    def _expert_routing_tables(self) -> None:
        return None


def quantization_methods(layer: Layer) -> dict[str, Any]:
    """How each of vLLM's configs that know NVFP4 experts makes the method of a layer."""
    config = layer.moe_config
    nvfp4 = modelopt.ModelOptNvFp4Config(
        is_checkpoint_nvfp4_serialized=True, kv_cache_quant_algo=None, exclude_modules=[], group_size=16
    )

    def mixed(algorithm: str) -> Any:
        experts = {"moe.experts.0.gate_proj": {"quant_algo": algorithm, "group_size": 16}}
        text = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": experts, "ignore": []}
        return modelopt.ModelOptMixedPrecisionConfig.from_config(text).get_quant_method(layer, "moe.experts")

    def deepseek_v4() -> Any:
        made = DeepseekV4FP8Config(is_checkpoint_fp8_serialized=True)
        made._resolved_expert_dtype, made._resolved_moe_quant_algo = "fp4", "NVFP4"  # else read off a running engine
        return made.get_quant_method(layer, "moe.experts")

    return {
        "ModelOpt": lambda: modelopt.ModelOptNvFp4FusedMoE(nvfp4, config),
        "ModelOpt, mixed precision, W4A4": lambda: mixed("NVFP4"),
        "ModelOpt, mixed precision, W4A16": lambda: mixed("W4A16_NVFP4"),
        "DeepSeek-V4": deepseek_v4,
        "compressed-tensors, W4A4": lambda: CompressedTensorsW4A4Nvfp4MoEMethod(config),
        "compressed-tensors, W4A16": lambda: CompressedTensorsW4A4Nvfp4MoEMethod(config, use_a16=True),
        "Quark": lambda: QuarkNvfp4MoEMethod(config, None, kNvfp4Dynamic),
    }


METHODS = ["ModelOpt", "ModelOpt, mixed precision, W4A4", "ModelOpt, mixed precision, W4A16", "DeepSeek-V4",
           "compressed-tensors, W4A4", "compressed-tensors, W4A16", "Quark"]  # fmt: skip


def load(layer: Layer, weights: Any) -> None:
    """Fills the parameters that a method has made, under the names that it has given them."""
    for prefix, weight in zip(("w13", "w2"), weights, strict=True):
        reciprocal = hasattr(layer, f"{prefix}_weight_global_scale")
        name = "weight_global_scale" if reciprocal else "weight_scale_2"
        getattr(layer, f"{prefix}_weight_packed" if reciprocal else f"{prefix}_weight").data.copy_(weight.data)
        getattr(layer, f"{prefix}_weight_scale").data.copy_(weight.scale)
        global_scale = 1.0 / weight.global_scale if reciprocal else weight.global_scale
        getattr(layer, f"{prefix}_{name}").data.copy_(global_scale)
    for name, parameter in layer.named_parameters():
        if "input" in name:
            parameter.data.fill_(1.0)


@pytest.mark.parametrize("name", METHODS)
def test_every_quantization_method(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From the parameters that the method makes, through its conversion and its kernel, to the output."""
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "require")
    monkeypatch.setattr(vllm.model_executor.parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(vllm.model_executor.parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    load_plugins()
    layer = Layer(moe_config(swiglu_limit=LIMIT))
    methods = quantization_methods(layer)
    assert list(methods) == METHODS
    method = methods[name]()
    method.create_weights(
        layer, EXPERTS, HIDDEN, INTERMEDIATE, torch.float32, weight_loader=lambda *_: None, global_num_experts=EXPERTS
    )
    weights = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    load(layer, weights)
    method.process_weights_after_loading(layer)
    x = activations(9, HIDDEN, seed=2).float()
    topk_weights, ids, _, _ = routed(9, EXPERTS, TOP_K, seed=3)
    output = method.moe_kernel.apply(
        x, layer.w13_weight, layer.w2_weight, topk_weights=topk_weights, topk_ids=ids.to(torch.int32),
        activation=MoEActivation.SILU, global_num_experts=EXPERTS, expert_map=None, apply_router_weight_on_input=False,
    )  # fmt: skip
    close(output, reference.moe(x.double(), *weights, topk_weights, ids, clamp_limit=LIMIT))


@pytest.mark.parametrize("name", ["ModelOpt", "compressed-tensors, W4A16", "Quark"])
def test_what_was_loaded_is_freed_and_converted_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "require")
    monkeypatch.setattr(vllm.model_executor.parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(vllm.model_executor.parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    load_plugins()
    hidden, intermediate = 208, 176  # of no other test
    layer = Layer(moe_config(hidden_dim=hidden, intermediate_size=intermediate))
    method = quantization_methods(layer)[name]()
    method.create_weights(
        layer, EXPERTS, hidden, intermediate, torch.float32, weight_loader=lambda *_: None, global_num_experts=EXPERTS
    )
    load(layer, make_layer(EXPERTS, hidden, intermediate, seed=1))
    loaded = {(EXPERTS, 2 * intermediate, hidden // 2), (EXPERTS, hidden, intermediate // 2),
              (EXPERTS, 2 * intermediate, hidden // 16), (EXPERTS, hidden, intermediate // 16)}  # fmt: skip

    def alive() -> set[tuple[int, ...]]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        return {tuple(tensor.shape) for tensor in tensors} & loaded

    assert alive() == loaded
    method.process_weights_after_loading(layer)
    assert alive() == set()
    if not name.startswith("compressed-tensors"):  # which has renamed its parameters, and does not come so far
        with pytest.raises(RuntimeError, match="process_weights_after_loading came twice for weights that were loaded"):
            method.process_weights_after_loading(layer)


def close(got: Tensor, expected: Tensor) -> None:
    error = float((got.double() - expected).abs().max()) / float(expected.abs().max())
    print(f"relative error {error:.1e}")
    assert error < 2e-6


@pytest.mark.parametrize("form", ["standard", "standard, late", "batched"])
@pytest.mark.parametrize("on_input", [False, True])
def test_values_through_the_kernel_interface(monkeypatch: pytest.MonkeyPatch, form: str, on_input: bool) -> None:
    """vLLM's prepare, the experts, vLLM's finalize. A router weight on the input comes with one expert per token.

    Late: the op runs in vLLM's finalize, as with versions that hand the experts a buffer of their own.
    """
    load_plugins()
    batched = form == "batched"
    monkeypatch.setattr("torch_nvfp4.integrations.vllm.experts.copies_output", lambda: form == "standard, late")
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    made, w13, w2 = kernel(layer, moe_config(swiglu_limit=LIMIT), batched_rows=16 if batched else 0)
    x = activations(9, HIDDEN, seed=2).float()
    weights, ids, _, _ = routed(9, EXPERTS, 1 if on_input else TOP_K, seed=3)
    if on_input:
        weights = torch.linspace(0.1, 0.9, 9).unsqueeze(1)
    if batched:  # vLLM's batched prepare takes neither ids that are not there nor the same one twice
        ids = torch.rand(ids.shape[0], EXPERTS).topk(ids.shape[1]).indices
    output = made.apply(
        x.clone(), w13, w2, topk_weights=weights, topk_ids=ids.to(torch.int32), activation=MoEActivation.SILU,
        global_num_experts=EXPERTS, expert_map=None, apply_router_weight_on_input=on_input,
    )  # fmt: skip
    options: dict[str, Any] = {"clamp_limit": LIMIT, "apply_router_weight_on_input": on_input}
    close(output, reference.moe(x.double(), *layer, weights, ids, **options))
    if not batched:
        assert (made.fused_experts._late, made.fused_experts._kept) == (form == "standard, late", {})


@pytest.mark.parametrize(("name", "of_vllm", "of_reference"), [
    ("SWIGLUSTEP", {}, {"activation": "swiglustep", "clamp_limit": 7.0}),
    ("SWIGLUOAI_UNINTERLEAVE", {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
     {"clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0}),
    ("GELU_TANH", {}, {"activation": "gelu_tanh"}),
])  # fmt: skip
def test_activations(name: str, of_vllm: dict[str, float], of_reference: dict[str, Any]) -> None:
    load_plugins()
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    made, w13, w2 = kernel(layer, moe_config(activation=MoEActivation[name], **of_vllm))
    x = activations(9, HIDDEN, seed=2, scale=3.0).float()
    weights, ids, _, _ = routed(9, EXPERTS, TOP_K, seed=3)
    output = made.apply(
        x, w13, w2, topk_weights=weights, topk_ids=ids.to(torch.int32), activation=MoEActivation[name],
        global_num_experts=EXPERTS, expert_map=None, apply_router_weight_on_input=False,
    )  # fmt: skip
    close(output, reference.moe(x.double(), *layer, weights, ids, **of_reference))


@pytest.mark.parametrize("rank", [0, 1])
def test_expert_parallel(rank: int) -> None:
    load_plugins()
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1 + rank)
    made, w13, w2 = kernel(layer, moe_config(num_experts=2 * EXPERTS))
    x = activations(9, HIDDEN, seed=2).float()
    weights, ids, _, _ = routed(9, 2 * EXPERTS, TOP_K, seed=3)
    expert_map = torch.full((2 * EXPERTS,), -1, dtype=torch.int32)
    expert_map[rank * EXPERTS : (rank + 1) * EXPERTS] = torch.arange(EXPERTS, dtype=torch.int32)
    output = made.apply(
        x, w13, w2, topk_weights=weights, topk_ids=ids.to(torch.int32), activation=MoEActivation.SILU,
        global_num_experts=2 * EXPERTS, expert_map=expert_map, apply_router_weight_on_input=False,
    )  # fmt: skip
    close(output, reference.moe(x.double(), *layer, weights, ids, expert_map))


def test_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's switch reaches the op, and a token's row has the bits that it has alone."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "require")
    load_plugins()
    layer = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    made, w13, w2 = kernel(layer, moe_config(swiglu_limit=LIMIT))
    x = activations(40, HIDDEN, seed=2).float()
    weights, ids, _, _ = routed(40, EXPERTS, TOP_K, seed=3)

    def run(rows: slice) -> Tensor:
        return made.apply(
            x[rows].clone(), w13, w2, topk_weights=weights[rows], topk_ids=ids[rows].to(torch.int32),
            activation=MoEActivation.SILU, global_num_experts=EXPERTS, expert_map=None,
            apply_router_weight_on_input=False,
        )  # fmt: skip

    with RecordedOps("batch_invariant") as seen:
        whole = run(slice(40))
    assert seen.values == [True]
    close(whole, reference.moe(x.double(), *layer, weights, ids, clamp_limit=LIMIT))
    assert all(torch.equal(run(slice(token, token + 1)), whole[token : token + 1]) for token in range(40))

    from torch_nvfp4.integrations.vllm.experts import NVFP4BatchedExperts

    supported, reason = NVFP4BatchedExperts.is_supported_config(
        NVFP4BatchedExperts, moe_config(), kNvfp4Static, None, NVFP4BatchedExperts.activation_format()
    )
    assert (supported, reason) == (False, "kernel does not support batch invariance")


def test_registering_twice_is_harmless() -> None:
    load_plugins()
    assert is_wrapped()
    before = oracle.select_nvfp4_moe_backend
    load_plugins()
    assert oracle.select_nvfp4_moe_backend is before


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "off")
    load_plugins()
    assert not is_wrapped()
    monkeypatch.delenv("TORCH_NVFP4_VLLM")
    load_plugins()
    assert is_wrapped()
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "off")
    with pytest.raises(NotImplementedError, match="No NvFp4 MoE backend"):  # vLLM has none for CPUs
        modelopt.select_nvfp4_moe_backend(moe_config(), kNvfp4Static, kNvfp4Dynamic)


def test_a_bad_mode_gets_through_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "on")
    with pytest.raises(ValueError, match="TORCH_NVFP4_VLLM: expected auto, require or off, got 'on'"):
        load_plugins()


def test_an_error_that_was_caught_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads plug-ins once per process; the next engine of a notebook must not go without."""
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "on")
    for attempt in (load_plugins, vllm.plugins.load_general_plugins):
        with pytest.raises(ValueError, match="TORCH_NVFP4_VLLM: expected auto, require or off, got 'on'"):
            attempt()
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "require")
    vllm.plugins.load_general_plugins()
    assert is_wrapped()


def test_an_unknown_version_gets_through_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(RuntimeError, match=r"expected vllm 0.24 to 0.33, got 0.99.0.*TORCH_NVFP4_VLLM=off"):
        load_plugins()
    assert not is_wrapped()


def test_a_changed_signature_gets_through_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_nvfp4_moe_quant_config(backend: Any, scales: Any) -> None: ...

    monkeypatch.setattr(oracle, "make_nvfp4_moe_quant_config", make_nvfp4_moe_quant_config)
    with pytest.raises(
        RuntimeError, match=r"make_nvfp4_moe_quant_config: expected \(backend, .*, got \(backend, scales\)"
    ):
        load_plugins()
    assert oracle.select_nvfp4_moe_backend is ORIGINALS["select_nvfp4_moe_backend"]


TWO_SIDED = dataclasses.replace(
    FusedMoEParallelConfig.make_no_parallel(), dp_size=2, ep_size=2, use_ep=True,
    all2all_backend="flashinfer_nvlink_two_sided",
)  # fmt: skip
UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"has_bias": True}, "for experts with biases, got one that is not known"),
    ({"is_lora_enabled": True}, "kernel does not support LoRA"),
    ({"hidden_dim": 72}, "expected K and I to be multiples of 16"),
    ({"activation": MoEActivation.SWIGLUOAI}, "for experts with SWIGLUOAI, got one that is not known"),
    ({"activation": MoEActivation.SITU}, "expected an activation_situ_beta with SITU, as vLLM does, got none"),
    ({"activation": MoEActivation.SWIGLUSTEP, "swiglu_limit": 5.0}, "expected swiglu_limit 7.0 with SWIGLUSTEP"),
    ({"moe_backend": "marlin"}, "expected --moe-backend auto, got marlin"),
    ({"moe_parallel_config": TWO_SIDED}, "expected an --all2all-backend of .*, got flashinfer_nvlink_two_sided"),
]


@pytest.mark.parametrize(("changes", "reason"), UNSUPPORTED)
def test_what_is_not_supported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], reason: str
) -> None:
    """``require`` raises. ``auto`` leaves it to vLLM, which has no kernel here, and logs the reason once."""
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "require")
    load_plugins()
    config = moe_config(**changes)
    with pytest.raises(ValueError, match="TORCH_NVFP4_VLLM=require: .*" + reason):
        modelopt.select_nvfp4_moe_backend(config, kNvfp4Static, kNvfp4Dynamic)
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "auto")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises((NotImplementedError, ValueError), match="MoE backend"):
                modelopt.select_nvfp4_moe_backend(config, kNvfp4Static, kNvfp4Dynamic)
    ours = [record.getMessage() for record in caplog.records if record.name == "vllm.torch_nvfp4"]
    assert [re.search(reason, message) is not None for message in ours] == [True]


@pytest.mark.parametrize("damage", ["missing", "not a library", "a library without the ops"])
def test_a_broken_library_ends_the_process(tmp_path: Path, engine_environment: dict[str, str], damage: str) -> None:
    """vLLM would swallow an error at import, log it and serve with other kernels."""
    root = Path(torch_nvfp4.__file__).parent
    shutil.copytree(root, tmp_path / "torch_nvfp4", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(root.parent / "torch_nvfp4_vllm.py", tmp_path)
    if damage == "not a library":
        (tmp_path / "torch_nvfp4" / "_C.so").write_text("version https://git-lfs.github.com/spec/v1")
    elif damage == "a library without the ops":
        other = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
        shutil.copy(other, tmp_path / "torch_nvfp4" / "_C.so")
    program = "import vllm.plugins; vllm.plugins.load_general_plugins(); print('went on')"
    run = subprocess.run(
        [sys.executable, "-c", program], env=engine_environment | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1
    assert "went on" not in run.stdout
    assert "RuntimeError: torch_nvfp4 is installed as a plug-in of vLLM but cannot be loaded: " in run.stderr
    assert ("nvfp4::" if damage == "a library without the ops" else f"{tmp_path}/torch_nvfp4/_C.so") in run.stderr
    assert "TORCH_NVFP4_VLLM=off" in run.stderr


def test_info_agrees() -> None:
    from torch_nvfp4.integrations.report import report_vllm

    report = report_vllm()
    assert report.version is not None
    assert (report.version.partition("+")[0], report.used) == (vllm.__version__.partition("+")[0], True), report.reason
    assert os.environ.get("TORCH_NVFP4_VLLM") is None
