"""The Typer application."""

from __future__ import annotations

from inspect import cleandoc
from types import ModuleType
from typing import Annotated, Any

import typer

from torch_nvfp4._version import __version__
from torch_nvfp4.cli import bench, demo, generate, info, inspect, quantize, serve, verify
from torch_nvfp4.cli.process import Commands

_ENDING = """\b
Exit codes:
  0    done, and every check passed
  1    a check failed
  2    a request, a checkpoint or a file that cannot be used; one line on stderr says why
  3    a bug in torch-nvfp4
  130  interrupted (Ctrl-C); 143 after SIGTERM, 141 when the reader of the output has gone

\b
Environment:
  TORCH_NVFP4_BACKEND    a backend instead of the first that can run a layer; --backend wins over it
  TORCH_NVFP4_CPU_LEVEL  amx, avx512, avx2 or portable, at most what the processor can; default: the highest
  TORCH_NVFP4_ARCH       80: the GPU kernels for compute capability 8.0 on any GPU; default: the GPU's own
  TORCH_NVFP4_DEBUG      1: the traceback of an error, after its line
  NO_COLOR, COLUMNS      no colours; the width of tables in a terminal (elsewhere 120)
"""

app = typer.Typer(
    cls=Commands,
    help="NVFP4 mixture-of-experts layers with the SwiGLU clamp: what runs here, is it right, how fast is it.\n\n"
    + _ENDING,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _add(name: str, module: ModuleType, **settings: Any) -> None:
    help_text = f"{cleandoc(module.command.__doc__ or '')}\n\n{_ENDING}"
    app.command(name, help=help_text, context_settings=settings)(module.command)


_add("info", info)
_add("inspect", inspect)
_add("verify", verify)
_add("quantize", quantize)
_add("bench", bench)
_add("demo", demo)
_add("generate", generate)
_add("serve", serve, allow_extra_args=True, ignore_unknown_options=True)  # the server's own options


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torch-nvfp4 {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
