"""Which layers of a model vLLM gives to torch_nvfp4, and why not the others. Does not import vLLM."""

from __future__ import annotations

from typing import Any

from torch_nvfp4.backends import Libraries
from torch_nvfp4.gate import Activation, Gate
from torch_nvfp4.integrations.device import backend_error

__all__ = ["QUANT_METHODS", "device_error", "layer_error", "layer_gate"]

# Names of vLLM's MoEActivation. Not SWIGLUOAI, whose rows of gate and up alternate.
_ACTIVATIONS = {
    "SILU": Activation.silu,
    "SWIGLUOAI_UNINTERLEAVE": Activation.silu,
    "SWIGLUSTEP": Activation.swiglustep,
    "GELU": Activation.gelu,
    "GELU_TANH": Activation.gelu_tanh,
    "RELU2": Activation.relu2,
}

QUANT_METHODS = ("ModelOptNvFp4FusedMoE", "CompressedTensorsW4A4Nvfp4MoEMethod", "QuarkNvfp4MoEMethod")
"""vLLM's classes whose weights reach the conversion as the checkpoint has them: gate rows first, two global scales on
the layer. Mixed precision and DeepSeek-V4's config use the first. A class derived from one may rely on vLLM's own
kernels (MuseSpark's does), so it does not count."""

_ALL_TO_ALL = ("allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency", "deepep_v2", "nixl_ep")
"""Exchanges of tokens between ranks that bring hidden_states in 16 bits, ids of experts and, batched, counts.

Not FlashInfer's, which vLLM's own kernels for 16-bit activations refuse too (two-sided) or take in some versions only
(one-sided); nor those in which the experts hold replicas (MoonEP) or exchange the tokens themselves (pass-through).
"""


def layer_gate(
    activation: str, limit: float | None, alpha: float | None, beta: float | None, step_limit: float | None
) -> Gate:
    """The gate that vLLM's own ``apply_moe_activation`` computes, which ignores some of what it is given.

    Args:
        activation: the name of a member of MoEActivation.
        limit, alpha, beta: ``swiglu_limit``, ``swiglu_alpha`` and ``swiglu_beta`` of the layer, None where not set.
        step_limit: the limit that is a constant of vLLM's kernel for SWIGLUSTEP.

    Raises ValueError (expected and got) for what torch_nvfp4 has not, or where vLLM's meaning is not certain.
    """
    ours = _ACTIVATIONS.get(activation)
    if ours is None:
        raise ValueError(f"expected an activation of {', '.join(_ACTIVATIONS)}, got {activation}")
    alpha, beta = 1.0 if alpha is None else alpha, 0.0 if beta is None else beta
    if activation == "SILU" and (alpha, beta) != (1.0, 0.0):
        raise ValueError(
            f"expected SILU without swiglu_alpha and swiglu_beta (vLLM's kernels do not agree on them), "
            f"got {alpha:g} and {beta:g}"
        )
    if activation == "SWIGLUOAI_UNINTERLEAVE" and limit is None:
        raise ValueError("expected a swiglu_limit with SWIGLUOAI_UNINTERLEAVE, as vLLM does, got none")
    if activation == "SWIGLUSTEP":
        if step_limit is None or (limit is not None and limit != step_limit):
            raise ValueError(
                f"expected swiglu_limit {step_limit} with SWIGLUSTEP, which vLLM has built in, got {limit}"
            )
        limit = step_limit
    return Gate(ours, limit, alpha, beta)


def device_error(
    device_type: str, capability: tuple[int, int] | None, libraries: Libraries | None = None
) -> str | None:
    """Why no layer is taken on this device, or None.

    Args:
        device_type: "cpu", "cuda", or the name of another of vLLM's platforms.
        capability: the compute capability of a CUDA device.
        libraries: default: those of this process.
    """
    return backend_error("vLLM", device_type, capability, 16, 16, None, Gate(), libraries)


def layer_error(
    config: Any,
    device_type: str,
    capability: tuple[int, int] | None,
    *,
    step_limit: float | None,
    quant_method: type | None = None,
    libraries: Libraries | None = None,
) -> str | None:
    """Why torch_nvfp4 does not take a layer, as "expected ..., got ...", or None.

    Args:
        config: vLLM's FusedMoEConfig.
        device_type, capability, libraries: as for ``device_error``.
        step_limit: as for ``layer_gate``.
        quant_method: the class that asks, None where it is not known.
    """
    if config.moe_backend != "auto":
        return f"expected --moe-backend auto, got {config.moe_backend}"
    error = device_error(device_type, capability, libraries)
    if error is not None:
        return error
    if quant_method is not None and quant_method.__name__ not in QUANT_METHODS:
        got = f"{quant_method.__module__}.{quant_method.__qualname__}"
        return f"expected a layer of {', '.join(QUANT_METHODS)}, got one of {got}"
    if config.has_bias:
        return "expected experts without biases, got some with"
    parallel = config.moe_parallel_config
    exchange = parallel.all2all_backend
    if exchange not in _ALL_TO_ALL and (parallel.use_all2all_kernels or exchange == "passthrough"):
        return f"expected an --all2all-backend of {', '.join(_ALL_TO_ALL)}, got {exchange}"
    if parallel.enable_eplb:
        return "expected no load balancing of experts (enable_eplb), which moves rows of vLLM's own layouts, got it"
    try:
        gate = layer_gate(
            config.activation.name, config.swiglu_limit, config.swiglu_alpha, config.swiglu_beta, step_limit
        )
    except ValueError as refused:
        return str(refused)
    hidden, intermediate = config.hidden_dim, config.intermediate_size_per_partition
    return backend_error("vLLM", device_type, capability, hidden, intermediate, config.in_dtype, gate, libraries)
