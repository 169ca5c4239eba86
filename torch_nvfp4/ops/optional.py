"""The arguments of an op that a call may leave out."""

from __future__ import annotations

from torch import Tensor

__all__ = ["optional_arguments"]


def optional_arguments(*arguments: Tensor | None) -> tuple[Tensor | None, ...]:
    """The last arguments of an op without those at the end that are None, the schema's default: graphs and exported
    programs then hold what the call has always held."""
    last = len(arguments)
    while last and arguments[last - 1] is None:
        last -= 1
    return arguments[:last]
