"""``torch-nvfp4 generate``."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any, TextIO

import torch
import typer

from torch_nvfp4.cli.inspect import open_checkpoint
from torch_nvfp4.cli.integration import integration, of_transformers
from torch_nvfp4.cli.options import (
    BackendOption,
    CheckpointArgument,
    DeviceOption,
    InputQuantOption,
    JsonOption,
    parse_device,
    parse_dtype,
    parse_input_quant,
)
from torch_nvfp4.cli.output import json_writer
from torch_nvfp4.cli.terminal import Terminal, printable
from torch_nvfp4.cli.wording import size

_LEAST_TEMPERATURE = 1e-6  # logits that are divided by less may leave the range of fp32


# Over 60 lines: more than half of it are its options, their help and examples.
def command(
    checkpoint: CheckpointArgument,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="What to answer or to go on from.", show_default=False)
    ],
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on from the text itself, without the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, max=2**20, metavar="N", help="Tokens to generate at most.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=100.0, metavar="T", help="0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=1e-6, max=1.0, metavar="P", help="Sample among this share of probability.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, max=2**20, metavar="K", help="Sample among this many tokens; 0: all.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="Of what is not packed: bf16, fp16, on the CPU also fp32.")
    ] = "bf16",
    device: DeviceOption = "",
    backend: BackendOption = "",
    input_quant: InputQuantOption = "",
    json_file: JsonOption = None,
) -> None:
    """Generate text with transformers on the packed weights (NVFP4 or MXFP4 experts), printed as it comes.

    Uses the model's chat template where there is one. At the end, stderr has the times, tokens per second and memory.
    Needs pip install 'torch-nvfp4[transformers]'.

    \b
    Examples:
      torch-nvfp4 generate DeepSeek-V4-Flash-NVFP4 --prompt "What is NVFP4?"
      torch-nvfp4 generate Qwen3-30B-A3B-NVFP4 --prompt "Once upon a time" --raw --temperature 0.7 --max-new-tokens 64
    """
    terminal = Terminal(json_file)
    _check(prompt, temperature)
    where = parse_device(device)
    precision, quant = parse_dtype(dtype, where), parse_input_quant(input_quant, where)
    with json_writer(json_file) as write_json:
        open_checkpoint(terminal, checkpoint)  # says what is wrong with it before the seconds that transformers takes
        generation = integration("generation", "transformers")
        sampling = generation.Sampling(max_new_tokens, temperature, top_p, top_k, seed)
        start = time.perf_counter()
        stream = sys.stderr if json_file is not None and str(json_file) == "-" else sys.stdout
        with of_transformers(f"a checkpoint and a prompt that transformers can run ({checkpoint})"):
            tokenizer, model = generation.load(checkpoint, where, precision, backend or None, quant)
            load_s = time.perf_counter() - start
            chat = not raw and bool(tokenizer.chat_template)
            result = generation.generate(
                tokenizer, model, prompt, sampling, chat=chat, write=lambda text: _write(text, stream)
            )
        _write("\n", stream)
        facts = {"checkpoint": str(checkpoint), "device": str(where), "load_s": load_s, **asdict(result)}
        facts |= {"decode_tokens_per_s": result.decode_tokens_per_s, "peak_bytes": _peak_memory(where)}
        terminal.note(_summary(facts))
        write_json(facts)


def _check(prompt: str, temperature: float) -> None:
    """What the parser of options lets pass."""
    if any("\ud800" <= char <= "\udfff" for char in prompt):
        raise ValueError(f"--prompt: expected text in UTF-8, got {prompt!a:.200}")
    if 0 < temperature < _LEAST_TEMPERATURE:
        expected = f"0, which takes the likeliest token, or at least {_LEAST_TEMPERATURE:g}"
        raise ValueError(f"--temperature: expected {expected}, got {temperature:g}")


def _summary(facts: dict[str, Any]) -> str:
    rate = facts["decode_tokens_per_s"]
    return (
        f"{facts['prompt_tokens']} + {facts['new_tokens']} tokens; loaded in {facts['load_s']:.1f} s, first token "
        f"after {facts['first_token_s']:.2f} s, then {'-' if rate is None else f'{rate:.1f}'} tokens/s; "
        f"{'static cache; ' if facts['static_cache'] else ''}peak memory {size(facts['peak_bytes'])} "
        f"({facts['device']})"
    )


def _write(text: str, stream: TextIO) -> None:
    """A piece of text, with escapes for what a terminal could act on; line breaks and tabs stay."""
    for line in text.splitlines(keepends=True):
        body = line.rstrip("\r\n")
        stream.write("\t".join(printable(part) for part in body.split("\t")) + ("\n" if body != line else ""))
    stream.flush()


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated by torch on the GPU, resident (with mapped files) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
