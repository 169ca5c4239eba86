"""The command line of the benchmark of transformers; see the package's docstring."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torch_nvfp4.bench.layer import BenchError
from torch_nvfp4.bench.random_model import removed_on_failure
from torch_nvfp4.bench.report import cpu_name
from torch_nvfp4.bench.transformers import deepseek
from torch_nvfp4.bench.transformers.report import DENSE, PACKED, load_table, print_values, time_table
from torch_nvfp4.bench.transformers.tokenizer import write_tokenizer
from torch_nvfp4.bench.vllm import model as qwen3
from torch_nvfp4.bench.vllm.engine import prompt, scored_prompts

_SHARED_MEMORY = Path("/dev/shm")
_CONTEXT = 128  # tokens before the first decode step
_MODELS: dict[str, Any] = {"dsv4": deepseek, "qwen3": qwen3}


@dataclasses.dataclass(frozen=True)
class Work:
    """How much is measured."""

    scored: tuple[int, ...] = (64,) * 8
    checked: int = 256  # tokens for the errors of the experts
    decode: tuple[int, ...] = (1, 4, 16)
    steps: int = 48
    prefill: tuple[tuple[int, int], ...] = ((1, 2048), (4, 2048))
    blocks: tuple[int, ...] = (1, 4, 16, 64, 2048)
    rounds: int = 3


_TINY_WORK = Work(
    scored=(12, 12), checked=24, decode=(2,), steps=2, prefill=((1, 24),), blocks=(1, 8), rounds=1
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_nvfp4.bench.transformers", description="transformers with packed weights and with bf16"
    )
    parser.add_argument("model", choices=tuple(_MODELS))
    parser.add_argument("--layers", type=int, help="default 3 for dsv4, 12 for qwen3")
    parser.add_argument("--dir", type=Path, help="where the models go; default: shared memory, else $TMPDIR")
    parser.add_argument("--device", type=torch.device, help="default: the GPU, if there is one")
    parser.add_argument("--json", type=Path, help="write everything measured to this file, after each step")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the benchmark itself; also on a CPU")
    parser.add_argument("--only-write", action="store_true", help="write the model with packed weights, and end")
    parser.add_argument("--no-dense", action="store_true", help="without the model in bf16, where that does not fit")
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile; default inductor")
    parser.add_argument(
        "--compile-mode", help="of torch.compile; default: reduce-overhead (CUDA graphs) where one graph is the step"
    )
    return parser


class _Run:
    """One run: progress with seconds, and the results so far on disk."""

    def __init__(self, file: Path | None, result: dict[str, Any]) -> None:
        self.begin = time.perf_counter()
        self.file = file
        self.result = result

    def tell(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    def keep(self, **values: Any) -> None:
        self.result.update(values)
        if self.file is not None:
            self.file.write_text(json.dumps(self.result, indent=1) + "\n")


def _machine(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "transformers", "accelerate", "safetensors", "triton")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"machine": name, "versions": found}


def _directory(asked: Path | None, name: str, gigabytes: float) -> Path:
    if asked is not None:
        return asked
    roomy = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > (gigabytes + 4) * 1e9
    return Path(_SHARED_MEMORY if roomy else tempfile.gettempdir()) / f"torch-nvfp4-bench-{name}"


def _experts_gigabytes(sizes: Any, dense: bool) -> float:
    values = 3 * sizes.layers * sizes.experts * sizes.hidden * sizes.intermediate
    return float(values * (0.5625 + (2.0 if dense else 0.0)) * 1e-9)


def _measure(options: argparse.Namespace, run: _Run, device: torch.device) -> None:
    module = _MODELS[options.model]
    sizes = module.TINY if options.tiny else module.Sizes()
    layers = options.layers or (12 if options.model == "qwen3" and not options.tiny else sizes.layers)
    sizes = dataclasses.replace(sizes, layers=layers)
    directory = _directory(options.dir, options.model, _experts_gigabytes(sizes, not options.no_dense))
    with removed_on_failure(directory if options.dir is None else None, "model", "dense", "tiny", "tiny-dense"):
        _measure_in(directory, sizes, options, run, device)


def _measure_in(directory: Path, sizes: Any, options: argparse.Namespace, run: _Run, device: torch.device) -> None:
    """What ``_measure`` does, with the models in ``directory``."""
    from torch_nvfp4.bench.transformers.dense import write_dense
    from torch_nvfp4.bench.transformers.loading import load

    module = _MODELS[options.model]
    work = _TINY_WORK if options.tiny else Work()
    path = module.write_model(directory / "model", sizes, device=device, progress=run.tell)
    write_tokenizer(path, sizes.vocab)
    run.tell(f"the model is in {path}")
    if options.only_write:
        return
    run.keep(**_machine(device), sizes=asdict(sizes), work=asdict(work), loads={})
    # bf16 first: on its way to the GPU it takes the more memory beside what is there.
    paths = {}
    if not options.no_dense:
        paths[DENSE] = write_dense(directory / "dense", path, device=device, progress=run.tell)
    paths[PACKED] = path
    if not options.tiny:
        _warm_up(module, directory, device, run)
    models = {}
    for side, where in paths.items():
        run.tell(f"loading {side}")
        models[side], loaded = load(where, packed=side == PACKED, device=device)
        run.result["loads"][side] = {**asdict(loaded), "gigabytes_per_s": loaded.gigabytes_per_s}
        run.keep()
        run.tell(f"loaded in {loaded.seconds:.1f} s")
    print(load_table(run.result["loads"]), flush=True)
    models = {side: models[side] for side in (PACKED, DENSE) if side in models}
    _values(models, path, sizes, work, run)
    gc.collect()  # the model in fp32
    _times(models, options, sizes, work, run)


def _warm_up(module: Any, directory: Path, device: torch.device, run: _Run) -> None:
    """Loads tiny models, so that what a process does once is not in the times of loading."""
    from torch_nvfp4.bench.transformers.dense import write_dense
    from torch_nvfp4.bench.transformers.loading import load

    run.tell("loading tiny models, to warm up")
    path = module.write_model(directory / "tiny", module.TINY, device=device)
    for side in (path, write_dense(directory / "tiny-dense", path, device=device, progress=lambda _: None)):
        load(side, packed=side == path, device=device)


def _values(models: dict[str, Any], path: Path, sizes: Any, work: Work, run: _Run) -> None:
    from torch_nvfp4.bench.transformers.values import compare, expert_errors, expert_modules, reference_model

    experts = expert_modules(models[PACKED])
    run.tell("the model in fp32")
    # The rest of it is that of the model in bf16 where there is one: that was loaded without this package.
    source = models.get(DENSE, models[PACKED])
    reference = reference_model(path, source.state_dict(), experts, device=source.device)
    run.tell(f"logits of {len(work.scored)} prompts")
    scores = compare(models, reference, scored_prompts(work.scored, sizes.vocab))
    run.keep(scores=scores)
    run.tell(f"experts on {work.checked} tokens")
    errors = expert_errors(models, models[PACKED], reference, prompt(0, work.checked, sizes.vocab), tuple(experts))
    run.keep(expert_errors=errors)
    print_values(scores, errors)


def _times(models: dict[str, Any], options: argparse.Namespace, sizes: Any, work: Work, run: _Run) -> None:
    from torch_nvfp4.bench.transformers import timing
    from torch_nvfp4.bench.transformers.values import expert_modules

    device = models[PACKED].device

    def ids(batch: int, length: int) -> torch.Tensor:
        return torch.tensor([prompt(index, length, sizes.vocab) for index in range(batch)], device=device)

    rows: list[dict[str, Any]] = []

    def add(kind: str, size: str, measure: Callable[[], dict[str, list[float]]], **more: Any) -> None:
        try:
            seconds = measure()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            run.tell(f"{kind}, {size}: left out, does not fit into the GPU's memory")
            return
        rows.append({"kind": kind, "size": size, **{side: statistics.median(s) for side, s in seconds.items()}, **more})
        run.keep(rows=rows)
        run.tell(time_table(rows[-1:]).splitlines()[-1])

    run.tell("MoE blocks")
    blocks = [name.removesuffix(".experts") for name in expert_modules(models[PACKED])]
    found = timing.block_seconds(models, PACKED, ids(1, max(work.blocks)), work.blocks, blocks, 5 * work.rounds)
    for count, sides in found.items():
        add("block", str(count), partial(_medians, sides), detail=sides)
    for batch, length in work.prefill:
        run.tell(f"prefill of {batch} x {length} tokens")
        for side in models.keys() - {PACKED}:
            models[side].set_experts_implementation("grouped_mm")
        measure = partial(timing.prefill_seconds, models, ids(batch, length), work.rounds)
        add("prefill", f"{batch} x {length}", measure)
    whole_step = getattr(models[PACKED], "_can_compile_fullgraph", False)
    mode = options.compile_mode or ("reduce-overhead" if whole_step and device.type == "cuda" else None)
    compile_options = {"backend": options.compile_backend, **({"mode": mode} if mode else {})}
    torch._dynamo.config.recompile_limit = 64  # a graph per batch, side and kind of layer
    length = _CONTEXT + timing.WARM_STEPS + work.steps + 1
    decoders = {side: timing.decoder(model, length, **compile_options) for side, model in models.items()}
    for batch in work.decode:
        run.tell(f"compiling the decode step of batch {batch}")
        detail = found.get(batch, {}).get(DENSE, {})
        if detail:
            models[DENSE].set_experts_implementation(detail["experts"])
        measure = partial(timing.decode_seconds, decoders, ids(batch, _CONTEXT), work.steps, work.rounds)
        add("decode", str(batch), measure, experts=detail.get("experts"), compiled=type(decoders[PACKED]).__name__)
    print(time_table(rows), flush=True)


def _medians(sides: dict[str, Any]) -> dict[str, list[float]]:
    return {side: [of["seconds"]] for side, of in sides.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    run = _Run(options.json, {"model": options.model, "arguments": sys.argv[1:]})
    try:
        _measure(options, run, device)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    run.keep(seconds=time.perf_counter() - run.begin)
    run.tell("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
