"""From the weights of a layer of vLLM to those of the op ``moe``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.ops import pack

__all__ = ["gate_up_scales", "pack_experts"]


def gate_up_scales(layer: Any, gate_scale: Tensor) -> Tensor:
    """The global scales of gate and up, [E, 2] float32, off the layer.

    vLLM hands its backends the gate's alone (and warns where the two differ); the layer still holds both:
    ``w13_weight_scale_2`` (ModelOpt, Quark), or ``w13_weight_global_scale`` (compressed-tensors), its reciprocal.

    Args:
        layer: with one of the two, [E, 2].
        gate_scale: what vLLM hands on, [E].

    Raises RuntimeError where the layer has neither, or its first column is not ``gate_scale``.
    """
    # compressed-tensors first: its layers also hold, as w13_weight_scale_2, what an earlier load was converted to.
    inverse = getattr(layer, "w13_weight_global_scale", None)
    both = getattr(layer, "w13_weight_scale_2", None) if inverse is None else 1.0 / inverse
    wanted = [gate_scale.shape[0], 2]
    if both is None or list(both.shape) != wanted:
        got = "neither" if both is None else f"shape {list(both.shape)}"
        raise RuntimeError(
            f"expected a layer with w13_weight_scale_2 or w13_weight_global_scale {wanted} (gate, up), got {got}"
        )
    both = both.detach().to(torch.float32).contiguous()
    # NaN equals itself here: it is not a sign of another vLLM, and pack() names it.
    if not torch.allclose(both[:, 0], gate_scale.detach().to(torch.float32), rtol=0.0, atol=0.0, equal_nan=True):
        raise RuntimeError(
            "expected w13_scale_2 to be the gate's column of the layer's global scales, got other values: this vLLM "
            "has changed what it hands to its backends"
        )
    return both


def pack_experts(
    w13: Tensor, w13_scale: Tensor, w13_global_scale: Tensor, w2: Tensor, w2_scale: Tensor, w2_global_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """[E, 2I, K / 2], [E, 2I, K / 16], [E, 2] and [E, K, I / 2], [E, K, I / 16], [E] -> packed w13 and w2.

    Raises:
        RuntimeError: w13 is packed already: the conversion frees what was loaded, and cannot be done twice.
        ValueError, TypeError: see ``torch_nvfp4.pack``; for instance for NaN scales.
    """
    if w13.dim() != 3:
        raise RuntimeError(
            f"expected w13 as the checkpoint has it, [E, 2I, K / 2], got shape {list(w13.shape)}, which is packed: "
            "process_weights_after_loading came twice for weights that were loaded once. vLLM's reload_weights loads "
            "and converts them again"
        )
    return (
        pack(NVFP4Weight(w13.detach(), w13_scale.detach(), w13_global_scale), gated=True),
        pack(NVFP4Weight(w2.detach(), w2_scale.detach(), w2_global_scale)),
    )
