"""The table of a benchmark's report, at most 120 columns wide."""

from __future__ import annotations

from typing import NamedTuple

from torch_nvfp4.bench import COMPILED, DEQUANTIZE, FP8, GGML, OURS, HostReport, Report
from torch_nvfp4.cli.wording import error, significant

_MIB = 2**20


class BenchTable(NamedTuple):
    """Titles, which may have several lines, and rows of as many cells."""

    columns: list[str]
    rows: list[list[str]]


def bench_table(report: Report) -> BenchTable:
    """The report as text."""
    return _cuda_table(report) if report.device == "cuda" else _cpu_table(report)


def _cpu_table(report: Report) -> BenchTable:
    peers = list(report.rows[0].speedup)
    halves = {name: name.replace(" ", "\n") for name in peers} | {DEQUANTIZE: "dequan-\ntize"}
    columns = ["M", "experts\nhit", "time\nms", "floor\nms", "time /\nfloor", "time /\nread", "GB/s"]
    best = [name for name in peers if name not in (DEQUANTIZE, GGML, *COMPILED)]
    rows = []
    for row in report.rows:
        seconds = row.seconds[OURS]
        rows.append(
            [
                f"{row.tokens}",
                f"{row.experts_hit:.4g}",
                significant(seconds * 1e3),
                significant(row.floor_seconds * 1e3),
                f"{row.over_floor:.2f}",
                f"{row.over_read:.2f}",
                significant(row.touched_bytes / seconds * 1e-9),
                *(_ratio(row.speedup[name]) for name in peers),
                *([_ratio(min(row.speedup[name] for name in best))] if best else []),
                _mib(row.extra_bytes),
            ]
        )
    titles = [*columns, *(halves[name] for name in peers), *(["best\n16-bit"] if best else []), "extra\nMiB"]
    return BenchTable(titles, rows)


def _cuda_table(report: Report) -> BenchTable:
    peers = list(report.rows[0].speedup)
    stacked = [name.replace(" ", "\n") for name in peers]
    titles = [
        *["M", "experts\nhit", "time\nµs", "floor\nµs", "time /\nfloor", "TB/s", "TFLOP/s"],
        *(text for name in stacked for text in (f"{name}\nµs", f"{name}\n/ ours")),
        *([f"{FP8}\nerror"] if FP8 in peers else []),
        "extra\nMiB",
    ]
    rows = []
    for row in report.rows:
        seconds = row.seconds[OURS]
        of_peers = [(significant(row.seconds[name] * 1e6), f"{row.speedup[name]:.2f}x") for name in peers]
        rows.append(
            [
                f"{row.tokens}",
                f"{row.experts_hit:.4g}",
                significant(seconds * 1e6),
                significant(row.floor_seconds * 1e6),
                f"{row.over_floor:.2f}",
                f"{row.touched_bytes / seconds * 1e-12:.2f}",
                significant(row.flop / seconds * 1e-12),
                *(text for pair in of_peers for text in pair),
                *([error(row.errors[FP8])] if FP8 in peers else []),
                _mib(row.extra_bytes),
            ]
        )
    return BenchTable(titles, rows)


def host_table(report: HostReport) -> BenchTable:
    """Microseconds per call and ratios to aten's add; the last column is the module's time over moe's."""
    names = list(report.rows[0].seconds)
    titles = [
        "M",
        "mode",
        *(f"{name}\nµs" for name in names),
        *(f"{name}\n/ add" for name in names[1:]),
        "module\n/ moe",
    ]
    rows = [
        [
            f"{row.tokens}",
            row.mode,
            *(significant(row.seconds[name] * 1e6) for name in names),
            *(f"{row.over_add[name]:.2f}x" for name in names[1:]),
            f"{row.module_over_moe:.2f}x",
        ]
        for row in report.rows
    ]
    return BenchTable(titles, rows)


def _mib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / _MIB:.1f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x"
