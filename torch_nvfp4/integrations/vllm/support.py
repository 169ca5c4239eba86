"""Which layers of a model vLLM gives to torch_nvfp4, and why not the others. Does not import vLLM."""

from __future__ import annotations

from typing import Any

from torch_nvfp4.backends import Libraries
from torch_nvfp4.gate import Activation, Gate
from torch_nvfp4.integrations.device import backend_error

__all__ = [
    "INTERLEAVED", "QUANT_METHODS", "config_gate", "device_error", "layer_error", "layer_gate", "needs_parameters",
    "situ_of",
]  # fmt: skip

# Names of vLLM's MoEActivation.
_ACTIVATIONS = {
    "SILU": Activation.silu,
    "SWIGLUOAI": Activation.silu,
    "SWIGLUOAI_UNINTERLEAVE": Activation.silu,
    "SWIGLUSTEP": Activation.swiglustep,
    "GELU": Activation.gelu,
    "GELU_TANH": Activation.gelu_tanh,
    "RELU2": Activation.relu2,
    "SITU": Activation.situ,
}
_WITHOUT_GATE = {
    "SILU_NO_MUL": Activation.silu,
    "GELU_NO_MUL": Activation.gelu,
    "GELU_TANH_NO_MUL": Activation.gelu_tanh,
    "RELU2_NO_MUL": Activation.relu2,
}

INTERLEAVED = "SWIGLUOAI"
"""The activation whose w13 has rows of gate and up in turn (gpt-oss)."""

_OF_INTERLEAVED = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}
"""What vLLM's kernel for it has built in (``SwigluOAIAndMul``, in every known version)."""

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
    activation: str,
    limit: float | None,
    alpha: float | None,
    beta: float | None,
    step_limit: float | None,
    situ: tuple[float | None, float | None] = (None, None),
) -> Gate:
    """The gate that vLLM's own ``apply_moe_activation`` computes, which ignores some of what it is given.

    Args:
        activation: the name of a member of MoEActivation.
        limit, alpha, beta: ``swiglu_limit``, ``swiglu_alpha`` and ``swiglu_beta`` of the layer, None where not set.
        step_limit: the limit that is a constant of vLLM's kernel for SWIGLUSTEP.
        situ: ``activation_situ_beta`` and ``activation_situ_linear_beta`` of the layer.

    Raises ValueError (expected and got) for what torch_nvfp4 has not, or where vLLM's meaning is not certain.
    """
    gated = activation not in _WITHOUT_GATE
    ours = _ACTIVATIONS.get(activation) if gated else _WITHOUT_GATE[activation]
    if ours is None:
        raise ValueError(f"expected an activation of {', '.join([*_ACTIVATIONS, *_WITHOUT_GATE])}, got {activation}")
    if activation == INTERLEAVED:
        given = dict(zip(_OF_INTERLEAVED, (limit, alpha, beta), strict=True))
        for name, value in _OF_INTERLEAVED.items():
            if given[name] not in (None, value):
                raise ValueError(f"expected {name} {value} with SWIGLUOAI, which vLLM has built in, got {given[name]}")
        limit, alpha, beta = _OF_INTERLEAVED.values()
    alpha, beta = _situ_constants(activation, alpha, beta, *situ)
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
    return Gate(ours, limit, alpha, beta, gated)


def _situ_constants(
    activation: str, alpha: float | None, beta: float | None, situ_beta: float | None, linear_beta: float | None
) -> tuple[float, float]:
    """alpha and beta of the gate: of SITU its own two, else ``swiglu_alpha`` and ``swiglu_beta``."""
    if activation != "SITU":
        if situ_beta is not None or linear_beta is not None:
            raise ValueError(f"expected no activation_situ_beta with {activation}, got {situ_beta}, {linear_beta}")
        return 1.0 if alpha is None else alpha, 0.0 if beta is None else beta
    if alpha is not None or beta is not None:
        raise ValueError(f"expected no swiglu_alpha and swiglu_beta with SITU, got {alpha}, {beta}")
    if situ_beta is None:
        raise ValueError("expected an activation_situ_beta with SITU, as vLLM does, got none")
    # To vLLM's kernels a linear_beta of 0 or less is one that is not set.
    return situ_beta, 0.0 if linear_beta is None or linear_beta <= 0.0 else linear_beta


def config_gate(config: Any, step_limit: float | None) -> Gate:
    """``layer_gate`` of a FusedMoEConfig."""
    given = (config.swiglu_limit, config.swiglu_alpha, config.swiglu_beta)
    return layer_gate(config.activation.name, *given, step_limit, situ_of(config))


def situ_of(config: Any) -> tuple[float | None, float | None]:
    """The constants of SITU in a FusedMoEConfig, which has none before vLLM 0.27."""
    return getattr(config, "activation_situ_beta", None), getattr(config, "activation_situ_linear_beta", None)


def needs_parameters(config: Any) -> bool:
    """Whether a layer (FusedMoEConfig) is one of those for which ``parameters`` adds to vLLM's create_weights."""
    return bool(config.has_bias) or config.activation.name == INTERLEAVED


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
    if quant_method is None and needs_parameters(config):
        what = "with biases" if config.has_bias else f"with {INTERLEAVED}"
        return f"expected a layer of {', '.join(QUANT_METHODS)} for experts {what}, got one that is not known"
    parallel = config.moe_parallel_config
    exchange = parallel.all2all_backend
    if exchange not in _ALL_TO_ALL and (parallel.use_all2all_kernels or exchange == "passthrough"):
        return f"expected an --all2all-backend of {', '.join(_ALL_TO_ALL)}, got {exchange}"
    if parallel.enable_eplb:
        return "expected no load balancing of experts (enable_eplb), which moves rows of vLLM's own layouts, got it"
    try:
        gate = config_gate(config, step_limit)
    except ValueError as refused:
        return str(refused)
    hidden, intermediate = config.hidden_dim, config.intermediate_size_per_partition
    return backend_error(
        "vLLM", device_type, capability, hidden, intermediate, config.in_dtype, gate, libraries, biases=config.has_bias
    )
