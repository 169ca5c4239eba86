"""Times contenders on CUDA, each as a graph of several calls with different routings."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from torch_nvfp4.bench.layer import Case, Contender, Shape, cases, cast
from torch_nvfp4.bench.report import Row

_MAX_ROUNDS = 400
# Bytes a second of a copy and bf16 operations a second, by a part of the device's name; measured.
_CUDA_RATES = {"H200": (4.3e12, 790e12)}


@functools.cache
def cuda_rates(device: torch.device) -> tuple[float, float]:
    """(bytes a second, bf16 operations a second) of the card: a constant where it is known, else measured here."""
    name = torch.cuda.get_device_name(device)
    for part, rates in _CUDA_RATES.items():
        if part in name:
            return rates
    source = torch.ones(2**27, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, device=device).to(torch.bfloat16)
    copy = min(event_seconds(lambda: target.copy_(source)) for _ in range(10))
    matmul = min(event_seconds(lambda: matrix @ matrix) for _ in range(10))
    return 2 * source.nbytes / copy, 2 * 8192**3 / matmul


def _calls_per_graph(tokens: int) -> int:
    return 12 if tokens <= 64 else 5 if tokens <= 512 else 3


def measure_cuda(
    shape: Shape,
    tokens: int,
    contenders: Sequence[Contender],
    *,
    device: torch.device,
    seconds: float,
    skew: float = 0.0,
    breakdown: bool = False,
    min_rounds: int = 5,
) -> Row:
    """Times one graph of 12, 5 or 3 calls of each contender (ours first), replayed in turns for about ``seconds``."""
    ours, *peers = contenders
    calls = _calls_per_graph(tokens)
    source = cases(shape, tokens, skew=skew, device=device)
    inputs = [next(source) for _ in range(calls)]
    # The inputs stay alive with the graphs that read them.
    prepared = {contender.name: [cast(case, contender) for case in inputs] for contender in contenders}
    graphs = {contender.name: _capture(contender, prepared[contender.name]) for contender in contenders}
    for graph in graphs.values():
        graph.replay()
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    started = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or (rounds < _MAX_ROUNDS and time.perf_counter() - started < seconds):
        for name, graph in graphs.items():
            times[name].append(event_seconds(graph.replay) / calls)
        rounds += 1
    bandwidth, matmul_rate = cuda_rates(device)
    hits = statistics.mean(shape.experts_hit(case.topk_ids) for case in inputs)
    touched = hits * shape.expert_bytes
    elapsed = {name: statistics.median(values) for name, values in times.items()}
    read_seconds, compute_seconds = touched / bandwidth, shape.flop(tokens) / matmul_rate
    return Row(
        tokens=tokens,
        experts_hit=hits,
        touched_bytes=touched,
        flop=shape.flop(tokens),
        rounds=rounds,
        read_rate=bandwidth,
        matmul_rate=matmul_rate,
        read_seconds=read_seconds,
        compute_seconds=compute_seconds,
        seconds=elapsed,
        over_read=elapsed[ours.name] / read_seconds,
        over_floor=elapsed[ours.name] / max(read_seconds, compute_seconds),
        speedup={
            peer.name: statistics.median(b / a for a, b in zip(times[ours.name], times[peer.name], strict=True))
            for peer in peers
        },
        extra_bytes=_cuda_extra_bytes(ours, prepared[ours.name][0]),
        kernels=_kernel_seconds(graphs[ours.name], calls) if breakdown else {},
    )


def event_seconds(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _capture(contender: Contender, inputs: Sequence[Case]) -> torch.cuda.CUDAGraph:
    """One graph that calls the contender once for each input."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            contender.run(inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for case in inputs:
            contender.run(case)
    return graph


def _cuda_extra_bytes(contender: Contender, case: Case) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.run(case)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _kernel_seconds(graph: torch.cuda.CUDAGraph, calls: int) -> dict[str, float]:
    """Time of each kernel in one call, by name, from the profiler."""
    replays = 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total > 0]
    events.sort(key=lambda event: -event.device_time_total)
    return {event.key: event.device_time_total * 1e-6 / (replays * calls) for event in events}
