"""``torch-nvfp4 bench``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from torch_nvfp4.backends import Libraries
from torch_nvfp4.bench import (
    CPU_PEERS,
    CUDA_PEERS,
    SHAPES,
    BenchError,
    Report,
    caption,
    default_peers,
    parse_shape,
    parse_tokens,
    plot,
    run_cpu,
    run_cuda,
    title,
)
from torch_nvfp4.cli.bench_table import render
from torch_nvfp4.cli.terminal import one_line_errors, wide_console
from torch_nvfp4.gate import Gate

_CPU_TOKENS = (1, 4, 16, 64, 256)
_CUDA_TOKENS = tuple(2**i for i in range(14))


def command(
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda where its kernels can run.")] = "",
    tokens: Annotated[str, typer.Option(metavar="M,M,...", help="Numbers of tokens.")] = "",
    shape: Annotated[str, typer.Option(metavar="E,K,I,TOPK", help=f"Sizes, or one of {', '.join(SHAPES)}.")] = "",
    dtype: Annotated[str, typer.Option(help="Activations: bf16 or fp16, on the CPU also fp32.")] = "bf16",
    clamp_limit: Annotated[float, typer.Option(help="The SwiGLU clamp limit.")] = 10.0,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compare with, repeatable: dequantize, transformers (CPU), vllm, humming (CUDA), compiled "
            "(the steps with their gate fused, left to Inductor, eager), none. Default on the CPU: dequantize, and "
            "transformers where it is installed."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on each number of tokens.")] = 6.0,
    breakdown: Annotated[bool, typer.Option(help="CUDA: also print the time of each kernel.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the times into this PNG file.")] = None,
) -> None:
    """Time the MoE layer against its floor and against other implementations, interleaved in one run.

    \b
    Examples:
      torch-nvfp4 bench
      torch-nvfp4 bench --tokens 1,4 --peer none --seconds 3
      torch-nvfp4 bench --peer compiled
      torch-nvfp4 bench --device cuda --peer vllm --json h200.json --plot h200.png
    """
    console = wide_console()
    with one_line_errors("bench"):
        report = _run(
            device, tokens, shape, dtype, clamp_limit, peer, seconds, breakdown, plot_file, Console(stderr=True)
        )
        console.print(title(report), style="bold", highlight=False, soft_wrap=True)
        console.print(render(report))
        console.print(caption(report), style="dim", highlight=False)
        for row in report.rows if breakdown else ():
            kernels = ", ".join(f"{name} {value * 1e6:.1f}" for name, value in row.kernels.items())
            console.print(f"M = {row.tokens}, µs a call: {kernels}", highlight=False)
        if json_file is not None:
            json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n")
        if plot_file is not None:
            plot(report, plot_file)


def _run(
    device: str, tokens: str, shape: str, dtype: str, clamp_limit: float, peer: list[str] | None, seconds: float,
    breakdown: bool, plot_file: Path | None, console: Console,
) -> Report:  # fmt: skip
    cuda_error = "a machine (or a torch) without one" if not torch.cuda.is_available() else None
    if cuda_error is None and not Libraries.detect().cuda_ops:
        cuda_error = "one, but this package is built without its CUDA kernels"
    device = device or ("cuda" if cuda_error is None else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and cuda_error is not None:
        raise BenchError(f"--device cuda: expected a CUDA device, got {cuda_error}")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16} | ({"fp32": torch.float32} if device == "cpu" else {})
    if dtype not in dtypes:
        raise ValueError(f"--dtype: expected one of {', '.join(dtypes)} on {device}, got {dtype!r}")
    Gate(clamp_limit=clamp_limit)  # raises
    table = CUDA_PEERS if device == "cuda" else CPU_PEERS
    peers = default_peers(device) if peer is None else [name for name in peer if name != "none"]
    for name in peers:
        if name not in table:
            raise ValueError(f"--peer: expected one of {', '.join((*table, 'none'))} on {device}, got {name!r}")
    sizes = parse_shape(shape or ("dsv4-flash" if device == "cuda" else "cpu"))
    counts = parse_tokens(tokens) if tokens else _CUDA_TOKENS if device == "cuda" else _CPU_TOKENS
    if plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot: expected matplotlib, which is not installed; pip install 'torch-nvfp4[bench]'")
    if peer is None and device == "cpu" and "transformers" not in peers:
        console.print("transformers is not installed, so it is not measured; pip install 'torch-nvfp4[bench]'")
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True,
        disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        # A step for the weights, each peer's weights, on the CPU their agreement, and each number of tokens.
        task = progress.add_task("", total=1 + len(peers) + (device == "cpu") + len(counts))
        begun = False

        def tell(step: str) -> None:
            nonlocal begun
            progress.update(task, description=step, advance=1 if begun else 0)
            begun = True

        arguments: dict[str, Any] = {"dtype": dtypes[dtype], "clamp_limit": clamp_limit, "peers": peers}
        if device == "cuda":
            return run_cuda(sizes, counts, seconds=seconds, breakdown=breakdown, progress=tell, **arguments)
        return run_cpu(sizes, counts, seconds=seconds, progress=tell, **arguments)
