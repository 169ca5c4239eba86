"""Loads a checkpoint with transformers and prints, in bytes, how much memory it took at most: python hf_memory.py DIR.

Counts anonymous memory (RssAnon), so the mapped files do not count, sampled each millisecond.
"""

from __future__ import annotations

import sys

import torch
import transformers

from torch_nvfp4.bench.transformers.loading import sampled_host_memory
from torch_nvfp4.integrations.transformers import from_pretrained


def main(warm_up: str, path: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    from_pretrained(warm_up)  # everything that is imported on the way
    with sampled_host_memory() as samples:
        model = from_pretrained(path)
    assert model.device.type == "cpu"
    print(max(samples) - samples[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
