"""What the plug-in asks vLLM about this process."""

from __future__ import annotations

import inspect

import vllm
from vllm import envs
from vllm.model_executor.layers.activation import swiglustep_and_mul_triton
from vllm.platforms import current_platform

from torch_nvfp4.integrations.vllm.versions import LAST_WITH_COPY, release

__all__ = ["batch_invariant", "copies_output", "device", "step_limit"]


def batch_invariant() -> bool:
    """Whether a row of the model's output must have the same bits whatever the batch is (VLLM_BATCH_INVARIANT)."""
    return bool(envs.VLLM_BATCH_INVARIANT)


def copies_output() -> bool:
    """Whether this version hands experts a buffer that is not the layer's output, and copies one to the other."""
    number = release(vllm.__version__)
    return number is not None and number <= LAST_WITH_COPY


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
