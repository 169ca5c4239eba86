"""What packaging and building promise: the version, the sources of each library, rebuilds, sdist and wheel."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

import torch_nvfp4
from torch_nvfp4 import cli

ROOT = Path(__file__).resolve().parent.parent


def test_one_version() -> None:
    """The command line, the package and the file that packaging reads say the same."""
    declared = re.search(r'^__version__ = "(.+)"$', (ROOT / "torch_nvfp4/_version.py").read_text(), re.MULTILINE)
    result = CliRunner().invoke(cli.app, ["--version"])
    assert declared is not None
    assert torch_nvfp4.__version__ == declared[1]
    assert (result.exit_code, result.stdout) == (0, f"torch-nvfp4 {declared[1]}\n")
