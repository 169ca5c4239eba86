"""The table of a benchmark's report, at most 120 columns wide."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from torch_nvfp4.bench import COMPILED, DEQUANTIZE, OURS, Report

_MIB = 2**20


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
