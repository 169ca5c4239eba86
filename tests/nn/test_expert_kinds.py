"""``NVFP4Experts`` with biases and without a gate: values, and what is done to modules."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.expert_kinds import KINDS, Experts, expected_moe, hidden_of, make_experts
from helpers.layers import BF16, seeded, to
from helpers.modules import same_weight
from torch_nvfp4 import dequantize
from torch_nvfp4.backends import Libraries, MoEBackendConfig, explain_moe_backends, moe_backend
from torch_nvfp4.format import NVFP4Weight, quantize
from torch_nvfp4.gate import Gate
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.quant_config import MoEQuantConfig
from torch_nvfp4.testing import assert_accurate, random_routing

E, K, I, TOP_K, M = 4, 64, 48, 2, 7  # noqa: E741
NAMES = ("gpt-oss with biases", "situ with biases", "relu2 without a gate", "relu2 without a gate, with biases")
kinds = pytest.mark.parametrize("name", NAMES)


def module_of(experts: Experts, device: str = "cpu", **options: Any) -> NVFP4Experts:
    w13, w2 = (NVFP4Weight(*to(device, *weight)) for weight in experts[:2])
    return NVFP4Experts.from_weights(w13, w2, **experts.biases("cpu"), **experts.kind.gate, **options)


def made(name: str, device: str = "cpu", **options: Any) -> tuple[NVFP4Experts, tuple[Tensor, Tensor, Tensor], Tensor]:
    """A module, inputs in fp32, and its result in fp64."""
    experts = make_experts(KINDS[name], E, K, I, seed=3)
    x, routing = hidden_of(experts, M, seed=4), random_routing(M, E, TOP_K, generator=seeded(5))
    return module_of(experts, device, **options), (x.float(), *routing), expected_moe(experts, x, *routing)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", KINDS)
def test_values(name: str, backend: str | None, device: str) -> None:
    module, (x, *routing), expected = made(name, device, backend=backend)
    gated, biased = KINDS[name].gated, KINDS[name].biased
    assert module.quant_config.gate.gated is gated
    x, *routing = to(device, x.to(BF16), *routing)
    out = module(x, *routing)
    assert_accurate(out.cpu(), expected)
    assert ("gated=False" in repr(module)) is not gated
    assert ("biases=True" in repr(module)) is biased
    w13, w2 = module.unpacked_weights()
    experts = make_experts(KINDS[name], E, K, I, seed=3)
    assert same_weight(NVFP4Weight(*to("cpu", *w13)), experts.w13)
    assert same_weight(NVFP4Weight(*to("cpu", *w2)), experts.w2)
    counts = torch.full((E,), 2, dtype=torch.int32, device=device)
    tensors = dict(module.named_buffers())
    batch = moe_backend(module.backend).apply_batched(tensors, module.quant_config, x[:2].repeat(E, 1, 1), counts)
    for e in range(E):
        alone = module(x[:2], torch.ones(2, 1, device=device), torch.full((2, 1), e, device=device))
        assert_accurate(batch[e], alone.double())


@kinds
def test_state_dict(name: str) -> None:
    module, args, expected = made(name)
    gated, biased = KINDS[name].gated, KINDS[name].biased
    state = module.state_dict()
    rows = 2 * I if gated else I
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    biases = {"w13_bias": (E, rows), "w2_bias": (E, K)} if biased else {}
    assert shapes == biases | {
        "w13_weight": (E, rows, K // 2),
        "w13_weight_scale": (E, rows, K // 16),
        "w13_weight_scale_2": (E, 2) if gated else (E,),
        "w2_weight": (E, K, I // 2),
        "w2_weight_scale": (E, K, I // 16),
        "w2_weight_scale_2": (E,),
    }
    file = io.BytesIO()
    torch.save(state, file)
    options = {**KINDS[name].gate, "gated": gated, "biases": biased}
    for device in ("cpu", "meta"):
        file.seek(0)
        fresh = NVFP4Experts(E, K, I, **options, device=device)
        assert fresh.load_state_dict(torch.load(file)) == nn.modules.module._IncompatibleKeys([], [])
        assert_accurate(fresh(*args), expected)
    if biased:
        other = NVFP4Experts(E, K, I, **{**options, "biases": False})
        with pytest.raises(RuntimeError, match='Unexpected key\\(s\\) in state_dict: "w13_bias", "w2_bias"'):
            other.load_state_dict(state)
        # A checkpoint's biases may be bf16; they become the float32 that the ops take.
        half = {key: value.bfloat16() if key.endswith("_bias") else value for key, value in state.items()}
        for assign in (False, True):
            fresh = NVFP4Experts(E, K, I, **options)
            fresh.load_state_dict(half, assign=assign)
            assert fresh.w2_bias is not None
            assert fresh.w2_bias.dtype == torch.float32
            assert torch.equal(fresh.w2_bias, half["w2_bias"].float())
            fresh(*args)
        # Whatever lies in memory how, the ops get contiguous ones.
        strided = {key: value.t().contiguous().t() if key.endswith("_bias") else value for key, value in state.items()}
        for device, assign in (("cpu", False), ("cpu", True), ("meta", False)):
            fresh = NVFP4Experts(E, K, I, **options, device=device)
            fresh.load_state_dict(strided, assign=assign)
            assert_accurate(fresh.half()(*args), expected)
            with pytest.raises(RuntimeError, match=r"w2_bias: expected floating point numbers, got torch\.int64"):
                fresh.load_state_dict({**state, "w2_bias": state["w2_bias"].long()}, assign=assign)


@kinds
def test_conversions_copies_and_the_meta_device(name: str) -> None:
    module, args, expected = made(name)
    before = {key: buffer.clone() for key, buffer in module.named_buffers()}
    for convert in (nn.Module.half, nn.Module.double, lambda m: m.to("cpu", BF16), copy.deepcopy, copy.copy):
        converted = convert(module)
        for key, buffer in converted.named_buffers():
            assert torch.equal(buffer, before[key])
            assert buffer.dtype == before[key].dtype
        assert_accurate(converted(*args), expected)
    assert_accurate(pickle.loads(pickle.dumps(module))(*args), expected)
    empty = module.to("meta").to_empty(device="cpu")
    assert {key: (b.shape, b.dtype) for key, b in empty.named_buffers()} == {
        key: (b.shape, b.dtype) for key, b in before.items()
    }
    assert not empty(args[0] * 0, *args[1:]).any()


def test_biases_that_are_assigned() -> None:
    """Another value counts; one where there was none would not."""
    (biased, args, _), (plain, _, _) = made(NAMES[0]), made(NAMES[2])
    module = copy.deepcopy(biased)
    module.w2_bias = torch.zeros(E, K)
    weights = biased.unpacked_weights()
    without = NVFP4Experts.from_weights(*weights, w13_bias=biased.w13_bias, quant_config=biased.quant_config)
    assert torch.equal(module(*args), without(*args))
    assert not torch.equal(module(*args), biased(*args))
    with pytest.raises(ValueError, match="w2_bias: expected a bias, as the layer was made, got none; make it anew"):
        module.w2_bias = None
    with pytest.raises(ValueError, match="w2_bias: expected none, as the layer was made, got a bias; make it anew"):
        copy.deepcopy(plain).w2_bias = torch.ones(E, K)


def test_a_pickle_from_before_biases() -> None:
    module, args, _ = made("relu2 without a gate")
    state = module.__getstate__()
    del state["_buffers"]["w13_bias"], state["_buffers"]["w2_bias"], state["_exact_names"]
    old = NVFP4Experts.__new__(NVFP4Experts)
    old.__setstate__(state)
    assert (old.w13_bias, old.w2_bias) == (None, None)
    assert torch.equal(old(*args), module(*args))
    assert old.state_dict().keys() == module.state_dict().keys()


@kinds
def test_from_float_and_one_gate(name: str) -> None:
    kind = KINDS[name]
    experts = make_experts(kind, E, K, I, seed=3)
    dense13, dense2 = dequantize(experts.w13), dequantize(experts.w2)
    module = NVFP4Experts.from_float(dense13, dense2, **experts.biases("cpu"), **kind.gate)
    expected = quantize(dense13, gated=kind.gated), quantize(dense2)
    assert all(map(same_weight, module.unpacked_weights(), expected))
    args = (torch.randn(M, K, generator=seeded(1)), *random_routing(M, E, TOP_K, generator=seeded(2)))
    gate = Gate(**kind.gate)  # of a config that says nothing of the sizes
    for given in ({"gate": gate}, {"quant_config": MoEQuantConfig(gate)}):
        same = NVFP4Experts.from_weights(*expected, **experts.biases("cpu"), **given)
        assert same.quant_config == module.quant_config
        assert torch.equal(same(*args), module(*args))


@kinds
def test_compile_and_export(name: str) -> None:
    module, args, expected = made(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(*args), module(*args))
    program = torch.export.export(module, args)
    assert torch.equal(program.module()(*args), module(*args))
    assert sum("nvfp4.moe" in str(node.target) for node in program.graph.nodes) == 1
    assert_accurate(program.module()(*args), expected)


def test_what_does_not_fit() -> None:
    plain, gated = (make_experts(KINDS[n], E, K, I, seed=3) for n in ("relu2 without a gate", "silu with biases"))
    for experts, options, words in (
        (gated, {"gate": Gate("relu2", gated=False)}, r"w13: expected up rows alone, \[E, I, K\], for relu2 without"),
        (plain, {"clamp_limit": 7.0}, "expected clamp_limit to be None for experts without a gate, .* never skipped"),
        (plain, {"gate": Gate(clamp_limit=7.0)}, "expected clamp_limit to be None for experts without a gate"),
        (plain, {"activation": "situ"}, "expected activation to be one of silu, gelu, gelu_tanh, relu2 for experts"),
        (
            plain,
            {"w13_bias": torch.zeros(E, 2 * I)},
            r"w13_bias: expected floating point numbers of shape \[4, 48\], got",
        ),
        (
            gated,
            {"w2_bias": torch.zeros(E, K, dtype=torch.int32)},
            r"w2_bias: expected .*\[4, 64\], got torch.int32 of",
        ),
        (
            gated,
            {"w2_bias": torch.zeros(E, K, device="meta")},
            r"w2_bias: expected .*\[4, 64\] with values, for cpu, got a tensor on the meta device",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            NVFP4Experts.from_weights(experts.w13, experts.w2, **options)
    with pytest.raises(TypeError, match=r"w2_bias: expected floating point numbers of shape \[4, 64\], got list"):
        NVFP4Experts.from_weights(gated.w13, gated.w2, w2_bias=[0.0])  # type: ignore[arg-type]


def test_flashinfer_refuses_them() -> None:
    libraries = Libraries(cpu_ops=True, cuda_ops=True, flashinfer=True)
    for options, words in (
        ({"biases": True}, "expected experts without biases, got some with"),
        ({"gate": Gate("silu", gated=False)}, "expected experts with a gate, got some without"),
    ):
        config = MoEBackendConfig("cuda", 128, 128, (10, 0), libraries=libraries, **options)
        reasons = explain_moe_backends(config)
        assert reasons["flashinfer_trtllm"] == words
        assert reasons["marlin"] is None
        assert explain_moe_backends(MoEBackendConfig.for_device("cpu", K, I, **options))["cpu"] is None
