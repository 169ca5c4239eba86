"""Runs the layers of a checkpoint eager, compiled and from a CUDA graph; checks and times every one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_nvfp4 import bench, reference
from torch_nvfp4.checkpoint import Checkpoint, ExpertWeights
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.format import dequantize
from torch_nvfp4.gate import Gate
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.verify import checked_top_k, relative_error

# hidden_states [M, K], and for every layer topk_weights and topk_ids, [M, top_k] both.
_Model = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]


class ExpertLayers(nn.Module):
    """The MoE layers of a model one after the other, each behind a residual connection and a norm.

    Returns what each layer's experts took and gave, [layers, M, K] both, so that each can be checked on its own input.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor, topk_weights: Sequence[Tensor], topk_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        inputs, outputs = [], []
        for experts, weights, ids in zip(self.experts, topk_weights, topk_ids, strict=True):
            inputs.append(F.rms_norm(x, x.shape[-1:]))
            outputs.append(experts(inputs[-1], weights, ids))
            x = x + outputs[-1]
        return torch.stack(inputs), torch.stack(outputs)


class DequantizeExperts(nn.Module):
    """The baseline of ``demo``: ``bench.dequantize_then_matmul`` as a layer."""

    def __init__(self, weights: ExpertWeights, gate: Gate, on_input: bool) -> None:
        super().__init__()
        self.weights, self.gate, self.on_input = weights, gate, on_input

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return bench.dequantize_then_matmul(
            bench.Case(x, topk_weights, topk_ids), self.weights.w13, self.weights.w2, **self.gate.kwargs(),
            apply_router_weight_on_input=self.on_input, w13_bias=self.weights.w13_bias, w2_bias=self.weights.w2_bias,
        )  # fmt: skip


@dataclass
class DemoRow:
    """One way to run the layers at one number of tokens. Times are seconds a layer, medians."""

    tokens: int
    mode: str
    seconds: float
    dequantize_seconds: float
    touched_bytes: int  # of NVFP4 weights, mean over the layers
    clamped_share: float | None = None  # mean over the layers; None where none of them has a limit
    relative_l2: float = 0.0  # the largest of the layers

    def to_json(self) -> dict[str, Any]:
        finite = self.relative_l2 if math.isfinite(self.relative_l2) else None
        return asdict(self) | {"relative_l2": finite}


class _Loaded(NamedTuple):
    """A layer as a model runs it, and the canonical weights of its baseline and its reference."""

    layer: int
    experts: NVFP4Experts
    weights: ExpertWeights
    gate: Gate
    on_input: bool  # where the router's weight acts
    shape: bench.Shape


class _Inputs(NamedTuple):
    """What a model takes: layers may differ in their number of experts, so that each has a routing of its own."""

    hidden_states: Tensor  # [M, K]
    topk_weights: list[Tensor]  # per layer, [M, top_k]
    topk_ids: list[Tensor]


class _Run(NamedTuple):
    """One row of the table, and what each layer took and gave in it, [layers, M, K] both."""

    row: DemoRow
    given: _Inputs
    inputs: Tensor
    outputs: Tensor


def run_demo(
    checkpoint: Checkpoint,
    layers: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
    tokens: Sequence[int],
    terminal: Terminal,
) -> list[DemoRow]:
    """Loads the layers, runs them eager, compiled and (CUDA) replayed from a graph, times and checks every one."""
    with terminal.progress() as progress, torch.inference_mode():
        progress.stage(len(layers))
        loaded = []
        for layer in layers:
            progress.begin(f"loading layer {layer}")
            loaded.append(_load(checkpoint, layer, device, backend))
            progress.advance()
        given = [_inputs(loaded, count, dtype, device) for count in tokens]
        model = ExpertLayers([part.experts for part in loaded])
        modes: dict[str, _Model] = {"eager": model, "compiled": torch.compile(model, fullgraph=True, dynamic=True)}
        baseline = ExpertLayers([DequantizeExperts(part.weights, part.gate, part.on_input) for part in loaded])
        progress.stage(len(tokens))
        runs: list[_Run] = []
        for inputs in given:
            progress.begin(f"compiling and timing M = {inputs.hidden_states.shape[0]}")
            runs += _time_modes(modes, baseline, inputs, loaded, device)
            progress.advance()
        progress.stage(len(layers))
        for index, part in enumerate(loaded):
            progress.begin(f"checking layer {part.layer} against fp64")
            _check(part, index, runs, len(layers))
            progress.advance()
    return [run.row for run in runs]


def _load(checkpoint: Checkpoint, layer: int, device: torch.device, backend: str | None) -> _Loaded:
    experts = NVFP4Experts.from_checkpoint(checkpoint, layer, device=device, backend=backend)
    weights = checkpoint.experts(layer).to(device)
    top_k = checked_top_k(checkpoint, experts.num_experts, layer)
    shape = bench.Shape(experts.num_experts, experts.hidden_size, experts.intermediate_size, top_k)
    on_input = checkpoint.apply_router_weight_on_input(layer)
    return _Loaded(layer, experts, weights, checkpoint.gate(layer), on_input, shape)


def _inputs(loaded: Sequence[_Loaded], tokens: int, dtype: torch.dtype, device: torch.device) -> _Inputs:
    cases = [next(bench.cases(part.shape, tokens, device=device)) for part in loaded]
    return _Inputs(
        cases[0].hidden_states.to(dtype), [case.topk_weights for case in cases], [case.topk_ids for case in cases]
    )


def _check(part: _Loaded, index: int, runs: Sequence[_Run], layers: int) -> None:
    """Adds the layer's error and its share of clamped values to every row."""
    dense = _dense_if_small(part.weights)
    for run in runs:
        expected = reference.moe_with_clamped_share(
            run.inputs[index], *dense, run.given.topk_weights[index], run.given.topk_ids[index], None,
            part.weights.w13_bias, part.weights.w2_bias, **part.gate.kwargs(),
            apply_router_weight_on_input=part.on_input,
        )  # fmt: skip
        if part.gate.clamp_limit is not None:
            run.row.clamped_share = (run.row.clamped_share or 0.0) + expected.clamped_share / layers
        run.row.relative_l2 = max(run.row.relative_l2, relative_error(run.outputs[index], expected.output))


def _dense_if_small(weights: ExpertWeights) -> tuple[reference.Weight, reference.Weight]:
    """In fp64 once for all checks of the layer, where that takes less than 2 GiB."""
    values = sum(2 * weight.data.numel() for weight in (weights.w13, weights.w2))
    if 8 * values > 2**31:
        return weights.w13, weights.w2
    return dequantize(weights.w13, torch.float64), dequantize(weights.w2, torch.float64)


def _time_modes(
    modes: dict[str, _Model],
    baseline: _Model,
    given: _Inputs,
    loaded: Sequence[_Loaded],
    device: torch.device,
) -> list[_Run]:
    """Every mode, timed in turns."""
    runs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        name: lambda model=model: model(*given)  # type: ignore[misc]
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
    baseline_times = [clock(lambda: baseline(*given)) for _ in range(2)]
    started = time.perf_counter()
    while len(times["eager"]) < 5 or (len(times["eager"]) < 50 and time.perf_counter() - started < 0.5):
        for name, run in runs.items():
            times[name].append(clock(run))
    layers = len(loaded)
    touched = sum(part.shape.touched_bytes(ids) for part, ids in zip(loaded, given.topk_ids, strict=True)) // layers
    return [
        _Run(
            DemoRow(
                given.hidden_states.shape[0],
                name,
                statistics.median(values) / layers,
                min(baseline_times) / layers,
                touched,
            ),
            given,
            *results[name],
        )
        for name, values in times.items()
    ]
