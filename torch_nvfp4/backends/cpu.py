"""The CPU kernels of this package: any x86-64 or other CPU that the C++ library was built for."""

from __future__ import annotations

import torch

from torch_nvfp4.backends._packed import apply, apply_batched, prepare, restore
from torch_nvfp4.backends.config import MoEBackendConfig, dtype_error, size_error
from torch_nvfp4.gate import CLAMP_ACTIVATIONS

__all__ = ["CLAMP_ACTIVATIONS", "INPUT_QUANT", "apply", "apply_batched", "name", "prepare", "restore", "supports"]

name = "cpu"
INPUT_QUANT = None


def supports(config: MoEBackendConfig) -> str | None:
    """Why this backend cannot run ``config``, or None."""
    if config.device_type != "cpu":
        return f"expected a cpu device, got {config.device_type}"
    if not config.libraries.cpu_ops:
        return "expected the CPU kernel of nvfp4::moe (torch_nvfp4/_C.so), got none; build it with pip install ."
    return dtype_error(config, torch.bfloat16, torch.float16, torch.float32) or size_error(config, 16)
