"""One measurement: vLLM with the model, in this process, as ``TORCH_NVFP4_VLLM`` says.

Runs as ``python -m torch_nvfp4.bench.vllm.engine JOB OUT``: both are files, JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.bench.vllm.options import EngineOptions

__all__ = ["Job", "experts_classes", "measure", "prompt", "scored_prompts"]

_CONTEXT = 16  # tokens of a prompt before the steps that are timed
_FEW, _MANY = 16, 112  # steps of two runs, whose difference is what 96 steps take


@dataclass(frozen=True)
class Job(EngineOptions):
    """What one process does."""

    decode: tuple[int, ...] = (1, 4, 16, 64)  # sequences per decode step
    prefill: tuple[tuple[int, int], ...] = ((1, 2048), (4, 2048))  # sequences, tokens per sequence
    scored: tuple[int, ...] = ()  # lengths of prompts whose tokens are scored
    repeats: int = 3
    vocab: int = 32000

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(file: Path) -> Job:
        values = json.loads(file.read_text())
        for name in ("decode", "scored"):
            values[name] = tuple(values[name])
        values["prefill"] = tuple(tuple(pair) for pair in values["prefill"])
        return Job(**values)


def prompt(index: int, length: int, vocab: int) -> list[int]:
    """Token ids that look random, the same in every process; another text for another index."""
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randint(3, vocab, (length,), generator=generator).tolist()


def scored_prompts(lengths: Sequence[int], vocab: int) -> list[list[int]]:
    return [prompt(10_000 + index, length, vocab) for index, length in enumerate(lengths)]


def experts_classes(model: torch.nn.Module) -> list[str]:
    """The names of the classes that run the model's experts."""
    names = set()
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            experts = type(kernel.fused_experts)
            names.add(f"{experts.__module__}.{experts.__qualname__}")
    return sorted(names)


def measure(job: Job, log_probs_file: Path | None = None) -> dict[str, Any]:
    """Loads the model and does what the job says.

    Returns the seconds of loading, of a decode step by the number of sequences, of a prefill by its size (each a list
    with one value per repeat), and which classes ran the experts. The log-probabilities of the scored prompts, fp32
    [positions, vocab], go to ``log_probs_file``.
    """
    from vllm import LLM

    begin = time.perf_counter()
    arguments = {"skip_tokenizer_init": True, "max_logprobs": -1, **job.arguments(max(job.decode, default=1))}
    llm = LLM(job.model, **arguments)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - begin}
    result["experts"] = sorted({name for names in llm.apply_model(experts_classes) for name in names})
    print(f"loaded in {result['load_seconds']:.0f} s, experts run by {result['experts']}", flush=True)
    if job.scored and log_probs_file is not None:
        torch.save(_log_probs(llm, job), log_probs_file)
    result["decode"] = {str(count): _decode_seconds(llm, job, count) for count in job.decode}
    result["prefill"] = {
        f"{count} x {length}": _prefill_seconds(llm, job, count, length) for count, length in job.prefill
    }
    return result


def _log_probs(llm: Any, job: Job) -> Tensor:
    """[positions, vocab]: after each token of each prompt but the last, what vLLM expects next; a prompt at a time."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False, ignore_eos=True
    )
    rows = []
    for ids in scored_prompts(job.scored, job.vocab):
        (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        flat = output.prompt_logprobs
        for start, end in zip(flat.start_indices[1:], flat.end_indices[1:], strict=True):
            row = torch.full((job.vocab,), float("nan"))
            row[torch.tensor(flat.token_ids[start:end])] = torch.tensor(flat.logprobs[start:end])
            rows.append(row)
    return torch.stack(rows)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _generate(llm: Any, job: Job, count: int, length: int, steps: int) -> Callable[[], object]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt(index, length, job.vocab)} for index in range(count)]
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True, detokenize=False)
    return lambda: llm.generate(prompts, params, use_tqdm=False)


def _decode_seconds(llm: Any, job: Job, count: int) -> list[float]:
    """Seconds per step: the time of a long run without that of a short one, over the steps between them."""
    few, many = (_generate(llm, job, count, _CONTEXT, steps) for steps in (_FEW, _MANY))
    few()
    seconds = [(_seconds(many) - _seconds(few)) / (_MANY - _FEW) for _ in range(job.repeats)]
    print(f"decode, {count} sequences: {min(seconds) * 1e3:.3f} ms per step", flush=True)
    return seconds


def _prefill_seconds(llm: Any, job: Job, count: int, length: int) -> list[float]:
    run = _generate(llm, job, count, length, 1)
    run()
    seconds = [_seconds(run) for _ in range(job.repeats + 2)]
    print(f"prefill, {count} x {length} tokens: {min(seconds) * 1e3:.2f} ms", flush=True)
    return seconds


def main(arguments: Sequence[str]) -> None:
    job_file, out_file = Path(arguments[0]), Path(arguments[1])
    log_probs_file = Path(arguments[2]) if len(arguments) > 2 else None
    out_file.write_text(json.dumps(measure(Job.load(job_file), log_probs_file)))


if __name__ == "__main__":
    # Under its own name, by which vLLM's workers import what the engine sends to them.
    from torch_nvfp4.bench.vllm import engine

    engine.main(sys.argv[1:])
