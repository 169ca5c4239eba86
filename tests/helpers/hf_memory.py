"""Loads a checkpoint with transformers and prints, in bytes, how much memory it took at most: python hf_memory.py DIR.

Counts anonymous memory (RssAnon), so the mapped files do not count, sampled each millisecond.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

import torch
import transformers

from torch_nvfp4.integrations.transformers import from_pretrained


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(warm_up: str, path: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    from_pretrained(warm_up)  # everything that is imported on the way
    start = anonymous_bytes()
    samples = [start]
    stop = threading.Event()

    def sample() -> None:
        while not stop.is_set():
            samples.append(anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    model = from_pretrained(path)
    stop.set()
    thread.join()
    assert model.device.type == "cpu"
    print(max(samples) - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
