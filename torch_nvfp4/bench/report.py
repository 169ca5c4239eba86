"""What a run found: JSON, a table of at most 120 columns, a plot."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from torch_nvfp4.bench.layer import COMPILED, DEQUANTIZE, OURS, BenchError, Shape

_MIB = 2**20


@dataclass
class Row:
    """One number of tokens. Times are seconds a call, medians over the rounds; ratios are medians within a round."""

    tokens: int
    experts_hit: float  # mean over the routings
    touched_bytes: float
    flop: int
    rounds: int
    read_rate: float  # bytes a second
    matmul_rate: float  # operations a second
    read_seconds: float  # touched_bytes / read_rate
    compute_seconds: float  # flop / matmul_rate
    seconds: dict[str, float]
    over_read: float
    over_floor: float
    speedup: dict[str, float]  # over each other contender
    extra_bytes: int | None = None  # peak of a call's memory, its output included; None where it cannot be measured
    kernels: dict[str, float] = field(default_factory=dict)  # CUDA kernel name -> seconds a call

    @property
    def floor_seconds(self) -> float:
        return max(self.read_seconds, self.compute_seconds)

    def best(self, prefix: str) -> str | None:
        """The fastest contender whose name starts with ``prefix``."""
        names = [name for name in self.seconds if name.startswith(prefix)]
        return min(names, key=lambda name: self.seconds[name], default=None)


@dataclass
class Report:
    """A whole run."""

    device: str
    machine: str
    threads: int
    date: str
    versions: dict[str, str]
    shape: dict[str, int]
    dtype: str
    clamp_limit: float
    rows: list[Row] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        report = asdict(self)
        for row, out in zip(self.rows, report["rows"], strict=True):
            out["floor_seconds"] = row.floor_seconds
        return report


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def title(report: Report) -> str:
    shape = Shape(**report.shape)
    threads = f", {report.threads} threads" if report.device == "cpu" else ""
    return (
        f"MoE layer E={shape.experts} K={shape.hidden} I={shape.intermediate} top-k {shape.top_k}, {report.dtype} "
        f"activations, clamp {report.clamp_limit:g}; {report.machine}{threads}"
    )


def render(report: Report) -> Table:
    """The table of a report, at most 120 columns wide."""
    return _cuda_table(report) if report.device == "cuda" else _cpu_table(report)


def _table(columns: Sequence[str]) -> Table:
    table = Table(pad_edge=False, box=None, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cpu_table(report: Report) -> Table:
    peers = list(report.rows[0].speedup)
    halves = {name: name.replace(" ", "\n") for name in peers} | {DEQUANTIZE: "dequan-\ntize"}
    columns = ["M", "experts\nhit", "time\nms", "floor\nms", "time /\nfloor", "time /\nread", "GB/s"]
    best = [name for name in peers if name not in (DEQUANTIZE, *COMPILED)]
    table = _table(
        [*columns, *(halves[name] for name in peers), *(["best\n16-bit"] if best else []), "extra\nMiB"],
    )
    for row in report.rows:
        seconds = row.seconds[OURS]
        table.add_row(
            f"{row.tokens}",
            f"{row.experts_hit:.4g}",
            _significant(seconds * 1e3),
            _significant(row.floor_seconds * 1e3),
            f"{row.over_floor:.2f}",
            f"{row.over_read:.2f}",
            _significant(row.touched_bytes / seconds * 1e-9),
            *(_ratio(row.speedup[name]) for name in peers),
            *([_ratio(min(row.speedup[name] for name in best))] if best else []),
            "-" if row.extra_bytes is None else f"{row.extra_bytes / _MIB:.1f}",
        )
    return table


def _cuda_table(report: Report) -> Table:
    peers = list(report.rows[0].speedup)
    stacked = [name.replace(" ", "\n") for name in peers]
    table = _table(
        ["M", "experts\nhit", "time\nµs", "floor\nµs", "time /\nfloor", "TB/s", "TFLOP/s"]
        + [text for name in stacked for text in (f"{name}\nµs", f"{name}\n/ ours")]
        + ["extra\nMiB"],
    )
    for row in report.rows:
        seconds = row.seconds[OURS]
        table.add_row(
            f"{row.tokens}",
            f"{row.experts_hit:.4g}",
            _significant(seconds * 1e6),
            _significant(row.floor_seconds * 1e6),
            f"{row.over_floor:.2f}",
            f"{row.touched_bytes / seconds * 1e-12:.2f}",
            _significant(row.flop / seconds * 1e-12),
            *(text for name in peers for text in (_significant(row.seconds[name] * 1e6), f"{row.speedup[name]:.2f}x")),
            "-" if row.extra_bytes is None else f"{row.extra_bytes / _MIB:.1f}",
        )
    return table


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x"


def _significant(value: float) -> str:
    """Three significant digits without an exponent."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def caption(report: Report) -> str:
    """How to read the table, with the rates that the floor comes from."""
    read, matmul = ([getattr(row, name) for row in report.rows] for name in ("read_rate", "matmul_rate"))
    rates = f"{_span([rate * 1e-9 for rate in read])} GB/s, {_span([rate * 1e-9 for rate in matmul])} GFLOP/s"
    if report.device == "cuda":
        return f"floor: the larger of bytes of the experts hit and operations over {rates}. A call in a CUDA graph."
    return (
        f"floor: the larger of bytes of the experts hit over the read bandwidth and operations over the bf16 matmul "
        f"rate, measured in the same rounds ({rates}). x: time of the other over ours. Medians over "
        f"{_span([row.rounds for row in report.rows])} rounds with different routings."
    )


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}..{high}"


def plot(report: Report, file: Path) -> None:
    """Time over M for every contender and the floor. Raises BenchError when matplotlib is not there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise BenchError(f"--plot: expected matplotlib, got: {error}; pip install 'torch-nvfp4[bench]'") from error
    unit, scale = ("µs", 1e6) if report.device == "cuda" else ("ms", 1e3)
    tokens = [row.tokens for row in report.rows]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in report.rows[0].seconds:
        width = 2.5 if name == OURS else 1.2
        axes.plot(
            tokens,
            [row.seconds[name] * scale for row in report.rows],
            marker="o",
            markersize=4,
            label=name,
            linewidth=width,
        )
    axes.plot(tokens, [row.floor_seconds * scale for row in report.rows], "k--", linewidth=1, label="floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"{unit} a call")
    axes.set_title(title(report), fontsize=8)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def wide_console() -> Console:
    """Standard output, 120 columns wide where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
