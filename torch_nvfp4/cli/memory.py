"""Telling memory that ran out from other errors."""

from __future__ import annotations

import re

import torch

from torch_nvfp4.cli.wording import size

_ADVICE = {
    "verify": "use fewer --tokens, or one layer at a time by --layer",
    "demo": "use fewer --layers, or --device cpu",
    "bench": "use a smaller --shape or fewer --tokens",
    "quantize": "use fewer --threads",
    "generate": "use fewer --max-new-tokens, or --device cpu",
    "serve": "",
    "info": "",
    "inspect": "",
}


def memory_error(error: BaseException) -> str | None:
    """``expected to allocate ..., got ...`` when the error says that memory ran out, else None."""
    text = str(error)
    on_cuda = isinstance(error, torch.OutOfMemoryError)
    on_cpu = "DefaultCPUAllocator" in text and "memory" in text
    if not (on_cuda or on_cpu or isinstance(error, MemoryError)):
        return None
    if text.startswith("expected") or ": expected" in text:
        return text  # one that has been here already, or one of the ops', which say for what
    match = re.search(r"allocate (\d+) bytes", text)
    asked = size(int(match[1])) if match else None
    match = re.search(r"allocate ([\d.]+ [KMGT]?i?B)", text)
    asked = match[1] if match and asked is None else asked
    where = "GPU" if on_cuda else "CPU"
    return f"expected to allocate {asked or 'memory'} on the {where}, got out of memory"


def memory_advice(command: str) -> str:
    """What a user of the command can do about it."""
    return _ADVICE.get(command, "")
