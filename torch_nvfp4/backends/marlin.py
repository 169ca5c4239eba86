"""The CUDA kernels of this package: weights stay in 4 bits, activations in 16, on tensor cores from SM80 on.

Named after the Marlin kernel, whose idea they share: weights laid out offline so that each thread decodes in registers
what its own matrix instruction needs.
"""

from __future__ import annotations

import torch

from torch_nvfp4.backends._packed import apply, apply_batched, prepare, restore
from torch_nvfp4.backends.config import MoEBackendConfig, dtype_error, size_error
from torch_nvfp4.gate import CLAMP_ACTIVATIONS

__all__ = ["CLAMP_ACTIVATIONS", "INPUT_QUANT", "apply", "apply_batched", "name", "prepare", "restore", "supports"]

name = "marlin"
INPUT_QUANT = None

_MIN_CAPABILITY = (8, 0)


def supports(config: MoEBackendConfig) -> str | None:
    """Why this backend cannot run ``config``, or None."""
    if config.device_type != "cuda":
        return f"expected a cuda device, got {config.device_type}"
    if config.compute_capability is None or config.compute_capability < _MIN_CAPABILITY:
        got = "none" if config.compute_capability is None else "{}.{}".format(*config.compute_capability)
        return f"expected compute capability 8.0 or later, got {got}"
    if not config.libraries.cuda_ops:
        return (
            "expected the CUDA kernel of nvfp4::moe (torch_nvfp4/_C_cuda.so), got none; build it with "
            "TORCH_NVFP4_BUILD_CUDA=1 pip install ."
        )
    return dtype_error(config, torch.bfloat16, torch.float16) or size_error(config, 16)
