"""Wraps the three functions with which vLLM chooses, feeds and configures its backends for NVFP4 experts.

They are wrapped in the oracle itself and in every module of vLLM that has imported them by name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from enum import Enum
from types import FrameType
from typing import Any

from torch_nvfp4._version import __version__
from torch_nvfp4.integrations.vllm.experts import NVFP4BatchedExperts, NVFP4Experts
from torch_nvfp4.integrations.vllm.parameters import check_loaded, convert_biases, layer_biases, wrap_create_weights
from torch_nvfp4.integrations.vllm.platform import device, step_limit
from torch_nvfp4.integrations.vllm.support import INTERLEAVED, config_gate, layer_error, needs_parameters
from torch_nvfp4.integrations.vllm.versions import ORACLE, bias_error, check_installed, cpu_error, marlin_error
from torch_nvfp4.integrations.vllm.weights import gate_up_scales, pack_experts, up_scales

__all__ = ["Backend", "install"]

_WRAPPED = "_torch_nvfp4_original"
_logger = logging.getLogger("vllm.torch_nvfp4")  # below vLLM's own, so that its handlers and level hold
_logged: set[str] = set()


class Backend(Enum):
    """Stands where vLLM has a member of its NvFp4MoeBackend, which it only compares and prints."""

    TORCH_NVFP4 = "TORCH_NVFP4"


def install(mode: Callable[[], str]) -> None:
    """Wraps the three functions, once per process; ``mode`` is asked for each layer.

    Raises RuntimeError where this vLLM is not known (see ``versions``).
    """
    import vllm

    oracle = importlib.import_module(ORACLE)
    wrappers = {
        "select_nvfp4_moe_backend": _select,
        "convert_to_nvfp4_moe_kernel_format": _convert,
        "make_nvfp4_moe_quant_config": _configure,
    }
    if all(hasattr(getattr(oracle, name, None), _WRAPPED) for name in wrappers):
        return
    check_installed(vllm.__version__)
    originals = {name: getattr(oracle, name) for name in wrappers}
    replacements = {name: wrapper(originals[name], mode) for name, wrapper in wrappers.items()}
    for name, replacement in replacements.items():
        setattr(replacement, _WRAPPED, originals[name])
    for module in [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "vllm"]:
        for name, original in originals.items():
            if module is not None and module.__dict__.get(name) is original:
                setattr(module, name, replacements[name])


def _select(original: Callable[..., Any], mode: Callable[[], str]) -> Callable[..., Any]:
    @functools.wraps(original)
    def select_nvfp4_moe_backend(*args: Any, **kwargs: Any) -> Any:
        asked = mode()
        if asked == "off":
            return original(*args, **kwargs)
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        config = arguments["config"]
        batched = config.moe_parallel_config.use_batched_activation_format
        experts = NVFP4BatchedExperts if batched else NVFP4Experts
        method = _quant_method(sys._getframe(1))
        reason = _reason_against(experts, None if method is None else type(method), **arguments)
        if reason is None:
            if needs_parameters(config):
                wrap_create_weights(method)
            gate = f"{config_gate(config, step_limit())}{', biases' if config.has_bias else ''}"
            _log_once(logging.INFO, f"Using torch_nvfp4 {__version__} for NVFP4 experts ({experts.__name__}, {gate})")
            return Backend.TORCH_NVFP4, experts
        if asked == "require":
            raise ValueError(
                f"TORCH_NVFP4_VLLM=require: torch_nvfp4 cannot run these NVFP4 experts: {reason}. "
                "TORCH_NVFP4_VLLM=auto leaves them to vLLM's own kernels."
            )
        _log_once(logging.WARNING, f"torch_nvfp4 leaves NVFP4 experts to vLLM's own kernels: {reason}")
        return original(*args, **kwargs)

    return select_nvfp4_moe_backend


def _reason_against(
    experts: Any, quant_method: type | None, config: Any, weight_key: Any, activation_key: Any
) -> str | None:
    where, version = device(), sys.modules["vllm"].__version__
    reason = layer_error(config, *where, step_limit=step_limit(), quant_method=quant_method) or marlin_error(version)
    if reason is None and where[0] == "cpu":
        reason = cpu_error(version)
    if reason is None and config.has_bias:
        reason = bias_error(version)
    if reason is not None:
        return reason
    # What vLLM asks of every backend: the quantization scheme, LoRA, batch invariance.
    supported, why = experts.is_supported_config(
        experts, config, weight_key, activation_key, experts.activation_format()
    )
    return None if supported else str(why)


def _quant_method(caller: FrameType) -> Any:
    """The quantization method that asks for a backend while it is being made, or None.

    vLLM passes the oracle nothing that tells one from another, and a class that is derived from one of its own may
    rely on a backend of vLLM's.
    """
    return caller.f_locals.get("self")


def _convert(original: Callable[..., Any], mode: Callable[[], str]) -> Callable[..., Any]:
    @functools.wraps(original)
    def convert_to_nvfp4_moe_kernel_format(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if given["nvfp4_backend"] is not Backend.TORCH_NVFP4:
            return original(*args, **kwargs)
        layer, gated = given["layer"], bool(given["is_act_and_mul"])
        interleaved = layer.moe_config.activation.name == INTERLEAVED
        if given["w13"].dim() == 3 and needs_parameters(layer.moe_config):
            check_loaded(layer)
        if gated:
            w13_global_scale = gate_up_scales(layer, given["w13_scale_2"], interleaved=interleaved)
        else:
            w13_global_scale = up_scales(layer, given["w13_scale_2"])
        w2_global_scale = given["w2_scale_2"].detach().float().contiguous()
        w13, w2 = pack_experts(
            given["w13"], given["w13_scale"], w13_global_scale, given["w2"], given["w2_scale"], w2_global_scale,
            gated=gated, interleaved=interleaved,
        )  # fmt: skip
        convert_biases(layer)
        # The packed weights hold the block scales. In their place vLLM wants tensors, of each of which an expert has a
        # part; activations are not quantized, so they have no scales.
        no_scale = w13.new_empty((w13.shape[0], 0))
        return w13, no_scale, w13_global_scale, None, w2, no_scale.clone(), w2_global_scale, None

    return convert_to_nvfp4_moe_kernel_format


def _configure(original: Callable[..., Any], mode: Callable[[], str]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_nvfp4_moe_quant_config(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if given["backend"] is not Backend.TORCH_NVFP4:
            return original(*args, **kwargs)
        config = importlib.import_module("vllm.model_executor.layers.fused_moe.config")
        layer = given.get("layer")  # from 0.25 on; layers with biases are not taken before
        w13_bias, w2_bias = (layer is not None and layer_biases(layer)) or (None, None)
        return config.FusedMoEQuantConfig.make(  # weights in 4 bits, activations in 16
            quant_dtype=None, weight_dtype="nvfp4", g1_alphas=given["w13_scale_2"], g2_alphas=given["w2_scale_2"],
            w1_scale=given["w13_scale"], w2_scale=given["w2_scale"], w1_bias=w13_bias, w2_bias=w2_bias,
            gemm1_clamp_limit=given.get("swiglu_limit"), gemm1_alpha=given.get("swiglu_alpha"),
            gemm1_beta=given.get("swiglu_beta"),
        )  # fmt: skip

    return make_nvfp4_moe_quant_config


def _log_once(level: int, message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _logger.log(level, message)
