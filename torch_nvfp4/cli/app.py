"""The Typer application.

Exit codes: 0, 1 for a check that failed, 2 for a request or a checkpoint that cannot be used (one line on stderr).
"""

from __future__ import annotations

from typing import Annotated

import typer

from torch_nvfp4._version import __version__
from torch_nvfp4.cli import bench, demo, info, inspect, verify

app = typer.Typer(
    help="NVFP4 mixture-of-experts layers with the SwiGLU clamp: what runs here, is it right, how fast is it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("info")(info.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("bench")(bench.command)
app.command("demo")(demo.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torch-nvfp4 {__version__}")
        raise typer.Exit


@app.callback()
def _options(_: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False) -> None:
    pass
