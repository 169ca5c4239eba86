"""batched_moe against the fp64 reference, on every kernel there is; nothing behind the counts is read or written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from helpers.layers import BF16, GATES, Layer, activations, make_layer, preactivation_scale, to
from torch_nvfp4 import reference
from torch_nvfp4.testing import assert_accurate, relative_l2

E, T, K, I = 6, 20, 144, 48  # noqa: E741
MIXED = [0, 1, T, 7, 16, 0]
COUNTS = {
    "none": [0] * E,
    "one": [1] * E,
    "all": [T] * E,
    "mixed": MIXED,
    "only the first": [3, *[0] * (E - 1)],
    "only the last": [*[0] * (E - 1), T - 1],
}
gates = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


def batch(layer: Layer, t: int, counts: list[int], *, seed: int, std: float = 10.0) -> tuple[Tensor, Tensor]:
    """hidden_states in fp64 with NaN behind the counts, whose pre-activations have this deviation; the counts."""
    e, k = layer.w13.data.shape[0], layer.w13.data.shape[-1] * 2
    x = activations(e, t, k, seed=seed, scale=preactivation_scale(layer.w13, std))
    for rows, count in zip(x, counts, strict=True):
        rows[count:] = math.nan
    return x, torch.tensor(counts, dtype=torch.int32)


def check(layer: Layer, x: Tensor, counts: Tensor, device: str, dtype: torch.dtype, **gate: Any) -> None:
    """Both overloads against the reference, and in place."""
    packed = layer.packed(device)
    expected = reference.batched_moe(x, *layer, counts, **gate)
    values, on_device = to(device, x.to(dtype), counts)
    out = torch_nvfp4.batched_moe(values, *packed, on_device, **gate)
    assert out.dtype == dtype
    assert_accurate(out.cpu(), expected)
    for rows, count in zip(out, counts.tolist(), strict=True):
        assert bool((rows[count:] == 0).all())

    for in_place in (False, True):
        buffer = values.clone() if in_place else torch.full_like(values, 3.0)
        before = buffer.clone()
        read = buffer if in_place else values
        assert torch_nvfp4.batched_moe(read, *packed, on_device, out=buffer, **gate) is buffer
        for rows, given, wanted, count in zip(buffer, before, out, counts.tolist(), strict=True):
            assert torch.equal(rows[:count], wanted[:count])
            assert torch.equal(rows[count:].view(torch.uint8), given[count:].view(torch.uint8))


@gates
def test_values(gate: dict[str, Any], target: str, dtype: torch.dtype) -> None:
    layer = make_layer(E, K, I, seed=1)
    x, counts = batch(layer, T, MIXED, seed=2, std=2.0 if gate["activation"] == "relu2" else 10.0)
    check(layer, x, counts, target, dtype, **gate)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str, target: str, dtype: torch.dtype) -> None:
    layer = make_layer(E, K, I, seed=3)
    check(layer, *batch(layer, T, COUNTS[name], seed=4), target, dtype, clamp_limit=1.0)


# E, T, K, I, counts. On CUDA: tiles of 16, 32 and 64 tokens and more; an odd and an even number of k-blocks; each with
# few tokens and with many, so that every path is taken and every path finds nothing to do.
SIZES = [
    (1, 1, 16, 16, [1]),
    (3, 5, 256, 64, [5, 0, 2]),
    (5, 40, 192, 96, [1, 0, 3, 2, 1]),
    (5, 40, 192, 96, [17, 0, 40, 33, 9]),
    (4, 300, 256, 128, [1, 4, 0, 2]),
    (4, 300, 256, 128, [12, 40, 0, 20]),
    (4, 300, 256, 128, [300, 0, 113, 1]),
    (3, 300, 64, 32, [0, 300, 0]),
    (40, 3, 128, 64, [i % 4 for i in range(40)]),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int, int, int, list[int]], target: str) -> None:
    e, t, k, i, counts = size
    layer = make_layer(e, k, i, seed=5)
    check(layer, *batch(layer, t, counts, seed=6), target, BF16, clamp_limit=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_on_the_kernels_of_sm80(size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_ARCH", "80")
    test_sizes(size, "cuda")


def test_a_limit_that_bites_is_applied(target: str, dtype: torch.dtype) -> None:
    layer = make_layer(E, K, I, seed=7)
    x, counts = batch(layer, T, MIXED, seed=8)
    out = torch_nvfp4.batched_moe(x.to(target, dtype), *layer.packed(target), counts.to(target), clamp_limit=1.0)
    assert_accurate(out.cpu(), reference.batched_moe(x, *layer, counts, clamp_limit=1.0))
    assert relative_l2(out.cpu(), reference.batched_moe(x, *layer, counts)) > 0.5


def test_the_same_tokens_as_moe(target: str, dtype: torch.dtype) -> None:
    """Spread by hand, multiplied in a batch and summed by hand, as an engine does it."""
    layer = make_layer(E, K, I, seed=9)
    m, top_k = 30, 2
    x = activations(m, K, seed=10)
    ids = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(i))[:top_k] for i in range(m)])
    weights = torch.rand(m, top_k, generator=torch.Generator().manual_seed(11))
    batched, counts = torch.full((E, T, K), math.nan, dtype=torch.float64), [0] * E
    place = torch.zeros_like(ids)
    for slot, e in enumerate(ids.view(-1).tolist()):
        batched[e, counts[e]] = x[slot // top_k]
        place.view(-1)[slot] = counts[e]
        counts[e] += 1
    packed = layer.packed(target)
    expected = torch_nvfp4.moe(*to(target, x.to(dtype)), *packed, *to(target, weights, ids), clamp_limit=1.0)
    tokens = torch.tensor(counts, dtype=torch.int32, device=target)
    out = torch_nvfp4.batched_moe(batched.to(target, dtype), *packed, tokens, clamp_limit=1.0)
    summed = (out.cpu()[ids, place].double() * weights[..., None].double()).sum(1)
    assert_accurate(summed.to(dtype), expected.cpu().double(), dtype=dtype)
    # One expert per token and weights of one: no sum is left that could be rounded differently.
    ones = torch.ones(m, 1, device=target)
    single = torch_nvfp4.moe(x.to(target, dtype), *packed, ones, ids[:, :1].contiguous().to(target), clamp_limit=1.0)
    picked = torch.stack([out[e, t] for e, t in zip(ids[:, 0].tolist(), place[:, 0].tolist(), strict=True)])
    assert_accurate(picked.cpu(), single.cpu().double())


def test_no_rows(target: str) -> None:
    layer = make_layer(E, K, I, seed=12)
    x, counts = torch.empty(E, 0, K, dtype=BF16, device=target), torch.zeros(E, dtype=torch.int32, device=target)
    assert torch_nvfp4.batched_moe(x, *layer.packed(target), counts).shape == (E, 0, K)
    out = torch.empty_like(x)
    assert torch_nvfp4.batched_moe(x, *layer.packed(target), counts, out=out) is out


def test_a_view_that_begins_anywhere(target: str) -> None:
    """CUDA's loads want 16 bytes; hidden_states may begin at any element."""
    layer = make_layer(E, K, I, seed=13)
    x, counts = batch(layer, T, MIXED, seed=14)
    values, on_device = to(target, x.to(BF16), counts)
    moved = torch.empty(values.numel() + 1, dtype=BF16, device=target)[1:].view(values.shape).copy_(values)
    expected = torch_nvfp4.batched_moe(values, *layer.packed(target), on_device)
    assert torch.equal(torch_nvfp4.batched_moe(moved, *layer.packed(target), on_device), expected)


def test_the_same_call_gives_the_same_bits(target: str, dtype: torch.dtype) -> None:
    layer = make_layer(E, K, I, seed=15)
    x, counts = batch(layer, T, MIXED, seed=16)
    arguments = (x.to(target, dtype), *layer.packed(target), counts.to(target))
    first = torch_nvfp4.batched_moe(*arguments)
    assert all(torch.equal(torch_nvfp4.batched_moe(*arguments), first) for _ in range(5))


@pytest.mark.parametrize(("index", "count"), [(0, -1), (2, T + 1), (E - 1, 2**31 - 1), (3, -(2**31))])
def test_counts_of_no_rows(index: int, count: int, target: str) -> None:
    """An error on the CPU; CUDA takes them for the nearest count there is."""
    layer = make_layer(E, K, I, seed=17)
    counts = torch.tensor(MIXED, dtype=torch.int32)
    counts[index] = count
    x = activations(E, T, K, seed=18, scale=preactivation_scale(layer.w13, 10.0))
    arguments = (x.to(target, BF16), *layer.packed(target), counts.to(target))
    if target == "cuda":
        expected = reference.batched_moe(x, *layer, counts.clamp(0, T))
        assert_accurate(torch_nvfp4.batched_moe(*arguments).cpu(), expected)
        return
    for out in (None, torch.zeros(E, T, K, dtype=BF16)):
        with pytest.raises(RuntimeError) as raised:
            torch_nvfp4.batched_moe(*arguments, out=out)
        op = "batched_moe" if out is None else "batched_moe.out"
        assert str(raised.value) == (
            f"nvfp4::{op}: expert_num_tokens must be from 0 to T = {T}, got {count} at index {index}"
        )
        assert out is None or not out.any()


def test_the_reference_reads_and_refuses_the_same() -> None:
    layer = make_layer(2, 32, 16, seed=19)
    x, counts = batch(layer, 3, [2, 0], seed=20)
    out = reference.batched_moe(x, *layer, counts, clamp_limit=1.0)
    # Each row alone, through the specification of moe.
    for t in range(2):
        row = reference.moe(x[:1, t], *layer, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), clamp_limit=1.0)
        assert_accurate(out[:1, t], row, dtype=torch.float32)
    assert not out[0, 2:].any()
    assert not out[1].any()
    for wrong, words in (
        ({"counts": torch.tensor([2, 4])}, r"expert_num_tokens: expected counts from 0 to T = 3, got 4 at index 1"),
        ({"counts": torch.tensor([2])}, r"expert_num_tokens: expected shape \[2\], got \[1\]"),
        ({"x": x[:1]}, r"hidden_states: expected shape \[2, T, 32\], got \[1, 3, 32\]"),
        ({"w2": layer.w2.data.new_zeros(2, 16, 16)}, r"expected w13 of shape \[E, 2I, K\], .* and w2 of shape"),
    ):
        call = {"x": x, "w2": layer.w2, "counts": counts} | wrong
        with pytest.raises(ValueError, match=words):
            reference.batched_moe(call["x"], layer.w13, call["w2"], call["counts"])
