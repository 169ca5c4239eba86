"""``torch-nvfp4 demo``."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError

from torch_nvfp4.bench import cpu_name
from torch_nvfp4.checkpoint import write_checkpoint
from torch_nvfp4.cli.demo_generate import Generation, generate, print_generation
from torch_nvfp4.cli.demo_run import DemoRow, run_demo
from torch_nvfp4.cli.inspect import collect_checkpoint, open_checkpoint, print_checkpoint
from torch_nvfp4.cli.options import BackendOption, DeviceOption, DtypeOption, JsonOption, parse_device, parse_dtype
from torch_nvfp4.cli.output import OutputError, json_writer
from torch_nvfp4.cli.process import failed
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.cli.wording import count, error, share
from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.testing import TOLERANCE

DEMO_TOKENS = (1, 16, 256)
_LAYOUT = "the layout of DeepSeek-V4-Flash-NVFP4"


def command(
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="DIR", help="Your own checkpoint instead of a written one.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="DIR", help="Write the checkpoint here, a new or empty directory, and keep it."),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", min=1, metavar="N", help="Run at most so many MoE layers.")] = 4,
    dtype: DtypeOption = "bf16",
    device: DeviceOption = "",
    backend: BackendOption = "",
    json_file: JsonOption = None,
) -> None:
    """The whole way: write a checkpoint in DeepSeek-V4-Flash's layout, load it, check it, compile it, time it.

    At the end transformers, where it is installed, generates tokens on the checkpoint that was written. Exit code 1 if
    an error is above the tolerance. It takes about a minute and writes 130 MiB, to $TMPDIR without --keep.

    \b
    Examples:
      torch-nvfp4 demo
      torch-nvfp4 demo --keep /tmp/tiny-dsv4
      torch-nvfp4 demo --checkpoint DeepSeek-V4-Flash-NVFP4 --layers 1
    """
    terminal = Terminal(json_file)
    started = time.perf_counter()
    if checkpoint is not None and keep is not None:
        raise ValueError("expected --checkpoint or --keep, got both")
    where = parse_device(device)
    activations = parse_dtype(dtype, where)
    with json_writer(json_file, checkpoint) as write_json, _checkpoint(terminal, checkpoint, keep) as path:
        opened = open_checkpoint(terminal, path)
        if not opened.layers:
            raise CheckpointError(refusal(path, "a checkpoint with NVFP4 or MXFP4 experts", "none in its headers"))
        facts = collect_checkpoint(opened, where, backend or None)
        terminal.line()
        print_checkpoint(terminal, facts)
        if facts["refused"]:
            raise CheckpointError(refusal(path, "experts that can be loaded", "tensors that loading refuses"))
        terminal.line()
        rows = run_demo(
            opened, opened.layers[:layers], dtype=activations, device=where, backend=backend or None,
            tokens=DEMO_TOKENS, terminal=terminal,
        )  # fmt: skip
        tolerance = TOLERANCE[activations]
        generation = None if checkpoint is not None else _generated(terminal, path, activations, where, backend)
        write_json(_report(facts, tolerance, rows, generation))
    ran = count(min(layers, len(opened.layers)), "layer")
    terminal.line(f"{ran}, {dtype} activations, times per layer, on {device_name(where)}:", "bold")
    _print_rows(terminal, rows, tolerance)
    worst = max(row.relative_l2 for row in rows)
    if not worst <= tolerance:
        failed("demo", f"the largest error of a layer: expected at most {tolerance:g}, got {error(worst)}")
    print_generation(terminal, generation)
    terminal.line(
        f"demo passed: {ran}, eager and compiled, within {tolerance:g} of fp64 "
        f"(largest error {worst:.1e}), in {time.perf_counter() - started:.0f} s",
        "green",
    )


def _generated(
    terminal: Terminal, path: Path, dtype: torch.dtype, device: torch.device, backend: str
) -> Generation | str:
    with terminal.progress() as progress:
        progress.stage(None)
        progress.begin("generating with transformers")
        return generate(path, dtype, device, backend or None)


def _report(
    facts: dict[str, Any], tolerance: float, rows: Sequence[DemoRow], generation: Generation | str | None
) -> dict[str, Any]:
    """What --json gets; without "generation" for a checkpoint of the user."""
    report = {"checkpoint": facts, "tolerance": tolerance, "rows": [row.to_json() for row in rows]}
    if generation is None:
        return report
    return report | {"generation": generation if isinstance(generation, str) else asdict(generation)}


@contextmanager
def _checkpoint(terminal: Terminal, given: Path | None, keep: Path | None) -> Iterator[Path]:
    """The user's checkpoint, or one that is written here: whole to ``keep``, or to a directory that goes away."""
    if given is not None:
        yield given
        return
    if keep is not None and os.path.isdir(keep) and (entries := sum(1 for _ in keep.iterdir())):
        expected, advice = "a new or empty directory", f"--checkpoint {keep} runs the checkpoint that is there"
        raise OutputError(refusal(f"--keep {keep}", expected, f"one with {count(entries)} entries", advice))
    if keep is not None and os.path.lexists(keep) and not os.path.isdir(keep):
        raise OutputError(refusal(f"--keep {keep}", "a new or empty directory", "a file"))
    with _scratch(keep) as scratch:
        with terminal.progress() as progress:
            progress.stage(None)
            progress.begin(f"writing a checkpoint in {_LAYOUT}")
            _write(scratch / "checkpoint")
        path = scratch / "checkpoint"
        if keep is not None:
            # A rename within one directory: what stands under the name that was asked for is whole.
            path.rename(os.path.realpath(keep))
            path = keep
        terminal.line(f"wrote a checkpoint with random weights in {_LAYOUT}: {path}")
        yield path


@contextmanager
def _scratch(keep: Path | None) -> Iterator[Path]:
    """A directory that goes away with the command; beside ``keep`` if there is one."""
    where = "$TMPDIR" if keep is None else f"--keep {keep}"
    try:
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
        parent = None if keep is None else keep.parent
        scratch = Path(tempfile.mkdtemp(prefix=".torch-nvfp4-demo-", dir=parent))
    except OSError as problem:
        raise OutputError(refusal(where, "a directory that can be written", str(problem.strerror))) from problem
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(path: Path) -> None:
    try:
        write_checkpoint(path)
    except (OSError, SafetensorError) as problem:
        raise OutputError(refusal(path, "130 MiB that can be written", str(problem))) from problem


def _print_rows(terminal: Terminal, rows: Sequence[DemoRow], tolerance: float) -> None:
    terminal.table(
        ("M", "mode", "rel. L2", "clamped", "ms", "dequantize, then matmul", "speed-up", "GB/s"),
        [
            (
                str(row.tokens),
                row.mode,
                error(row.relative_l2),
                "-" if row.clamped_share is None else share(row.clamped_share),
                f"{row.seconds * 1e3:.3f}",
                f"{row.dequantize_seconds * 1e3:.1f} ms",
                f"{row.dequantize_seconds / row.seconds:.1f}x",
                f"{row.touched_bytes / row.seconds * 1e-9:.1f}",
            )
            for row in rows
        ],
        left=("mode",),
        marked=[number for number, row in enumerate(rows) if not row.relative_l2 <= tolerance],
    )
    terminal.line("rel. L2: largest error of a layer against fp64; GB/s: NVFP4 bytes of the experts hit over the time")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
