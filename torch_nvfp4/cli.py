"""The command ``torch-nvfp4``: info, inspect, verify, bench, demo.

Exit codes: 0, 1 for a check that failed, 2 for a request or a checkpoint that cannot be used (one line on stderr).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from torch_nvfp4 import bench, reference
from torch_nvfp4._version import __version__
from torch_nvfp4.backends import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    Libraries,
    MoEBackendConfig,
    explain_moe_backends,
    select_moe_backend,
)
from torch_nvfp4.checkpoint import Checkpoint, CheckpointError, ExpertWeights, GateActivation
from torch_nvfp4.demo import write_checkpoint
from torch_nvfp4.format import NVFP4Weight, dequantize
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.ops import library_paths
from torch_nvfp4.quant_config import MoEQuantConfig
from torch_nvfp4.testing import TOLERANCE, random_routing, relative_l2

DEMO_TOKENS = (1, 16, 256)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_EXAMPLE_LIMIT = 10.0  # DeepSeek-V4's

app = typer.Typer(
    help="NVFP4 mixture-of-experts layers with the SwiGLU clamp: what runs here, is it right, how fast is it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("bench")(bench.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torch-nvfp4 {__version__}")
        raise typer.Exit


@app.callback()
def _options(_: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False) -> None:
    pass


_Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint directory.", show_default=False)]
_Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default cuda where its kernels can run.")]
_Backend = Annotated[str, typer.Option(help="A backend by name instead of the automatic choice.")]
_Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout.")]


def _write_json(file: Path | None, content: dict[str, Any]) -> None:
    if file is None:
        return
    text = json.dumps(content, indent=2) + "\n"
    if str(file) == "-":
        sys.stdout.write(text)
    else:
        file.write_text(text)


def _console(json_file: Path | None = None) -> Console:
    """Where tables go: stdout, or stderr when stdout holds the JSON."""
    if json_file is not None and str(json_file) == "-":
        return Console(stderr=True)
    return bench.wide_console()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _table(*columns: str, left: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def _parse_device(text: str) -> torch.device:
    """``text``, or, when it is empty, cuda where the CUDA kernels are built and can run, else cpu."""
    if not text:
        usable = torch.cuda.is_available() and Libraries.detect().cuda_ops
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: expected one of {torch.cuda.device_count()} CUDA devices, got {text!r}")
    return device


def _parse_dtype(text: str, device: torch.device) -> torch.dtype:
    dtypes = {name: dtype for name, dtype in _DTYPES.items() if device.type == "cpu" or dtype.itemsize == 2}
    if text not in dtypes:
        raise ValueError(f"--dtype: expected one of {', '.join(dtypes)} on {device.type}, got {text!r}")
    return dtypes[text]


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _limit(limit: float | None) -> str:
    return "none" if limit is None else f"{limit:g}"


def _gate(gate: GateActivation) -> str:
    extra = "" if (gate.alpha, gate.beta) == (1.0, 0.0) else f" (alpha {gate.alpha:g}, beta {gate.beta:g})"
    return f"{gate.activation}{extra}, " + ("no clamp" if gate.clamp_limit is None else f"clamp {gate.clamp_limit:g}")


@app.command()
def info(json_file: _Json = None) -> None:
    """Show this machine, the libraries, and which backends can run here, each with its reason if not.

    \b
    Examples:
      torch-nvfp4 info
      TORCH_NVFP4_CPU_LEVEL=avx2 torch-nvfp4 info
    """
    console = _console(json_file)
    with bench.one_line_errors("info"):
        facts = collect_info()
        _write_json(json_file, facts)
    for section in ("hardware", "libraries"):
        table = _table(section, "", left=(section, ""))
        for key, value in facts[section].items():
            table.add_row(key, str(value))
        console.print(table)
        console.print()
    table = _table("backend", "device", "no clamp", f"clamp {_EXAMPLE_LIMIT:g}", left=("backend", "device", "no clamp"))
    table.columns[-1].justify = "left"
    for entry in facts["backends"]:
        reasons = [entry["unclamped"], entry["clamped"]]
        table.add_row(
            entry["backend"], entry["device"], *("usable" if reason is None else reason for reason in reasons)
        )
    console.print(table)


def collect_info() -> dict[str, Any]:
    """What ``info`` prints: hardware, libraries, and every backend's reason (None: usable) on every device."""
    hardware: dict[str, Any] = {
        "CPU": f"{bench.cpu_name()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads",
        "CPU instruction level": _cpu_level(),
    }
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        hardware[f"GPU {index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{_mib(properties.total_memory)}"
        )
        devices.append(torch.device("cuda", index))
    if len(devices) == 1:
        hardware["GPU"] = "none" if torch.version.cuda else "none (this torch is built without CUDA)"
    libraries: dict[str, Any] = {
        "torch_nvfp4": __version__,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "ops": ", ".join(library_paths()),
    }
    for package in ("safetensors", "transformers", "flashinfer-python", "vllm", "matplotlib"):
        libraries[package] = _version(package) or "not installed"
    backends = []
    for device in devices:
        reasons = [
            explain_moe_backends(MoEBackendConfig.for_device(device, 4096, 2048, clamp_limit=limit))
            for limit in (None, _EXAMPLE_LIMIT)
        ]
        backends += [
            {"backend": b.name, "device": str(device), "unclamped": reasons[0][b.name], "clamped": reasons[1][b.name]}
            for b in BACKENDS
        ]
    return {"hardware": hardware, "libraries": libraries, "backends": backends}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_level() -> str:
    """The level that the CPU kernels run at, and why."""
    try:
        detect = ctypes.CDLL(library_paths()[0]).nvfp4_cpu_detected_level
        detect.restype = ctypes.c_char_p
        detected = detect().decode()
    except (OSError, AttributeError):
        detected = "unknown"
    wanted = os.environ.get(bench.CPU_LEVEL_VARIABLE)
    if wanted:
        return f"{wanted}, asked for by {bench.CPU_LEVEL_VARIABLE}; this processor and build can {detected}"
    return f"{detected}, the highest of this processor and build ({bench.CPU_LEVEL_VARIABLE} is not set)"


@app.command()
def inspect(checkpoint: _Checkpoint, device: _Device = "", backend: _Backend = "", json_file: _Json = None) -> None:
    """Show what a checkpoint holds and which backend would run its experts here. Reads headers only.

    \b
    Examples:
      torch-nvfp4 inspect DeepSeek-V4-Flash-NVFP4
      torch-nvfp4 inspect DeepSeek-V4-Flash-NVFP4 --device cuda --json -
    """
    console = _console(json_file)
    with bench.one_line_errors("inspect"):
        facts = collect_checkpoint(Checkpoint.open(checkpoint), _parse_device(device), backend or None)
        _write_json(json_file, facts)
    _print_checkpoint(console, facts)


def collect_checkpoint(checkpoint: Checkpoint, device: torch.device, backend: str | None = None) -> dict[str, Any]:
    """What ``inspect`` prints. Raises ValueError, NotImplementedError as ``select_moe_backend``."""
    summary = asdict(checkpoint.summary())
    summary["path"] = str(checkpoint.path)
    gates: dict[str, list[int]] = {}
    for layer in checkpoint.layers:
        gates.setdefault(_gate(checkpoint.activation(layer)), []).append(layer)
    summary["gates"] = [{"gate": gate, "layers": layers} for gate, layers in gates.items()]
    summary["device"] = str(device)
    summary["backend"], summary["passed_over"] = None, {}
    if checkpoint.layers:
        config = _backend_config(checkpoint, checkpoint.layers[0], device)
        chosen = select_moe_backend(config, backend)
        summary["backend"] = chosen.name
        explicit = backend is not None or bool(os.environ.get(ENVIRONMENT_VARIABLE))
        summary["asked_for"] = explicit
        for name, reason in explain_moe_backends(config).items():
            if name == chosen.name:
                break
            summary["passed_over"][name] = reason or "usable, but another one was asked for"
    return summary


def _backend_config(checkpoint: Checkpoint, layer: int, device: torch.device) -> MoEBackendConfig:
    gate = MoEQuantConfig.from_config(checkpoint.config, layer, source=checkpoint.path / "config.json")
    return MoEBackendConfig.for_device(
        device,
        checkpoint.hidden_size,
        checkpoint.intermediate_size,
        activation=gate.activation,
        clamp_limit=gate.gemm1_clamp_limit,
        alpha=gate.gemm1_alpha,
        beta=gate.gemm1_beta,
    )


def _print_checkpoint(console: Console, facts: dict[str, Any]) -> None:
    table = _table("checkpoint", "", left=("checkpoint", ""))
    declared = ", ".join(str(facts[key]) for key in ("quant_method", "quant_algo") if facts[key]) or "nothing"
    table.add_row("path", f"{facts['path']} ({facts['shards']} shards, {_mib(facts['nbytes'])})")
    table.add_row("model", f"{facts['model_type'] or 'undeclared'}, config declares {declared}")
    table.add_row("layout", facts["layout"] or "no NVFP4 tensors")
    if facts["layers"]:
        table.add_row(
            "MoE layers",
            f"{len(facts['layers'])} ({_spans(facts['layers'])}): {facts['num_experts']} experts, "
            f"top-k {facts['top_k'] or 'undeclared'}, hidden {facts['hidden_size']}, "
            f"intermediate {facts['intermediate_size']}",
        )
        for entry in facts["gates"]:
            table.add_row("gate", f"{entry['gate']} (layers {_spans(entry['layers'])})")
    console.print(table)
    console.print()
    table = _table("stored as", "modules", "tensors", "size", "first", left=("stored as", "first"))
    for category in facts["categories"]:
        sizes = (str(category["modules"]), str(category["tensors"]), _mib(category["nbytes"]))
        table.add_row(category["name"], *sizes, category["example"])
    console.print(table)
    console.print()
    for text in _backend_lines(facts):
        _line(console, text)


def _backend_lines(facts: dict[str, Any]) -> list[str]:
    if facts["backend"] is None:
        return ["no NVFP4 experts: no backend is needed"]
    why = "as asked for" if facts["asked_for"] else "the first in order that can"
    lines = [f"backend on {facts['device']}: {facts['backend']} ({why})"]
    return lines + [f"  not {name}: {reason}" for name, reason in facts["passed_over"].items()]


def _spans(layers: Sequence[int]) -> str:
    """0..3, 7 for (0, 1, 2, 3, 7)."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in spans)


@dataclass(frozen=True)
class LayerCheck:
    """One layer's kernel against the fp64 reference. ``error`` is infinite where NaN or infinity stand elsewhere."""

    layer: int
    backend: str
    gate: str
    clamped_share: float
    relative_l2: float
    tolerance: float
    experts_hit: int
    seconds: float

    @property
    def passed(self) -> bool:
        return self.relative_l2 <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        # JSON has no infinity.
        finite = self.relative_l2 if math.isfinite(self.relative_l2) else None
        return asdict(self) | {"relative_l2": finite, "passed": self.passed}


@app.command()
def verify(
    checkpoint: _Checkpoint,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; repeatable.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Random tokens, each routed to top-k random experts.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the activations: bf16, fp16, on the CPU also fp32.")] = "bf16",
    device: _Device = "",
    backend: _Backend = "",
    seed: Annotated[int, typer.Option(help="Of the random tokens and routings.")] = 0,
    json_file: _Json = None,
) -> None:
    """Check the kernel against an fp64 reference on the checkpoint's own weights. Exit code 1 if a layer fails.

    \b
    Examples:
      torch-nvfp4 verify DeepSeek-V4-Flash-NVFP4 --layer 3
      torch-nvfp4 verify DeepSeek-V4-Flash-NVFP4 --tokens 64 --dtype fp16 --json checks.json
    """
    console = _console(json_file)
    with bench.one_line_errors("verify"):
        opened = Checkpoint.open(checkpoint)
        where = _parse_device(device)
        activations = _parse_dtype(dtype, where)
        layers = opened.layers if layer is None else tuple(layer)
        if not layers:
            raise CheckpointError(f"{checkpoint}: expected a checkpoint with NVFP4 experts, got none in its headers")
        checks = []
        with _progress(Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(layers))
            for index in layers:
                progress.update(task, description=f"layer {index}")
                check = verify_layer(
                    opened, index, tokens=tokens, dtype=activations, device=where, backend=backend or None, seed=seed
                )
                checks.append(check)
                progress.advance(task)
        _write_json(
            json_file,
            {
                "checkpoint": str(checkpoint), "device": str(where), "dtype": dtype, "tokens": tokens, "seed": seed,
                "passed": all(check.passed for check in checks),
                "layers": [check.to_json() for check in checks],
            },
        )  # fmt: skip
    table = _table(
        "layer", "backend", "gate", "experts", "clamped", "rel. L2", "tolerance", "", left=("backend", "gate")
    )
    for check in checks:
        table.add_row(
            str(check.layer),
            check.backend,
            check.gate,
            str(check.experts_hit),
            f"{check.clamped_share:.1%}",
            f"{check.relative_l2:.2e}",
            f"{check.tolerance:.0e}",
            "ok" if check.passed else "FAILED",
            style=None if check.passed else "red",
        )
    console.print(table)
    failed = [check.layer for check in checks if not check.passed]
    if failed:
        bench.fail("verify", f"{len(failed)} of {len(checks)} layers above the tolerance: {_spans(failed)}")
        raise typer.Exit(1)
    _line(console, f"verify passed: {len(checks)} layers within {checks[0].tolerance:g} of the fp64 reference", "green")


def verify_layer(
    checkpoint: Checkpoint,
    layer: int,
    *,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
    seed: int = 0,
) -> LayerCheck:
    """Loads a layer the way a model does, runs it on random tokens and compares with the reference in fp64."""
    started = time.perf_counter()
    experts = NVFP4Experts.from_checkpoint(checkpoint, layer, device=device, backend=backend)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, checkpoint.hidden_size, generator=generator).to(device, dtype)
    topk_weights, topk_ids = random_routing(
        tokens, checkpoint.num_experts, checkpoint.top_k, generator=generator, device=device
    )
    with torch.inference_mode():
        output = experts(x, topk_weights, topk_ids)
        ran_on = experts.backend
        del experts  # the reference needs the memory
        weights = checkpoint.experts(layer)
        gate = checkpoint.activation(layer)
        expected = _reference(weights, gate, bench.Case(x, topk_weights, topk_ids))
    return LayerCheck(
        layer=layer,
        backend=ran_on,
        gate=_gate(gate),
        clamped_share=expected.clamped_share,
        relative_l2=_error(output, expected.output),
        tolerance=TOLERANCE[dtype],
        experts_hit=int(topk_ids.unique().numel()),
        seconds=time.perf_counter() - started,
    )


def _reference(weights: ExpertWeights, gate: GateActivation, case: bench.Case) -> reference.MoEResult:
    device = case.hidden_states.device
    w13, w2 = (NVFP4Weight(*(part.to(device) for part in weight)) for weight in weights)
    return reference.moe_with_clamped_share(
        case.hidden_states, w13, w2, case.topk_weights, case.topk_ids, **gate._asdict()
    )


def _error(output: Tensor, expected: Tensor) -> float:
    try:
        return relative_l2(output, expected)
    except AssertionError:
        return float("inf")


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

    def __init__(self, weights: ExpertWeights, gate: GateActivation) -> None:
        super().__init__()
        self.weights, self.gate = weights, gate

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return bench.dequantize_then_matmul(bench.Case(x, topk_weights, topk_ids), *self.weights, **self.gate._asdict())


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


@app.command()
def demo(
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Your own checkpoint instead of a written one.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the checkpoint here and keep it.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Run at most so many MoE layers.")] = 4,
    dtype: Annotated[str, typer.Option(help="Of the activations: bf16, fp16, on the CPU also fp32.")] = "bf16",
    device: _Device = "",
    backend: _Backend = "",
    json_file: _Json = None,
) -> None:
    """The whole way: write a checkpoint in DeepSeek-V4-Flash's layout, load it, check it, compile it, time it.

    Exit code 1 if a layer's error is above the tolerance.

    \b
    Examples:
      torch-nvfp4 demo
      torch-nvfp4 demo --keep /tmp/tiny-dsv4
      torch-nvfp4 demo --checkpoint DeepSeek-V4-Flash-NVFP4 --layers 1
    """
    console = _console(json_file)
    started = time.perf_counter()
    with bench.one_line_errors("demo"), tempfile.TemporaryDirectory(prefix="torch-nvfp4-demo-") as scratch:
        if checkpoint is not None and keep is not None:
            raise ValueError("expected --checkpoint or --keep, got both")
        where = _parse_device(device)
        activations = _parse_dtype(dtype, where)
        if checkpoint is None:
            checkpoint = keep or Path(scratch)
            with console.status("writing a checkpoint in the layout of DeepSeek-V4-Flash-NVFP4"):
                write_checkpoint(checkpoint)
            _line(
                console,
                f"wrote a checkpoint with random weights in the layout of DeepSeek-V4-Flash-NVFP4: {checkpoint}",
            )
        opened = Checkpoint.open(checkpoint)
        if not opened.layers:
            raise CheckpointError(f"{checkpoint}: expected a checkpoint with NVFP4 experts, got none in its headers")
        facts = collect_checkpoint(opened, where, backend or None)
        console.print()
        _print_checkpoint(console, facts)
        console.print()
        rows = run_demo(
            opened, opened.layers[:layers], dtype=activations, device=where, backend=backend or None,
            tokens=DEMO_TOKENS, console=console,
        )  # fmt: skip
        tolerance = TOLERANCE[activations]
        _write_json(json_file, {"checkpoint": facts, "tolerance": tolerance, "rows": [row.to_json() for row in rows]})
    count = min(layers, len(opened.layers))
    _line(console, f"{count} layers, {dtype} activations, times a layer, on {_device_name(where)}:", "bold")
    table = _table(
        "M", "mode", "rel. L2", "clamped", "ms", "dequantize, then matmul", "speed-up", "GB/s", left=("mode",)
    )
    for row in rows:
        table.add_row(
            str(row.tokens),
            row.mode,
            f"{row.relative_l2:.2e}",
            f"{row.clamped_share:.1%}",
            f"{row.seconds * 1e3:.3f}",
            f"{row.dequantize_seconds * 1e3:.1f} ms",
            f"{row.dequantize_seconds / row.seconds:.1f}x",
            f"{row.touched_bytes / row.seconds * 1e-9:.1f}",
            style=None if row.relative_l2 <= tolerance else "red",
        )
    console.print(table)
    _line(console, "rel. L2: largest error of a layer against fp64; GB/s: NVFP4 bytes of the experts hit over the time")
    worst = max(row.relative_l2 for row in rows)
    seconds = time.perf_counter() - started
    if not worst <= tolerance:
        bench.fail("demo", f"the largest error of a layer is {worst:.2e}, expected at most {tolerance:g}")
        raise typer.Exit(1)
    _line(
        console,
        f"demo passed: {count} layers, eager and compiled, within {tolerance:g} of fp64 "
        f"(largest error {worst:.1e}), in {seconds:.0f} s",
        "green",
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else bench.cpu_name()


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
    gates = [checkpoint.activation(layer) for layer in layers]
    with _progress(console) as progress, torch.inference_mode():
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
                    case.hidden_states, *dense, case.topk_weights, case.topk_ids, **gate._asdict()
                )
                row.clamped_share += expected.clamped_share / len(layers)
                row.relative_l2 = max(row.relative_l2, _error(outputs[index], expected.output))
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


if __name__ == "__main__":
    app()
