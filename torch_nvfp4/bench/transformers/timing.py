"""Times models of transformers in turns: a prefill, compiled decode steps, and the MoE blocks alone."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn

from torch_nvfp4.bench.cuda import event_seconds
from torch_nvfp4.bench.transformers.values import recorded

__all__ = ["Decoder", "LayerDecoder", "StaticDecoder", "block_seconds", "decode_seconds", "decoder", "prefill_seconds"]

WARM_STEPS = 4
_BATCHED_SLOTS = 128  # above it the copies of the experts' weights that batched_mm makes take gigabytes
_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


class Decoder(Protocol):
    """Greedy decoding of a model, one step at a time."""

    model: Any
    token: Tensor  # [batch, 1], of the last step

    def start(self, ids: Tensor) -> None:
        """Prefills with a prompt, [batch, tokens]."""

    def step(self) -> None:
        """One compiled step."""


class StaticDecoder:
    """With a static cache, the whole step as one graph: as transformers' generate has it with such a cache."""

    def __init__(self, model: Any, length: int, **options: Any) -> None:
        self.model = model
        self.length = length  # tokens that a cache has room for
        self._step = torch.compile(model.forward, fullgraph=True, **options)
        self._caches: dict[int, Any] = {}
        self._keyword = _cache_keyword(model)

    def start(self, ids: Tensor) -> None:
        batch = len(ids)
        if batch not in self._caches:
            self._caches[batch] = transformers.StaticCache(config=self.model.config, max_cache_len=self.length)
        self._cache = self._caches[batch]
        self._cache.reset()
        arguments = {self._keyword: self._cache}
        logits = self.model(ids, use_cache=True, logits_to_keep=1, **arguments).logits
        self.token = logits[:, -1:].argmax(-1)
        self._position = torch.full((batch, 1), ids.shape[1], device=ids.device)

    def step(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        arguments = {self._keyword: self._cache}
        logits = self._step(self.token, use_cache=True, position_ids=self._position, **arguments).logits
        self.token = logits[:, -1:].argmax(-1)
        self._position = self._position + 1


class LayerDecoder:
    """With a growing cache: each decoder layer is compiled, and its attention, whose cache has no fixed shape, is not.

    For DeepSeek-V4, for which transformers has no static cache.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.model = model
        self._layers = list(model.model.layers)
        for layer in self._layers:
            attention = layer.self_attn
            attention.forward = torch.compiler.disable(attention.forward)
        self._compiled = [torch.compile(layer.forward, **options) for layer in self._layers]
        self._keyword = _cache_keyword(model)

    def start(self, ids: Tensor) -> None:
        self._cache = transformers.DynamicCache(config=self.model.config)
        arguments = {self._keyword: self._cache}
        logits = self.model(ids, use_cache=True, logits_to_keep=1, **arguments).logits
        self.token = logits[:, -1:].argmax(-1)

    def step(self) -> None:
        kept = [layer.__dict__.get("forward") for layer in self._layers]  # a hook of accelerate, if there is one
        for layer, compiled in zip(self._layers, self._compiled, strict=True):
            layer.forward = compiled
        try:
            arguments = {self._keyword: self._cache}
            logits = self.model(self.token, use_cache=True, **arguments).logits
        finally:
            for layer, forward in zip(self._layers, kept, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward
        self.token = logits[:, -1:].argmax(-1)


def _cache_keyword(model: nn.Module) -> str:
    """What the installed version calls the cache that a model is called with."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def decoder(model: Any, length: int, **options: Any) -> Decoder:
    """The decoder that the class of a model allows.

    Args:
        length: tokens that a static cache has room for.
        options: of torch.compile.
    """
    if getattr(model, "_can_compile_fullgraph", False):
        return StaticDecoder(model, length, **options)
    return LayerDecoder(model, **options)


@torch.no_grad()
def decode_seconds(decoders: Mapping[str, Decoder], ids: Tensor, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each round, the decoders in turns; each starts anew from the prompt."""
    result: dict[str, list[float]] = {side: [] for side in decoders}
    for number in range(rounds + 1):
        for side, each in decoders.items():
            each.start(ids)
            for _ in range(WARM_STEPS):
                each.step()
            seconds = _wall_seconds(partial(_steps, each, steps), ids.device) / steps
            if number:  # the first round compiles
                result[side].append(seconds)
    return result


def _steps(each: Decoder, count: int) -> None:
    for _ in range(count):
        each.step()


@torch.no_grad()
def tokens(each: Decoder, ids: Tensor, steps: int) -> Tensor:
    """[batch, 1 + steps]: what a decoder makes of a prompt."""
    each.start(ids)
    found = [each.token]
    for _ in range(steps):
        each.step()
        found.append(each.token)
    return torch.cat(found, 1)


@torch.no_grad()
def prefill_seconds(models: Mapping[str, Any], ids: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds per prefill of a prompt with a fresh cache, in turns, not compiled."""
    result: dict[str, list[float]] = {side: [] for side in models}
    for number in range(rounds + 1):
        for side, model in models.items():
            seconds = _wall_seconds(partial(model, ids, use_cache=True, logits_to_keep=1), ids.device)
            if number:
                result[side].append(seconds)
    return result


@torch.no_grad()
def block_seconds(
    models: Mapping[str, Any], packed: str, ids: Tensor, counts: Sequence[int], blocks: Sequence[str], rounds: int
) -> dict[int, dict[str, Any]]:
    """Tokens -> seconds per MoE block (router, experts, shared expert) of each side, in turns, under CUDA graphs.

    The blocks of all layers follow each other in a graph, each on what the packed model gives it for the first tokens
    of a prompt. The other models run with each of transformers' implementations, and the faster one counts.

    Args:
        packed: whose blocks' inputs are taken.
        ids: the prompt, [1, at least max(counts)].
    """
    with recorded(models[packed], blocks) as calls:
        models[packed](ids, use_cache=False, logits_to_keep=1)
    result: dict[int, dict[str, Any]] = {}
    for count in counts:
        runs: dict[tuple[str, str], Callable[[], object]] = {}
        remarks: dict[tuple[str, str], str] = {}
        for side, model in models.items():
            for name in ("packed",) if side == packed else _IMPLEMENTATIONS:
                slots = count * model.config.num_experts_per_tok
                if name == "batched_mm" and slots > _BATCHED_SLOTS:
                    continue
                if side != packed:
                    model.set_experts_implementation(name)
                run, remark = _captured(_blocks(model, calls, count), ids.device)
                runs[side, name] = run
                remarks[side, name] = remark
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                seconds = event_seconds(run) if ids.device.type == "cuda" else _wall_seconds(run, ids.device)
                times[key].append(seconds / len(blocks))
        medians = {key: statistics.median(values) for key, values in times.items()}
        result[count] = {}
        for side in models:
            best = min((key for key in medians if key[0] == side), key=lambda key: medians[key])
            result[count][side] = {"seconds": medians[best], "experts": best[1]}
            result[count][side]["all"] = {f"{key[1]}{remarks[key]}": medians[key] for key in medians if key[0] == side}
    return result


def _blocks(
    model: nn.Module, calls: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]], count: int
) -> Callable[[], object]:
    """Runs the blocks one after the other on the first ``count`` tokens of recorded calls."""
    inputs = []
    for name, (args, kwargs) in calls.items():
        cut = [value[:, :count].contiguous() for value in args]
        named = {key: value[:, :count].contiguous() for key, value in kwargs.items() if isinstance(value, Tensor)}
        inputs.append((model.get_submodule(name), cut, named))

    def run() -> None:
        for block, args, kwargs in inputs:
            block(*args, **kwargs)

    return run


def _captured(run: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], str]:
    """``run`` as a CUDA graph, and ""; ``run`` itself on a CPU, and, with a remark, where it cannot be captured."""
    if device.type != "cuda":
        return run, ""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # such as an operation that waits for the GPU
        torch.cuda.synchronize()
        return run, ", not as a CUDA graph"
    graph.replay()

    def replay(_: Callable[[], object] = run) -> None:  # with ``run`` the inputs stay alive that the graph reads
        graph.replay()

    return replay, ""


def _wall_seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
