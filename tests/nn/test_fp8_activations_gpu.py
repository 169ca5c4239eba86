"""Experts with input_quant="fp8" on a GPU: values, what a module keeps, compilers, and the commands."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import torch_nvfp4
from helpers.modules import same_weight
from torch_nvfp4 import NVFP4Experts, NVFP4Weight, quantize, reference, reference_fp8
from torch_nvfp4.checkpoint import Checkpoint, write_checkpoint
from torch_nvfp4.cli import app
from torch_nvfp4.testing import FP8_TOLERANCE, TOLERANCE, random_routing, random_weight, relative_l2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs compute capability 9.0"
    ),
]

E, K, I, TOP_K = 6, 320, 208, 3  # noqa: E741
LIMIT = 7.0


def weights() -> tuple[NVFP4Weight, NVFP4Weight]:
    """Of normally distributed values, for pre-activations of about 1.5."""
    generator = torch.Generator("cuda").manual_seed(0)
    w13 = torch.randn(E, 2 * I, K, generator=generator, device="cuda") * (1.5 / K**0.5)
    return quantize(w13, gated=True), quantize(torch.randn(E, K, I, generator=generator, device="cuda") / I**0.5)


def inputs(tokens: int = 150, dtype: torch.dtype = torch.bfloat16, experts: int = E) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, K, generator=generator, device="cuda").to(dtype)
    return x, *random_routing(tokens, experts, TOP_K, generator=generator, device="cuda")


def module(**options: Any) -> NVFP4Experts:
    return NVFP4Experts.from_weights(*weights(), **{"clamp_limit": LIMIT, "input_quant": "fp8"} | options)


def check(got: Tensor, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **options: Any) -> None:
    options = {"clamp_limit": LIMIT} | options
    arguments = (x, *weights(), topk_weights, topk_ids)
    assert got.dtype == x.dtype
    assert relative_l2(got, reference_fp8.moe(*arguments, **options)) < FP8_TOLERANCE
    error = relative_l2(got, reference.moe(*arguments, **options))
    assert TOLERANCE[x.dtype] < error < TOLERANCE[torch.float8_e4m3fn]  # it did not run in 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 150, 900])
def test_values(tokens: int, dtype: torch.dtype) -> None:
    experts, args = module(), inputs(tokens, dtype)
    assert (experts.backend, experts.input_quant) == ("wgmma_fp8", "fp8")
    check(experts(*args), *args)


def test_a_batch_of_sequences_and_weights_in_16_bits() -> None:
    x, topk_weights, topk_ids = inputs(60)
    topk_weights = topk_weights.bfloat16()
    got = module()(*(tensor.view(3, 20, -1) for tensor in (x, topk_weights, topk_ids)))
    assert got.shape == (3, 20, K)
    check(got.view(60, K), x, topk_weights.float(), topk_ids)


def test_gate_expert_map_and_router_weights_on_the_input() -> None:
    expert_map = torch.tensor([-1, 2, 0, -1, 5, 3, 1, -1, 4, -1], dtype=torch.int32, device="cuda")
    gate = {"alpha": 1.702, "beta": 1.0, "apply_router_weight_on_input": True}
    x, topk_weights, topk_ids = inputs(80, experts=10)
    topk_weights *= 2  # not too small for pre-activations of order 1
    got = module(expert_map=expert_map, **gate)(x, topk_weights, topk_ids)
    check(got, x, topk_weights, topk_ids, expert_map=expert_map, **gate)


def test_from_float() -> None:
    w13, w2 = (torch_nvfp4.dequantize(weight, torch.float32) for weight in weights())
    experts, args = NVFP4Experts.from_float(w13, w2, clamp_limit=LIMIT, input_quant="fp8"), inputs()
    assert experts.input_quant == "fp8"
    exact = (quantize(w13, gated=True), quantize(w2))
    want = reference_fp8.moe(args[0], *exact, *args[1:], clamp_limit=LIMIT)
    assert relative_l2(experts(*args), want) < FP8_TOLERANCE


# Sizes that fill no block of 64, an expert that ends in bytes of no block, and one that is exactly a block.
@pytest.mark.parametrize(("rows", "k"), [(48, 80), (144, 16), (64, 64), (80, 208)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_unpack_is_the_inverse_of_pack(rows: int, k: int, gated: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    shape = (3, 2 * rows if gated else rows, k)
    weight = random_weight(shape, gated=gated, all_scales=True, generator=generator, device="cuda")
    packed = torch_nvfp4.pack(weight, gated=gated, input_quant="fp8")
    usual = torch_nvfp4.pack(weight, gated=gated)
    assert packed.dtype == torch.int8
    assert not torch.equal(packed.view(torch.uint8), usual)
    assert torch.equal(torch_nvfp4.order_for_fp8(usual, k, gated=gated), packed)
    assert same_weight(torch_nvfp4.unpack(packed, k, weight.global_scale, gated=gated), weight)


def test_state_dicts() -> None:
    experts, usual = module(), module(input_quant=None)
    state = experts.state_dict()
    assert all(map(same_weight, experts.unpacked_weights(), weights()))
    assert state.keys() == usual.state_dict().keys()
    expected = experts(*inputs())
    empty = NVFP4Experts(E, K, I, clamp_limit=LIMIT, input_quant="fp8", device="cuda")
    held = dict(empty.named_buffers())
    empty.load_state_dict(usual.state_dict())
    assert all(held[name] is buffer for name, buffer in empty.named_buffers())
    meta = NVFP4Experts(E, K, I, clamp_limit=LIMIT, input_quant="fp8", device="meta")
    meta.load_state_dict(state)
    for loaded in (empty, meta, meta.to("cuda"), meta.half()):
        assert loaded.backend == "wgmma_fp8"
        assert torch.equal(loaded(*inputs()), expected)
    usual.load_state_dict(state)
    assert usual.backend == "marlin"
    want = reference.moe(inputs()[0], *weights(), *inputs()[1:], clamp_limit=LIMIT)
    assert relative_l2(usual(*inputs()), want) < TOLERANCE[torch.bfloat16]


def test_copies_and_devices() -> None:
    experts, args = module(), inputs()
    expected = experts(*args)
    for twin in (copy.deepcopy(experts), copy.copy(experts), pickle.loads(pickle.dumps(experts))):
        assert (twin.backend, twin.input_quant) == ("wgmma_fp8", "fp8")
        assert torch.equal(twin(*args), expected)
    with pytest.raises(
        ValueError, match=r"input_quant='fp8' cannot run .* capability 9\.0, got cpu; leave input_quant"
    ):
        experts.cpu()
    assert experts.device.type == "cuda"  # as it was
    assert torch.equal(experts(*args), expected)


def test_no_gradient_and_no_batch_invariance() -> None:
    experts, args = module(), inputs(20)
    x = args[0].clone().requires_grad_()
    output = experts(x, *args[1:])
    assert torch.equal(output, experts(*args))
    with pytest.raises(
        NotImplementedError, match=r"nvfp4::moe_fp8 has no gradient with respect to hidden_states\. Call"
    ):
        output.sum().backward()
    torch_nvfp4.set_batch_invariant(True)
    try:
        with pytest.raises(NotImplementedError, match=r"moe_fp8: expected set_batch_invariant\(False\), got True"):
            experts(*args)
    finally:
        torch_nvfp4.set_batch_invariant(False)
    with pytest.raises(RuntimeError, match="nvfp4::moe_fp8: hidden_states must be bfloat16 or float16, got float32"):
        experts(args[0].float(), *args[1:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "gelu", "clamp_limit": None}, "expected activation silu, got gelu"),
        ({"w2_bias": torch.zeros(E, K)}, "expected experts without biases, got some with"),
        ({"backend": "marlin"}, "expected a layer with input_quant=None, got 'fp8'"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module(**options)


def test_the_kernels_of_sm80_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_ARCH", "80")
    with pytest.raises(ValueError, match="expected TORCH_NVFP4_ARCH to be unset, got 80, whose kernels have no FP8"):
        module()


def test_compile_export_and_a_graph() -> None:
    torch._dynamo.reset()
    experts = module()
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, options=torch_nvfp4.inductor_options())
    decomposed = torch.compile(experts, fullgraph=True, options=torch_nvfp4.inductor_options(decompose_moe=True))
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(experts, inputs(9), dynamic_shapes=({0: tokens},) * 3).module()
    for count in (9, 150, 700):
        args = inputs(count)
        expected = experts(*args)
        for run in (compiled, decomposed, program):
            assert torch.equal(run(*args), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = experts(*args)
    args[0].neg_()
    graph.replay()
    assert torch.equal(output, experts(*args))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Without a limit: the weights that write_checkpoint makes for one have a fifth of the values clamped.
    return write_checkpoint(
        tmp_path_factory.mktemp("fp8"), hidden_size=256, moe_intermediate_size=128, n_routed_experts=8,
        num_experts_per_tok=2, num_hidden_layers=2, swiglu_limit=None,
    )  # fmt: skip


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_from_checkpoint_and_verify(checkpoint: Path) -> None:
    experts = NVFP4Experts.from_checkpoint(checkpoint, 1, device="cuda", input_quant="fp8")
    assert experts.backend == "wgmma_fp8"
    saved = Checkpoint.open(checkpoint).experts(1).to("cuda")
    assert same_weight(experts.unpacked_weights()[1], saved.w2)
    result = run("verify", checkpoint, "--input-quant", "fp8", "--tokens", 200, "--json", "-")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["input_quant"], report["passed"]) == ("fp8", True)
    for layer in report["layers"]:
        assert (layer["backend"], layer["tolerance"], layer["specification_tolerance"]) == ("wgmma_fp8", 0.06, 0.02)
        assert 0.03 < layer["relative_l2"] < 0.06
        assert 0 < layer["specification_l2"] < 0.02
    text = run("verify", checkpoint, "--input-quant", "fp8").stdout
    assert "2 layers within 0.06 of the fp64 reference and 0.02 of the specification of FP8 activations" in text
    usual = json.loads(run("verify", checkpoint, "--json", "-").stdout)
    assert [(layer["backend"], layer["specification_l2"]) for layer in usual["layers"]] == [("marlin", None)] * 2


def test_verify_of_layers_that_are_clamped(tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path, hidden_size=1024, moe_intermediate_size=512, n_routed_experts=8, num_experts_per_tok=2,
        num_hidden_layers=1,
    )  # fmt: skip
    result = run("verify", path, "--input-quant", "fp8", "--json", "-")
    assert result.exit_code == 0, result.output
    (layer,) = json.loads(result.stdout)["layers"]
    assert 0.15 < layer["clamped_share"] < 0.3
    assert layer["tolerance"] == pytest.approx(0.06 + 0.1 * layer["clamped_share"])
    assert 0.05 < layer["quantization_l2"] < 0.07
    assert 0 < layer["specification_l2"] < 0.02


def test_verify_sees_a_wrong_expert(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_checkpoint = NVFP4Experts.from_checkpoint

    def one_wrong(*args: Any, **options: Any) -> NVFP4Experts:
        experts = from_checkpoint(*args, **options)
        w13, w2 = experts.unpacked_weights()
        w2.data[3] ^= 8  # the sign of every second value
        return NVFP4Experts.from_weights(w13, w2, quant_config=experts.quant_config, input_quant="fp8")

    monkeypatch.setattr(NVFP4Experts, "from_checkpoint", one_wrong)
    result = run("verify", checkpoint, "--input-quant", "fp8", "--layer", 0)
    assert result.exit_code == 1
    assert (
        "against the specification of FP8 activations, where at most 0.02 is right: the kernel is at" in result.stderr
    )


def test_bench(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    result = run(
        "bench", "--input-quant", "fp8", "--shape", "8,256,128,2", "--tokens", "8,300", "--seconds", 0, "--json", file
    )
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["input_quant"] == "fp8"
    for row in report["rows"]:
        assert set(row["seconds"]) == set(row["errors"]) == {"torch_nvfp4", "fp8"}
        assert row["speedup"]["fp8"] > 0
        assert row["errors"]["torch_nvfp4"] < TOLERANCE[torch.bfloat16] < 0.03 < row["errors"]["fp8"] < 0.12
    assert "error: relative L2 against fp64 of the same weights" in " ".join(result.stdout.split())


def test_info() -> None:
    facts = json.loads(run("info", "--json", "-").stdout)
    reasons = {entry["device"]: entry for entry in facts["backends"] if entry["backend"] == "wgmma_fp8"}
    assert (reasons["cuda:0"]["unclamped"], reasons["cuda:0"]["clamped"]) == (None, None)
    assert reasons["cpu"]["clamped"] == "expected a GPU of compute capability 9.0, got cpu"
