"""The package's own exception, and the one way in which it words a refusal."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CheckpointError", "refusal"]


class CheckpointError(ValueError):
    """The checkpoint, or the slice asked of it, cannot be used; the text names file and place, expected and got."""


def refusal(where: str | Path, expected: str, got: str, advice: str = "") -> str:
    """``where: expected ..., got ...``, and after a semicolon what the reader can do about it."""
    return f"{where}: expected {expected}, got {got}" + (f"; {advice}" if advice else "")
