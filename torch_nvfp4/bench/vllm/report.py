"""What the runs of both sides say together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FIRST_TOKEN", "OURS", "RATE", "THEIRS", "chat_table", "ratios", "table"]

OURS, THEIRS = "plug-in", "vLLM"
FIRST_TOKEN, RATE = "time to first token", "tokens per second"
"""Of chat completions: seconds, and tokens of all requests over the time from the first question to the last token."""


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


def chat_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row of ``chat.chat_rows``; a side that has not run is a dash."""
    lines = [f"{'':40}{OURS:>10}{THEIRS:>10}{'ratio':>8}"]
    for row in rows:
        first = row["kind"] == FIRST_TOKEN
        name = f"{row['kind']}, {row['requests']} at once" + (", ms" if first else "")
        values = [row[side] if row[side] is None or not first else row[side] * 1e3 for side in (OURS, THEIRS)]
        cells = [f"{'-':>10}" if value is None else f"{value:10.1f}" for value in values]
        ratio = f"{'-':>8}" if row["ratio"] is None else f"{row['ratio']:8.3f}"
        lines.append(f"{name:40}{''.join(cells)}{ratio}")
    return "\n".join(lines)
