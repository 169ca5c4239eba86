"""Loads the op libraries that setup.py built; importing this registers the schemas and kernels."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

_OPS = (
    "moe", "batched_moe", "route", "grouped_gemm", "grouped_gemm_swiglu", "combine", "linear", "swiglu", "pack",
    "unpack", "moe_backward", "grouped_gemm_backward", "grouped_gemm_swiglu_backward", "linear_backward",
    "swiglu_backward", "no_gradient", "moe_fp8", "order_for_fp8",
)  # fmt: skip
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
    for op in _OPS:
        if not hasattr(torch.ops.nvfp4, op):
            raise ImportError(
                f"torch_nvfp4: expected the op nvfp4::{op} in {library_paths()[0]}, which does not define it: another "
                "library, or an older build. Build it again with `pip install .` in the source folder."
            )


def below_autograd(op: str) -> Callable[..., Any]:
    """``call(tensors, args, kwargs)``: the op with ``args`` and ``kwargs``, past its autograd kernel where nothing asks
    for a derivative with respect to any of ``tensors`` (None counts as none).

    The stable ABI cannot ask a tensor whether it requires a gradient, so that kernel is Python, and costs as much as
    the rest of a call.
    """
    overload = getattr(torch.ops.nvfp4, op).default
    is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
    is_inference, transforms = torch.is_inference_mode_enabled, torch._C._are_functorch_transforms_active
    guard = torch._C._AutoDispatchBelowAutograd

    def call(tensors: tuple[torch.Tensor | None, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_compiling() or is_inference() or forward_ad._current_level >= 0 or transforms():
            return overload(*args, **kwargs)
        if has_torch_function(args):  # a mode, or a subclass, whose Python runs inside the call and may differentiate
            return overload(*args, **kwargs)
        if is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    return overload(*args, **kwargs)
        with guard():
            return overload(*args, **kwargs)

    return call


_with_dtensor: list[Callable[[], None]] = []
_before_fakes: list[Callable[[Any], Any]] = []


def call_with_dtensor(action: Callable[[], None]) -> None:
    """Calls ``action`` once, before the first op runs on DTensors.

    DTensor asks an op's fake for the shape of the result before it looks for a sharding rule, so the first fake that
    runs after DTensor was imported is early enough. Importing DTensor at once would take half as long as torch itself.
    """
    _with_dtensor.append(action)


def call_before_fakes(prepare: Callable[[Any], Any]) -> None:
    """Every fake that runs once DTensor is imported gets ``prepare((args, kwargs))`` as its arguments."""
    _before_fakes.append(prepare)


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the fake of ``nvfp4::<op>``."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def run(*args: Any, **kwargs: Any) -> Any:
            if "torch.distributed.tensor" in sys.modules:
                while _with_dtensor:
                    _with_dtensor.pop()()
                for prepare in _before_fakes:
                    args, kwargs = prepare((args, kwargs))
            return fake(*args, **kwargs)

        torch.library.register_fake(f"nvfp4::{op}")(run)
        return fake

    return register


_load()
