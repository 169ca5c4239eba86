"""``torch-nvfp4 info``."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Annotated, Any

import torch
import typer

from torch_nvfp4._version import __version__
from torch_nvfp4.backends import BACKENDS, MoEBackendConfig, explain_moe_backends
from torch_nvfp4.bench import cpu_name, dtype_name
from torch_nvfp4.cli.bench import ShapeOption, understand_sizes
from torch_nvfp4.cli.options import DtypeOption, JsonOption, parse_device, parse_dtype
from torch_nvfp4.cli.output import json_writer
from torch_nvfp4.cli.select import GPUS, cpu_choices, cpu_level, cuda_choice
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.cli.wording import size
from torch_nvfp4.gate import Gate
from torch_nvfp4.integrations.report import engine_reports
from torch_nvfp4.ops import library_paths

_EXAMPLE_LIMIT = 10.0  # DeepSeek-V4's


def command(
    select: Annotated[
        str,
        typer.Option(
            "--select", metavar="M,M,...", show_default=False,
            help="Instead: which way the kernels take for a layer at these numbers of tokens, and why.",
        ),
    ] = "",
    shape: ShapeOption = "",
    dtype: DtypeOption = "bf16",
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="DEVICE", show_default=False,
            help=f"cpu, cuda, cuda:N, or a GPU that need not be here: {', '.join(GPUS)}.",
        ),
    ] = "",
    json_file: JsonOption = None,
) -> None:  # fmt: skip
    """Show this machine, the libraries, and which backends and engines can run here, each with its reason if not.

    --shape, --dtype and --device belong to --select.

    \b
    Examples:
      torch-nvfp4 info
      TORCH_NVFP4_CPU_LEVEL=avx2 torch-nvfp4 info
      torch-nvfp4 info --select 1,16,128 --shape dsv4-flash
      torch-nvfp4 info --select 64 --shape 128,2048,768,8 --dtype fp32
      torch-nvfp4 info --select 1,16,4096 --device h100
    """
    terminal = Terminal(json_file)
    with json_writer(json_file) as write_json:
        if not select:
            for option, value in (("--shape", shape), ("--device", device)):
                if value:
                    raise ValueError(f"{option}: expected --select beside it, got {option} alone")
            facts = collect_info()
            write_json(facts)
            _print_info(terminal, facts)
        else:
            choice = collect_selection(select, shape, dtype, device)
            write_json(choice)
            _print_selection(terminal, choice)


def _print_info(terminal: Terminal, facts: dict[str, Any]) -> None:
    for section in ("hardware", "libraries"):
        terminal.table((section, ""), [(key, str(value)) for key, value in facts[section].items()], left=(section, ""))
        terminal.line()
    columns = ("backend", "device", "no clamp", f"clamp {_EXAMPLE_LIMIT:g}")
    terminal.table(
        columns,
        [
            (
                entry["backend"] + (f" (input_quant={entry['input_quant']})" if entry["input_quant"] else ""),
                entry["device"],
                *("usable" if entry[key] is None else entry[key] for key in ("unclamped", "clamped")),
            )
            for entry in facts["backends"]
        ],
        left=columns,
    )
    terminal.line()
    columns = ("engine", "version", "uses these kernels", "why")
    rows = [
        (entry["engine"], entry["version"] or "not installed", "yes" if entry["used"] else "no", entry["reason"])
        for entry in facts["engines"]
    ]
    terminal.table(columns, rows, left=columns)


def collect_info() -> dict[str, Any]:
    """What ``info`` prints: hardware, libraries, every backend's reason (None: usable) on every device, and engines."""
    hardware: dict[str, Any] = {
        "CPU": f"{cpu_name()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads",
        "CPU instruction level": ", ".join(cpu_level()),
    }
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        hardware[f"GPU {index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{size(properties.total_memory)}"
        )
        devices.append(torch.device("cuda", index))
    if len(devices) == 1:
        hardware["GPU"] = "none" if torch.version.cuda else "none (this torch is built without CUDA)"
    libraries: dict[str, Any] = {
        "torch_nvfp4": __version__,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "ops": ", ".join(library_paths()),
    }
    for package in ("safetensors", "transformers", "flashinfer-python", "matplotlib"):
        libraries[package] = _version(package) or "not installed"
    return {
        "hardware": hardware,
        "libraries": libraries,
        "backends": _backends(devices),
        "engines": [report.to_json() for report in engine_reports()],
    }


def _backends(devices: list[torch.device]) -> list[dict[str, Any]]:
    """A backend for an ``input_quant`` is asked whether it could run a layer that asks for it."""
    backends = []
    for device in devices:
        for b in BACKENDS:
            configs = [
                MoEBackendConfig.for_device(device, 4096, 2048, gate=Gate(clamp_limit=limit), input_quant=b.INPUT_QUANT)
                for limit in (None, _EXAMPLE_LIMIT)
            ]
            unclamped, clamped = (explain_moe_backends(config)[b.name] for config in configs)
            backends.append(
                {
                    "backend": b.name, "device": str(device), "input_quant": b.INPUT_QUANT, "unclamped": unclamped,
                    "clamped": clamped,
                }
            )  # fmt: skip
    return backends


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect_selection(tokens: str, shape: str, dtype: str, device: str) -> dict[str, Any]:
    """What ``info --select`` prints. Raises ValueError (expected and got)."""
    gpu = GPUS.get(device.lower())
    where = torch.device("cuda") if gpu is not None else parse_device(device)
    activations = parse_dtype(dtype, where)
    sizes, counts = understand_sizes(where.type, shape, tokens)
    asked = {"device": device or str(where), "shape": sizes._asdict(), "dtype": dtype_name(activations)}
    if where.type == "cuda":
        return asked | {"choices": [cuda_choice(sizes, count, activations, where, gpu) for count in counts]}
    level, why = cpu_level()
    choices = cpu_choices(sizes, counts, activations, level)
    return asked | {"level": level, "level_reason": why, "choices": [choice.to_json() for choice in choices]}


def _print_selection(terminal: Terminal, facts: dict[str, Any]) -> None:
    shape = facts["shape"]
    terminal.line(
        f"MoE layer E={shape['experts']} K={shape['hidden']} I={shape['intermediate']} top-k {shape['top_k']}, "
        f"{facts['dtype']} activations, on {facts['device']}",
        "bold",
    )
    if "level" not in facts:
        for choice in facts["choices"]:
            terminal.line()
            tokens = choice.pop("M")
            terminal.table(("M", tokens), list(choice.items()), left=("M", tokens))
        return
    terminal.line(f"level: {facts['level']}, {facts['level_reason']}")
    columns = ("M", "tokens per expert", "arithmetic", "path", "why")
    rows = []
    for choice in facts["choices"]:
        low, high = choice["per_expert"]
        rows.append(
            (
                str(choice["tokens"]),
                f"{low}" if low == high else f"{low}..{high}",
                choice["arithmetic"],
                choice["path"],
                choice["why"],
            )
        )
    terminal.table(columns, rows, left=("path", "why", "arithmetic"))
    terminal.line("tokens per expert: of the experts that are hit, if the routing is even", "dim")
