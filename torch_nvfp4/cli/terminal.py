"""What all commands share on the terminal: consoles, tables, progress, one-line errors, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from torch_nvfp4.bench import CPU_LEVEL_VARIABLE, BenchError


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    if file is None:
        return
    text = json.dumps(content, indent=2) + "\n"
    if str(file) == "-":
        sys.stdout.write(text)
    else:
        file.write_text(text)


def console_for(json_file: Path | None = None) -> Console:
    """Where tables go: stdout, or stderr when stdout holds the JSON."""
    if json_file is not None and str(json_file) == "-":
        return Console(stderr=True)
    return wide_console()


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def print_line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def make_table(*columns: str, left: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def spans(layers: Sequence[int]) -> str:
    """0..3, 7 for (0, 1, 2, 3, 7)."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in spans)


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turns an error that the user of ``torch-nvfp4 name`` can act on into one line on stderr and exit code 2."""
    try:
        yield
    # CheckpointError is a ValueError.
    except (ValueError, NotImplementedError, BenchError, OSError) as error:
        fail(name, str(error))
        raise typer.Exit(2) from error
    except RuntimeError as error:
        # Any other one from a kernel is a bug, and keeps its traceback.
        if CPU_LEVEL_VARIABLE not in str(error):
            raise
        fail(name, str(error).splitlines()[0])
        raise typer.Exit(2) from error


def fail(name: str, message: str) -> None:
    Console(stderr=True).print(
        f"torch-nvfp4 {name}: {message}", style="red", markup=False, highlight=False, soft_wrap=True
    )


def wide_console() -> Console:
    """Standard output, 120 columns wide where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
