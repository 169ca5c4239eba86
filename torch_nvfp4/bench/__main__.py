"""``python -m torch_nvfp4.bench``."""

import typer

from torch_nvfp4.bench.run import command

typer.run(command)
