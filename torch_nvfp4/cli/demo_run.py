"""Runs the layers of a checkpoint eager, compiled and from a CUDA graph; checks and times every one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from torch_nvfp4 import bench, reference
from torch_nvfp4.checkpoint import Checkpoint, ExpertWeights
from torch_nvfp4.cli.terminal import progress_bar
from torch_nvfp4.format import NVFP4Weight, dequantize
from torch_nvfp4.gate import Gate
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.verify import relative_error

_Model = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class ExpertLayers(nn.Module):
    """The MoE layers of a model one after the other, each behind a residual connection and a norm.

    Returns what each layer's experts took and gave, [layers, M, K] both, so that each can be checked on its own input.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
        inputs, outputs = [], []
        for experts in self.experts:
            inputs.append(F.rms_norm(x, x.shape[-1:]))
            outputs.append(experts(inputs[-1], topk_weights, topk_ids))
            x = x + outputs[-1]
        return torch.stack(inputs), torch.stack(outputs)


class DequantizeExperts(nn.Module):
    """The baseline of ``demo``: ``bench.dequantize_then_matmul`` as a layer."""

    def __init__(self, weights: ExpertWeights, gate: Gate) -> None:
        super().__init__()
        self.weights, self.gate = weights, gate

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return bench.dequantize_then_matmul(bench.Case(x, topk_weights, topk_ids), *self.weights, **self.gate.kwargs())


@dataclass
class DemoRow:
    """One way to run the layers at one number of tokens. Times are seconds a layer, medians."""

    tokens: int
    mode: str
    seconds: float
    dequantize_seconds: float
    touched_bytes: int  # of NVFP4 weights, a layer
    clamped_share: float = 0.0  # mean over the layers
    relative_l2: float = 0.0  # the largest of the layers

    def to_json(self) -> dict[str, Any]:
        finite = self.relative_l2 if math.isfinite(self.relative_l2) else None
        return asdict(self) | {"relative_l2": finite}


def run_demo(
    checkpoint: Checkpoint,
    layers: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
    tokens: Sequence[int],
    console: Console,
) -> list[DemoRow]:
    """Loads the layers, runs them eager, compiled and (CUDA) replayed from a graph, times and checks every one."""
    shape = bench.Shape(checkpoint.num_experts, checkpoint.hidden_size, checkpoint.intermediate_size, checkpoint.top_k)
    gates = [checkpoint.gate(layer) for layer in layers]
    with progress_bar(console) as progress, torch.inference_mode():
        task = progress.add_task("loading", total=len(layers))
        experts, weights = [], []
        for layer in layers:
            progress.update(task, description=f"loading layer {layer}")
            experts.append(NVFP4Experts.from_checkpoint(checkpoint, layer, device=device, backend=backend))
            loaded = checkpoint.experts(layer)
            weights.append(ExpertWeights(*(NVFP4Weight(*(part.to(device) for part in weight)) for weight in loaded)))
            progress.advance(task)
        cases = [next(bench.cases(shape, count, device=device)) for count in tokens]
        cases = [case._replace(hidden_states=case.hidden_states.to(dtype)) for case in cases]
        model = ExpertLayers(experts)
        modes: dict[str, _Model] = {
            "eager": model,
            "compiled": torch.compile(model, fullgraph=True, dynamic=True),
        }
        baseline = ExpertLayers([DequantizeExperts(*pair) for pair in zip(weights, gates, strict=True)])
        task = progress.add_task("compiling and timing", total=len(tokens))
        results: list[tuple[DemoRow, Tensor, Tensor]] = []
        for case in cases:
            progress.update(task, description=f"compiling and timing M = {case.hidden_states.shape[0]}")
            results += _time_modes(modes, baseline, case, shape, len(layers), device)
            progress.advance(task)
        task = progress.add_task("checking", total=len(layers))
        for index, gate in enumerate(gates):
            progress.update(task, description=f"checking layer {layers[index]} against fp64")
            dense = _dense_if_small(weights[index])
            by_tokens = {case.hidden_states.shape[0]: case for case in cases}
            for row, inputs, outputs in results:
                case = by_tokens[row.tokens]._replace(hidden_states=inputs[index])
                expected = reference.moe_with_clamped_share(
                    case.hidden_states, *dense, case.topk_weights, case.topk_ids, **gate.kwargs()
                )
                row.clamped_share += expected.clamped_share / len(layers)
                row.relative_l2 = max(row.relative_l2, relative_error(outputs[index], expected.output))
            progress.advance(task)
    return [row for row, _, _ in results]


def _dense_if_small(weights: ExpertWeights) -> tuple[reference.Weight, reference.Weight]:
    """In fp64 once for all checks of the layer, where that takes less than 2 GiB."""
    values = sum(2 * weight.data.numel() for weight in weights)
    if 8 * values > 2**31:
        return weights
    return dequantize(weights.w13, torch.float64), dequantize(weights.w2, torch.float64)


def _time_modes(
    modes: dict[str, _Model],
    baseline: _Model,
    case: bench.Case,
    shape: bench.Shape,
    layers: int,
    device: torch.device,
) -> list[tuple[DemoRow, Tensor, Tensor]]:
    """A row, the inputs and the outputs of the layers for every mode, timed in turns."""
    runs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        name: lambda model=model: model(*case)  # type: ignore[misc]
        for name, model in modes.items()
    }
    results = {name: run() for name, run in runs.items()}
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = runs["eager"]()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return captured

        runs["CUDA graph"] = replay
        # A copy: the tensors that a graph writes belong to its memory pool.
        inputs, outputs = replay()
        results["CUDA graph"] = (inputs.clone(), outputs.clone())
    clock = bench.event_seconds if device.type == "cuda" else bench.wall_seconds
    times: dict[str, list[float]] = {name: [] for name in runs}
    baseline_times = [clock(lambda: baseline(*case)) for _ in range(2)]
    started = time.perf_counter()
    while len(times["eager"]) < 5 or (len(times["eager"]) < 50 and time.perf_counter() - started < 0.5):
        for name, run in runs.items():
            times[name].append(clock(run))
    touched = shape.touched_bytes(case.topk_ids)
    return [
        (
            DemoRow(
                case.hidden_states.shape[0],
                name,
                statistics.median(values) / layers,
                min(baseline_times) / layers,
                touched,
            ),
            *results[name],
        )
        for name, values in times.items()
    ]
