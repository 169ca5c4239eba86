"""What ``cpu``, ``marlin`` and, for weights, ``wgmma_fp8`` share: ``torch.ops.nvfp4`` packs for the device of its
tensors, and runs there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torch_nvfp4.format import NVFP4Weight, has_gate_rows
from torch_nvfp4.gate import Gate, gate_keywords
from torch_nvfp4.ops import pack, unpack
from torch_nvfp4.ops.batch_invariance import invariance_keywords, refuse_batch_invariance
from torch_nvfp4.ops.batched_moe import call_batched_moe
from torch_nvfp4.ops.moe import call_moe
from torch_nvfp4.ops.optional import optional_arguments
from torch_nvfp4.quant_config import MoEQuantConfig


def prepare(w13: NVFP4Weight, w2: NVFP4Weight, input_quant: str | None = None) -> dict[str, Tensor]:
    """[E, 2I, K] (global_scale [E, 2]) or [E, I, K] (global_scale [E]), gate rows first, and [E, K, I] -> the weight
    arguments of the op ``moe``, or of the one for ``input_quant``."""
    return {
        "w13": pack(w13, gated=has_gate_rows(w13, w2), input_quant=input_quant),
        "w13_global_scale": w13.global_scale.contiguous(),
        "w2": pack(w2, input_quant=input_quant),
        "w2_global_scale": w2.global_scale.contiguous(),
    }


def restore(tensors: Mapping[str, Tensor], hidden_size: int, intermediate_size: int) -> tuple[NVFP4Weight, NVFP4Weight]:
    """The inverse of ``prepare``."""
    return (
        unpack(tensors["w13"], hidden_size, tensors["w13_global_scale"], gated=tensors["w13_global_scale"].dim() == 2),
        unpack(tensors["w2"], intermediate_size, tensors["w2_global_scale"]),
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
    """The layer: hidden_states [M, K] -> [M, K], as ``torch_nvfp4.moe``."""
    w13_scale, w2_scale = tensors["w13_global_scale"], tensors["w2_global_scale"]
    keywords: dict[str, Any] = {**_keywords(quant.gate), **invariance_keywords(None)}
    if apply_router_weight_on_input:
        keywords["apply_router_weight_on_input"] = True
    biases = (tensors.get("w13_bias"), tensors.get("w2_bias"))
    arguments = (hidden_states, tensors["w13"], w13_scale, tensors["w2"], w2_scale, topk_weights, topk_ids)
    return call_moe(
        (hidden_states, w13_scale, w2_scale, topk_weights, *biases),
        arguments + optional_arguments(expert_map, *biases),
        keywords,
    )


def apply_batched(
    tensors: Mapping[str, Tensor], quant: MoEQuantConfig, hidden_states: Tensor, expert_num_tokens: Tensor
) -> Tensor:
    """The layer's experts: hidden_states [E, T, K] -> [E, T, K], as ``torch_nvfp4.batched_moe``."""
    refuse_batch_invariance("batched_moe")
    w13_scale, w2_scale = tensors["w13_global_scale"], tensors["w2_global_scale"]
    biases = (tensors.get("w13_bias"), tensors.get("w2_bias"))
    arguments = (hidden_states, tensors["w13"], w13_scale, tensors["w2"], w2_scale, expert_num_tokens)
    return call_batched_moe(
        (hidden_states, w13_scale, w2_scale, *biases),
        arguments + optional_arguments(*biases),
        _keywords(quant.gate),
    )


def _keywords(gate: Gate) -> dict[str, Any]:
    return gate_keywords(gate.activation.value, gate.clamp_limit, gate.alpha, gate.beta)
