"""The instruction levels of the CPU kernels that this processor has."""

from __future__ import annotations

from pathlib import Path

# Processor flags that a level needs, as /proc/cpuinfo names them: a second opinion on the library's own detection.
LEVEL_FLAGS = {
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
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
