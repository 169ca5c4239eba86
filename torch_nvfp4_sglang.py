"""SGLang's entry point to torch_nvfp4 (group ``sglang.srt.plugins``).

A module of its own beside the package, which imports the standard library alone. SGLang logs whatever a plug-in raises,
while it is imported or called, and goes on with its own kernels. So a failure of ``register`` is kept, and raised
again by the first layer of NVFP4 experts that SGLang makes.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["ENVIRONMENT_VARIABLE", "MODES", "NVFP4_CLASSES", "mode", "register"]

ENVIRONMENT_VARIABLE = "TORCH_NVFP4_SGLANG"
MODES = ("auto", "require", "off")

_QUANTIZATION = "sglang.srt.layers.quantization"
NVFP4_CLASSES = (
    (f"{_QUANTIZATION}.modelopt_quant", "ModelOptNvFp4FusedMoEMethod"),
    (
        f"{_QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_w4a16_nvfp4_moe",
        "CompressedTensorsW4A16Nvfp4MoE",
    ),
    (f"{_QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4_moe", "CompressedTensorsW4A4Nvfp4MoE"),
)
"""SGLang's classes for NVFP4 experts, as (module, class); it makes one object per layer."""


def mode() -> str:
    """``auto``, ``require`` or ``off``, as the environment variable says; unset or empty is ``auto``.

    - auto: torch_nvfp4 runs the NVFP4 experts that it can run, unless SGLang was told which backend to take. What is
      left to SGLang is logged with the reason.
    - require: NVFP4 experts that torch_nvfp4 cannot run are an error.
    - off: SGLang is left as it is.

    Raises ValueError for any other value.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if value not in MODES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected auto, require or off, got {value!r}")
    return value


def register() -> None:
    """Puts torch_nvfp4 in front of SGLang's backends for NVFP4 experts. SGLang calls this in each of its processes.

    Calling it again changes nothing.

    Raises what is wrong, which SGLang logs; the same error comes again, and is not caught, when a layer of NVFP4
    experts is made:
        ValueError: TORCH_NVFP4_SGLANG has an unknown value.
        RuntimeError: torch_nvfp4 cannot be loaded, or this SGLang is not one that it knows.
    Raises SystemExit where SGLang has none of the classes that could raise later.
    """
    try:
        if mode() == "off":
            return
        _load()(mode)
    except Exception as error:
        _fail_with_the_first_layer(error)
        raise


def _load() -> Callable[[Callable[[], str]], None]:
    try:
        from torch_nvfp4.integrations.sglang import install
    # An ImportError, the OSError of a library that does not load, a schema that is registered twice.
    except Exception as error:
        raise RuntimeError(
            f"torch_nvfp4 is installed as a plug-in of SGLang but cannot be loaded: {type(error).__name__}: {error}. "
            f"Install it again, or set {ENVIRONMENT_VARIABLE}=off to serve with SGLang's own kernels."
        ) from error
    return install


def _fail_with_the_first_layer(error: Exception) -> None:
    """Lets every class of NVFP4 experts raise ``error`` when an object of it is made."""
    found = 0
    for module, name in NVFP4_CLASSES:
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        cls.__init__ = _raising(cls.__init__, error)
        found += 1
    if not found:  # no layer could raise, and SGLang catches every Exception: only this stops it
        raise SystemExit(
            f"{error} (SGLang has no class that torch_nvfp4 knows, so nothing could fail later)"
        ) from error


def _raising(original: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(str(error)) from error

    return __init__
