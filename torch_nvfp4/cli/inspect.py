"""``torch-nvfp4 inspect``."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch

from torch_nvfp4.backends import ENVIRONMENT_VARIABLE, MoEBackendConfig, explain_moe_backends, select_moe_backend
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.cli.options import BackendOption, CheckpointArgument, DeviceOption, JsonOption, parse_device
from torch_nvfp4.cli.output import json_writer
from torch_nvfp4.cli.process import failed
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.cli.wording import count, size, spans

_MOST_REFUSED = 20  # lines; the JSON has all


def command(
    checkpoint: CheckpointArgument, device: DeviceOption = "", backend: BackendOption = "", json_file: JsonOption = None
) -> None:
    """Show what a checkpoint holds and which backend would run its experts here. Reads headers only.

    Exit code 1 when loading the experts would refuse one of the tensors.

    \b
    Examples:
      torch-nvfp4 inspect DeepSeek-V4-Flash-NVFP4
      torch-nvfp4 inspect DeepSeek-V4-Flash-NVFP4 --device cuda --json -
    """
    terminal = Terminal(json_file)
    with json_writer(json_file, checkpoint) as write_json:
        opened = open_checkpoint(terminal, checkpoint)
        facts = collect_checkpoint(opened, parse_device(device), backend or None)
        write_json(facts)
    print_checkpoint(terminal, facts)
    if facts["refused"]:
        failed("inspect", f"expected experts that can be loaded, got {_count_refused(facts)} that loading refuses")


def open_checkpoint(terminal: Terminal, path: Any) -> Checkpoint:
    with terminal.progress() as progress:
        progress.stage(None)
        progress.begin("reading the headers")
        return Checkpoint.open(path)


def collect_checkpoint(checkpoint: Checkpoint, device: torch.device, backend: str | None = None) -> dict[str, Any]:
    """What ``inspect`` prints. Raises ValueError, NotImplementedError as ``select_moe_backend``."""
    summary = asdict(checkpoint.summary())
    summary["path"] = str(checkpoint.path)
    gates: dict[str, list[int]] = {}
    summary["refused"] = [{"tensor": part.what, "reason": part.reason} for part in summary.pop("refusals")]
    refused = {part["tensor"] for part in summary["refused"]}
    for layer in checkpoint.layers:
        if f"layer {layer}" in refused:
            continue
        gates.setdefault(checkpoint.layer_config(layer).kind, []).append(layer)
    summary["gates"] = [{"gate": gate, "layers": layers} for gate, layers in gates.items()]
    summary["device"] = str(device)
    summary["backend"], summary["passed_over"] = None, {}
    if checkpoint.layers and not summary["refused"]:
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
    facts = checkpoint.layer_config(layer)
    return MoEBackendConfig.for_device(
        device, facts.hidden_size, facts.intermediate_size, gate=facts.gate,
        apply_router_weight_on_input=facts.apply_router_weight_on_input,
        biases=facts.has_w13_bias or facts.has_w2_bias,
    )  # fmt: skip


def print_checkpoint(terminal: Terminal, facts: dict[str, Any]) -> None:
    declared = ", ".join(str(facts[key]) for key in ("quant_method", "quant_algo") if facts[key]) or "nothing"
    rows = [
        ("path", f"{facts['path']} ({count(facts['shards'], 'shard')}, {size(facts['nbytes'])})"),
        ("model", f"{facts['model_type'] or 'undeclared'}, config declares {declared}"),
        ("layout", facts["layout"] or "no NVFP4 or MXFP4 tensors"),
    ]
    if facts["layers"]:
        rows.append(
            (
                "MoE layers",
                f"{count(len(facts['layers']))} ({spans(facts['layers'])}): "
                f"{_range(facts['expert_counts'], 'expert')}, "
                f"top-k {_range(facts['top_ks']) if facts['top_ks'] else 'undeclared'}, "
                f"hidden {facts['hidden_size']}, intermediate {_range(facts['intermediate_sizes'])}",
            )
        )
        rows += [("gate", f"{entry['gate']} (layers {spans(entry['layers'])})") for entry in facts["gates"]]
    terminal.table(("checkpoint", ""), rows, left=("checkpoint", ""))
    terminal.line()
    terminal.table(
        ("stored as", "modules", "tensors", "size", "first"),
        [
            (entry["name"], count(entry["modules"]), count(entry["tensors"]), size(entry["nbytes"]), entry["example"])
            for entry in facts["categories"]
        ],
        left=("stored as", "first"),
    )
    terminal.line()
    for text in [*_refused_lines(facts), *_backend_lines(facts)]:
        terminal.line(text)


def _range(by_layer: dict[int, int], noun: str = "") -> str:
    """One number, or the smallest and the largest where layers differ."""
    least, most = min(by_layer.values(), default=0), max(by_layer.values(), default=0)
    return count(most, noun) if least == most else f"{count(least)} to {count(most, noun)}"


def _count_refused(facts: dict[str, Any]) -> str:
    return count(len(facts["refused"]), "part")


def _refused_lines(facts: dict[str, Any]) -> list[str]:
    refused = facts["refused"]
    if not refused:
        return []
    lines = [f"{_count_refused(facts)} that loading refuses:"]
    lines += [f"  {entry['tensor']}: {entry['reason']}" for entry in refused[:_MOST_REFUSED]]
    rest = len(refused) - _MOST_REFUSED
    return lines + [f"  and {count(rest)} more"] * (rest > 0)


def _backend_lines(facts: dict[str, Any]) -> list[str]:
    if facts["refused"]:
        return ["no backend: the experts cannot be loaded"]
    if facts["backend"] is None:
        return ["no NVFP4 or MXFP4 experts: no backend is needed"]
    why = "as asked for" if facts["asked_for"] else "the first in order that can"
    lines = [f"backend on {facts['device']}: {facts['backend']} ({why})"]
    return lines + [f"  not {name}: {reason}" for name, reason in facts["passed_over"].items()]
