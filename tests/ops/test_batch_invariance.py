"""batch_invariant=True: a row has the same bits whatever the batch is, on every kernel there is."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from helpers.layers import BF16, FP32, GATES, PackedLayer, activations, make_layer, seeded, to
from helpers.recorded import RecordedOps
from torch_nvfp4.ops.moe import decomposed_moe
from torch_nvfp4.ops.select import CudaDevice, explain_select
from torch_nvfp4.testing import random_routing

E, K, FEATURES, TOP_K = 8, 656, 208, 3  # parts of blocks and panels, and an odd number of k-blocks
M = 480
# CUDA: few_slots_mlp up to 32 slots (10 tokens), stream_gemm up to 5 per expert (13 tokens), wgmma_experts above, with
# tall and wide tiles.
COUNTS = (1, 2, 7, 10, 11, 13, 14, 33, 100, 298, 299, 469, 470)


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    before = torch_nvfp4.is_batch_invariant()
    torch_nvfp4.set_batch_invariant(False)
    yield
    torch_nvfp4.set_batch_invariant(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def inputs(device: str) -> tuple[PackedLayer, Tensor, Tensor, Tensor]:
    weights, ids = random_routing(M, E, TOP_K, generator=seeded(1))
    ids[5] = -1
    return (make_layer(E, K, FEATURES, seed=2).packed(device), *to(device, activations(M, K, seed=3), weights, ids))


def batches(seed: int) -> Iterator[Tensor]:
    """Rows of the whole batch: its beginnings, and choices in any order."""
    for count in COUNTS:
        yield torch.arange(count)
        yield torch.randperm(M, generator=seeded(seed + count))[:count]


def test_counts_reach_every_kernel() -> None:
    sizes = {"top_k": TOP_K, "experts": E, "hidden": K, "features": FEATURES, "batch_invariant": True}
    answers = {m: explain_select(m, **sizes, device=CudaDevice()) for m in COUNTS}
    tiles = {m: answer["kernel"].split()[0] + " " + answer["tile"] for m, answer in answers.items()}
    assert {m: tile.split(" (")[-1] for m, tile in tiles.items()} == {
        **{m: f"few_slots_mlp 16 rows x at most {min(m, 8)} tokens" for m in (1, 2, 7, 10)},
        **dict.fromkeys((11, 13), "narrow)"),
        **dict.fromkeys((14, 33, 100, 298, 470), "tall)"),
        **dict.fromkeys((299, 469), "wide)"),
    }
    for answer in answers.values():
        assert answer["split"] in ("none", "k over 1 warps in w13, over 1 in w2")
    sm80 = explain_select(1, **sizes, device=CudaDevice(8, 108, 166912))
    assert sm80["not few_slots_mlp"] == "how it splits k depends on the batch"


@pytest.mark.parametrize(
    ("name", "on_input"), [("silu-clamped", False), ("alpha-beta", True), ("swiglustep", False), ("gelu_tanh", True)]
)
def test_moe(name: str, on_input: bool, target: str, dtype: torch.dtype) -> None:
    layer, x, weights, ids = inputs(target)
    x = x.to(dtype)
    how = {**GATES[name], "apply_router_weight_on_input": on_input, "batch_invariant": True}
    whole = torch_nvfp4.moe(x, *layer, weights, ids, **how)
    for rows in batches(4):
        rows = rows.to(x.device)
        assert same_bits(torch_nvfp4.moe(x[rows], *layer, weights[rows], ids[rows], **how), whole[rows]), len(rows)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_grouped_gemms(gated: bool, scaled: bool, target: str, dtype: torch.dtype) -> None:
    layer, x, weights, ids = inputs(target)
    x = x.to(dtype)

    def call(rows: Tensor) -> Tensor:
        order, offsets = torch_nvfp4.route(ids[rows], None, E)
        arguments = (x[rows], layer.w13, layer.w13_global_scale, order, offsets, weights[rows] if scaled else None)
        if not scaled:
            arguments = (x[rows].repeat_interleave(TOP_K, 0), *arguments[1:])
        if gated:
            out = torch_nvfp4.grouped_gemm_swiglu(*arguments, clamp_limit=2.0, batch_invariant=True)
        else:
            out = torch_nvfp4.grouped_gemm(*arguments, batch_invariant=True)
        return out.unflatten(0, (-1, TOP_K))

    whole = call(torch.arange(M, device=x.device))
    for rows in batches(5):
        rows = rows.to(x.device)
        assert same_bits(call(rows), whole[rows]), len(rows)


def test_linear(target: str, dtype: torch.dtype) -> None:
    layer, x, _, _ = inputs(target)
    x, bias = x.to(dtype), activations(2 * FEATURES, seed=6).to(x.device, dtype)
    weight, scale = layer.w13[0], layer.w13_global_scale[0]
    whole = torch_nvfp4.linear(x, weight, scale, bias, batch_invariant=True)
    for rows in batches(7):
        rows = rows.to(x.device)
        some = torch_nvfp4.linear(x[rows], weight, scale, bias, batch_invariant=True)
        assert same_bits(some, whole[rows]), len(rows)


def test_out_and_decomposition_pass_it_on(device: str) -> None:
    layer, x, weights, ids = inputs(device)
    x = x.to(BF16)
    whole = decomposed_moe(x, *layer, weights, ids, batch_invariant=True)
    out = torch.empty_like(x[:3])
    torch_nvfp4.moe(x[:3], *layer, weights[:3], ids[:3], batch_invariant=True, out=out)
    assert same_bits(out, torch_nvfp4.moe(x, *layer, weights, ids, batch_invariant=True)[:3])
    assert same_bits(decomposed_moe(x[:3], *layer, weights[:3], ids[:3], batch_invariant=True), whole[:3])


def recorded(call: Any) -> list[Any]:
    """What the ops of a call get for batch_invariant."""
    with RecordedOps("batch_invariant") as seen:
        call()
    return seen.values


def test_setting(device: str) -> None:
    """None is what was set; the module and the functions ask at each call."""
    packed, x, weights, ids = inputs(device)
    x = x[:2].to(BF16)
    weight, scale = packed.w13[0], packed.w13_global_scale[0]
    order, offsets = torch_nvfp4.route(ids[:2], None, E)
    gemm = (x, packed.w13, packed.w13_global_scale, order, offsets, weights[:2])
    dense = make_layer(E, K, FEATURES, seed=2)
    moved = [torch_nvfp4.NVFP4Weight(*to(device, *part)) for part in dense]
    experts = torch_nvfp4.NVFP4Experts.from_weights(*moved)
    calls = {
        "moe": lambda how: torch_nvfp4.moe(x, *packed, weights[:2], ids[:2], batch_invariant=how),
        "grouped_gemm": lambda how: torch_nvfp4.grouped_gemm(*gemm, batch_invariant=how),
        "swiglu": lambda how: torch_nvfp4.grouped_gemm_swiglu(*gemm, batch_invariant=how),
        "linear": lambda how: torch_nvfp4.linear(x, weight, scale, batch_invariant=how),
        "experts": lambda how: experts(x, weights[:2], ids[:2]) if how is None else None,
    }
    for setting, (name, call) in itertools.product((False, True), calls.items()):
        torch_nvfp4.set_batch_invariant(setting)
        assert torch_nvfp4.is_batch_invariant() is setting
        assert recorded(lambda call=call: call(None)) == [setting], name
        if name != "experts":
            assert recorded(lambda call=call, how=not setting: call(how)) == [not setting], name


def test_what_cannot_keep_the_promise_refuses(device: str) -> None:
    packed, x, weights, ids = inputs(device)
    counts = torch.ones(E, dtype=torch.int32, device=x.device)
    torch_nvfp4.set_batch_invariant(True)
    with pytest.raises(NotImplementedError, match=r"batched_moe: expected set_batch_invariant\(False\), got True"):
        torch_nvfp4.batched_moe(x[:E].to(BF16).unsqueeze(1), *packed, counts)
    experts = torch_nvfp4.NVFP4Experts.from_weights(*make_layer(E, K, FEATURES, seed=2), backend="reference")
    with pytest.raises(
        NotImplementedError, match=r"backend reference: expected set_batch_invariant\(False\), got True"
    ):
        experts(x[:2].cpu().to(FP32), weights[:2].cpu(), ids[:2].cpu())


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False"), ("", "False"), ("yes", "got 'yes'")])
def test_environment(value: str, expected: str) -> None:
    code = "import torch_nvfp4; print(torch_nvfp4.is_batch_invariant())"
    environment = {**os.environ, "TORCH_NVFP4_BATCH_INVARIANT": value}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert expected in run.stdout + run.stderr
