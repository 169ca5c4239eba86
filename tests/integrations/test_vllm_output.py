"""Where the plug-in's experts write: up to vLLM 0.26 into the layer's output, which vLLM hands on after the experts.

In a stand-in for each version of vLLM, whose kernel gives the experts a buffer and then asks for what reduces it.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.fake_vllm import FINALIZE, VERSIONS, moe_config
from helpers.layers import activations, make_layer, routed
from helpers.vllm_layers import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Plugin, apply, build, call, close
from torch_nvfp4 import reference
from torch_nvfp4.integrations.vllm.versions import release

LIMIT = 0.7


class Layer(NamedTuple):
    """A layer of vLLM, and what it was made of."""

    experts: Any
    w13: Tensor
    w2: Tensor
    weights: Any


class Batch(NamedTuple):
    """hidden_states and routing."""

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


def make(make_plugin: Callable[..., Plugin], version: str, **changes: Any) -> Layer:
    weights = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    config = moe_config(in_dtype=torch.float32, swiglu_limit=LIMIT, **changes)
    return Layer(*build(make_plugin(version), weights, "modelopt", config), weights)


def batch(tokens: int, seed: int) -> Batch:
    topk_weights, topk_ids, _, _ = routed(tokens, EXPERTS, TOP_K, seed=seed)
    return Batch(activations(tokens, HIDDEN, seed=seed).float(), topk_weights, topk_ids)


def begin(layer: Layer, given: Batch, output: Tensor) -> Tensor:
    return call(layer.experts, output, given.x, layer.w13, layer.w2, given.topk_weights, given.topk_ids)


def end(layer: Layer, given: Batch, output: Tensor | None, buffer: Tensor) -> Tensor:
    reduce = layer.experts.finalize_weight_and_reduce_impl()
    result: Tensor = reduce.apply(
        output=output, fused_expert_output=buffer, topk_weights=given.topk_weights, topk_ids=given.topk_ids,
        apply_router_weight_on_input=False,
    )  # fmt: skip
    return result


def expected(layer: Layer, given: Batch) -> Tensor:
    return reference.moe(given.x.double(), *layer.weights, given.topk_weights, given.topk_ids, clamp_limit=LIMIT)


def nan_like(given: Batch) -> Tensor:
    return torch.full_like(given.x, torch.nan)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_op_writes_the_output_and_not_the_buffer(make_plugin: Callable[..., Plugin], version: str) -> None:
    """From 0.27 on vLLM's buffer is the output."""
    layer, given = make(make_plugin, version), batch(9, 2)
    output = nan_like(given)
    buffer = begin(layer, given, output)
    late = release(version) < (0, 27)  # type: ignore[operator]
    assert (buffer is not output) is late
    assert bool(output.isnan().all()) is late
    assert end(layer, given, output, buffer) is output
    close(output, expected(layer, given))
    if late:
        assert bool(buffer.isnan().all())


@pytest.mark.parametrize("changes", [{"dp_size": 2}, {"use_all2all_kernels": True}])
def test_with_ranks_that_exchange_tokens_the_buffer_is_written(
    make_plugin: Callable[..., Plugin], changes: dict[str, Any]
) -> None:
    """Some of vLLM's ways to exchange them never call what reduces, and read the buffer at once."""
    layer, given = make(make_plugin, "0.25.1", **changes), batch(9, 2)
    buffer = begin(layer, given, nan_like(given))
    close(buffer, expected(layer, given))
    reduced = layer.experts.finalize_weight_and_reduce_impl()
    assert type(reduced) is sys.modules[FINALIZE].TopKWeightAndReduceNoOP  # type: ignore[attr-defined]


def test_what_reduces_is_of_the_class_that_vllm_asks_for(make_plugin: Callable[..., Plugin]) -> None:
    layer, given = make(make_plugin, "0.25.1"), batch(9, 2)
    begin(layer, given, nan_like(given))
    reduced = layer.experts.finalize_weight_and_reduce_impl()
    assert isinstance(reduced, sys.modules[FINALIZE].TopKWeightAndReduceNoOP)  # type: ignore[attr-defined]


def test_outputs_that_the_op_does_not_write(make_plugin: Callable[..., Plugin]) -> None:
    """No output: the buffer is handed on. Another dtype, or rows apart: copied, as vLLM does."""
    layer, given = make(make_plugin, "0.25.1"), batch(9, 2)
    buffer = begin(layer, given, nan_like(given))
    assert end(layer, given, None, buffer) is buffer
    close(buffer, expected(layer, given))
    for output in (torch.full((9, HIDDEN), torch.nan).double(), torch.full((HIDDEN, 9), torch.nan).t()):
        buffer = begin(layer, given, nan_like(given))
        assert end(layer, given, output, buffer) is output
        close(output, expected(layer, given))


def test_batches_of_other_sizes_and_none_at_all(make_plugin: Callable[..., Plugin]) -> None:
    """A prompt in chunks, and a rank that no token reaches, for which vLLM does not call the experts."""
    layer = make(make_plugin, "0.25.1")
    for tokens in (9, 3, 0, 5, 1):
        given = batch(tokens, 10 + tokens)
        output = nan_like(given)
        buffer = begin(layer, given, output) if tokens else nan_like(given)
        assert end(layer, given, output, buffer) is output
        close(output, expected(layer, given)) if tokens else None


def test_two_threads_in_one_layer(make_plugin: Callable[..., Plugin]) -> None:
    """Micro-batches that take turns: both have begun before either ends, and the first to begin is the last to end."""
    layer = make(make_plugin, "0.25.1")
    batches, outputs = [batch(9, 2), batch(4, 3)], [torch.empty(0), torch.empty(0)]
    begun, second_ended = threading.Barrier(2), threading.Event()

    def step(index: int) -> None:
        output = nan_like(batches[index])
        buffer = begin(layer, batches[index], output)
        begun.wait(timeout=30)
        if index == 0:
            second_ended.wait(timeout=30)
        outputs[index] = end(layer, batches[index], output, buffer)
        if index == 1:
            second_ended.set()

    threads = [threading.Thread(target=step, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for given, output in zip(batches, outputs, strict=True):
        close(output, expected(layer, given))


def test_nothing_is_held_after_the_call(make_plugin: Callable[..., Plugin]) -> None:
    """Without a collection of cycles: a graph's private pool and an engine's memory profile would count it."""
    layer, given = make(make_plugin, "0.25.1"), batch(9, 2)
    output = nan_like(given)
    gc.disable()
    try:
        apply(layer.experts, output, given.x, layer.w13, layer.w2, given.topk_weights, given.topk_ids)
        held = [weakref.ref(tensor) for tensor in (*given, output)]
        del given, output
        assert [reference() for reference in held] == [None] * 4
    finally:
        gc.enable()


def test_a_vllm_that_never_asks_for_the_reduction_is_an_error(make_plugin: Callable[..., Plugin]) -> None:
    layer, given = make(make_plugin, "0.25.1"), batch(9, 2)
    begin(layer, given, nan_like(given))
    with pytest.raises(
        RuntimeError, match=r"expected finalize_weight_and_reduce_impl\(\) after apply\(\), got apply\(\) again: .*=off"
    ):
        begin(layer, given, nan_like(given))
