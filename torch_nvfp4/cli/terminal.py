"""The one place that prints. Whatever comes from a file or from the user becomes harmless here, by ``printable``.

Nothing is read as rich's markup, and no character reaches the terminal that it could act on.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from torch_nvfp4 import errors
from torch_nvfp4.cli.memory import memory_error

_LONGEST_CELL, _LONGEST_LINE = 300, 4000
_NARROWEST_TEXT = 24  # a column of text is wrapped down to this width; below it a table becomes a list
_NARROWEST = 20  # rich prints nothing at all into a width of 0
_PADDING = 2


def printable(text: str, limit: int = _LONGEST_LINE) -> str:
    r"""``text`` on one line, with escapes (\x1b, \u202e, \ud800) for every character that is not plainly visible.

    These are control characters and line breaks, the escape codes that begin with one, formatting characters such as
    those that turn the direction of writing, surrogates without a partner, and spaces other than the ordinary one. From
    a text of more than ``limit`` characters the middle is left out.
    """
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} ... {text[-half:]} ({len(text):,} characters)"
    return errors.printable(text)


def make_streams_total() -> None:
    """Lets stdout and stderr take every character: one that their encoding lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a replaced stream may have none
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


class _Console(Console):
    """Takes every text literally, is 120 columns wide where it is no terminal, and reports a closed pipe."""

    def __init__(self, *, stderr: bool) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)
        self.width = max(self.width, _NARROWEST) if self.is_terminal else 120

    def on_broken_pipe(self) -> None:
        raise


class Terminal:
    """Where a command prints: results on stdout (on stderr when stdout holds the JSON), progress on stderr."""

    def __init__(self, json_file: Path | None = None) -> None:
        self._out = _Console(stderr=json_file is not None and str(json_file) == "-")

    def line(self, text: str = "", style: str | None = None) -> None:
        self._out.print(printable(text), style=style, soft_wrap=True)

    def paragraph(self, text: str, style: str | None = None) -> None:
        """As many lines as the width asks for."""
        self._out.print(printable(text), style=style)

    def note(self, text: str) -> None:
        """Beside the result, on stderr."""
        _Console(stderr=True).print(printable(text), soft_wrap=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        left: Collection[str] = (),
        marked: Collection[int] = (),
    ) -> None:
        """A table, or a list of ``column: cell`` where the terminal is too narrow for one.

        Args:
            columns: the titles, which may have several lines.
            left: columns of text; they are aligned left, and wrapped where the width asks for it.
            marked: numbers of rows that are printed in red.
        """
        cells = [[printable(cell, _LONGEST_CELL) for cell in row] for row in rows]
        if _narrowest(columns, cells, left) > self._out.width:
            self._list(columns, cells)
            return
        table = Table(box=None, pad_edge=False, padding=(0, _PADDING, 0, 0))
        for column in columns:
            text = column in left
            table.add_column(column, justify="left" if text else "right", no_wrap=not text, overflow="fold")
        for number, row in enumerate(cells):
            table.add_row(*row, style="red" if number in marked else None)
        self._out.print(table)

    def _list(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        titles = [column.replace("-\n", "").replace("\n", " ") for column in columns]
        for row in rows:
            if len(columns) == 2 and not titles[1]:  # what a key says of the first title
                self._out.print(f"{titles[0]} {row[0]}: {row[1]}", soft_wrap=True)
                continue
            for title, cell in zip(titles, row, strict=True):
                self._out.print(f"{title}: {cell}" if title else cell, soft_wrap=True)
            self._out.print()

    @contextmanager
    def progress(self) -> Iterator[Steps]:
        """A progress bar on stderr, where that is a terminal; memory that runs out names the step."""
        console = _Console(stderr=True)
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )
        steps = Steps(bar)
        try:
            with bar:
                yield steps
        except Exception as error:
            refused = memory_error(error)
            if refused is None or not steps.step:
                raise
            raise MemoryError(f"{steps.step}: {refused}") from error


class Steps:
    """The bars of a command, one per stage, and the step that is being done."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self.step = ""

    def stage(self, total: int | None) -> None:
        """Begins a stage of ``total`` steps; None where nobody knows how many."""
        self._task = self._bar.add_task("", total=total)

    def begin(self, step: str) -> None:
        self.step = step
        if self._task is not None:
            self._bar.update(self._task, description=printable(step, _LONGEST_CELL))

    def advance(self) -> None:
        if self._task is not None:
            self._bar.advance(self._task)


def _narrowest(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> int:
    """Columns of the terminal that a table needs at least."""
    widths = []
    for index, column in enumerate(columns):
        texts = [*column.split("\n"), *(row[index] for row in rows)]
        width = max(map(cell_len, texts))
        widths.append(min(width, _NARROWEST_TEXT) if column in left else width)
    return sum(widths) + _PADDING * (len(widths) - 1)


def say(command: str, message: str) -> None:
    """``torch-nvfp4 command: message``, one line on stderr; where stderr cannot be written there is nobody to tell."""
    name = f"torch-nvfp4 {command}".rstrip()
    message = "; ".join(filter(None, (line.strip() for line in message.split("\n")))).replace(":; ", ": ")
    with suppress(OSError):
        _Console(stderr=True).print(f"{name}: {printable(message)}", style="red", soft_wrap=True)


def print_traceback(error: BaseException) -> None:
    """For whoever looks for a bug, on stderr."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    with suppress(OSError):
        for line in lines:
            _Console(stderr=True).print(printable(line), soft_wrap=True)
