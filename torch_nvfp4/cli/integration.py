"""The commands that run transformers: what is installed of it, and its errors in one line."""

from __future__ import annotations

import importlib
import importlib.metadata
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from torch_nvfp4.cli.memory import memory_error
from torch_nvfp4.integrations.transformers.versions import check_installed, unknown_version

__all__ = ["integration", "of_transformers"]

_PACKAGE = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent


def integration(name: str, extra: str) -> ModuleType:
    """A module of the integration, which takes seconds to import.

    Raises ValueError, with the extra to install, where transformers is missing or one that is not known.
    """
    install = f"pip install 'torch-nvfp4[{extra}]'"
    try:
        installed = importlib.metadata.version("transformers")
        wrong = unknown_version(installed)
        if wrong is not None:
            raise ValueError(f"{wrong}; {install}, in an environment apart from an engine that asks for {installed}")
        check_installed()  # before the module is imported, which needs names that an older one lacks
        return importlib.import_module(f"torch_nvfp4.integrations.transformers.{name}")
    except ModuleNotFoundError as error:  # PackageNotFoundError is one
        raise ValueError(f"expected transformers, got no module {error.name}; {install}") from error
    except RuntimeError as error:
        raise ValueError(f"{error}; {install}") from error


@contextmanager
def of_transformers(what: str) -> Iterator[None]:
    """An exception from the code of transformers is a ValueError that says ``what`` was expected; ours are bugs.

    A config or a template of a checkpoint may raise anything there.
    """
    try:
        yield
    except (ValueError, OSError, NotImplementedError):
        raise  # these are told as they are
    except Exception as error:
        if memory_error(error) is not None or _is_ours(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(f"expected {what}, got {type(error).__name__}: {reason}") from error


def _is_ours(error: Exception) -> bool:
    """Whether the innermost frame outside of torch is this package's (and not the command's own)."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = Path(frame.f_code.co_filename)
        if _TORCH not in file.parents:
            return _PACKAGE in file.parents
    return True
