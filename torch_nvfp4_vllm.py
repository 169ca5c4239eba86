"""vLLM's entry point to torch_nvfp4 (group ``vllm.general_plugins``).

A module of its own beside the package, which imports the standard library alone: vLLM logs what a plug-in raises while
it is imported and goes on with its own kernels, but lets through what the loaded function raises. So whatever can fail,
torch_nvfp4's op library above all, is imported inside ``register``.
"""

from __future__ import annotations

import os
import sys

__all__ = ["ENVIRONMENT_VARIABLE", "MODES", "mode", "register"]

ENVIRONMENT_VARIABLE = "TORCH_NVFP4_VLLM"
MODES = ("auto", "require", "off")


def mode() -> str:
    """``auto``, ``require`` or ``off``, as the environment variable says; unset or empty is ``auto``.

    - auto: torch_nvfp4 runs the NVFP4 experts that it can run, unless vLLM was told which backend to take. What is left
      to vLLM is logged with the reason.
    - require: NVFP4 experts that torch_nvfp4 cannot run are an error.
    - off: vLLM is left as it is.

    Raises ValueError for any other value.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if value not in MODES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected auto, require or off, got {value!r}")
    return value


def register() -> None:
    """Puts torch_nvfp4 in front of vLLM's backends for NVFP4 experts. vLLM calls this in each of its processes.

    Calling it again changes nothing. After an error vLLM calls it again for the next engine of the process.

    Raises:
        ValueError: TORCH_NVFP4_VLLM has an unknown value.
        RuntimeError: torch_nvfp4 cannot be loaded, or this vLLM is not one that it knows.
    """
    try:
        _install()
    except BaseException:
        # vLLM notes that plug-ins are loaded before it loads them. A process that catches the error and makes another
        # engine, as a notebook does, would serve with vLLM's own kernels and not hear of it.
        plugins = sys.modules.get("vllm.plugins")
        if getattr(plugins, "plugins_loaded", False):
            plugins.plugins_loaded = False  # type: ignore[union-attr]
        raise


def _install() -> None:
    if mode() == "off":
        return
    try:
        from torch_nvfp4.integrations.vllm import install
    except Exception as error:  # also OSError, of a library that does not load
        raise RuntimeError(
            f"torch_nvfp4 is installed as a plug-in of vLLM but cannot be loaded: {type(error).__name__}: {error}. "
            f"Install it again, or set {ENVIRONMENT_VARIABLE}=off to serve with vLLM's own kernels."
        ) from error
    install(mode)
