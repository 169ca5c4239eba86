"""``torch-nvfp4 bench``."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from torch_nvfp4.backends import Libraries
from torch_nvfp4.bench import (
    CPU_PEERS,
    CUDA_PEERS,
    HOST_SHAPE,
    SHAPES,
    BenchError,
    Report,
    Shape,
    caption,
    default_peers,
    host_times,
    parse_shape,
    parse_tokens,
    plot,
    run_cpu,
    run_cuda,
    title,
)
from torch_nvfp4.cli.bench_table import bench_table, host_table
from torch_nvfp4.cli.options import DtypeOption, InputQuantOption, JsonOption, parse_dtype, parse_input_quant
from torch_nvfp4.cli.output import json_writer, placed
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.gate import Gate

_CPU_TOKENS = (1, 4, 16, 64, 256)
_CUDA_TOKENS = tuple(2**i for i in range(14))
_LARGEST_SIZE = 2**20  # of M, E, K, I: a mistyped number is refused, not allocated

ShapeOption = Annotated[
    str,
    typer.Option(
        "--shape", metavar="E,K,I,TOPK", show_default=False,
        help=f"Sizes, or one of {', '.join(SHAPES)}. Default: cpu on the CPU, dsv4-flash on CUDA.",
    ),
]  # fmt: skip


class _Request(NamedTuple):
    """The options, understood."""

    device: str
    shape: Shape
    tokens: Sequence[int]
    dtype: torch.dtype
    clamp_limit: float
    skew: float
    peers: list[str]
    input_quant: str | None


# Over 60 lines: two thirds of it are its options and their help.
def command(
    device: Annotated[
        str,
        typer.Option(
            "--device", help="cpu or cuda. Default: cuda where its kernels can run, else cpu.", show_default=False
        ),
    ] = "",
    tokens: Annotated[
        str,
        typer.Option(
            "--tokens", metavar="M,M,...", show_default=False,
            help="Numbers of tokens. Default: 1,4,16,64,256 on the CPU, powers of two up to 8192 on CUDA.",
        ),
    ] = "",
    shape: ShapeOption = "",
    dtype: DtypeOption = "bf16",
    clamp_limit: Annotated[float, typer.Option("--clamp-limit", help="The SwiGLU clamp limit.")] = 10.0,
    skew: Annotated[
        float,
        typer.Option("--skew", metavar="SIGMA", help="Experts' popularity is log-normal with this sigma; 0: equal."),
    ] = 0.0,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help="What to compare with, repeatable: dequantize, transformers, ggml, kt (CPU), vllm, humming, "
            "flashinfer (CUDA), compiled (the steps with their gate fused, left to Inductor, eager), none. Default on "
            "the CPU: dequantize, and transformers where it is installed."
        ),
    ] = None,
    input_quant: InputQuantOption = "",
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Time to spend on each number of tokens.")] = 6.0,
    breakdown: Annotated[
        bool, typer.Option("--breakdown/--no-breakdown", help="CUDA: also print the time of each kernel.")
    ] = False,
    host_time: Annotated[
        bool,
        typer.Option(
            "--host-time/--no-host-time",
            help="Instead: what a call costs the host, in inference mode, without and with grad mode, over aten's add."
        ),
    ] = False,
    json_file: JsonOption = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the times into this PNG file.")] = None,
) -> None:  # fmt: skip
    """Time the MoE layer against its floor and against other implementations, interleaved in one run.

    With --input-quant fp8 the layer runs in turns with activations in 16 bits and in FP8, and the errors stand beside.

    \b
    Examples:
      torch-nvfp4 bench
      torch-nvfp4 bench --tokens 1,4 --peer none --seconds 3
      torch-nvfp4 bench --peer compiled
      torch-nvfp4 bench --host-time
      torch-nvfp4 bench --input-quant fp8 --tokens 1024,4096,8192
      torch-nvfp4 bench --device cuda --peer vllm --json h200.json --plot h200.png
    """
    terminal = Terminal(json_file)
    if host_time:
        if input_quant:
            raise ValueError(f"--input-quant {input_quant}: expected no --host-time beside it, got both")
        request = _understand(device, tokens or "1", shape, dtype, clamp_limit, 0.0, ["none"], "")
        _host_time(terminal, json_file, request, shape, seconds)
        return
    if plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot: expected matplotlib, which is not installed; pip install 'torch-nvfp4[bench]'")
    request = _understand(device, tokens, shape, dtype, clamp_limit, skew, peer, input_quant)
    with json_writer(json_file) as write_json, placed("--plot", plot_file) as plot_place:
        if peer is None and request.device == "cpu" and "transformers" not in request.peers:
            terminal.note("transformers is not installed, so it is not measured; pip install 'torch-nvfp4[bench]'")
        report = _measure(terminal, request, seconds, breakdown)
        write_json(report.to_json())
        if plot_place is not None:
            plot(report, plot_place.scratch)
            plot_place.commit()
    terminal.line(title(report), "bold")
    terminal.table(*bench_table(report))
    terminal.paragraph(caption(report), "dim")
    for row in report.rows if breakdown else ():
        kernels = ", ".join(f"{name} {value * 1e6:.1f}" for name, value in row.kernels.items())
        terminal.paragraph(f"M = {row.tokens}, µs per call: {kernels}")


def _host_time(terminal: Terminal, json_file: Path | None, request: _Request, shape: str, seconds: float) -> None:
    sizes = request.shape if shape or request.device == "cuda" else HOST_SHAPE
    with json_writer(json_file) as write_json:
        report = host_times(
            request.device, sizes, request.tokens, dtype=request.dtype, clamp_limit=request.clamp_limit, seconds=seconds
        )
        write_json(report.to_json())
    experts, hidden, intermediate, top_k = sizes
    terminal.line(
        f"Host time per call, E={experts} K={hidden} I={intermediate} top-k {top_k}, {report.dtype}; {report.machine}",
        "bold",
    )
    terminal.table(*host_table(report))
    terminal.paragraph("Medians over rounds; ratios are medians of the ratios within a round.", "dim")


def _understand(
    device: str, tokens: str, shape: str, dtype: str, clamp_limit: float, skew: float, peer: list[str] | None,
    input_quant: str,
) -> _Request:  # fmt: skip
    cuda_error = "a machine (or a torch) without one" if not torch.cuda.is_available() else None
    if cuda_error is None and not Libraries.detect().cuda_ops:
        cuda_error = "one, but this package is built without its CUDA kernels"
    device = device or ("cuda" if cuda_error is None else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and cuda_error is not None:
        raise BenchError(f"--device cuda: expected a CUDA device, got {cuda_error}")
    activations = parse_dtype(dtype, torch.device(device))
    quant = parse_input_quant(input_quant, torch.device(device))
    Gate(clamp_limit=clamp_limit)  # raises
    if not 0 <= skew < math.inf:
        raise ValueError(f"--skew: expected a finite sigma of at least 0, got {skew:g}")
    table = CUDA_PEERS if device == "cuda" else CPU_PEERS
    peers = default_peers(device) if peer is None else [name for name in peer if name != "none"]
    for name in peers:
        if name not in table:
            raise ValueError(f"--peer: expected one of {', '.join((*table, 'none'))} on {device}, got {name!r}")
    sizes, counts = understand_sizes(device, shape, tokens)
    return _Request(device, sizes, counts, activations, clamp_limit, skew, peers, quant)


def understand_sizes(device: str, shape: str, tokens: str) -> tuple[Shape, tuple[int, ...]]:
    """(--shape, --tokens) with the defaults of a device. Raises ValueError (expected and got)."""
    sizes = parse_shape(shape or ("dsv4-flash" if device == "cuda" else "cpu"))
    counts = parse_tokens(tokens) if tokens else _CUDA_TOKENS if device == "cuda" else _CPU_TOKENS
    if max(*sizes, *counts) > _LARGEST_SIZE:
        raise ValueError(f"expected sizes and numbers of tokens of at most {_LARGEST_SIZE:,}, got {shape} {tokens}")
    return sizes, counts


def _measure(terminal: Terminal, request: _Request, seconds: float, breakdown: bool) -> Report:
    with terminal.progress() as progress:
        # A step for the weights, each peer's weights, on the CPU their agreement, and each number of tokens.
        progress.stage(1 + len(request.peers) + (request.device == "cpu") + len(request.tokens))
        begun = False

        def tell(step: str) -> None:
            nonlocal begun
            if begun:
                progress.advance()
            progress.begin(step)
            begun = True

        arguments: dict[str, Any] = {
            "dtype": request.dtype, "clamp_limit": request.clamp_limit, "skew": request.skew,
            "peers": request.peers, "seconds": seconds, "progress": tell,
        }  # fmt: skip
        if request.device == "cuda":
            arguments |= {"breakdown": breakdown, "input_quant": request.input_quant}
            return run_cuda(request.shape, request.tokens, **arguments)
        return run_cpu(request.shape, request.tokens, **arguments)
