"""``torch-nvfp4 inspect``."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from torch_nvfp4.backends import ENVIRONMENT_VARIABLE, MoEBackendConfig, explain_moe_backends, select_moe_backend
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.cli.options import BackendOption, CheckpointArgument, DeviceOption, JsonOption, parse_device
from torch_nvfp4.cli.terminal import console_for, make_table, mib, one_line_errors, print_line, spans, write_json


def command(
    checkpoint: CheckpointArgument, device: DeviceOption = "", backend: BackendOption = "", json_file: JsonOption = None
) -> None:
    """Show what a checkpoint holds and which backend would run its experts here. Reads headers only.

    \b
    Examples:
      torch-nvfp4 inspect DeepSeek-V4-Flash-NVFP4
      torch-nvfp4 inspect DeepSeek-V4-Flash-NVFP4 --device cuda --json -
    """
    console = console_for(json_file)
    with one_line_errors("inspect"):
        facts = collect_checkpoint(Checkpoint.open(checkpoint), parse_device(device), backend or None)
        write_json(json_file, facts)
    print_checkpoint(console, facts)


def collect_checkpoint(checkpoint: Checkpoint, device: torch.device, backend: str | None = None) -> dict[str, Any]:
    """What ``inspect`` prints. Raises ValueError, NotImplementedError as ``select_moe_backend``."""
    summary = asdict(checkpoint.summary())
    summary["path"] = str(checkpoint.path)
    gates: dict[str, list[int]] = {}
    for layer in checkpoint.layers:
        gates.setdefault(str(checkpoint.gate(layer)), []).append(layer)
    summary["gates"] = [{"gate": gate, "layers": layers} for gate, layers in gates.items()]
    summary["device"] = str(device)
    summary["backend"], summary["passed_over"] = None, {}
    if checkpoint.layers:
        config = _backend_config(checkpoint, checkpoint.layers[0], device)
        chosen = select_moe_backend(config, backend)
        summary["backend"] = chosen.name
        explicit = backend is not None or bool(os.environ.get(ENVIRONMENT_VARIABLE))
        summary["asked_for"] = explicit
        for name, reason in explain_moe_backends(config).items():
            if name == chosen.name:
                break
            summary["passed_over"][name] = reason or "usable, but another one was asked for"
    return summary


def _backend_config(checkpoint: Checkpoint, layer: int, device: torch.device) -> MoEBackendConfig:
    return MoEBackendConfig.for_device(
        device, checkpoint.hidden_size, checkpoint.intermediate_size, gate=checkpoint.gate(layer)
    )


def print_checkpoint(console: Console, facts: dict[str, Any]) -> None:
    table = make_table("checkpoint", "", left=("checkpoint", ""))
    declared = ", ".join(str(facts[key]) for key in ("quant_method", "quant_algo") if facts[key]) or "nothing"
    table.add_row("path", f"{facts['path']} ({facts['shards']} shards, {mib(facts['nbytes'])})")
    table.add_row("model", f"{facts['model_type'] or 'undeclared'}, config declares {declared}")
    table.add_row("layout", facts["layout"] or "no NVFP4 tensors")
    if facts["layers"]:
        table.add_row(
            "MoE layers",
            f"{len(facts['layers'])} ({spans(facts['layers'])}): {facts['num_experts']} experts, "
            f"top-k {facts['top_k'] or 'undeclared'}, hidden {facts['hidden_size']}, "
            f"intermediate {facts['intermediate_size']}",
        )
        for entry in facts["gates"]:
            table.add_row("gate", f"{entry['gate']} (layers {spans(entry['layers'])})")
    console.print(table)
    console.print()
    table = make_table("stored as", "modules", "tensors", "size", "first", left=("stored as", "first"))
    for category in facts["categories"]:
        sizes = (str(category["modules"]), str(category["tensors"]), mib(category["nbytes"]))
        table.add_row(category["name"], *sizes, category["example"])
    console.print(table)
    console.print()
    for text in _backend_lines(facts):
        print_line(console, text)


def _backend_lines(facts: dict[str, Any]) -> list[str]:
    if facts["backend"] is None:
        return ["no NVFP4 experts: no backend is needed"]
    why = "as asked for" if facts["asked_for"] else "the first in order that can"
    lines = [f"backend on {facts['device']}: {facts['backend']} ({why})"]
    return lines + [f"  not {name}: {reason}" for name, reason in facts["passed_over"].items()]
