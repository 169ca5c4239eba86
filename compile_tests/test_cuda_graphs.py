"""CUDA graphs by hand, by ``make_graphed_callables`` and by torch.compile, and the streams they run on.

Private torch APIs: ``torch._inductor.cudagraph_trees.CUDAGraphTreeManager.record_function`` and
``torch._dynamo.utils.counters``, to see what the compiler recorded; ``torch._dynamo.decorators.mark_unbacked``;
``torch.cuda._sleep``, to expose a kernel that runs on the wrong stream. Run with torch 2.11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.utils import counters

import torch_nvfp4
from helpers.expert_kinds import KINDS
from helpers.expert_kinds import make_experts as make_experts_of_kind
from torch_nvfp4 import NVFP4Weight
from torch_nvfp4.nn import NVFP4Experts, NVFP4Linear
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight

pytestmark = pytest.mark.gpu

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, LIMIT = 8, 512, 256, 2, 2.0
TOKENS = (1, 3, 16, 200)  # few and many tokens per expert run different kernels
DELAY = 20_000_000  # cycles, about 10 ms

Inputs = tuple[Tensor, Tensor, Tensor]


def make_experts() -> NVFP4Experts:
    generator = torch.Generator().manual_seed(0)
    w13 = random_weight((EXPERTS, 2 * INTERMEDIATE, HIDDEN), gated=True, generator=generator, device="cuda")
    w2 = random_weight((EXPERTS, HIDDEN, INTERMEDIATE), generator=generator, device="cuda")
    return NVFP4Experts.from_weights(w13, w2, clamp_limit=LIMIT)


def make_inputs(tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to("cuda", dtype)
    return x, *random_routing(tokens, EXPERTS, TOP_K, generator=generator, device="cuda")


def refill(buffers: Inputs, values: Inputs) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def warm_up(function: Callable[[], object]) -> None:
    """What torch asks for before a capture: a few calls on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)


class Residual(nn.Module):
    """Experts between aten ops, so that the compiler has kernels of its own in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = make_experts()
        generator = torch.Generator().manual_seed(1)
        self.shared = NVFP4Linear.from_weight(random_weight((HIDDEN, HIDDEN), generator=generator, device="cuda"))

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return x + self.shared(x).relu() + self.experts(x, topk_weights, topk_ids)


class DecodeStep(nn.Module):
    """hidden state -> router -> experts -> residual -> norm -> next hidden state, all on the device.

    The router sums in a fixed order, so that eager and captured steps choose the same experts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.experts = make_experts()
        generator = torch.Generator().manual_seed(2)
        router = torch.randn(EXPERTS, HIDDEN, generator=generator) / HIDDEN**0.5
        self.register_buffer("router", router.to("cuda"))

    def forward(self, x: Tensor) -> Tensor:
        scores = (x.float().unsqueeze(1) * self.router).sum(-1).softmax(-1)
        topk_weights, topk_ids = scores.topk(TOP_K)
        hidden = x.float() + self.experts(x, topk_weights, topk_ids).float()
        return (hidden * hidden.square().mean(-1, keepdim=True).add(1e-6).rsqrt()).to(x.dtype)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for every graph that the compiler's graph trees record."""
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    recorded: list[object] = []
    record = CUDAGraphTreeManager.record_function

    def count(self: CUDAGraphTreeManager, new_inputs: Any, function_id: Any) -> Any:
        recorded.append(function_id)
        return record(self, new_inputs, function_id)

    monkeypatch.setattr(CUDAGraphTreeManager, "record_function", count)
    return recorded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_replay_on_new_values_and_new_routing(tokens: int, dtype: torch.dtype) -> None:
    experts = make_experts()
    weights = experts.unpacked_weights()
    buffers = make_inputs(tokens, 0, dtype)
    warm_up(lambda: experts(*buffers))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = experts(*buffers)
    for seed in range(1, 5):
        values = make_inputs(tokens, seed, dtype)
        if seed == 3:  # every token on one expert, and ids without an expert
            values[2].fill_(EXPERTS - 1)[0, 0] = -1
        refill(buffers, values)
        graph.replay()
        assert torch.equal(output, experts(*values))
        assert_accurate(output, torch_nvfp4.reference.moe(values[0], *weights, *values[1:], clamp_limit=LIMIT))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ["gpt-oss with biases", "relu2 without a gate", "situ with biases"])
def test_replay_of_other_experts(name: str, tokens: int) -> None:
    """Kernels of their own: biases, no gate, SiTU. A new bias in the old buffer is read too."""
    layer = make_experts_of_kind(KINDS[name], EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    w13, w2 = (NVFP4Weight(*(part.to("cuda") for part in weight)) for weight in layer[:2])
    experts = NVFP4Experts.from_weights(w13, w2, **layer.biases("cuda"), **layer.kind.gate)
    buffers = make_inputs(tokens, 0)
    warm_up(lambda: experts(*buffers))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = experts(*buffers)
    for seed in range(1, 4):
        refill(buffers, make_inputs(tokens, seed))
        if experts.w2_bias is not None:
            experts.w2_bias.mul_(-0.5)
        graph.replay()
        assert torch.equal(output, experts(*buffers))
        x, *routing = buffers
        biases = (experts.w13_bias, experts.w2_bias)
        expected = torch_nvfp4.reference.moe(x, w13, w2, *routing, None, *biases, **layer.kind.gate)
        assert_accurate(output, expected)


@pytest.mark.parametrize("tokens", TOKENS)
def test_replay_of_the_steps(tokens: int) -> None:
    """route, grouped_gemm_swiglu, grouped_gemm and combine, whose work depends on the routing they read."""
    experts = make_experts()
    w13, g13, w2, g2 = (experts.get_buffer(name) for name in ("w13", "w13_global_scale", "w2", "w2_global_scale"))

    def steps(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        order, offsets = torch_nvfp4.route(topk_ids, None, EXPERTS)
        hidden = torch_nvfp4.grouped_gemm_swiglu(x, w13, g13, order, offsets, clamp_limit=LIMIT)
        return torch_nvfp4.combine(
            torch_nvfp4.grouped_gemm(hidden, w2, g2, order, offsets), topk_weights, topk_ids, None, EXPERTS
        )

    buffers = make_inputs(tokens, 0)
    warm_up(lambda: steps(*buffers))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = steps(*buffers)
    for seed in (1, 2):
        values = make_inputs(tokens, seed)
        refill(buffers, values)
        graph.replay()
        assert torch.equal(output, steps(*values))


def test_one_pool_for_several_sizes() -> None:
    """Graphs that share a memory pool, replayed in any order, as a server keeps one per batch size."""
    experts = make_experts()
    captured: dict[int, tuple[torch.cuda.CUDAGraph, Inputs, Tensor]] = {}
    pool = torch.cuda.graph_pool_handle()
    for tokens in sorted(TOKENS, reverse=True):
        buffers = make_inputs(tokens, 0)
        warm_up(lambda buffers=buffers: experts(*buffers))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = experts(*buffers)
        captured[tokens] = graph, buffers, output
    for seed, tokens in enumerate((*TOKENS, *reversed(TOKENS))):
        graph, buffers, output = captured[tokens]
        values = make_inputs(tokens, seed)
        refill(buffers, values)
        graph.replay()
        assert torch.equal(output, experts(*values))


def test_make_graphed_callables() -> None:
    eager = make_experts()
    samples = make_inputs(4, 0)
    graphed = torch.cuda.make_graphed_callables(make_experts().eval(), samples)
    for seed in range(1, 4):
        values = make_inputs(4, seed)
        assert torch.equal(graphed(*values), eager(*values))


def test_decode_loop_of_100_steps_replayed() -> None:
    step = DecodeStep()
    start = make_inputs(4, 0)[0]
    x = start.clone()
    warm_up(lambda: step(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(step(x))
    expected = start
    x.copy_(start)
    for index in range(100):
        graph.replay()
        expected = step(expected)
        assert torch.equal(x, expected), f"step {index}"
    assert x.isfinite().all()
    assert not torch.equal(x, start)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_graph_trees_over_alternating_sizes(mode: str, dynamic: bool, recordings: list[object]) -> None:
    layer = Residual()
    sizes = (4, 16, 5)  # none equal to top_k: the compiler would take the two for one size
    compiled = torch.compile(layer, mode=mode, fullgraph=True, dynamic=dynamic)
    for seed in range(5):
        for tokens in sizes:
            inputs = make_inputs(tokens, seed)
            torch.compiler.cudagraph_mark_step_begin()
            assert_accurate(compiled(*inputs).clone(), layer(*inputs))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(recordings) == len(sizes)  # each size once
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else len(sizes))


def test_graph_trees_with_unbacked_tokens(recordings: list[object]) -> None:
    """The recipe that compiles once for every size, a single token included, records each size once too."""
    layer = Residual()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    sizes = (8, 1, 16)
    for seed in range(4):
        for tokens in sizes:
            inputs = make_inputs(tokens, seed)
            if (seed, tokens) == (0, 8):
                for tensor in inputs:
                    mark_unbacked(tensor, 0)
            torch.compiler.cudagraph_mark_step_begin()
            assert_accurate(compiled(*inputs).clone(), layer(*inputs))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(recordings) == len(sizes)
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_decode_loop(recordings: list[object]) -> None:
    step = DecodeStep()
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    x = make_inputs(4, 0)[0]
    for _ in range(100):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x).clone()
        # One step at a time: the compiler may sum in another order, and a near tie of the router would part the loops.
        close = (y.float() - step(x).float()).norm(dim=-1) <= 0.02 * y.float().norm(dim=-1)
        assert close.float().mean() >= 0.75
        x = y
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(recordings) == 1


@pytest.mark.parametrize("tokens", TOKENS)
def test_side_stream(tokens: int) -> None:
    """Everything runs on the current stream: on another one it would read the inputs before they are written."""
    experts = make_experts()
    values = make_inputs(tokens, 1)
    expected = experts(*values)
    buffers = make_inputs(tokens, 0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY)
        refill(buffers, values)
        output = experts(*buffers)
    stream.synchronize()
    assert torch.equal(output, expected)


def test_two_streams_at_once() -> None:
    """Calls in flight together share no workspace."""
    experts = make_experts()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs = [make_inputs(tokens, seed) for seed, tokens in enumerate((200, 16))]
    expected = [experts(*values) for values in inputs]
    torch.cuda.synchronize()
    outputs: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, values, results in zip(streams, inputs, outputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(experts(*values))
    torch.cuda.synchronize()
    for results, reference in zip(outputs, expected, strict=True):
        assert all(torch.equal(result, reference) for result in results)


@pytest.mark.parametrize("tokens", [*TOKENS, 0])
def test_no_synchronization(tokens: int) -> None:
    layer = Residual()
    experts = layer.experts
    x, topk_weights, topk_ids = inputs = make_inputs(tokens, 0)
    w13, g13, w2, g2 = (experts.get_buffer(name) for name in ("w13", "w13_global_scale", "w2", "w2_global_scale"))
    expert_map = torch.arange(EXPERTS, dtype=torch.int32, device="cuda")
    layer(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*inputs)
        torch_nvfp4.moe(x, w13, g13, w2, g2, topk_weights, topk_ids, expert_map, clamp_limit=LIMIT)
        order, offsets = torch_nvfp4.route(topk_ids, None, EXPERTS)
        gate_up = torch_nvfp4.grouped_gemm(x, w13, g13, order, offsets)
        hidden = torch_nvfp4.swiglu(gate_up, clamp_limit=LIMIT)
        torch_nvfp4.grouped_gemm_swiglu(x, w13, g13, order, offsets, clamp_limit=LIMIT)
        expert_out = torch_nvfp4.grouped_gemm(hidden, w2, g2, order, offsets)
        torch_nvfp4.combine(expert_out, topk_weights, topk_ids, None, EXPERTS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
