"""What a run found: JSON, its title and caption, a plot."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch_nvfp4.bench.layer import OURS, BenchError, Shape


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
    matmul_dtype: str = "bf16"  # what was multiplied at matmul_rate: on the CPU torch's fastest
    extra_bytes: int | None = None  # peak of a call's memory, its output included; None where it cannot be measured
    kernels: dict[str, float] = field(default_factory=dict)  # CUDA kernel name -> seconds a call
    errors: dict[str, float] = field(default_factory=dict)  # relative L2 against fp64, where it was asked for

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
    skew: float = 0.0
    input_quant: str | None = None

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
    skew = f", skew {report.skew:g}" if report.skew > 0 else ""
    return (
        f"MoE layer E={shape.experts} K={shape.hidden} I={shape.intermediate} top-k {shape.top_k}, {report.dtype} "
        f"activations, clamp {report.clamp_limit:g}{skew}; {report.machine}{threads}"
    )


def caption(report: Report) -> str:
    """How to read the table, with the rates that the floor comes from."""
    read, matmul = ([getattr(row, name) for row in report.rows] for name in ("read_rate", "matmul_rate"))
    rates = f"{_span([rate * 1e-9 for rate in read])} GB/s, {_span([rate * 1e-9 for rate in matmul])} GFLOP/s"
    if report.device == "cuda":
        errors = [row.errors[OURS] for row in report.rows if row.errors]
        of_fp8 = f" error: relative L2 against fp64 of the same weights; {OURS} {_span(errors)}." if errors else ""
        floor = f"floor: the larger of bytes of the experts hit and operations over {rates}."
        return f"{floor} A call in a CUDA graph.{of_fp8}"
    return (
        f"floor: the larger of bytes of the experts hit over the read bandwidth and operations over the rate of "
        f"torch's fastest matmul ({report.rows[0].matmul_dtype}), measured in the same rounds ({rates}). x: time of "
        f"the other over ours. Medians over "
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
