"""Which layers of a model SGLang gives to torch_nvfp4, and why not the others. Does not import SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from torch_nvfp4.backends import Libraries
from torch_nvfp4.gate import Activation, Gate
from torch_nvfp4.integrations.device import backend_error

__all__ = ["Process", "device_error", "layer_error", "layer_gate"]

_ACTIVATIONS = {
    "silu": Activation.silu,
    "gelu": Activation.gelu,
    "gelu_tanh": Activation.gelu_tanh,
    "situ": Activation.situ,
}
_OF_SITU = ("gemm1_alpha", "gemm1_clamp_limit")
"""The fields in which SGLang's models hand over ``activation_situ_beta`` and ``activation_situ_linear_beta``."""

_WITHOUT_GATE = {"silu": Activation.silu, "gelu": Activation.gelu, "relu2": Activation.relu2}


@dataclass(frozen=True)
class Process:
    """What SGLang was told, and where it runs: the same for every layer of a process."""

    device_type: str  # "cpu", "cuda", or the name of another of SGLang's platforms
    compute_capability: tuple[int, int] | None = None  # CUDA only
    runner_backend: str = "auto"  # --moe-runner-backend
    all_to_all: str = "none"  # --moe-a2a-backend
    lora: bool = False
    load_balancing: bool = False  # --enable-eplb
    paged_experts: bool = False
    replicated_weights: bool = False  # --dwdp-size above 1
    cpu_experts: bool = False  # --kt-weight-path
    libraries: Libraries | None = None  # None: those of this process


def layer_gate(config: Any) -> Gate:
    """The gate of a layer, as SGLang's Triton runner has it.

    ``swiglu_limit`` clamps before SiLU (DeepSeek-V4), and so does ``gemm1_clamp_limit`` with ``gemm1_alpha`` (gpt-oss).
    Without one, ``gemm1_clamp_limit`` clamps what comes out of SiLU, as Step-3.5 and Ling do: ``swiglustep``, which
    SGLang's Marlin runner leaves out. With ``situ`` the two are its constants (Kimi-K3). Where the runners disagree and
    no model says what is meant, nothing is taken.

    Args:
        config: a MoeRunnerConfig (``activation``, ``is_gated``, ``swiglu_limit``, ``gemm1_alpha``, ``gemm1_beta``,
            ``gemm1_clamp_limit``, ``gate_up_interleaved``).

    Raises ValueError (expected and got) for what torch_nvfp4 has not, or where SGLang's meaning is not certain.
    """
    known = _ACTIVATIONS if config.is_gated else _WITHOUT_GATE
    activation = known.get(config.activation)
    if activation is None:
        plain = "" if config.is_gated else " for experts without a gate"
        raise ValueError(f"expected an activation of {', '.join(known)}{plain}, got {config.activation}")
    if not config.is_gated or activation is Activation.situ:
        return _gate_without_clamp(config, activation)
    before, limit, alpha = config.swiglu_limit, config.gemm1_clamp_limit, config.gemm1_alpha
    if before is not None and limit is not None and (alpha is None or before != limit):
        raise ValueError(f"expected one limit per layer, got swiglu_limit {before:g} and gemm1_clamp_limit {limit:g}")
    if alpha is None:
        if config.gemm1_beta is not None:
            raise ValueError(f"expected no gemm1_beta without gemm1_alpha, got {config.gemm1_beta:g}")
        if limit is None:
            return Gate(activation, before)
        if activation is not Activation.silu:
            raise ValueError(f"expected no gemm1_clamp_limit with {config.activation}, got {limit:g}")
        return Gate(Activation.swiglustep, limit)
    if activation is not Activation.silu:
        raise ValueError(f"expected no gemm1_alpha with {config.activation}, got {config.gemm1_alpha:g}")
    if limit is None:
        raise ValueError("expected a gemm1_clamp_limit with gemm1_alpha, as SGLang's runners do, got none")
    if config.gemm1_beta not in (None, 1.0):
        raise ValueError(f"expected gemm1_beta 1, which SGLang's runners have built in, got {config.gemm1_beta:g}")
    if config.gate_up_interleaved:
        raise ValueError("expected gate rows first with gemm1_alpha, got gate_up_interleaved")
    return Gate(activation, limit, alpha, 1.0)


def _gate_without_clamp(config: Any, activation: Activation) -> Gate:
    """Of experts without a gate, which SGLang's runners give no constants, and of ``situ``, which has two."""
    gated = config.is_gated
    refused = ("swiglu_limit", "gemm1_beta") if gated else ("swiglu_limit", "gemm1_beta", *_OF_SITU)
    for name in refused:
        value = getattr(config, name)
        if value is not None:
            raise ValueError(
                f"expected no {name} {'with situ' if gated else 'for experts without a gate'}, got {value:g}"
            )
    if not gated:
        return Gate(activation, gated=False)
    alpha, linear_beta = (getattr(config, name) for name in _OF_SITU)
    if alpha is None:  # then Marlin's runner takes its other limit from another field than Triton's
        raise ValueError("expected a gemm1_alpha with situ, as SGLang's models give, got none")
    if linear_beta is not None and linear_beta <= 0.0:
        raise ValueError(f"expected a gemm1_clamp_limit above 0 with situ, or none, got {linear_beta:g}")
    return Gate(activation, None, alpha, 0.0 if linear_beta is None else linear_beta)


def device_error(
    device_type: str, capability: tuple[int, int] | None, libraries: Libraries | None = None
) -> str | None:
    """Why no layer is taken on this device, as "expected ..., got ...", or None.

    Args:
        device_type, capability: as in ``Process``.
        libraries: default: those of this process.
    """
    return backend_error("SGLang", device_type, capability, 16, 16, None, Gate(), libraries)


def layer_error(config: Any, process: Process, dtype: torch.dtype | None, *, with_bias: bool = False) -> str | None:
    """Why torch_nvfp4 does not take a layer, as "expected ..., got ...", or None.

    Args:
        config: SGLang's MoeRunnerConfig, see ``layer_gate``.
        process: what holds for every layer.
        dtype: of hidden_states.
        with_bias: whether the experts have biases.
    """
    if process.runner_backend != "auto":
        return f"expected --moe-runner-backend auto, got {process.runner_backend}"
    error = device_error(process.device_type, process.compute_capability, process.libraries)
    if error is not None:
        return error
    if process.all_to_all != "none":
        return f"expected --moe-a2a-backend none, got {process.all_to_all}"
    refused = {
        "LoRA": process.lora,
        "load balancing of experts (--enable-eplb)": process.load_balancing,
        "paged experts": process.paged_experts,
        "weights replicated after loading (--dwdp-size)": process.replicated_weights,
        "experts on the CPU beside those here (--kt-weight-path)": process.cpu_experts,
        "biases, for which SGLang's NVFP4 layers have no parameters": with_bias,
        "outputs per expert (no_combine)": config.no_combine,
    }
    for what, present in refused.items():
        if present:
            return f"expected no {what}, got {'some' if what.startswith('biases') else 'it'}"
    factor = config.routed_scaling_factor
    if process.device_type != "cuda" and factor not in (None, 1.0):
        return f"expected a routed_scaling_factor of 1 off CUDA, where SGLang's models apply it again, got {factor:g}"
    try:
        gate = layer_gate(config)
    except ValueError as error_of_gate:
        return str(error_of_gate)
    return backend_error(
        "SGLang", process.device_type, process.compute_capability, config.hidden_size,
        config.intermediate_size_per_partition, dtype, gate, process.libraries,
    )  # fmt: skip
