"""Whether an installed SGLang would run on torch_nvfp4's kernels, without importing it."""

from __future__ import annotations

import importlib.metadata
import os

import torch

import torch_nvfp4_sglang
from torch_nvfp4.integrations.entry_point import plugin_error
from torch_nvfp4.integrations.sglang.support import device_error
from torch_nvfp4.integrations.sglang.versions import unknown_version

__all__ = ["report"]


def report() -> tuple[str | None, bool, str]:
    """SGLang's version (None: not installed), whether it would run NVFP4 experts on torch_nvfp4's kernels, and why.

    By the version, the environment and this machine's device; not the model, whose layers decide at last.
    """
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None, False, "not installed"
    reason = _reason_against(version)
    if reason is not None:
        return version, False, reason
    return version, True, f"{torch_nvfp4_sglang.ENVIRONMENT_VARIABLE}={torch_nvfp4_sglang.mode()}"


def _reason_against(version: str) -> str | None:
    allowed = os.environ.get("SGLANG_PLUGINS")
    names = [name.strip() for name in allowed.split(",") if name.strip()] if allowed else None
    problem = plugin_error(torch_nvfp4_sglang, "sglang.srt.plugins", "SGLANG_PLUGINS", names)
    problem = problem or unknown_version(version)
    if problem is not None:
        return problem
    if torch.cuda.is_available():
        return device_error("cuda", torch.cuda.get_device_capability())
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return device_error("cpu", None)
    return "expected a CUDA device or SGLANG_USE_CPU_ENGINE=1, got neither"
