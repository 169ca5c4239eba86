"""How numbers read in every table and message."""

from __future__ import annotations

import math
from collections.abc import Iterable


def size(nbytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1, with one or two decimals."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while unit + 1 < len(units) and nbytes >= 1024:
        nbytes, unit = nbytes / 1024, unit + 1
    return f"{nbytes:.{(0, 1, 1, 2, 2)[unit]}f} {units[unit]}"


def count(number: int, noun: str = "") -> str:
    """``12,345 layers``; the noun is the singular."""
    return f"{number:,}" + (f" {noun}{'s' * (number != 1)}" if noun else "")


def share(part: float) -> str:
    """A share of 0..1 in percent."""
    return f"{part:.1%}"


def error(relative_l2: float) -> str:
    return f"{relative_l2:.2e}"


def significant(value: float) -> str:
    """Three significant digits without an exponent."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def spans(numbers: Iterable[int], most: int = 20) -> str:
    """``0..3, 7`` for 0, 1, 2, 3, 7; after ``most`` runs only how many follow."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a}..{b}" for a, b in runs[:most]]
    rest = sum(b - a + 1 for a, b in runs[most:])
    return ", ".join(texts) + (f" and {rest:,} more" if rest else "")
