"""Which way a kernel takes for a shape, and why: ``torch-nvfp4 info --select``."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from torch_nvfp4.bench import CPU_LEVEL_VARIABLE, Shape, dtype_name
from torch_nvfp4.ops import library_paths
from torch_nvfp4.ops.select import CudaDevice, explain_select

# kFewTokens in csrc/cpu/levels/amx.cpp, avx512.cpp and avx2.cpp; the portable level has one way.
FEW_TOKENS = {"amx": 4, "avx512": 8, "avx2": 4}
LEVELS = ("amx", "avx512", "avx2", "portable")
# Levels whose way for few tokens takes fp32 activations too; fp32 at the level amx goes the way of avx512.
_FEW_IN_FP32 = {"amx", "avx512"}
# kMaxTileTokens in csrc/cpu/level_kernels.h, and kMostTokens in csrc/cpu/levels/amx.cpp, which counts for 16 bits.
TILE_TOKENS = 128
AMX_TOKENS = 512


# What the choice of a CUDA kernel depends on, of GPUs that need not be here: capability, multiprocessors, shared
# memory per block with opt-in, as CUDA's programming guide and the vendor's data sheets have them.
GPUS = {
    "h100": CudaDevice(9, 132, 232448),
    "h200": CudaDevice(9, 132, 232448),
    "a100": CudaDevice(8, 108, 166912),
    "l40s": CudaDevice(8, 142, 101376),
    "rtx4090": CudaDevice(8, 128, 101376),
}


def cuda_choice(
    shape: Shape, tokens: int, dtype: torch.dtype, where: torch.device, gpu: CudaDevice | None
) -> dict[str, str]:
    """What csrc/cuda decides for one number of tokens, on ``gpu`` or else on the device ``where``, as named lines."""
    if gpu is None:
        with torch.cuda.device(where):
            gpu = CudaDevice.current()
    return {"M": str(tokens)} | explain_select(
        tokens, top_k=shape.top_k, experts=shape.experts, hidden=shape.hidden, features=shape.intermediate,
        dtype=dtype, device=gpu,
    )  # fmt: skip


@dataclass(frozen=True)
class CpuChoice:
    """How the CPU runs one MoE layer.

    Attributes:
        tokens: M.
        per_expert: the fewest and the most tokens of an expert that is hit, if the routing is even.
        arithmetic: in which the products are summed.
        path: how the codes of a weight reach the multiplications.
        why: the comparison that decided.
    """

    tokens: int
    per_expert: tuple[int, int]
    arithmetic: str
    path: str
    why: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cpu_level() -> tuple[str, str]:
    """(the level that the CPU kernels run at, why)."""
    try:
        detect = ctypes.CDLL(library_paths()[0]).nvfp4_cpu_detected_level
        detect.restype = ctypes.c_char_p
        detected = detect().decode()
    except (OSError, AttributeError):
        detected = "unknown"
    wanted = os.environ.get(CPU_LEVEL_VARIABLE)
    if wanted:
        return wanted, f"asked for by {CPU_LEVEL_VARIABLE}; this processor and build can {detected}"
    return detected, f"the highest of this processor and build ({CPU_LEVEL_VARIABLE} is not set)"


def cpu_choices(shape: Shape, tokens: Sequence[int], dtype: torch.dtype, level: str) -> list[CpuChoice]:
    """What ``csrc/cpu`` decides for each number of tokens, expert by expert, under an even routing.

    Raises ValueError for a level that does not exist.
    """
    if level not in LEVELS:
        raise ValueError(f"{CPU_LEVEL_VARIABLE}: expected one of {', '.join(LEVELS)}, got {level!r}")
    return [_cpu_choice(shape, count, dtype, level) for count in tokens]


def _cpu_choice(shape: Shape, tokens: int, dtype: torch.dtype, level: str) -> CpuChoice:
    slots = tokens * shape.top_k
    fewest, most = max(1, slots // shape.experts), -(-slots // shape.experts)
    exact = dtype == torch.float32 or level not in FEW_TOKENS
    if exact and level == "amx":
        level = "avx512"
    tiles = level == "amx"
    arithmetic = "fp32" if exact else "int16"
    blocked = "bf16" if tiles else arithmetic
    limit = FEW_TOKENS.get(level, 0) if not exact or level in _FEW_IN_FP32 else 0
    chunk = min(most, AMX_TOKENS if tiles else TILE_TOKENS)
    block = f"blocks of 64 columns decoded into L1, for up to {chunk} tokens at a time"
    if limit == 0:
        what = f"the level {level}" if level not in FEW_TOKENS else f"{dtype_name(dtype)} at the level {level}"
        return CpuChoice(tokens, (fewest, most), arithmetic, block, f"{what} has no other way")
    registers = "codes decoded straight into registers"
    if most <= limit:
        return CpuChoice(tokens, (fewest, most), arithmetic, registers, f"at most {limit} tokens per expert")
    if fewest > limit:
        why = f"more than {limit} tokens per expert"
        return CpuChoice(tokens, (fewest, most), blocked, block, why)
    why = f"experts of at most {limit} tokens the first way, others the second"
    both = f"{arithmetic}; {blocked}" if tiles else arithmetic
    return CpuChoice(tokens, (fewest, most), both, f"{registers}; {block}", why)
