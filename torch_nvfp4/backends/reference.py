"""``torch_nvfp4.reference`` in fp32, on any device that torch has: slow, and there when nothing else is.

It runs as opaque ops, ``nvfp4_reference::moe`` and ``batched_moe``, since the grouping of tokens by expert reads tensor
values: with them torch.compile and torch.export go through this backend without a graph break too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_nvfp4 import reference
from torch_nvfp4.backends.config import MoEBackendConfig, dtype_error, size_error
from torch_nvfp4.format import NVFP4Weight, has_gate_rows, validate
from torch_nvfp4.gate import CLAMP_ACTIVATIONS
from torch_nvfp4.ops.batch_invariance import refuse_batch_invariance
from torch_nvfp4.ops.optional import optional_arguments
from torch_nvfp4.quant_config import MoEQuantConfig

__all__ = ["CLAMP_ACTIVATIONS", "INPUT_QUANT", "apply", "apply_batched", "name", "prepare", "restore", "supports"]

name = "reference"
INPUT_QUANT = None


def supports(config: MoEBackendConfig) -> str | None:
    """Why this backend cannot run ``config``, or None."""
    return dtype_error(config, torch.bfloat16, torch.float16, torch.float32, torch.float64) or size_error(config, 16)


def prepare(w13: NVFP4Weight, w2: NVFP4Weight) -> dict[str, Tensor]:
    """The canonical weights themselves. Those without values, on the meta device, have none to check."""
    for weight, gated in ((w13, has_gate_rows(w13, w2)), (w2, False)):
        validate(weight, gated=gated)
    weights = {"w13": w13, "w2": w2}
    return {
        f"{prefix}_{leaf}": part.contiguous()
        for prefix, weight in weights.items()
        for leaf, part in weight._asdict().items()
    }


def restore(tensors: Mapping[str, Tensor], hidden_size: int, intermediate_size: int) -> tuple[NVFP4Weight, NVFP4Weight]:
    """The inverse of ``prepare``."""
    return (
        NVFP4Weight(tensors["w13_data"], tensors["w13_scale"], tensors["w13_global_scale"]),
        NVFP4Weight(tensors["w2_data"], tensors["w2_scale"], tensors["w2_global_scale"]),
    )


def apply(
    tensors: Mapping[str, Tensor],
    quant: MoEQuantConfig,
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """The layer: hidden_states [M, K] -> [M, K] in their dtype, computed in fp32 (fp64 for fp64)."""
    refuse_batch_invariance(f"backend {name}")
    return torch.ops.nvfp4_reference.moe(
        hidden_states,
        tensors["w13_data"],
        tensors["w13_scale"],
        tensors["w13_global_scale"],
        tensors["w2_data"],
        tensors["w2_scale"],
        tensors["w2_global_scale"],
        topk_weights,
        topk_ids,
        expert_map,
        *quant.gate.kwargs().values(),
        apply_router_weight_on_input,
        *optional_arguments(tensors.get("w13_bias"), tensors.get("w2_bias")),
    )


def apply_batched(
    tensors: Mapping[str, Tensor], quant: MoEQuantConfig, hidden_states: Tensor, expert_num_tokens: Tensor
) -> Tensor:
    """The layer's experts: hidden_states [E, T, K] -> [E, T, K] in their dtype, computed in fp32 (fp64 for fp64)."""
    return torch.ops.nvfp4_reference.batched_moe(
        hidden_states,
        tensors["w13_data"],
        tensors["w13_scale"],
        tensors["w13_global_scale"],
        tensors["w2_data"],
        tensors["w2_scale"],
        tensors["w2_global_scale"],
        expert_num_tokens,
        *quant.gate.kwargs().values(),
        *optional_arguments(tensors.get("w13_bias"), tensors.get("w2_bias")),
    )


def _computed_in(hidden_states: Tensor) -> torch.dtype:
    return torch.float64 if hidden_states.dtype == torch.float64 else torch.float32


@torch.library.custom_op(
    "nvfp4_reference::moe",
    mutates_args=(),
    schema="(Tensor hidden_states, Tensor w13, Tensor w13_scale, Tensor w13_global_scale, Tensor w2, Tensor w2_scale, "
    "Tensor w2_global_scale, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, int activation, "
    "float? clamp_limit, float alpha, float beta, bool apply_router_weight_on_input, Tensor? w13_bias=None, "
    "Tensor? w2_bias=None) -> Tensor",
)
def _moe(
    hidden_states: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w13_global_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w2_global_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    activation: int,
    clamp_limit: float | None,
    alpha: float,
    beta: float,
    apply_router_weight_on_input: bool,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    output = reference.moe(
        hidden_states,
        NVFP4Weight(w13, w13_scale, w13_global_scale),
        NVFP4Weight(w2, w2_scale, w2_global_scale),
        topk_weights,
        topk_ids,
        expert_map,
        w13_bias,
        w2_bias,
        activation=activation,
        clamp_limit=clamp_limit,
        alpha=alpha,
        beta=beta,
        apply_router_weight_on_input=apply_router_weight_on_input,
        dtype=_computed_in(hidden_states),
    )
    return output.to(hidden_states.dtype)


@_moe.register_fake
def _(hidden_states: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden_states)


@torch.library.custom_op(
    "nvfp4_reference::batched_moe",
    mutates_args=(),
    schema="(Tensor hidden_states, Tensor w13, Tensor w13_scale, Tensor w13_global_scale, Tensor w2, Tensor w2_scale, "
    "Tensor w2_global_scale, Tensor expert_num_tokens, int activation, float? clamp_limit, float alpha, float beta, "
    "Tensor? w13_bias=None, Tensor? w2_bias=None) -> Tensor",
)
def _batched_moe(
    hidden_states: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w13_global_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w2_global_scale: Tensor,
    expert_num_tokens: Tensor,
    activation: int,
    clamp_limit: float | None,
    alpha: float,
    beta: float,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    output = reference.batched_moe(
        hidden_states,
        NVFP4Weight(w13, w13_scale, w13_global_scale),
        NVFP4Weight(w2, w2_scale, w2_global_scale),
        expert_num_tokens,
        w13_bias,
        w2_bias,
        activation=activation,
        clamp_limit=clamp_limit,
        alpha=alpha,
        beta=beta,
        dtype=_computed_in(hidden_states),
    )
    return output.to(hidden_states.dtype)


@_batched_moe.register_fake
def _(hidden_states: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden_states)
