"""Gradients through torch.compile: the joint graph, its values, checkpointing, AOTAutograd's cache, torch.func."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import expecttest
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import torch_nvfp4
from torch_nvfp4.testing import random_weight

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 8, 2


class Layer(nn.Module):
    """A projection that learns, a router that learns, frozen experts."""

    def __init__(self, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.project = nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator).to(device, torch.bfloat16) / 8)
        self.router = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator).to(device))
        w13 = random_weight((EXPERTS, 2 * INTERMEDIATE, HIDDEN), gated=True, generator=generator, device=device)
        w2 = random_weight((EXPERTS, HIDDEN, INTERMEDIATE), generator=generator, device=device)
        self.experts = torch_nvfp4.NVFP4Experts.from_weights(w13, w2, clamp_limit=7.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.project
        topk_weights, topk_ids = (x.float() @ self.router.T).softmax(-1).topk(TOP_K)
        return x + self.experts(x, topk_weights, topk_ids)


def gradients(f: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    out = f(leaf)
    out.float().square().mean().backward()
    found = [out.detach(), leaf.grad, *(parameter.grad for parameter in layer.parameters())]
    assert all(grad is not None for grad in found)
    return found  # type: ignore[return-value]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(got, expected, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) <= tolerance


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "tolerance"), [("eager", 0.0), ("aot_eager", 0.0), ("inductor", 5e-3)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradients(
    backend: str, tolerance: float, dynamic: bool, tokens: Callable[[int, str], Tensor], device: str
) -> None:
    layer = Layer(device)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for m in (5, 12):
        x = tokens(m, device)
        assert_close(gradients(compiled, layer, x), gradients(layer, layer, x), tolerance)


def test_the_joint_graph_has_one_node_more(
    tokens: Callable[[int, str], Tensor], render: Callable[[torch.fx.Graph], str]
) -> None:
    """The whole derivative of the layer's experts is one op, and what is saved for it are its arguments."""
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(render(module.graph))
        return make_boxed_func(module.forward)

    layer = Layer("cpu")
    experts = torch.compile(layer.experts, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    x, weights = tokens(6, "cpu").requires_grad_(), torch.rand(6, TOP_K, requires_grad=True)
    experts(x, weights, torch.zeros(6, TOP_K, dtype=torch.int64)).sum().backward()
    calls = [re.findall(r"nvfp4\.\w+", graph) for graph in graphs]
    assert calls == [["nvfp4.moe"], ["nvfp4.moe_backward"]]
    expecttest.TestCase().assertExpectedInline(
        graphs[1],
        """\
%8: (bfloat16[6, 64], float32[6, 2]) = nvfp4.moe_backward.default(%0: bfloat16[6, 64], %1: bfloat16[6, 64],
    %2: uint8[8, 2, 32, 1, 36], %3: float32[8, 2], %4: uint8[8, 64, 1, 36], %5: float32[8], %6: float32[6, 2],
    %7: int64[6, 2], clamp_limit=7.0)
%9: bfloat16[6, 64] = getitem(%8, 0)
%10: float32[6, 2] = getitem(%8, 1)
return [%9, %10, None, None, None, None, None]""",
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(
    reentrant: bool, compiled: bool, tokens: Callable[[int, str], Tensor], device: str
) -> None:
    layer = Layer(device)
    x = tokens(9, device)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    run = torch.compile(checkpointed, backend="aot_eager", fullgraph=not reentrant) if compiled else checkpointed
    assert_close(gradients(run, layer, x), gradients(layer, layer, x))


def test_aot_autograd_cache(tokens: Callable[[int, str], Tensor], tmp_path: Any, monkeypatch: Any) -> None:
    """What another process compiled gives the same gradients; a layer with another limit is not taken for it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = tokens(9, "cpu")
    with torch._functorch.config.patch(enable_autograd_cache=True), torch._inductor.config.patch(fx_graph_cache=True):
        for round_ in range(2):
            torch._dynamo.reset()
            counters.clear()
            layer = Layer("cpu")
            assert_close(
                gradients(torch.compile(layer, fullgraph=True), layer, x), gradients(layer, layer, x), 5e-3
            )  # fmt: skip
            hits = counters["aot_autograd"]["autograd_cache_hit"]
            assert hits == round_, dict(counters["aot_autograd"])


# Without AOTAutograd's cache: what another version of this package compiled has its own numbers for the words.
@torch._functorch.config.patch(enable_autograd_cache=False)
def test_a_forward_pass_that_eager_runs_compiles(device: str) -> None:
    """Of an op without a gradient, and with respect to what has none: only backward raises, with the op's words."""
    generator = torch.Generator().manual_seed(0)
    w13 = random_weight((2, 64, 64), gated=True, generator=generator, device=device)
    w2 = random_weight((2, 64, 32), generator=generator, device=device)
    packed = torch_nvfp4.pack(w13, gated=True), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale
    counts = torch.tensor([1, 3], dtype=torch.int32, device=device)
    bias = torch.zeros(2, 64, device=device, requires_grad=True)
    x = torch.randn(2, 3, 64, generator=generator).to(device, torch.bfloat16)
    routing = torch.ones(6, 1, device=device), torch.zeros(6, 1, dtype=torch.int64, device=device)

    def batched(x: Tensor) -> Tensor:
        return torch_nvfp4.batched_moe(x * 2, *packed, counts)

    def biased(x: Tensor) -> Tensor:
        return torch_nvfp4.moe(x.view(6, 64), *packed, *routing, None, bias)

    for f, words in (
        (batched, "batched_moe has no gradient"),
        (biased, "moe has no gradient with respect to w13_bias"),
    ):
        for run in (f, torch.compile(f, fullgraph=True), torch.compile(f, backend="aot_eager", fullgraph=True)):
            out = run(x.clone().requires_grad_())
            assert torch.equal(out, f(x))
            with pytest.raises(NotImplementedError, match=words):
                out.sum().backward()


def test_no_python_and_no_graph_where_no_gradient_is_wanted(tokens: Callable[[int, str], Tensor], device: str) -> None:
    layer = Layer(device).requires_grad_(False)
    x = tokens(4, device)
    for context in (contextlib.nullcontext(), torch.no_grad(), torch.inference_mode()):
        with context:
            assert layer(x).grad_fn is None
