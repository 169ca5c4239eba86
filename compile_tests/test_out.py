"""The out overloads under torch.compile and in CUDA graphs: the buffer itself is written, without a copy of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import torch_nvfp4
from torch_nvfp4 import reference
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight

E, K, I, TOP_K = 4, 256, 96, 2  # noqa: E741

Call = Callable[..., Tensor]


def moe(tokens: int, device: str) -> tuple[Tensor, Call]:
    """hidden_states, and torch_nvfp4.moe of them with all but ``out`` given."""
    generator = torch.Generator().manual_seed(tokens)
    w13 = random_weight((E, 2 * I, K), gated=True, generator=generator, device=device)
    w2 = random_weight((E, K, I), generator=generator, device=device)
    packed = (torch_nvfp4.pack(w13, gated=True), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale)
    routing = random_routing(tokens, E, TOP_K, generator=generator, device=device)
    x = torch.randn(tokens, K, generator=generator).to(device, torch.bfloat16)
    return x, lambda x, **options: torch_nvfp4.moe(x, *packed, *routing, clamp_limit=0.5, **options)


def batched_moe(tokens: int, device: str) -> tuple[Tensor, Call]:
    """The same of torch_nvfp4.batched_moe, with so many tokens in all."""
    generator = torch.Generator().manual_seed(tokens)
    w13 = random_weight((E, 2 * I, K), gated=True, generator=generator, device=device)
    w2 = random_weight((E, K, I), generator=generator, device=device)
    packed = (torch_nvfp4.pack(w13, gated=True), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale)
    counts = torch.tensor([tokens - tokens // 2, 0, tokens // 2, 0], dtype=torch.int32, device=device)
    # All rows: what lies behind the counts of the functional op is 0, of a buffer what was there.
    x = torch.zeros(E, tokens, K)
    for rows, count in zip(x, counts.tolist(), strict=True):
        rows[:count] = torch.randn(count, K, generator=generator)
    return x.to(device, torch.bfloat16), lambda x, **options: torch_nvfp4.batched_moe(
        x, *packed, counts, clamp_limit=0.5, **options
    )


OPS = {"moe": moe, "batched_moe": batched_moe}


def compiled_code(function: Call, *args: Any) -> tuple[Any, str]:
    torch._dynamo.reset()
    result, code = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    assert len(code) == 1
    return result, code[0]


@pytest.mark.parametrize("op", OPS)
def test_a_buffer_that_comes_from_outside(op: str, device: str) -> None:
    x, call = OPS[op](5, device)

    def into(x: Tensor, out: Tensor) -> Tensor:
        return call(x * 0.5, out=out) + 1

    expected = call(x * 0.5)
    out = torch.zeros_like(x)
    result, code = compiled_code(into, x, out)
    assert torch.equal(out, expected)
    assert torch.equal(result, expected + 1)
    assert code.count(f"torch.ops.nvfp4.{op}.out(") == 1
    assert "aten.copy_" not in code
    assert "aten.clone" not in code


@pytest.mark.parametrize("op", OPS)
def test_a_buffer_of_the_graph(op: str, device: str) -> None:
    x, call = OPS[op](5, device)

    def fresh(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        call(x, out=out)
        return out * 2

    result, code = compiled_code(fresh, x)
    assert torch.equal(result, call(x) * 2)
    assert code.count(f"torch.ops.nvfp4.{op}.out(") == 1
    assert "aten.copy_" not in code


@pytest.mark.parametrize("op", OPS)
def test_in_place_where_the_old_values_are_wanted_again(op: str, device: str) -> None:
    """Functionalization must see that out changes hidden_states. Twice a number is exact, fused or not."""
    x, call = OPS[op](5, device)

    def over(x: Tensor) -> tuple[Tensor, Tensor]:
        before = x * 2
        call(x, out=x)
        return before, x + before

    expected = call(x)
    before, values = x * 2, x.clone()
    (got_before, got_sum), _ = compiled_code(over, values)
    assert torch.equal(values, expected)
    assert torch.equal(got_before, before)
    assert torch.equal(got_sum, expected + before)


@pytest.mark.gpu
@pytest.mark.parametrize("into", [False, True], ids=["functional", "out"])
@pytest.mark.parametrize("arch", ["", "80"])
def test_each_replay_follows_the_counts(into: bool, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One captured call takes another way through the kernels when the counts change, and other rows."""
    monkeypatch.setenv("TORCH_NVFP4_ARCH", arch)
    rows = 200
    generator = torch.Generator().manual_seed(0)
    w13 = random_weight((E, 2 * I, K), gated=True, generator=generator, device="cuda")
    w2 = random_weight((E, K, I), generator=generator, device="cuda")
    packed = (torch_nvfp4.pack(w13, gated=True), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale)
    x = torch.randn(E, rows, K, generator=generator).to("cuda", torch.bfloat16)
    counts = torch.zeros(E, dtype=torch.int32, device="cuda")
    buffer = torch.empty_like(x)
    call = lambda: torch_nvfp4.batched_moe(x, *packed, counts, clamp_limit=0.5, out=buffer if into else None)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for values in ([0, 0, 0, 0], [1, 0, 0, 0], [0, 7, 3, 0], [20, 20, 1, 40], [200, 0, 0, 1], [0, 0, 2, 0], [90] * E):
        counts.copy_(torch.tensor(values))
        buffer.fill_(3.0)
        graph.replay()
        expected = reference.batched_moe(x, w13, w2, counts, clamp_limit=0.5)
        for got, wanted, count in zip(out, expected, values, strict=True):
            assert_accurate(got[:count], wanted[:count])
            assert bool((got[count:] == (3.0 if into else 0.0)).all())


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_a_captured_call_allocates_no_result(op: str, tokens: int) -> None:
    x, call = OPS[op](tokens, "cuda")
    out = torch.zeros_like(x)

    def peak_of(function: Callable[[], Any]) -> int:
        """Bytes that a capture takes at most at a time."""
        function()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.cuda.graph(graph):
            kept = function()
        peak = torch.cuda.max_memory_allocated() - before
        out.zero_()
        graph.replay()
        assert torch.equal(out if kept is None else kept, call(x))
        return peak

    def into() -> None:
        call(x, out=out)

    result_bytes = out.numel() * out.element_size()
    assert peak_of(lambda: call(x)) - peak_of(into) >= result_bytes
    nodes = torch.compile(lambda x, out: call(x, out=out), fullgraph=True)
    nodes(x, out)
    assert peak_of(lambda: (nodes(x, out), None)[1]) == peak_of(into)
