"""The end of ``torch-nvfp4 demo``: transformers generates tokens on the checkpoint that was written."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_nvfp4.cli.process import failed
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.cli.wording import error

__all__ = ["MAX_DIVERGENCE", "Generation", "generate", "print_generation"]

_PROMPT = tuple(range(3, 19))
_NEW_TOKENS = 24
MAX_DIVERGENCE = 0.1
"""Largest Kullback-Leibler divergence (nats, the mean over the positions) from the model in fp32.

bf16 leaves 0.03 to 0.05 of it; with gate and up in each other's place in one of four layers it is 0.17, and 0.54
without the clamp.
"""


@dataclass(frozen=True)
class Generation:
    """What was generated, and how far the model's log-probabilities are from the model in fp32."""

    transformers: str
    tokens: list[int]
    seconds: float
    mean_kl: float


def generate(path: Path, dtype: torch.dtype, device: torch.device, backend: str | None) -> Generation | str:
    """Loads the checkpoint with transformers, generates, and compares with transformers' own model in fp32.

    Returns a line that says how to get there, where transformers (or a version that this package knows) is not
    installed.
    """
    try:
        from torch_nvfp4.bench.transformers.values import compare, expert_modules, reference_model
        from torch_nvfp4.integrations.transformers.generation import load_model
        from torch_nvfp4.integrations.transformers.versions import check_installed

        check_installed()
        importlib.import_module("accelerate")  # which from_pretrained needs
    except (ImportError, RuntimeError) as problem:
        return f"no tokens were generated ({problem}): pip install 'torch-nvfp4[transformers]', and demo does that too"
    model = load_model(path, device, dtype, backend)
    ids = torch.tensor([_PROMPT], device=model.device)
    begin = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    tokens = output[0].tolist()
    reference = reference_model(path, model.state_dict(), expert_modules(model), device=model.device)
    far = compare({"packed": model}, reference, [tokens])["packed"]
    version = importlib.metadata.version("transformers")
    return Generation(version, tokens[len(_PROMPT) :], seconds, far["mean_kl"])


def print_generation(terminal: Terminal, generation: Generation | str | None) -> None:
    """One line, or none where nothing was asked for; exit code 1 where the model is too far from the one in fp32."""
    if generation is None:
        return
    if isinstance(generation, str):
        terminal.line(generation)
        return
    if not generation.mean_kl <= MAX_DIVERGENCE:
        expected = f"at most {MAX_DIVERGENCE:g} nats from transformers' own model in fp32"
        failed("demo", f"transformers with packed weights: expected {expected}, got {error(generation.mean_kl)}")
    count = len(generation.tokens)
    terminal.line(
        f"transformers {generation.transformers} generated {count} tokens on the packed weights, "
        f"{count / generation.seconds:.1f} tokens/s, {generation.mean_kl:.1e} nats (KL) from its own model in fp32"
    )
