"""``torch-nvfp4 demo``."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from torch_nvfp4.bench import cpu_name
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.cli.demo_run import run_demo
from torch_nvfp4.cli.inspect import collect_checkpoint, print_checkpoint
from torch_nvfp4.cli.options import BackendOption, DeviceOption, JsonOption, parse_device, parse_dtype
from torch_nvfp4.cli.terminal import console_for, fail, make_table, one_line_errors, print_line, write_json
from torch_nvfp4.demo import write_checkpoint
from torch_nvfp4.errors import CheckpointError
from torch_nvfp4.testing import TOLERANCE

DEMO_TOKENS = (1, 16, 256)


def command(
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Your own checkpoint instead of a written one.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the checkpoint here and keep it.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Run at most so many MoE layers.")] = 4,
    dtype: Annotated[str, typer.Option(help="Of the activations: bf16, fp16, on the CPU also fp32.")] = "bf16",
    device: DeviceOption = "",
    backend: BackendOption = "",
    json_file: JsonOption = None,
) -> None:
    """The whole way: write a checkpoint in DeepSeek-V4-Flash's layout, load it, check it, compile it, time it.

    Exit code 1 if a layer's error is above the tolerance.

    \b
    Examples:
      torch-nvfp4 demo
      torch-nvfp4 demo --keep /tmp/tiny-dsv4
      torch-nvfp4 demo --checkpoint DeepSeek-V4-Flash-NVFP4 --layers 1
    """
    console = console_for(json_file)
    started = time.perf_counter()
    with one_line_errors("demo"), tempfile.TemporaryDirectory(prefix="torch-nvfp4-demo-") as scratch:
        if checkpoint is not None and keep is not None:
            raise ValueError("expected --checkpoint or --keep, got both")
        where = parse_device(device)
        activations = parse_dtype(dtype, where)
        if checkpoint is None:
            checkpoint = keep or Path(scratch)
            with console.status("writing a checkpoint in the layout of DeepSeek-V4-Flash-NVFP4"):
                write_checkpoint(checkpoint)
            print_line(
                console,
                f"wrote a checkpoint with random weights in the layout of DeepSeek-V4-Flash-NVFP4: {checkpoint}",
            )
        opened = Checkpoint.open(checkpoint)
        if not opened.layers:
            raise CheckpointError(f"{checkpoint}: expected a checkpoint with NVFP4 experts, got none in its headers")
        facts = collect_checkpoint(opened, where, backend or None)
        console.print()
        print_checkpoint(console, facts)
        console.print()
        rows = run_demo(
            opened, opened.layers[:layers], dtype=activations, device=where, backend=backend or None,
            tokens=DEMO_TOKENS, console=console,
        )  # fmt: skip
        tolerance = TOLERANCE[activations]
        write_json(json_file, {"checkpoint": facts, "tolerance": tolerance, "rows": [row.to_json() for row in rows]})
    count = min(layers, len(opened.layers))
    print_line(console, f"{count} layers, {dtype} activations, times a layer, on {device_name(where)}:", "bold")
    table = make_table(
        "M", "mode", "rel. L2", "clamped", "ms", "dequantize, then matmul", "speed-up", "GB/s", left=("mode",)
    )
    for row in rows:
        table.add_row(
            str(row.tokens),
            row.mode,
            f"{row.relative_l2:.2e}",
            f"{row.clamped_share:.1%}",
            f"{row.seconds * 1e3:.3f}",
            f"{row.dequantize_seconds * 1e3:.1f} ms",
            f"{row.dequantize_seconds / row.seconds:.1f}x",
            f"{row.touched_bytes / row.seconds * 1e-9:.1f}",
            style=None if row.relative_l2 <= tolerance else "red",
        )
    console.print(table)
    print_line(
        console, "rel. L2: largest error of a layer against fp64; GB/s: NVFP4 bytes of the experts hit over the time"
    )
    worst = max(row.relative_l2 for row in rows)
    seconds = time.perf_counter() - started
    if not worst <= tolerance:
        fail("demo", f"the largest error of a layer is {worst:.2e}, expected at most {tolerance:g}")
        raise typer.Exit(1)
    print_line(
        console,
        f"demo passed: {count} layers, eager and compiled, within {tolerance:g} of fp64 "
        f"(largest error {worst:.1e}), in {seconds:.0f} s",
        "green",
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
