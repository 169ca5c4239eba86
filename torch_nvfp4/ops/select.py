"""Which CUDA kernel a problem gets, and why: asks csrc/cuda/select.cpp, with or without a GPU, and runs nothing."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from torch_nvfp4.gate import Activation, parse_activation
from torch_nvfp4.ops._library import library_paths


@dataclass(frozen=True)
class CudaDevice:
    """What the choice of a kernel depends on; the default is an H100 or H200 (SXM)."""

    major: int = 9  # of the compute capability
    multiprocessors: int = 132
    shared_memory_per_block: int = 232448  # bytes, with opt-in

    @classmethod
    def current(cls) -> CudaDevice:
        """The current CUDA device."""
        properties: Any = torch.cuda.get_device_properties()  # typed without shared_memory_per_block_optin
        return cls(properties.major, properties.multi_processor_count, properties.shared_memory_per_block_optin)


@cache
def _function() -> Any:
    # The CPU library is always there and holds the table too. Not an op: a returned str leaks in the stable ABI.
    function = ctypes.CDLL(library_paths()[0]).nvfp4_explain_select
    sizes, numbers = [ctypes.c_int64] * 5, [ctypes.c_int] * 6
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, *sizes, *numbers, ctypes.c_char_p, ctypes.c_int64]
    function.restype = ctypes.c_int64
    return function


def explain_select(
    tokens: int,
    *,
    top_k: int,
    experts: int,
    hidden: int,
    features: int,
    op: str = "moe",
    dtype: torch.dtype = torch.bfloat16,
    activation: str | int | None = "silu",
    gated: bool = True,
    biases: bool = False,
    batch_invariant: bool = False,
    device: CudaDevice | None = None,
) -> dict[str, str]:
    """Which kernel, tile and split an op of these sizes runs with on ``device``, and why, as lines ``{name: text}``.

    Args:
        tokens: rows of the input; for ``op="batched_moe"`` those of each expert, T.
        top_k: experts per token; 1 for ``op="linear"`` and ``op="batched_moe"``.
        experts: local experts; 1 for ``op="linear"``.
        hidden: columns of the input.
        features: the intermediate size I for ``op="moe"`` and ``op="batched_moe"``, else the weight's rows.
        op: ``"moe"``, ``"batched_moe"``, ``"grouped_gemm"`` or ``"linear"``.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        activation: that of the experts, or None for a GEMM without one.
        gated: False for experts without a gate.
        biases: whether the experts have biases, which no choice depends on.
        batch_invariant: as the op takes it; not for ``op="batched_moe"``.
        device: default: the current CUDA device, or an H100 where there is none.

    Returns:
        ``problem``, ``device``, ``kernel``, ``tile``, ``split``, ``shared memory`` (of some kernels), ``not <kernel>``
        for each that was passed over, and ``why``, in this order; for ``op="batched_moe"`` ``problem``, ``device``,
        ``path 1`` and the others among which the device chooses, and ``why``. TORCH_NVFP4_ARCH=80 counts as when the op
        runs.

    Raises:
        ValueError: for a size, name or dtype that no op takes; the message says what was expected and what came.
    """
    if device is None:
        device = CudaDevice.current() if torch.cuda.is_available() else CudaDevice()
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    wide = activation is None or (gated and parse_activation(activation) in (Activation.silu, Activation.situ))
    sizes = (tokens, top_k, experts, hidden, features)
    if any(not 0 <= size < 2**63 for size in sizes):
        raise ValueError(f"expected sizes from 0 to 2^63 - 1, got {sizes}")
    facts = (device.major, device.multiprocessors, device.shared_memory_per_block)
    if any(not 0 <= fact < 2**31 for fact in facts):
        raise ValueError(f"expected numbers of a device from 0 to 2^31 - 1, got {facts}")
    text = ctypes.create_string_buffer(4096)
    name = names.get(dtype, str(dtype))
    flags = (wide, gated, batch_invariant)
    length = _function()(op.encode(), name.encode(), *sizes, *flags, *facts, text, len(text))
    answer = text.value.decode()
    if length < 0:
        raise ValueError(answer)
    return dict(line.split(": ", 1) for line in answer.splitlines())
