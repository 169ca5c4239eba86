"""The model served with and without the plug-in: a process per measurement, in turns."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from torch_nvfp4.bench.layer import BenchError
from torch_nvfp4.bench.process import log_end, process_group
from torch_nvfp4.bench.vllm.engine import Job, scored_prompts
from torch_nvfp4.bench.vllm.reference import closer, distance, reference_log_probs
from torch_nvfp4.bench.vllm.report import OURS, THEIRS, ratios

__all__ = ["MODES", "Pair", "run_pair", "score", "summary"]

MODES = {OURS: "require", THEIRS: "off"}
"""What TORCH_NVFP4_VLLM is on each side."""

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the measuring process, which asks the model for its classes
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # with tensor parallelism that question goes to other processes
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

Pair = dict[str, dict[str, Any]]


def run_pair(
    job: Job, number: int, directory: Path, *, timeout: float, progress: Callable[[str], None]
) -> tuple[Pair, dict[str, Path]]:
    """Runs one process per side; from pair to pair the sides change places.

    Pair 0 does not count: it fills the caches, times everything once, and alone scores the tokens that the job names.
    Jobs, results and logs stand in ``directory``.

    Returns the results, and the files with each side's log-probabilities (none without scores).

    Raises BenchError where a process fails or takes longer than ``timeout`` seconds, or the experts of a side are not
    run by what that side stands for.
    """
    this = dataclasses.replace(job, scored=()) if number else dataclasses.replace(job, repeats=1)
    pair: Pair = {}
    scores: dict[str, Path] = {}
    for side in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
        progress(f"pair {number}{'' if number else ' (not counted)'}: {side}")
        if this.scored:
            scores[side] = directory / f"log_probs-{MODES[side]}.pt"
        pair[side] = _run(this, side, directory / f"{number}-{MODES[side]}", scores.get(side), timeout)
    return pair, scores


def _run(job: Job, side: str, stem: Path, scores: Path | None, timeout: float) -> dict[str, Any]:
    job_file, out_file, log_file = (stem.with_suffix(suffix) for suffix in (".job.json", ".json", ".log"))
    job.save(job_file)
    out_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch_nvfp4.bench.vllm.engine", str(job_file), str(out_file)]
    if scores is not None:
        command.append(str(scores))
    environment = {**os.environ, **_ENVIRONMENT, "TORCH_NVFP4_VLLM": MODES[side]}
    with process_group(command, log=log_file, environment=environment) as process:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
    if code != 0 or not out_file.is_file():
        got = f"none within {timeout:.0f} s" if code is None else f"exit code {code}"
        raise BenchError(f"{side}: expected a result, got {got}. {log_end(log_file)}")
    result: dict[str, Any] = json.loads(out_file.read_text())
    _check_experts(side, result["experts"])
    return result


def _check_experts(side: str, experts: Sequence[str]) -> None:
    ours = [name.startswith("torch_nvfp4.") for name in experts]
    if side == OURS and not (ours and all(ours)):
        raise BenchError(
            f"expected torch_nvfp4's experts with TORCH_NVFP4_VLLM=require, got {experts or 'none'}. vLLM finds the "
            "plug-in by its entry point (vllm.general_plugins): install torch_nvfp4 in vLLM's environment."
        )
    if side == THEIRS and (not ours or any(ours)):
        raise BenchError(f"expected vLLM's own experts with TORCH_NVFP4_VLLM=off, got {experts or 'none'}")


def score(
    job: Job, scores: Mapping[str, Path], device: torch.device, progress: Callable[[str], None]
) -> dict[str, Any]:
    """How far each side's log-probabilities are from the fp32 reference, and which is closer."""
    prompts = scored_prompts(job.scored, job.vocab)
    reference = reference_log_probs(Path(job.model), prompts, device=device, progress=progress)
    following = torch.tensor([token for ids in prompts for token in ids[1:]])
    values = {side: torch.load(file) for side, file in scores.items()}
    result: dict[str, Any] = {side: asdict(distance(each, reference, following)) for side, each in values.items()}
    gain, error = closer(values[OURS], values[THEIRS], reference)
    result["gain"] = {"mean": gain, "standard_error": error}
    return result


def summary(pairs: Sequence[Pair], job: Job) -> list[dict[str, Any]]:
    """One row of ``ratios`` per size."""
    rows = [ratios(pairs, "decode", str(count)) for count in job.decode]
    return rows + [ratios(pairs, "prefill", f"{count} x {length}") for count, length in job.prefill]
