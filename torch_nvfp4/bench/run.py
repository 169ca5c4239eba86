"""``torch-nvfp4 bench``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from torch_nvfp4.backends import Libraries
from torch_nvfp4.bench.contenders import CPU_PEERS, CUDA_PEERS, our_contender
from torch_nvfp4.bench.cpu import Probes, measure_cpu
from torch_nvfp4.bench.cuda import measure_cuda
from torch_nvfp4.bench.layer import (
    DEQUANTIZE,
    SHAPES,
    BenchError,
    Layer,
    Shape,
    cases,
    check_agreement,
    dtype_name,
    parse_shape,
    parse_tokens,
)
from torch_nvfp4.bench.report import Report, caption, cpu_name, plot, render, title, wide_console
from torch_nvfp4.gate import Gate

CPU_LEVEL_VARIABLE = "TORCH_NVFP4_CPU_LEVEL"
_CPU_TOKENS = (1, 4, 16, 64, 256)
_CUDA_TOKENS = tuple(2**i for i in range(14))


def run_cpu(
    shape: Shape, tokens: Sequence[int], *, dtype: torch.dtype, clamp_limit: float, peers: Sequence[str],
    seconds: float, progress: Callable[[str], None] | None = None,
) -> Report:  # fmt: skip
    """The whole CPU run. ``peers`` are keys of ``CPU_PEERS``; ``progress`` is told what begins."""
    tell = progress or (lambda _: None)
    tell("random weights")
    layer = Layer.random(shape, clamp_limit=clamp_limit)
    contenders = [our_contender(layer, dtype)]
    for peer in peers:
        tell(f"weights for {peer}")
        contenders += CPU_PEERS[peer](layer, dtype)
    probes = Probes()
    report = _report("cpu", shape, dtype, clamp_limit, peers)
    with torch.inference_mode():
        tell("do they agree?")
        check_agreement(contenders, next(cases(shape, 2)))
        for count in tokens:
            tell(f"M = {count}")
            report.rows.append(measure_cpu(shape, count, contenders, probes, seconds=seconds))
    return report


def run_cuda(
    shape: Shape, tokens: Sequence[int], *, dtype: torch.dtype, clamp_limit: float, peers: Sequence[str],
    seconds: float, breakdown: bool = False, progress: Callable[[str], None] | None = None,
) -> Report:  # fmt: skip
    """The whole run on the current CUDA device. ``peers`` are keys of ``CUDA_PEERS``."""
    tell = progress or (lambda _: None)
    tell("random weights")
    device = torch.device("cuda", torch.cuda.current_device())
    layer = Layer.random(shape, clamp_limit=clamp_limit, device=device)
    contenders = [our_contender(layer, dtype)]
    for peer in peers:
        tell(f"weights for {peer}")
        contenders += CUDA_PEERS[peer](layer, dtype)
    report = _report("cuda", shape, dtype, clamp_limit, peers)
    with torch.inference_mode():
        for count in tokens:
            tell(f"M = {count}")
            # A peer picks another kernel for another M.
            check_agreement(contenders, next(cases(shape, count, device=device)))
            report.rows.append(
                measure_cuda(shape, count, contenders, device=device, seconds=seconds, breakdown=breakdown)
            )
    return report


def _report(device: str, shape: Shape, dtype: torch.dtype, clamp_limit: float, peers: Sequence[str]) -> Report:
    of_peers = {"humming": "humming-kernels", "transformers": "transformers", "vllm": "vllm"}
    packages = ["torch", *(of_peers[peer] for peer in peers if peer in of_peers)]
    return Report(
        device=device,
        machine=torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        threads=torch.get_num_threads(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={package: importlib.metadata.version(package) for package in packages},
        shape=shape._asdict(),
        dtype=dtype_name(dtype),
        clamp_limit=clamp_limit,
    )


def default_peers(device: str) -> list[str]:
    """What a run is compared with unless it is told otherwise."""
    if device == "cuda":
        return []
    return [DEQUANTIZE] + ["transformers"] * (importlib.util.find_spec("transformers") is not None)


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turns an error that the user of ``torch-nvfp4 name`` can act on into one line on stderr and exit code 2."""
    try:
        yield
    # CheckpointError is a ValueError.
    except (ValueError, NotImplementedError, BenchError, OSError) as error:
        fail(name, str(error))
        raise typer.Exit(2) from error
    except RuntimeError as error:
        # Any other one from a kernel is a bug, and keeps its traceback.
        if CPU_LEVEL_VARIABLE not in str(error):
            raise
        fail(name, str(error).splitlines()[0])
        raise typer.Exit(2) from error


def fail(name: str, message: str) -> None:
    Console(stderr=True).print(
        f"torch-nvfp4 {name}: {message}", style="red", markup=False, highlight=False, soft_wrap=True
    )


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
