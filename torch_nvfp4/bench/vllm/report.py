"""What the runs of both sides say together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["OURS", "THEIRS", "ratios", "table"]

OURS, THEIRS = "plug-in", "vLLM"


def _best(run: Mapping[str, Any], kind: str, size: str) -> float:
    return float(min(run[kind][size]))


def ratios(pairs: Sequence[Mapping[str, Mapping[str, Any]]], kind: str, size: str) -> dict[str, Any]:
    """Of the pairs that count: the seconds of both (medians of each process' best) and the ratio, median and range.

    A pair has one run per side, {OURS: run, THEIRS: run}.
    """
    ours = [_best(pair[OURS], kind, size) for pair in pairs]
    theirs = [_best(pair[THEIRS], kind, size) for pair in pairs]
    each = [their / our for our, their in zip(ours, theirs, strict=True)]
    return {
        "kind": kind,
        "size": size,
        OURS: statistics.median(ours),
        THEIRS: statistics.median(theirs),
        "ratio": statistics.median(each),
        "ratios": each,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row of ``ratios``, milliseconds."""
    what = {
        "layer": ("layer, {} tokens", 4),
        "decode": ("decode step, batch {}", 3),
        "prefill": ("prefill, {} tokens", 2),
    }
    lines = [f"{'':26}{OURS + ' ms':>12}{THEIRS + ' ms':>12}{'ratio':>8}  ratios of the pairs"]
    for row in rows:
        text, digits = what[row["kind"]]
        lines.append(
            f"{text.format(row['size']):26}{row[OURS] * 1e3:12.{digits}f}{row[THEIRS] * 1e3:12.{digits}f}"
            f"{row['ratio']:8.3f}  {' '.join(f'{ratio:.3f}' for ratio in row['ratios'])}"
        )
    return "\n".join(lines)
