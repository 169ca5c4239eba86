"""Everything that is measured over several GPUs of a host, in one command: ``python -m torch_nvfp4.bench.gpus``.

    python -m torch_nvfp4.bench.gpus --json gpus.json
    python -m torch_nvfp4.bench.gpus --distributed "--layers 43" --vllm "--attention-backend TRITON_ATTN"

For all GPUs, one after the other: DeepSeek-V4-Flash's layer split over them (``bench.distributed``), a Qwen3-MoE in
vLLM's engine (``bench.vllm serve``) and behind ``vllm serve`` (``bench.vllm chat``), both tensor parallel. What one
leaves is kept when another fails. At the end it prints rows for the README's tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_nvfp4.bench.layer import BenchError
from torch_nvfp4.bench.process import process_group, signals_raise
from torch_nvfp4.bench.vllm.report import FIRST_TOKEN, OURS, THEIRS

_STEPS = ("distributed", "serve", "chat")
_PATIENCE = 60.0  # seconds; a step ends its own processes first
_SPLITS = {
    "tensor": "tensor parallel over {ranks}",
    "experts": "experts split over {ranks}",
    "experts x tensor 2": "experts split over {half} pairs, each tensor parallel over its pair",
    "experts, tokens sent": "experts split over {ranks}, tokens sent",
}
_NUMBERS = {1: "one", 2: "two", 4: "four", 8: "eight"}


def _steps(text: str) -> list[str]:
    steps = text.split(",")
    for step in steps:
        if step not in _STEPS:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(_STEPS)}, got {step!r}")
    return steps


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torch_nvfp4.bench.gpus", description="all runs over several GPUs")
    parser.add_argument("--gpus", type=int, help="how many; default: all that are there")
    parser.add_argument("--only", type=_steps, default=_STEPS, help=f"some of {','.join(_STEPS)}")
    parser.add_argument("--distributed", type=shlex.split, default=[], help="more arguments of bench.distributed")
    parser.add_argument("--vllm", type=shlex.split, default=[], help="more arguments of bench.vllm serve and chat")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds per step; default 1800")
    parser.add_argument("--json", type=Path, help="write everything measured to this file, after each step")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the command itself")
    return parser


def commands(options: argparse.Namespace, gpus: int) -> dict[str, list[str]]:
    """What each step runs, without ``--json``."""
    tiny = ["--tiny"] if options.tiny else []
    vllm = [sys.executable, "-m", "torch_nvfp4.bench.vllm"]
    size = ["--tensor-parallel-size", str(gpus), *tiny, *options.vllm]
    ranks = ["--ranks", str(gpus), *tiny, *options.distributed]
    every = {
        "distributed": [sys.executable, "-m", "torch_nvfp4.bench.distributed", *ranks],
        "serve": [*vllm, "serve", "--pairs", "1", *size],
        "chat": [*vllm, "chat", *size],
    }
    return {step: every[step] for step in _STEPS if step in options.only}


def run_steps(steps: Mapping[str, Sequence[str]], timeout: float, file: Path | None) -> dict[str, Any]:
    """Runs the steps, each in processes of its own that end with it.

    Returns by step its ``commands``, ``seconds``, ``results`` (what it wrote as JSON) and, of those that failed,
    ``errors``. ``file`` has all this after each step.
    """
    result: dict[str, Any] = {"commands": {}, "seconds": {}, "results": {}, "errors": {}}
    with tempfile.TemporaryDirectory() as folder:
        for step, command in steps.items():
            print(f"== {step}: {shlex.join(command)}", file=sys.stderr, flush=True)
            result["commands"][step] = shlex.join(command)
            written = Path(folder) / f"{step}.json"
            begin = time.perf_counter()
            with process_group([*command, "--json", str(written)], log=None, patience=_PATIENCE) as process:
                try:
                    code = process.wait(timeout)
                    error = f"expected exit code 0, got {code}" if code else None
                except subprocess.TimeoutExpired:
                    error = f"expected an end within {timeout:.0f} s, got none"
            result["seconds"][step] = time.perf_counter() - begin
            with contextlib.suppress(FileNotFoundError, ValueError):  # cut short, or not even begun
                result["results"][step] = json.loads(written.read_text())
            if error is None and step not in result["results"]:
                error = "expected a result, got none"
            if error is not None:
                result["errors"][step] = error
                print(f"== {step}: {error}", file=sys.stderr, flush=True)
            if file is not None:
                file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def readme_rows(results: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown for each step that has a result."""
    if "distributed" in results:
        yield from _distributed_rows(results["distributed"])
    if "rows" in results.get("serve", {}):
        yield from _serve_rows(results["serve"])
    if "rows" in results.get("chat", {}):
        yield from _chat_rows(results["chat"])


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*cells: object) -> list[str]:
    return [_line(*cells), "|" + "---|" * len(cells)]


def _distributed_rows(result: Mapping[str, Any]) -> Iterator[str]:
    tokens = sorted({row["tokens"] for row in result["rows"]})
    yield from _head("speed over one GPU (share of communication)", *(f"M = {count}" for count in tokens))

    def spelled(number: int) -> str:
        return _NUMBERS.get(number, str(number))

    cells: dict[tuple[str, int], dict[int, str]] = {}
    for row in result["rows"]:
        share = "" if row["local"] is None else f" ({max(0.0, 1 - row['local'] / row['seconds']) * 100:.0f} %)"
        cells.setdefault((row["split"], row["ranks"]), {})[row["tokens"]] = f"{row['one'] / row['seconds']:.2f}x{share}"
    for (split, ranks), found in cells.items():
        name = _SPLITS.get(split, f"{split} over {{ranks}}").format(ranks=spelled(ranks), half=spelled(ranks // 2))
        yield _line(name, *(found.get(count, "-") for count in tokens))
    yield ""


def _serve_rows(result: Mapping[str, Any]) -> Iterator[str]:
    """Tokens per second, of a decode step the sequences'."""
    rows, size = result["rows"], result["job"]["tensor_parallel_size"]

    def tokens(row: Mapping[str, Any]) -> int:
        sequences, _, length = row["size"].partition(" x ")
        return int(sequences) * int(length or 1)

    yield from _head(f"tensor parallel {size}, tokens per second", *(f"{row['kind']} {row['size']}" for row in rows))
    for name, side in (("with the plug-in", OURS), ("vLLM alone", THEIRS)):
        yield _line(name, *(f"{tokens(row) / row[side]:.0f}" for row in rows))
    yield _line("faster", *(f"{row['ratio']:.2f}x" for row in rows))
    yield ""


def _chat_rows(result: Mapping[str, Any]) -> Iterator[str]:
    rows, size = result["rows"], result["job"]["tensor_parallel_size"]
    names = (f"{row['kind']}, {row['requests']} at once" for row in rows)
    yield from _head(f"chat completions, tensor parallel {size}", *names)

    def cell(row: Mapping[str, Any], side: str) -> str:
        if row[side] is None:
            return "-"
        return f"{row[side] * 1e3:.1f} ms" if row["kind"] == FIRST_TOKEN else f"{row[side]:.0f}"

    for name, side in (("with the plug-in", OURS), ("vLLM alone", THEIRS)):
        yield _line(name, *(cell(row, side) for row in rows))
    yield _line("faster", *("-" if row["ratio"] is None else f"{row['ratio']:.2f}x" for row in rows))
    yield ""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    gpus = options.gpus or torch.cuda.device_count()
    try:
        if not gpus:
            raise BenchError("expected a GPU, got none; to try the command on a CPU: --tiny --gpus 2")
        with signals_raise():
            result = run_steps(commands(options, gpus), options.timeout, options.json)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(readme_rows(result["results"])))
    for step, problem in result["errors"].items():
        print(f"{step} failed: {problem}", file=sys.stderr)
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
