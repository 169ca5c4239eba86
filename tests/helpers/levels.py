"""The instruction levels of the CPU kernels that this processor has."""

from __future__ import annotations

import os
from pathlib import Path

_AVX512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}

# Processor flags that a level needs, as /proc/cpuinfo names them: a second opinion on the library's own detection.
LEVEL_FLAGS = {
    # A library built with TORCH_NVFP4_EMULATE_AMX=1 has the level without the flags: make test-amx sets both.
    "amx": _AVX512 | (set() if os.environ.get("TORCH_NVFP4_EMULATE_AMX") == "1" else {"amx_tile", "amx_bf16"}),
    "avx512": _AVX512,
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}


def processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}


LEVELS = [level for level, needed in LEVEL_FLAGS.items() if needed <= processor_flags()]
