"""The package's own exception, and the one way in which it words a refusal.

Names, values and texts that come from a file may hold anything. What is built here is printable: a control character,
an escape code, a line break or a lone surrogate comes out as its escape, and a long value is cut.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

__all__ = ["CheckpointError", "printable", "refusal", "shown"]

_MAX_TEXT = 2000  # of an error; a name in a hostile file may have millions of characters

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxlist = _short.maxdict = _short.maxtuple = 8
_short.maxstring = _short.maxother = 160
_short.maxlong = 60


class CheckpointError(ValueError):
    """The checkpoint, or the slice asked of it, cannot be used; the text names file and place, expected and got.

    The text is one printable paragraph of at most 2000 characters, whatever the file holds.
    """

    def __init__(self, text: str = "") -> None:
        text = printable(text)
        if len(text) > _MAX_TEXT:
            text = f"{text[: _MAX_TEXT - 505]} ... {text[-500:]}"
        super().__init__(text)


def refusal(where: str | Path, expected: str, got: str, advice: str = "") -> str:
    """``where: expected ..., got ...``, and after a semicolon what the reader can do about it. Printable."""
    return printable(f"{where}: expected {expected}, got {got}" + (f"; {advice}" if advice else ""))


def printable(text: str) -> str:
    """``text`` with everything that is not printable (control, format and surrogate characters) as its escape."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in text
    )


def shown(value: Any) -> str:
    """``repr(value)``, shortened: what an error quotes of a value of unknown size, depth and type."""
    try:
        return _short.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
