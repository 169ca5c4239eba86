"""The CUDA kernels of this package with activations in FP8, for GPUs of compute capability 9.0 (H100, H200).

Faster than ``marlin`` for thousands of tokens and about 20 times as far from fp64, so that a layer gets it by asking
for ``input_quant="fp8"`` and in no other way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from torch_nvfp4.backends import _packed, marlin
from torch_nvfp4.backends._packed import restore
from torch_nvfp4.backends.config import MoEBackendConfig
from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.gate import Activation
from torch_nvfp4.ops.moe import moe
from torch_nvfp4.ops.moe_fp8 import MAX_EXPERTS
from torch_nvfp4.quant_config import MoEQuantConfig

__all__ = [
    "CLAMP_ACTIVATIONS", "INPUT_QUANT", "apply", "apply_batched", "layer_error", "name", "prepare", "restore",
    "supports",
]  # fmt: skip

name = "wgmma_fp8"
INPUT_QUANT = "fp8"
CLAMP_ACTIVATIONS = frozenset({Activation.silu})

_MAJOR = 9


def layer_error(config: MoEBackendConfig) -> str | None:
    """Why no device has kernels for this layer, or None."""
    if config.gate.activation is not Activation.silu:
        return f"expected activation silu, got {config.gate.activation.name}"
    if not config.gate.gated:
        return "expected experts with a gate, got some without"
    if config.biases:
        return "expected experts without biases, got some with"
    return None


def supports(config: MoEBackendConfig) -> str | None:
    """Why this backend cannot run ``config``, or None."""
    if config.device_type != "cuda":
        return f"expected a GPU of compute capability 9.0, got {config.device_type}"
    if config.compute_capability is None or config.compute_capability[0] != _MAJOR:
        got = "none" if config.compute_capability is None else "{}.{}".format(*config.compute_capability)
        return f"expected compute capability 9.0, got {got}"
    if os.environ.get("TORCH_NVFP4_ARCH") == "80":
        return "expected TORCH_NVFP4_ARCH to be unset, got 80, whose kernels have no FP8"
    # Libraries, dtypes and sizes are those of the kernels in 16 bits.
    return layer_error(config) or marlin.supports(config)


def prepare(w13: NVFP4Weight, w2: NVFP4Weight) -> dict[str, Tensor]:
    """[E, 2I, K] (global_scale [E, 2]), gate rows first, and [E, K, I] -> the weight arguments of ``moe_fp8``."""
    if w13.data.shape[0] > MAX_EXPERTS:
        raise ValueError(
            f"input_quant='fp8': expected at most {MAX_EXPERTS} experts, got {w13.data.shape[0]}; leave input_quant "
            "out, or split the experts over several GPUs"
        )
    return _packed.prepare(w13, w2, INPUT_QUANT)


def apply(
    tensors: Mapping[str, Tensor],
    quant: MoEQuantConfig,
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """The layer: hidden_states [M, K] -> [M, K], as ``torch_nvfp4.moe_fp8``."""
    gate = quant.gate
    return moe(
        hidden_states,
        tensors["w13"],
        tensors["w13_global_scale"],
        tensors["w2"],
        tensors["w2_global_scale"],
        topk_weights,
        topk_ids,
        expert_map,
        tensors.get("w13_bias"),
        tensors.get("w2_bias"),
        **gate.kwargs(),
        apply_router_weight_on_input=apply_router_weight_on_input,
        input_quant=INPUT_QUANT,
    )


def apply_batched(
    tensors: Mapping[str, Tensor], quant: MoEQuantConfig, hidden_states: Tensor, expert_num_tokens: Tensor
) -> NoReturn:
    """Raises NotImplementedError: the op has no such form."""
    raise NotImplementedError(
        f"{name}: expected tokens with a routing, got a batch with a count for each expert; leave input_quant out"
    )
