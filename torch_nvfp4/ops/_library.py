"""Loads the op libraries that setup.py built; importing this registers the schemas and kernels."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

_AUTOGRAD = torch.library.Library("nvfp4", "FRAGMENT")
_OPS = (
    "moe", "batched_moe", "route", "grouped_gemm", "grouped_gemm_swiglu", "combine", "linear", "swiglu", "pack",
    "unpack", "moe_fp8", "order_for_fp8",
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


def register_no_autograd(op: str, alternative: str) -> None:
    """Makes derivatives of ``nvfp4::<op>`` raise with the alternative, where torch would silently give none.

    Registered at import: autograd that is registered after an op was first traced gives wrong gradients under AOT. Not
    ``torch.library.register_autograd``: under torch.func its errors do not name the op, and forward mode gives zeros.

    ``op`` may be an out overload, such as "moe.out". It raises at once, since no result of its own could raise in
    backward, and marks ``out`` as changed for whoever saved it for a backward of theirs.
    """
    name, _, overload_name = op.partition(".")
    overload = getattr(getattr(torch.ops.nvfp4, name), overload_name or "default")

    def fail(*_: Any) -> NoReturn:
        raise NotImplementedError(
            f"nvfp4::{op} has no gradient: its weights are quantized for inference. Call it under torch.no_grad(), or "
            f"use {alternative} (plain torch, differentiable in its activations)."
        )

    def below(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, kwargs: dict[str, Any], *args: Any) -> Any:
            return below(*args, **kwargs)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> None:
            fail()

    def autograd(*args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        in_forward_mode = forward_ad._current_level >= 0
        if in_forward_mode and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            fail()
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return below(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            fail()
        return NoGradient.apply(kwargs, *args)

    def autograd_out(*args: Any, out: torch.Tensor, **kwargs: Any) -> None:
        tensors = [arg for arg in (*args, out) if isinstance(arg, torch.Tensor)]
        in_forward_mode = forward_ad._current_level >= 0
        if in_forward_mode and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            fail()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            fail()
        below(*args, out=out, **kwargs)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)

    _AUTOGRAD.impl(op, autograd_out if overload_name == "out" else autograd, "Autograd")


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
        if is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    return overload(*args, **kwargs)
        with guard():
            return overload(*args, **kwargs)

    return call


_with_dtensor: list[Callable[[], None]] = []


def call_with_dtensor(action: Callable[[], None]) -> None:
    """Calls ``action`` once, before the first op runs on DTensors.

    DTensor asks an op's fake for the shape of the result before it looks for a sharding rule, so the first fake that
    runs after DTensor was imported is early enough. Importing DTensor at once would take half as long as torch itself.
    """
    _with_dtensor.append(action)


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the fake of ``nvfp4::<op>``."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def run(*args: Any, **kwargs: Any) -> Any:
            while _with_dtensor and "torch.distributed.tensor" in sys.modules:
                _with_dtensor.pop()()
            return fake(*args, **kwargs)

        torch.library.register_fake(f"nvfp4::{op}")(run)
        return fake

    return register


_load()
