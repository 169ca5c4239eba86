"""``torch-nvfp4 info``."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from typing import Any

import torch

from torch_nvfp4._version import __version__
from torch_nvfp4.backends import BACKENDS, MoEBackendConfig, explain_moe_backends
from torch_nvfp4.bench import CPU_LEVEL_VARIABLE, cpu_name
from torch_nvfp4.cli.options import JsonOption
from torch_nvfp4.cli.terminal import console_for, make_table, mib, one_line_errors, write_json
from torch_nvfp4.gate import Gate
from torch_nvfp4.ops import library_paths

_EXAMPLE_LIMIT = 10.0  # DeepSeek-V4's


def command(json_file: JsonOption = None) -> None:
    """Show this machine, the libraries, and which backends can run here, each with its reason if not.

    \b
    Examples:
      torch-nvfp4 info
      TORCH_NVFP4_CPU_LEVEL=avx2 torch-nvfp4 info
    """
    console = console_for(json_file)
    with one_line_errors("info"):
        facts = collect_info()
        write_json(json_file, facts)
    for section in ("hardware", "libraries"):
        table = make_table(section, "", left=(section, ""))
        for key, value in facts[section].items():
            table.add_row(key, str(value))
        console.print(table)
        console.print()
    table = make_table(
        "backend", "device", "no clamp", f"clamp {_EXAMPLE_LIMIT:g}", left=("backend", "device", "no clamp")
    )
    table.columns[-1].justify = "left"
    for entry in facts["backends"]:
        reasons = [entry["unclamped"], entry["clamped"]]
        table.add_row(
            entry["backend"], entry["device"], *("usable" if reason is None else reason for reason in reasons)
        )
    console.print(table)


def collect_info() -> dict[str, Any]:
    """What ``info`` prints: hardware, libraries, and every backend's reason (None: usable) on every device."""
    hardware: dict[str, Any] = {
        "CPU": f"{cpu_name()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads",
        "CPU instruction level": _cpu_level(),
    }
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        hardware[f"GPU {index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{mib(properties.total_memory)}"
        )
        devices.append(torch.device("cuda", index))
    if len(devices) == 1:
        hardware["GPU"] = "none" if torch.version.cuda else "none (this torch is built without CUDA)"
    libraries: dict[str, Any] = {
        "torch_nvfp4": __version__,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "ops": ", ".join(library_paths()),
    }
    for package in ("safetensors", "transformers", "flashinfer-python", "vllm", "matplotlib"):
        libraries[package] = _version(package) or "not installed"
    backends = []
    for device in devices:
        reasons = [
            explain_moe_backends(MoEBackendConfig.for_device(device, 4096, 2048, gate=Gate(clamp_limit=limit)))
            for limit in (None, _EXAMPLE_LIMIT)
        ]
        backends += [
            {"backend": b.name, "device": str(device), "unclamped": reasons[0][b.name], "clamped": reasons[1][b.name]}
            for b in BACKENDS
        ]
    return {"hardware": hardware, "libraries": libraries, "backends": backends}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_level() -> str:
    """The level that the CPU kernels run at, and why."""
    try:
        detect = ctypes.CDLL(library_paths()[0]).nvfp4_cpu_detected_level
        detect.restype = ctypes.c_char_p
        detected = detect().decode()
    except (OSError, AttributeError):
        detected = "unknown"
    wanted = os.environ.get(CPU_LEVEL_VARIABLE)
    if wanted:
        return f"{wanted}, asked for by {CPU_LEVEL_VARIABLE}; this processor and build can {detected}"
    return f"{detected}, the highest of this processor and build ({CPU_LEVEL_VARIABLE} is not set)"
