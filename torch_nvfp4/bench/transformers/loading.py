"""Loads a model with transformers and measures what that takes."""

from __future__ import annotations

import gc
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from torch_nvfp4.integrations.transformers import from_pretrained

__all__ = ["Loaded", "anonymous_bytes", "load", "sampled_host_memory"]


@dataclass(frozen=True)
class Loaded:
    """What it took to load a model; bytes, above what was allocated before."""

    seconds: float
    file_bytes: int  # of the checkpoint's tensors
    device_bytes: int  # that the model keeps on the GPU
    device_peak: int
    host_peak: int  # of anonymous memory, so without mapped files

    @property
    def gigabytes_per_s(self) -> float:
        return self.file_bytes / self.seconds * 1e-9


def anonymous_bytes() -> int:
    """Resident memory of this process without mapped files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux says it"
    return int(found[1]) * 1024


@contextmanager
def sampled_host_memory(interval: float = 0.001) -> Iterator[list[int]]:
    """A list to which ``anonymous_bytes`` is added all the time; its first entry is from before the block."""
    samples = [anonymous_bytes()]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            samples.append(anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def load(path: Path, *, packed: bool, device: torch.device) -> tuple[Any, Loaded]:
    """A model in bf16 on a device, with this package's quantizer if ``packed`` says so, else as transformers has it."""
    load_model: Any = from_pretrained if packed else transformers.AutoModelForCausalLM.from_pretrained
    cuda = device.type == "cuda"
    placed = {"device_map": {"": device}} if cuda else {}
    gc.collect()
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with sampled_host_memory(0.005) as samples:
        begin = time.perf_counter()
        model = load_model(path, dtype=torch.bfloat16, **placed).eval().requires_grad_(False)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return model, Loaded(
        seconds=seconds,
        file_bytes=sum(file.stat().st_size for file in path.glob("*.safetensors")),
        device_bytes=torch.cuda.memory_allocated() - before if cuda else 0,
        device_peak=torch.cuda.max_memory_allocated() - before if cuda else 0,
        host_peak=max(samples) - samples[0],
    )
