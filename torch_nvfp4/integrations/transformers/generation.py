"""Generating text with a checkpoint: for ``torch-nvfp4 generate``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer

from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.integrations.transformers.registry import from_pretrained

__all__ = ["GeneratedText", "Sampling", "generate", "load", "load_model"]


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen. temperature 0: the likeliest."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: among all
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Those of ``model.generate``: one sequence, whatever the checkpoint's generation_config.json says."""
        one = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
        if self.temperature == 0:
            return one | {"max_new_tokens": self.max_new_tokens, "do_sample": False, "top_p": None, "top_k": None,
                    "temperature": None}  # fmt: skip
        return one | {"max_new_tokens": self.max_new_tokens, "do_sample": True, "temperature": self.temperature,
                "top_p": self.top_p, "top_k": self.top_k}  # fmt: skip


@dataclass(frozen=True)
class GeneratedText:
    """What a call of ``generate`` made. Times are in seconds; the first token's holds the prompt's.

    ``step_s`` is the median of the steps, None for a single token: with a static cache the first ones compile, which
    ``decode_s`` holds as well.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    decode_s: float
    step_s: float | None
    static_cache: bool

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of the steps after the first token; None for a single token."""
        return 1 / self.step_s if self.step_s else None


def load(
    path: str | Path, device: torch.device, dtype: torch.dtype, backend: str | None = None,
    input_quant: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(tokenizer, model) of a checkpoint directory, the model on one device.

    Raises CheckpointError for a directory without a tokenizer, and what ``from_pretrained`` raises.
    """
    try:
        # The code of a checkpoint is not run, and nobody is asked on the terminal whether it may be.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())  # lists, over several lines, what each kind of tokenizer needs
        raise CheckpointError(refusal(path, "the files of a tokenizer beside the weights", reason)) from error
    # Without any file transformers makes up a tokenizer that knows its special tokens alone.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise CheckpointError(refusal(path, "the files of a tokenizer beside the weights", "none"))
    return tokenizer, load_model(path, device, dtype, backend, input_quant)


def load_model(
    path: str | Path, device: torch.device, dtype: torch.dtype, backend: str | None = None,
    input_quant: str | None = None,
) -> Any:  # fmt: skip
    """The model of a checkpoint directory on one device. Raises what ``from_pretrained`` raises."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # Onto the device at once: a layer is packed where it runs.
    placed: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    return from_pretrained(
        path, backend=backend, input_quant=input_quant, dtype=dtype, trust_remote_code=False, **placed
    ).eval()


def generate(
    tokenizer: Any, model: Any, prompt: str, sampling: Sampling, *, chat: bool, write: Callable[[str], None]
) -> GeneratedText:
    """Generates from a prompt, as the user's turn of a chat where ``chat`` says so.

    On a GPU the cache is static and the decode step compiled where the model's class allows it; on a CPU, and for
    models such as DeepSeek-V4 whose class does not, steps run one by one.

    Args:
        write: called with each piece of text as it is there.

    Raises ValueError for ``chat`` without a chat template, and for a prompt without a token.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError("expected a tokenizer with a chat template, got none; generate from the prompt itself (--raw)")
    if chat:
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"].to(model.device)
    if ids.shape[1] == 0:
        raise ValueError(f"expected a prompt of at least one token, got none in {prompt!r}")
    static = model.device.type == "cuda" and bool(getattr(model, "_can_compile_fullgraph", False))
    arguments = sampling.arguments() | ({"cache_implementation": "static"} if static else {})
    streamer = _Streamer(tokenizer, write)
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            pad_token_id=_padding(tokenizer, model),
            **arguments,
        )
    end = time.perf_counter()
    first = streamer.times[0] if streamer.times else end
    steps = [after - before for before, after in pairwise(streamer.times)]
    step = statistics.median(steps) if steps else None
    new = output[0, ids.shape[1] :]
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    return GeneratedText(text, ids.shape[1], len(new), first - start, end - first, step, static)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands the text on as it becomes readable, and knows when each token came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self._calls = 0
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls > 1:  # the first call has the prompt
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)


def _padding(tokenizer: Any, model: Any) -> int | None:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    eos = model.generation_config.eos_token_id
    return eos[0] if isinstance(eos, list) else eos
