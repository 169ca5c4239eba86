"""Loads the op libraries that setup.py built; importing this registers the schemas and kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


def library_paths() -> list[str]:
    """The shared libraries that hold the ops, in loading order, for a process without Python (``dlopen``)."""
    paths = [_PACKAGE / "_C.so"]
    cuda = _PACKAGE / "_C_cuda.so"
    if torch.version.cuda is not None and cuda.exists():
        paths.append(cuda)
    return [str(path) for path in paths]


def _load() -> None:
    for path in library_paths():
        if not Path(path).exists():
            raise ImportError(
                f"torch_nvfp4: expected the op library {path}, which is not there. "
                "Build it with `pip install .` (or `pip install --no-build-isolation -e .`) in the source folder."
            )
        torch.ops.load_library(path)


def register_no_autograd(op: str, alternative: str) -> None:
    """Makes backward through ``nvfp4::<op>`` raise with the alternative, where torch would silently give no gradient.

    Registered at import: autograd that is registered after an op was first traced gives wrong gradients under AOT.
    """

    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise NotImplementedError(
            f"nvfp4::{op} has no gradient: its weights are quantized for inference. Call it under torch.no_grad(), or "
            f"use {alternative} (plain torch, differentiable in its activations)."
        )

    torch.library.register_autograd(f"nvfp4::{op}", backward)


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"nvfp4::{op}")


_load()
