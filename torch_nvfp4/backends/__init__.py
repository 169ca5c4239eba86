"""The ordered registry of MoE backends, and the choice among them.

A backend is one module with

- ``name`` and ``CLAMP_ACTIVATIONS``, the activations to which it can apply a clamp;
- ``INPUT_QUANT``: the ``input_quant`` that a layer must ask for to get it, None for the usual ones;
- ``supports(config)``: None, or why it cannot run the layer;
- ``prepare(w13, w2)``: canonical weights -> the tensors that it reads, and ``restore``, its exact inverse;
- ``apply(tensors, quant, hidden_states, topk_weights, topk_ids, ...)``: one layer;
- ``apply_batched(tensors, quant, hidden_states, expert_num_tokens)``: its experts over tokens that are theirs already.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import NoReturn, Protocol, cast

import torch
from torch import Tensor

from torch_nvfp4.backends import cpu, flashinfer_trtllm, marlin, reference, wgmma_fp8
from torch_nvfp4.backends.config import Libraries, MoEBackendConfig
from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.gate import Activation
from torch_nvfp4.quant_config import MoEQuantConfig

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "Libraries",
    "MoEBackend",
    "MoEBackendConfig",
    "check_input_quant_of_layer",
    "explain_moe_backends",
    "input_quant_error",
    "moe_backend",
    "select_moe_backend",
]

ENVIRONMENT_VARIABLE = "TORCH_NVFP4_BACKEND"

_logger = logging.getLogger(__name__)
_logged: set[str] = set()


class MoEBackend(Protocol):
    """What the registry expects of a backend's module."""

    name: str
    CLAMP_ACTIVATIONS: frozenset[Activation]
    INPUT_QUANT: str | None

    def supports(self, config: MoEBackendConfig) -> str | None:
        """None if the backend can run ``config``, else why not, as "expected ..., got ..."."""

    def prepare(self, w13: NVFP4Weight, w2: NVFP4Weight) -> dict[str, Tensor]:
        """[E, 2I, K] (global scale [E, 2]), gate rows first, or [E, I, K] (global scale [E]) of experts without a gate,
        and [E, K, I] -> the tensors that ``apply`` reads.

        Raises ValueError for NaN scales and global scales that are not finite.
        """

    def restore(
        self, tensors: Mapping[str, Tensor], hidden_size: int, intermediate_size: int
    ) -> tuple[NVFP4Weight, NVFP4Weight]:
        """The exact inverse of ``prepare``: every code and every scale byte comes back."""

    def apply(
        self,
        tensors: Mapping[str, Tensor],
        quant: MoEQuantConfig,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
    ) -> Tensor:
        """The layer: hidden_states [M, K], topk_weights fp32 and topk_ids [M, top_k] -> [M, K] in their dtype.

        ``tensors`` are those of ``prepare``, and ``w13_bias`` and ``w2_bias`` where the experts have them; the rest is
        as in ``torch_nvfp4.moe``.
        """

    def apply_batched(
        self,
        tensors: Mapping[str, Tensor],
        quant: MoEQuantConfig,
        hidden_states: Tensor,
        expert_num_tokens: Tensor,
    ) -> Tensor:
        """The layer's experts: hidden_states [E, T, K], expert_num_tokens int32 [E] -> [E, T, K] in their dtype.

        The rest is as in ``torch_nvfp4.batched_moe``. Raises NotImplementedError where the backend has no such form.
        """


BACKENDS: tuple[MoEBackend, ...] = cast(tuple[MoEBackend, ...], (flashinfer_trtllm, marlin, cpu, reference, wgmma_fp8))
"""In order of preference, among those of the same ``INPUT_QUANT``."""


def moe_backend(name: str) -> MoEBackend:
    """The backend of that name; ValueError lists what there is."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"expected a backend of {', '.join(backend.name for backend in BACKENDS)}, got {name!r}")


def _reason_against(backend: MoEBackend, config: MoEBackendConfig) -> str | None:
    """Why ``backend`` cannot run ``config``, or None. A clamp leaves only backends that can apply it, and an
    ``input_quant`` that is asked for, or not, those that are for it."""
    if config.input_quant != backend.INPUT_QUANT:
        return f"expected a layer with input_quant={backend.INPUT_QUANT!r}, got {config.input_quant!r}"
    gate = config.gate
    if gate.clamp_limit is not None and gate.activation not in backend.CLAMP_ACTIVATIONS:
        clampable = " or ".join(sorted(activation.name for activation in backend.CLAMP_ACTIVATIONS)) or "no activation"
        return (
            f"expected a backend that applies clamp_limit {gate.clamp_limit:g} to {gate.activation.name}, "
            f"got one that clamps {clampable}"
        )
    return backend.supports(config)


def explain_moe_backends(config: MoEBackendConfig) -> dict[str, str | None]:
    """Every backend in order of preference: None if it can run ``config``, else why it cannot."""
    return {backend.name: _reason_against(backend, config) for backend in BACKENDS}


def select_moe_backend(config: MoEBackendConfig, backend: str | None = None) -> MoEBackend:
    """The first backend of ``BACKENDS`` that can run ``config``, or the one asked for.

    Each distinct decision is logged once, at level INFO, with the reasons against the backends that were passed over.

    Args:
        config: the layer and the device.
        backend: a name; the choice then is not automatic. None takes the environment variable TORCH_NVFP4_BACKEND, if
            it is set and not empty, for an explicit request.

    Raises:
        ValueError: the explicit request, of a backend or of an ``input_quant``, is unknown or cannot run ``config``,
            with the reason.
        NotImplementedError: no backend can, with every backend's reason.
    """
    asked_by = "backend"
    if backend is None:
        backend, asked_by = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if backend is not None:
        try:
            requested = moe_backend(backend)
        except ValueError as error:
            raise ValueError(f"{asked_by}: {error}") from None
        reason = _reason_against(requested, config)
        if reason is not None:
            raise ValueError(f"{asked_by}={backend!r} cannot run this MoE layer ({config}): {reason}")
        _log_once(f"MoE backend {backend}, asked for by {asked_by}, for {config}")
        return requested

    reasons = explain_moe_backends(config)
    for candidate in BACKENDS:
        if reasons[candidate.name] is None:
            passed_over = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
            _log_once(f"MoE backend {candidate.name} for {config}; passed over: {passed_over or 'none'}")
            return candidate
    reason = _reason_against_input_quant(config.input_quant, reasons)
    if config.input_quant is not None and reason is not None:
        _refuse_input_quant(config, reason)
    listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no backend can run this MoE layer ({config}):{listed}")


def input_quant_error(device: torch.device | str, input_quant: str | None) -> str | None:
    """Why no layer can have this ``input_quant`` on a device that is here, as "expected ..., got ...", or None."""
    reasons = explain_moe_backends(MoEBackendConfig.for_device(device, 64, 64, input_quant=input_quant))
    return _reason_against_input_quant(input_quant, reasons)


def _reason_against_input_quant(input_quant: str | None, reasons: Mapping[str, str | None]) -> str | None:
    """None if one of the backends for ``input_quant`` can run the layer, else why the first of them cannot."""
    of_it = [reasons[backend.name] for backend in BACKENDS if input_quant == backend.INPUT_QUANT]
    return None if None in of_it else of_it[0]


def check_input_quant_of_layer(config: MoEBackendConfig) -> None:
    """Raises ValueError where no device could run the layer with the ``input_quant`` that it asks for."""
    reason = wgmma_fp8.layer_error(config) if config.input_quant == wgmma_fp8.INPUT_QUANT else None
    if reason is not None:
        _refuse_input_quant(config, reason)


def _refuse_input_quant(config: MoEBackendConfig, reason: str) -> NoReturn:
    """Every other backend would compute something else than was asked for."""
    raise ValueError(
        f"input_quant={config.input_quant!r} cannot run this MoE layer ({config}): {reason}; leave input_quant out to "
        "run it with activations in 16 bits"
    )


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _logger.info(message)
