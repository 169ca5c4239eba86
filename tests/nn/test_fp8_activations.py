"""Experts with input_quant="fp8" where no GPU is: what is refused, what a module keeps, and what is traced."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.modules import LIMIT, TOP_K, E, I, K, experts, inputs, weights
from torch_nvfp4 import NVFP4Experts, decompositions
from torch_nvfp4.backends import Libraries, moe_backend
from torch_nvfp4.compiler.decomposition import decompose_moe
from torch_nvfp4.compiler.fusion import fuse_gates

MOE_FP8 = torch.ops.nvfp4.moe_fp8.default
ADVICE = "leave input_quant out to run it with activations in 16 bits"


@pytest.fixture
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors on a GPU that is not here: what torch and the library say of it."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(Libraries, "detect", classmethod(lambda cls: cls(True, True, False)))
    with FakeTensorMode():
        yield


def fp8_experts(**options: Any) -> NVFP4Experts:
    return NVFP4Experts(E, K, I, clamp_limit=LIMIT, input_quant="fp8", device="cuda", **options)


def fake_inputs(tokens: int = 7, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.empty(tokens, K, dtype=dtype, device="cuda")
    ids = torch.empty(tokens, TOP_K, dtype=torch.int64, device="cuda")
    return x, torch.empty(tokens, TOP_K, device="cuda"), ids


CPU_MAKERS: dict[str, Callable[..., Any]] = {
    "constructor": lambda **options: NVFP4Experts(E, K, I, **options),
    "from_weights": lambda **options: NVFP4Experts.from_weights(*weights(), **options),
    "from_float": lambda **options: NVFP4Experts.from_float(torch.ones(E, 2 * I, K), torch.ones(E, K, I), **options),
}


@pytest.mark.parametrize("make", CPU_MAKERS.values(), ids=list(CPU_MAKERS))
def test_a_cpu_is_refused(make: Callable[..., Any]) -> None:
    assert make().input_quant is None
    words = r"input_quant='fp8' cannot run this MoE layer \(cpu, K 64, I 48, .*input_quant fp8\): expected a GPU of "
    with pytest.raises(ValueError, match=f"{words}compute capability 9.0, got cpu; {ADVICE}"):
        make(input_quant="fp8")
    with pytest.raises(ValueError, match="input_quant: expected None or 'fp8', got 'int8'"):
        make(input_quant="int8")


def meta_experts(**options: Any) -> NVFP4Experts:
    return NVFP4Experts(E, K, I, device="meta", input_quant="fp8", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "gelu"}, "expected activation silu, got gelu"),
        ({"activation": "swiglustep", "clamp_limit": LIMIT}, "expected activation silu, got swiglustep"),
        ({"gated": False}, "expected experts with a gate, got some without"),
        ({"biases": True}, "expected experts without biases, got some with"),
    ],
)
def test_a_kind_that_no_device_runs_is_refused_before_there_is_one(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"input_quant='fp8' cannot run .*: {words}; {ADVICE}"):
        meta_experts(**options)


def test_on_the_meta_device_the_choice_waits() -> None:
    for meta in (meta_experts(clamp_limit=LIMIT), copy.deepcopy(meta_experts(clamp_limit=LIMIT))):
        assert meta(*(arg.to("meta") for arg in inputs())).shape == (7, K)
        assert "input_quant=fp8" in repr(meta)
        with pytest.raises(ValueError, match=f"compute capability 9.0, got cpu; {ADVICE}"):
            meta.to_empty(device="cpu")
        with pytest.raises(RuntimeError, match=r"input_quant='fp8' cannot run .* got cpu"):
            meta.load_state_dict(experts().state_dict())
        assert (meta.device.type, meta.input_quant) == ("meta", "fp8")


def test_pickles() -> None:
    meta = pickle.loads(pickle.dumps(meta_experts(clamp_limit=LIMIT)))
    assert meta.input_quant == "fp8"
    with pytest.raises(ValueError, match="got cpu"):
        meta.to_empty(device="cpu")
    old = experts()
    state = old.__getstate__()
    del state["input_quant"]  # from before there was a choice
    new = NVFP4Experts.__new__(NVFP4Experts)
    new.__setstate__(state)
    assert new.input_quant is None
    assert torch.equal(new(*inputs()), old(*inputs()))


@pytest.mark.usefixtures("on_an_h100")
def test_packed_and_saved() -> None:
    module = fp8_experts()
    assert module.backend == "wgmma_fp8"
    assert {name: buffer.dtype for name, buffer in module.named_buffers()} == {
        "w13": torch.int8,
        "w13_global_scale": torch.float32,
        "w2": torch.int8,
        "w2_global_scale": torch.float32,
    }
    usual = NVFP4Experts(E, K, I, clamp_limit=LIMIT, device="cuda")
    assert usual.backend == "marlin"
    assert [buffer.shape for buffer in module.buffers()] == [buffer.shape for buffer in usual.buffers()]
    saved = {name: (tuple(value.shape), value.dtype) for name, value in module.state_dict().items()}
    real = experts().state_dict()
    assert saved == {name: (tuple(value.shape), value.dtype) for name, value in real.items()}
    assert module.half() is module
    assert module.w13.dtype == torch.int8
    module.to("meta")
    assert (module.backend, module.input_quant) == ("reference", "fp8")


@pytest.mark.usefixtures("on_an_h100")
def test_forward() -> None:
    expert_map = torch.empty(9, dtype=torch.int32, device="cuda")
    module = fp8_experts(expert_map=expert_map, apply_router_weight_on_input=True)
    for dtype in (torch.bfloat16, torch.float16):
        output = module(*fake_inputs(dtype=dtype))
        assert (output.shape, output.dtype, output.device.type) == ((7, K), dtype, "cuda")
    with pytest.raises(RuntimeError, match="nvfp4::moe_fp8: hidden_states must be bfloat16 or float16, got float32"):
        module(*fake_inputs(dtype=torch.float32))


@pytest.mark.usefixtures("on_an_h100")
def test_batch_invariance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fp8_experts()
    monkeypatch.setattr("torch_nvfp4.ops.batch_invariance._enabled", True)
    with pytest.raises(NotImplementedError, match=r"moe_fp8: expected set_batch_invariant\(False\), got True"):
        module(*fake_inputs())


@pytest.mark.usefixtures("on_an_h100")
def test_more_experts_than_the_kernel_takes() -> None:
    with pytest.raises(ValueError, match="input_quant='fp8': expected at most 2048 experts, got 2049"):
        NVFP4Experts(2049, 16, 16, input_quant="fp8", device="cuda")


@pytest.mark.usefixtures("on_an_h100")
def test_compile_and_export_without_a_break() -> None:
    torch._dynamo.reset()
    module, args = fp8_experts(), fake_inputs()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=count, fullgraph=True, dynamic=True)
    assert [compiled(*fake_inputs(tokens)).shape for tokens in (7, 2, 33)] == [(7, K), (2, K), (33, K)]
    assert len(graphs) == 1
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(module, args, dynamic_shapes=({0: tokens},) * 3)
    (call,) = program.graph.find_nodes(op="call_function", target=MOE_FP8)
    assert call.kwargs == {"clamp_limit": LIMIT}
    whole = program.run_decompositions(decompositions())
    assert len(whole.graph.find_nodes(op="call_function", target=MOE_FP8)) == 1


@pytest.mark.usefixtures("on_an_h100")
def test_the_passes_leave_it_whole() -> None:
    graph = make_fx(fp8_experts(), tracing_mode="fake", decomposition_table=decompositions())(*fake_inputs()).graph
    before = str(graph)
    assert len(graph.find_nodes(op="call_function", target=MOE_FP8)) == 1
    assert (decompose_moe(graph), fuse_gates(graph)) == (0, 0)
    assert str(graph) == before


def test_a_bias_that_the_op_has_no_place_for_is_never_left_out() -> None:
    tensors = dict.fromkeys(("w13", "w13_global_scale", "w2", "w2_global_scale", "w13_bias"), torch.zeros(1))
    with pytest.raises(ValueError, match="input_quant='fp8': expected no w13_bias, got it"):
        moe_backend("wgmma_fp8").apply(tensors, experts().quant_config, *inputs())
