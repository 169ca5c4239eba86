"""The plug-in on vLLM's own layers of experts without a gate, with biases, or with alternating rows of gate and up.

Nemotron-3's models themselves need Mamba kernels that vLLM has not on a CPU, so its MoE block is run alone. vLLM's
configuration also refuses experts without a gate on CPUs: it is told of a GPU while the layer is made, and no later.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import vllm.model_executor.layers.fused_moe.config as fused_moe_config
from torch import Tensor
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.activation import SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload, record_metadata_for_reloading
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts
from vllm.model_executor.models.nemotron_h import NemotronHMoE
from vllm.plugins import load_general_plugins
from vllm.v1.worker.workspace import init_workspace_manager

from helpers.expert_kinds import Experts, Kind, expected_moe, hidden_of, make_experts
from helpers.layers import seeded
from torch_nvfp4.gate import gated_activation
from torch_nvfp4.integrations.vllm import support
from torch_nvfp4.testing import TOLERANCE, relative_l2

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 8, 64, 48, 2, 9
PREFIX = "backbone.layers.1.mixer.experts"
LAYOUTS = ("modelopt", "compressed-tensors")


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmConfig]:
    """vLLM set up for layers outside a model, as one process of one rank."""
    config = VllmConfig()
    with tempfile.NamedTemporaryFile() as meeting, set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
            initialize_model_parallel(1)
        init_workspace_manager(torch.device("cpu"))
        load_general_plugins()
        yield config


@pytest.fixture(autouse=True)
def _required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "require")


class _Platform:
    """vLLM's, as far as it says that there is a GPU."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def experts_without_a_gate_are_configured() -> Any:
    return mock.patch.object(fused_moe_config, "current_platform", _Platform(fused_moe_config.current_platform))


def quant_config(layout: str) -> Any:
    if layout == "modelopt":
        return ModelOptNvFp4Config(
            is_checkpoint_nvfp4_serialized=True, kv_cache_quant_algo=None, exclude_modules=["*latent_proj"],
            group_size=16,
        )  # fmt: skip
    scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    group = {"targets": ["Linear"], "weights": scheme | {"dynamic": False}, "input_activations": None}
    return CompressedTensorsConfig.from_config({
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["re:.*latent_proj"],
        "config_groups": {"group_0": group},
    })  # fmt: skip


def tensors_of(experts: Experts, layout: str) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds, one tensor per expert and projection, under its names."""
    modelopt = layout == "modelopt"
    for e in range(EXPERTS):
        w13, w2 = experts.w13, experts.w2
        names = ["gate_proj", "up_proj"] if experts.kind.gated else ["up_proj"]
        scales = w13.global_scale[e].reshape(-1)
        parts = [
            (name, codes, scale, global_scale, bias)
            for name, codes, scale, global_scale, bias in zip(
                names, w13.data[e].chunk(len(names)), w13.scale[e].view(torch.uint8).chunk(len(names)), scales,
                experts.w13_bias[e].chunk(len(names)) if experts.kind.biased else [None] * len(names), strict=True,
            )
        ]  # fmt: skip
        w2_bias = experts.w2_bias[e] if experts.kind.biased else None
        parts.append(("down_proj", w2.data[e], w2.scale[e].view(torch.uint8), w2.global_scale[e], w2_bias))
        for name, codes, scale, global_scale, bias in parts:
            yield f"{e}.{name}.weight{'' if modelopt else '_packed'}", codes
            yield f"{e}.{name}.weight_scale", scale.view(torch.float8_e4m3fn)
            if modelopt:
                yield f"{e}.{name}.weight_scale_2", global_scale
            else:
                yield f"{e}.{name}.weight_global_scale", 1.0 / global_scale.reshape(1)
            if modelopt:
                yield f"{e}.{name}.input_scale", torch.tensor(0.5)
            if bias is not None:
                yield f"{e}.{name}.bias", bias.to(torch.bfloat16)


def load(runner: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """vLLM's loader of experts, and the conversion."""
    experts = runner.routed_experts
    list(experts.load_weights(tensors))
    assert experts.quant_method.nvfp4_backend.name == "TORCH_NVFP4"
    experts.quant_method.process_weights_after_loading(experts)


def bf16_biases(experts: Experts) -> Experts:
    """With values that a checkpoint in bfloat16 holds."""
    if not experts.kind.biased:
        return experts
    w13_bias, w2_bias = (bias.to(torch.bfloat16).float() for bias in (experts.w13_bias, experts.w2_bias))
    return experts._replace(w13_bias=w13_bias, w2_bias=w2_bias)


def close(got: Tensor, expected: Tensor) -> None:
    error = float((got.double() - expected).abs().max()) / float(expected.abs().max())
    print(f"relative error {error:.1e}")
    assert error < 2e-6


@pytest.mark.parametrize("latent", [None, 32], ids=["Nano", "Super"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nemotron_3(engine: VllmConfig, layout: str, latent: int | None) -> None:
    """The model's own MoE block: its router, its projections to a narrower space (Super) and its loader's names."""
    width = latent or HIDDEN
    experts = make_experts(Kind({"activation": "relu2"}, False, False), EXPERTS, width, INTERMEDIATE, seed=1)
    config = SimpleNamespace(
        hidden_size=HIDDEN, moe_latent_size=latent, n_routed_experts=EXPERTS, n_shared_experts=None,
        moe_intermediate_size=INTERMEDIATE, num_experts_per_tok=TOP_K, norm_topk_prob=True, n_group=1, topk_group=1,
        mlp_hidden_act="relu2", mlp_bias=False, routed_scaling_factor=2.5,
    )  # fmt: skip
    with experts_without_a_gate_are_configured():
        block = NemotronHMoE(config, quant_config(layout), ParallelConfig(), prefix=f"{PREFIX[:-8]}.{layout}{latent}")
    generator = seeded(4)
    dense = {}
    for name, parameter in block.named_parameters():
        if "routed_experts" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            dense[name] = parameter.detach().double().clone()
    for module in block.modules():
        if isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod):
            module.quant_method.process_weights_after_loading(module)
    load(block.experts, tensors_of(experts, layout))
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    with set_forward_context(None, engine, num_tokens=TOKENS), torch.inference_mode():
        got = block(x.clone())

    scores = torch.sigmoid(x.double() @ dense["gate.weight"].T)
    ids = (scores + dense["gate.e_score_correction_bias"]).topk(TOP_K).indices
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(1, keepdim=True)
    inner = x.double()
    if latent:
        inner = inner @ dense["fc1_latent_proj.weight"].T
    expected = expected_moe(experts, inner, weights, ids) * 2.5
    if latent:
        expected = expected @ dense["fc2_latent_proj.weight"].T
    close(got, expected)


BIASED: dict[str, tuple[dict[str, Any], Kind]] = {
    "silu": ({}, Kind({"activation": "silu"}, True, True)),
    "silu, a clamp": ({"swiglu_limit": 1.5}, Kind({"activation": "silu", "clamp_limit": 1.5}, True, True)),
    "relu2 without a gate": (
        {"activation": "relu2_no_mul", "ckpt_names": ("up_proj", "down_proj", None)},
        Kind({"activation": "relu2"}, False, True),
    ),
    "situ": (
        {"activation": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0, "has_bias": False},
        Kind({"activation": "situ", "alpha": 4.0, "beta": 25.0}, True, False),
    ),
}  # fmt: skip


def factory(name: str, layout: str, options: dict[str, Any]) -> Any:
    """vLLM's layer. To its loader a tensor is a bias where its whole name says "bias", so ``name`` must not."""
    keywords: dict[str, Any] = {"has_bias": True} | options
    with experts_without_a_gate_are_configured():
        return FusedMoEFactory(
            num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, renormalize=True,
            quant_config=quant_config(layout), prefix=f"{name}.{layout}.mlp.experts", **keywords,
        )  # fmt: skip


def run(engine: VllmConfig, runner: Any, x: Tensor, logits: Tensor) -> Tensor:
    with set_forward_context(None, engine, num_tokens=len(x)), torch.inference_mode():
        out: Tensor = runner(x.clone(), logits)
    return out


def routing(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.double().softmax(-1).topk(TOP_K)
    return weights / weights.sum(-1, keepdim=True), ids


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BIASED)
def test_biases_and_situ(engine: VllmConfig, name: str, layout: str) -> None:
    """vLLM's loader finds the biases' parameters, for which it would skip the checkpoint's tensors without the plug-in.

    ModelOpt and compressed-tensors, from the checkpoint's tensors to the layer's output.
    """
    options, kind = BIASED[name]
    experts = bf16_biases(make_experts(kind, EXPERTS, HIDDEN, INTERMEDIATE, seed=1))
    runner = factory(name, layout, options)
    load(runner, tensors_of(experts, layout))
    x = hidden_of(experts, TOKENS, seed=2).float()
    logits = torch.randn(TOKENS, EXPERTS, generator=seeded(3))
    got = run(engine, runner, x, logits)
    close(got, expected_moe(experts, x.double(), *routing(logits)))
    if kind.biased:
        without = expected_moe(experts._replace(w13_bias=None, w2_bias=None), x.double(), *routing(logits))
        assert float((got - without).abs().max()) > 0.1 * float(without.abs().max())


def test_a_model_in_bfloat16(engine: VllmConfig) -> None:
    """The dtype in which vLLM makes the parameters of a model that name none: not that of the biases."""
    options, kind = BIASED["silu, a clamp"]
    experts = make_experts(kind, EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        runner = factory("bfloat16", "modelopt", options)
    finally:
        torch.set_default_dtype(torch.float32)
    load(runner, tensors_of(experts, "modelopt"))
    x = hidden_of(experts, TOKENS, seed=2).to(torch.bfloat16)
    logits = torch.randn(TOKENS, EXPERTS, generator=seeded(3))
    got = run(engine, runner, x, logits)
    expected = expected_moe(bf16_biases(experts), x.double(), *routing(logits))
    assert relative_l2(got, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", ["silu, a clamp", "relu2 without a gate"])
def test_biases_under_dynamo(engine: VllmConfig, name: str) -> None:
    """On a CPU vLLM compiles the model through the layer into the op."""
    options, kind = BIASED[name]
    experts = bf16_biases(make_experts(kind, EXPERTS, HIDDEN, INTERMEDIATE, seed=1))
    runner = factory(f"compiled.{name}", "modelopt", options)
    load(runner, tensors_of(experts, "modelopt"))
    x = hidden_of(experts, TOKENS, seed=2).float()
    logits = torch.randn(TOKENS, EXPERTS, generator=seeded(3))
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module

    torch._dynamo.reset()
    got = run(engine, torch.compile(runner, backend=backend, fullgraph=True), x, logits)
    assert seen.count("nvfp4.moe.out") == 1
    close(got, expected_moe(experts, x.double(), *routing(logits)))


@pytest.mark.parametrize("name", BIASED)
def test_other_weights_for_the_same_layer(engine: VllmConfig, name: str) -> None:
    """What vLLM's reload_weights does layer by layer: new biases reach the op, and stand where the old ones stood."""
    options, kind = BIASED[name]
    first, second = (bf16_biases(make_experts(kind, EXPERTS, HIDDEN, INTERMEDIATE, seed=seed)) for seed in (1, 2))
    runner = factory(f"reloaded.{name}", "modelopt", options)
    record_metadata_for_reloading(runner)
    load(runner, tensors_of(first, "modelopt"))
    held = {part: tensor.data_ptr() for part, tensor in runner.named_parameters()}
    initialize_layerwise_reload(runner)
    list(runner.routed_experts.load_weights(tensors_of(second, "modelopt")))
    assert {part: tensor.data_ptr() for part, tensor in runner.named_parameters()} == held
    x = hidden_of(second, TOKENS, seed=2).float()
    logits = torch.randn(TOKENS, EXPERTS, generator=seeded(3))
    close(run(engine, runner, x, logits), expected_moe(second, x.double(), *routing(logits)))
    if kind.biased:
        assert torch.equal(runner.routed_experts.w2_bias, second.w2_bias)


def test_a_checkpoint_without_the_biases_that_the_model_has(engine: VllmConfig) -> None:
    options, kind = BIASED["silu"]
    experts = make_experts(kind, EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    runner = factory("without", "modelopt", options)
    some = ((name, tensor) for name, tensor in tensors_of(experts, "modelopt") if not name.endswith("3.down_proj.bias"))
    with pytest.raises(RuntimeError, match="got NaN in w2_bias: vLLM's loader of this model has found no tensors"):
        load(runner, some)


def alternating(rows: Tensor) -> Tensor:
    """[2I, ...] with gate rows first -> gate and up in turn."""
    gate, up = rows.chunk(2)
    return torch.stack((gate, up), dim=1).flatten(0, 1)


def test_gpt_oss_with_its_own_loader(engine: VllmConfig) -> None:
    """Rows of gate and up in turn, their biases too, one expert per tensor and one global scale for both."""
    kind = Kind({"activation": "silu", "clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0}, True, True)
    experts = bf16_biases(make_experts(kind, EXPERTS, HIDDEN, INTERMEDIATE, seed=1))
    experts.w13.global_scale[:, 1] = experts.w13.global_scale[:, 0]
    options = {"activation": "swigluoai", "routed_experts_cls": GptOssRoutedExperts}
    runner = factory("gpt-oss", "compressed-tensors", options)
    layer = runner.routed_experts
    for e in range(EXPERTS):
        tensors = {
            "w13_weight_packed": alternating(experts.w13.data[e]),
            "w13_weight_scale": alternating(experts.w13.scale[e].view(torch.uint8)).view(torch.float8_e4m3fn),
            "w13_weight_global_scale": 1.0 / experts.w13.global_scale[e, :1],
            "w13_bias": alternating(experts.w13_bias[e]), "w2_weight_packed": experts.w2.data[e],
            "w2_weight_scale": experts.w2.scale[e], "w2_weight_global_scale": 1.0 / experts.w2.global_scale[e],
            "w2_bias": experts.w2_bias[e],
        }  # fmt: skip
        for name, tensor in tensors.items():
            parameter = getattr(layer, name)
            shard = "gpt_oss_w13" if name.startswith("w13") else "gpt_oss_w2"
            assert parameter.weight_loader(parameter, tensor, name, shard, e, return_success=True)
    layer.quant_method.process_weights_after_loading(layer)
    x = hidden_of(experts, TOKENS, seed=2).float() * 3
    logits = torch.randn(TOKENS, EXPERTS, generator=seeded(3))
    close(run(engine, runner, x, logits), expected_moe(experts, x.double(), *routing(logits)))


def test_the_constants_of_alternating_rows_are_vllms() -> None:
    x = torch.randn(5, 2 * INTERMEDIATE, generator=seeded(1), dtype=torch.float64) * 8
    gate = support.layer_gate("SWIGLUOAI", None, None, None, None)
    got = gated_activation(x[:, 0::2], x[:, 1::2], **gate.kwargs())
    torch.testing.assert_close(got, SwigluOAIAndMul.forward_native(SimpleNamespace(alpha=1.702, limit=7.0), x))  # type: ignore[arg-type]
    made = SwigluOAIAndMul()
    assert (made.alpha, made.limit) == (gate.alpha, gate.clamp_limit)
