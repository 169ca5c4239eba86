"""Times what a call costs the host, as a ratio to aten's add in the same round.

On CUDA a call returns as soon as its kernels are in the stream, so this is the time to put them there: where a layer's
kernels are shorter, eager decoding is bound by it. On the CPU a call includes its arithmetic, so the sizes are small.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from torch_nvfp4 import ops
from torch_nvfp4.bench.layer import Layer, Shape, cases, dtype_name
from torch_nvfp4.nn import NVFP4Experts

ADD, MOE, MODULE = "aten add", "moe", "NVFP4Experts"
HOST_SHAPE = Shape(8, 64, 64, 2)
_MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
_CALLS = 100  # of a contender in a round: their launches fit into a stream's queue, which would block the host


@dataclass
class HostRow:
    """One mode and number of tokens: seconds per call, and ratios within a round; medians over the rounds."""

    mode: str  # inference, no_grad or grad; no tensor requires a gradient
    tokens: int
    rounds: int
    seconds: dict[str, float]
    over_add: dict[str, float]
    module_over_moe: float


@dataclass
class HostReport:
    """A whole run."""

    device: str
    machine: str
    date: str
    versions: dict[str, str]
    shape: dict[str, int]
    dtype: str
    rows: list[HostRow] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def host_contenders(layer: Layer, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed, by name: aten's add, the public function, the op under it, the module, and another op."""
    device = layer.w2.data.device
    x, topk_weights, topk_ids = next(cases(layer.shape, tokens, device=device))
    x = x.to(dtype)
    p13, p2, limit = ops.pack(layer.w13, gated=True), ops.pack(layer.w2), layer.clamp_limit
    g13, g2 = layer.w13.global_scale, layer.w2.global_scale
    experts = NVFP4Experts.from_weights(layer.w13, layer.w2, clamp_limit=limit)
    moe, gate_up = torch.ops.nvfp4.moe, x.repeat(1, 2)
    return {
        ADD: lambda: x + x,
        MOE: lambda: ops.moe(x, p13, g13, p2, g2, topk_weights, topk_ids, clamp_limit=limit),
        "torch.ops.nvfp4.moe": lambda: moe(x, p13, g13, p2, g2, topk_weights, topk_ids, clamp_limit=limit),
        MODULE: lambda: experts(x, topk_weights, topk_ids),
        "swiglu": lambda: ops.swiglu(gate_up, clamp_limit=limit),
    }


def measure_host(
    layer: Layer, tokens: int, *, dtype: torch.dtype, seconds: float, min_rounds: int = 5
) -> list[HostRow]:
    """Times the contenders for about ``seconds`` in each mode."""
    rows = []
    synchronize = torch.cuda.synchronize if layer.w2.data.is_cuda else lambda: None
    for mode, context in _MODES.items():
        with context():
            runs = host_contenders(layer, tokens, dtype)
            for run in runs.values():
                _seconds_per_call(run, synchronize)
            times: dict[str, list[float]] = {name: [] for name in runs}
            started = time.perf_counter()
            while len(times[ADD]) < min_rounds or time.perf_counter() - started < seconds:
                for name, run in runs.items():
                    times[name].append(_seconds_per_call(run, synchronize))
        rows.append(
            HostRow(
                mode=mode,
                tokens=tokens,
                rounds=len(times[ADD]),
                seconds={name: statistics.median(values) for name, values in times.items()},
                over_add={name: _ratio(values, times[ADD]) for name, values in times.items()},
                module_over_moe=_ratio(times[MODULE], times[MOE]),
            )
        )
    return rows


def run_host(
    report: HostReport, shape: Shape, tokens: Sequence[int], *, dtype: torch.dtype, clamp_limit: float, seconds: float
) -> HostReport:
    """Fills ``report``, which says what machine this is, with a row for each number of tokens and mode."""
    layer = Layer.random(shape, clamp_limit=clamp_limit, device=report.device)
    report.dtype, report.shape = dtype_name(dtype), shape._asdict()
    for count in tokens:
        report.rows += measure_host(layer, count, dtype=dtype, seconds=seconds / len(_MODES))
    return report


def _seconds_per_call(run: Callable[[], object], synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(_CALLS):
        run()
    elapsed = time.perf_counter() - start
    synchronize()
    return elapsed / _CALLS


def _ratio(values: Sequence[float], to: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, to, strict=True))
