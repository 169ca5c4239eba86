"""What the plug-in asks vLLM about this process."""

from __future__ import annotations

import inspect

from vllm.model_executor.layers.activation import swiglustep_and_mul_triton
from vllm.platforms import current_platform

__all__ = ["device", "step_limit"]


def device() -> tuple[str, tuple[int, int] | None]:
    """ "cpu", "cuda" or the name of another platform, and the compute capability of a CUDA device."""
    if current_platform.is_cpu():
        return "cpu", None
    if not current_platform.is_cuda():  # ROCm calls its devices cuda too
        return current_platform.device_name or current_platform.device_type, None
    capability = current_platform.get_device_capability()
    return "cuda", None if capability is None else (capability.major, capability.minor)


def step_limit() -> float | None:
    """The limit of MoEActivation.SWIGLUSTEP, for which vLLM calls its kernel with the default."""
    default = inspect.signature(swiglustep_and_mul_triton).parameters["limit"].default
    return float(default) if isinstance(default, (int, float)) else None
