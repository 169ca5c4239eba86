"""The biases of experts, for which vLLM's NVFP4 methods make no parameters. Does not import vLLM.

Some loaders of vLLM's models skip a tensor for which there is no parameter, the transformers backend's those of biases,
gpt-oss's those of scales whose names it does not know. So the layers here begin with NaN where a checkpoint has to
write, and what is left of it after loading is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.integrations.vllm.support import INTERLEAVED
from torch_nvfp4.integrations.vllm.weights import deinterleave

__all__ = ["BIASES", "check_loaded", "convert_biases", "layer_biases", "wrap_create_weights"]

BIASES = ("w13_bias", "w2_bias")
"""Names of vLLM's other quantization methods, which the loaders of its models look up."""

_E4M3_NAN = 0x7F


def wrap_create_weights(method: Any) -> None:
    """Lets a quantization method also make the biases of its layer, and begin its scales with NaN.

    w13_bias is [E, 2I] ([E, I] without a gate) and w2_bias [E, K], float32, which holds what any checkpoint has.

    Args:
        method: an object of one of vLLM's classes, whose ``moe`` is the layer's FusedMoEConfig.
    """
    method.create_weights = _with_parameters(method.create_weights, method.moe)


def _with_parameters(create_weights: Callable[..., None], config: Any) -> Callable[..., None]:
    def create(*args: Any, **kwargs: Any) -> None:
        given = inspect.signature(create_weights).bind(*args, **kwargs).arguments
        hidden, intermediate = given["hidden_size"], given["intermediate_size_per_partition"]
        unpadded = [config.hidden_dim_unpadded, config.intermediate_size_per_partition_unpadded]
        if [hidden, intermediate] != unpadded:
            kind = "with biases" if config.has_bias else f"with {INTERLEAVED}"
            raise RuntimeError(
                f"torch_nvfp4: expected K and I of experts {kind} as the checkpoint has them, {unpadded}, got "
                f"{[hidden, intermediate]}, which are padded. Set TORCH_NVFP4_VLLM=off to serve with vLLM's own kernels"
            )
        loader = given.get("extra_weight_attrs", {}).get("weight_loader")
        create_weights(*args, **kwargs)
        layer, experts = given["layer"], given["num_experts"]
        for _, scale in _scales(layer):
            if scale.dtype == torch.float8_e4m3fn:
                scale.data.view(torch.uint8).fill_(_E4M3_NAN)
            else:
                scale.data.fill_(torch.nan)
        if config.has_bias:
            rows = intermediate * (2 if config.is_act_and_mul else 1)
            for name, size in zip(BIASES, (rows, hidden), strict=True):
                empty = torch.full((experts, size), torch.nan, dtype=torch.float32)  # vLLM's default is the model's
                bias = torch.nn.Parameter(empty, requires_grad=False)
                bias.weight_loader = loader  # type: ignore[attr-defined]
                layer.register_parameter(name, bias)

    return create


def _scales(layer: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """The scales of weights, not those of activations, which are not used."""
    named = layer.named_parameters(recurse=False)
    return [(name, tensor) for name, tensor in named if "_weight_" in name and "scale" in name]


def check_loaded(layer: torch.nn.Module) -> None:
    """Raises RuntimeError with the names of the biases and scales of a layer that no checkpoint has written.

    Args:
        layer: made by a method of ``wrap_create_weights``, not converted yet.
    """
    interleaved = layer.moe_config.activation.name == INTERLEAVED  # type: ignore[union-attr]
    missing = []
    for name, tensor in (*_scales(layer), *zip(BIASES, layer_biases(layer) or (), strict=False)):
        # One scale per tensor of alternating rows: some of vLLM's loaders write the first column alone.
        alone = interleaved and name.startswith("w13_weight") and tensor.dim() == 2
        fp8 = tensor.dtype == torch.float8_e4m3fn
        empty = tensor.view(torch.uint8) == _E4M3_NAN if fp8 else (tensor[:, 0] if alone else tensor).isnan()
        if bool(empty.any()):
            missing.append(name)
    if missing:
        raise RuntimeError(
            f"torch_nvfp4: expected a checkpoint with finite values for every part of the experts, got NaN in "
            f"{', '.join(missing)}: vLLM's loader of this model has found no tensors for all of it, or they have NaN"
        )


def layer_biases(layer: Any) -> tuple[Tensor, Tensor] | None:
    """w13_bias and w2_bias of a layer, None where its experts have none.

    Raises RuntimeError where they should have some.
    """
    if not layer.moe_config.has_bias:
        return None
    w13_bias, w2_bias = (getattr(layer, name, None) for name in BIASES)
    if w13_bias is None or w2_bias is None:
        raise RuntimeError("torch_nvfp4: expected a layer with w13_bias and w2_bias, got one without them")
    return w13_bias, w2_bias


def convert_biases(layer: Any) -> None:
    """From the checkpoint's biases to those of the op, in place: gate rows first, and w2's on one rank alone.

    The outputs of tensor-parallel ranks are added up. gpt-oss's loader in vLLM leaves zeros on the others by itself.
    """
    biases = layer_biases(layer)
    if biases is None:
        return
    if layer.moe_config.activation.name == INTERLEAVED:
        biases[0].data.copy_(deinterleave(biases[0].data))
    if layer.moe_config.moe_parallel_config.tp_rank != 0:
        biases[1].data.zero_()
