"""Puts the classes of ``methods`` where SGLang makes its own for NVFP4 experts.

SGLang has several configurations that make ``ModelOptNvFp4FusedMoEMethod``, without the layer; the layer first comes
with ``create_weights``. So that method decides, and changes the class of its object. compressed-tensors' configuration
has the layer when it chooses a scheme.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW4A4Nvfp4MoE,
    CompressedTensorsW4A16Nvfp4MoE,
)
from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod
from sglang.srt.runtime_context import override_platform

from torch_nvfp4._version import __version__
from torch_nvfp4.integrations.sglang.methods import CompressedTensorsNVFP4, ModelOptNVFP4
from torch_nvfp4.integrations.sglang.platform import device, process
from torch_nvfp4.integrations.sglang.runner import NAME, NVFP4RunnerCore
from torch_nvfp4.integrations.sglang.support import layer_error, layer_gate

__all__ = ["install"]

_logger = logging.getLogger("sglang.torch_nvfp4")  # below SGLang's own, so that its handlers and level hold
_logged: set[str] = set()
_installed = False


def install(mode: Callable[[], str]) -> None:
    """Registers the runner and wraps SGLang's classes, once per process; ``mode`` is asked for each layer."""
    global _installed
    if _installed:
        return
    register_moe_runner_core(NAME, NVFP4RunnerCore)
    for cls, name, wrapper in (
        (ModelOptNvFp4FusedMoEMethod, "__init__", _init_modelopt),
        (ModelOptNvFp4FusedMoEMethod, "create_weights", _create_modelopt_weights),
        (CompressedTensorsConfig, "get_moe_scheme", _get_moe_scheme),
        (CompressedTensorsW4A4Nvfp4MoE, "__init__", _init_w4a4),
    ):
        setattr(cls, name, wrapper(getattr(cls, name), mode))
    _installed = True


def _init_modelopt(original: Callable[..., None], mode: Callable[[], str]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        exact = type(self) is ModelOptNvFp4FusedMoEMethod
        if mode() != "off" and not exact:
            _decline(mode, _expected_class(ModelOptNvFp4FusedMoEMethod, self))
        if mode() == "off" or not exact or device()[0] != "cpu":
            original(self, *args, **kwargs)
            return
        # SGLang has no kernels for NVFP4 on a CPU and says so here. Whether there are some is known with the layer.
        with override_platform(is_blackwell=True):
            original(self, *args, **kwargs)

    return __init__


def _create_modelopt_weights(original: Callable[..., None], mode: Callable[[], str]) -> Callable[..., None]:
    @functools.wraps(original)
    def create_weights(self: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        if mode() != "off" and type(self) is ModelOptNvFp4FusedMoEMethod:
            reason = None if self.quant_config.is_checkpoint_nvfp4_serialized else "expected NVFP4 weights, got others"
            if _takes(layer, mode, reason):
                self.__class__ = ModelOptNVFP4
        original(self, layer, *args, **kwargs)
        if type(self) is ModelOptNVFP4:  # placeholders of SGLang's kernels
            layer.w13_blockscale_swizzled = layer.w2_blockscale_swizzled = None

    return create_weights


def _get_moe_scheme(original: Callable[..., Any], mode: Callable[[], str]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_moe_scheme(self: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if mode() == "off":
            return original(self, layer, *args, **kwargs)
        with _no_gpu_is_asked(self):
            scheme = original(self, layer, *args, **kwargs)
        if type(scheme) is CompressedTensorsW4A16Nvfp4MoE and _takes(layer, mode):
            return CompressedTensorsNVFP4(scheme.has_input_global_scale)
        return scheme

    return get_moe_scheme


def _init_w4a4(original: Callable[..., None], mode: Callable[[], str]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if mode() != "off":  # SGLang makes it for GPUs with FP4 tensor cores, and models of it what is their own
            _decline(mode, _expected_class(CompressedTensorsW4A16Nvfp4MoE, self))
        original(self, *args, **kwargs)

    return __init__


@contextlib.contextmanager
def _no_gpu_is_asked(config: Any) -> Iterator[None]:
    """On a CPU, SGLang's question for the GPU's compute capability is answered with "too low", where torch raises."""
    if device()[0] != "cpu":
        yield
        return
    config._check_scheme_supported = lambda *args, **kwargs: False
    try:
        yield
    finally:
        del config._check_scheme_supported


def _takes(layer: Any, mode: Callable[[], str], reason: str | None = None) -> bool:
    """Whether torch_nvfp4 runs the layer; logs it, or why not.

    Raises ValueError with the reason where it does not, and either ``require`` is asked for or nothing else would.
    """
    config = layer.moe_runner_config
    where = process()
    if reason is None:
        reason = layer_error(config, where, layer.params_dtype, with_bias=layer.with_bias)
    if reason is None:
        _log_once(logging.INFO, f"Using torch_nvfp4 {__version__} for NVFP4 experts ({layer_gate(config)})")
        return True
    _decline(mode, reason, only=where.device_type == "cpu")
    return False


def _decline(mode: Callable[[], str], reason: str, only: bool = False) -> None:
    if mode() == "require":
        raise ValueError(
            f"TORCH_NVFP4_SGLANG=require: torch_nvfp4 cannot run these NVFP4 experts: {reason}. Set it to auto to let "
            "SGLang's own kernels run them."
        )
    if only:
        raise ValueError(f"torch_nvfp4 cannot run these NVFP4 experts, and SGLang has no kernels for a CPU: {reason}")
    _log_once(logging.WARNING, f"torch_nvfp4 leaves NVFP4 experts to SGLang: {reason}")


def _expected_class(cls: type, got: object) -> str:
    return f"expected a layer of {cls.__name__}, got one of {type(got).__module__}.{type(got).__qualname__}"


def _log_once(level: int, message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _logger.log(level, message)
