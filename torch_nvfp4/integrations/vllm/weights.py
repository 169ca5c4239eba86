"""From the weights of a layer of vLLM to those of the op ``moe``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.ops import pack

__all__ = ["deinterleave", "gate_up_scales", "pack_experts", "up_scales"]


def gate_up_scales(layer: Any, gate_scale: Tensor, *, interleaved: bool = False) -> Tensor:
    """The global scales of gate and up, [E, 2] float32, off the layer.

    vLLM hands its backends the gate's alone (and warns where the two differ); the layer still holds both:
    ``w13_weight_scale_2`` (ModelOpt, Quark), or ``w13_weight_global_scale`` (compressed-tensors), its reciprocal.

    Args:
        layer: with one of the two, [E, 2].
        gate_scale: what vLLM hands on, [E].
        interleaved: rows of gate and up alternate, so that one scale holds for both: the other column is the same, or
            NaN where a loader has not written it.

    Raises RuntimeError where the layer has neither, or its first column is not ``gate_scale``; ValueError for two
    scales of alternating rows.
    """
    both = _layer_scales(layer, gate_scale, 2)
    if not interleaved:
        return both
    if not bool(((both[:, 1] == both[:, 0]) | both[:, 1].isnan()).all()):
        raise ValueError("expected one global scale per expert where rows of gate and up alternate, got two")
    return both[:, :1].expand(-1, 2).contiguous()


def up_scales(layer: Any, up_scale: Tensor) -> Tensor:
    """The global scales of experts without a gate, [E] float32; what vLLM hands on, checked against the layer's [E, 1].

    Raises RuntimeError (see ``gate_up_scales``).
    """
    return _layer_scales(layer, up_scale, 1)[:, 0].contiguous()


def _layer_scales(layer: Any, first: Tensor, columns: int) -> Tensor:
    # compressed-tensors first: its layers also hold, as w13_weight_scale_2, what an earlier load was converted to.
    inverse = getattr(layer, "w13_weight_global_scale", None)
    scales = getattr(layer, "w13_weight_scale_2", None) if inverse is None else 1.0 / inverse
    wanted = [first.shape[0], columns]
    if scales is None or list(scales.shape) != wanted:
        got = "neither" if scales is None else f"shape {list(scales.shape)}"
        raise RuntimeError(
            f"expected a layer with w13_weight_scale_2 or w13_weight_global_scale {wanted} "
            f"({'gate, up' if columns == 2 else 'up'}), got {got}"
        )
    scales = scales.detach().to(torch.float32).contiguous()
    # NaN equals itself here: it is not a sign of another vLLM, and pack() names it.
    if not torch.allclose(scales[:, 0], first.detach().to(torch.float32), rtol=0.0, atol=0.0, equal_nan=True):
        raise RuntimeError(
            "expected w13_scale_2 to be the first column of the layer's global scales, got other values: this vLLM "
            "has changed what it hands to its backends"
        )
    return scales


def deinterleave(rows: Tensor) -> Tensor:
    """[E, 2I, ...] with rows of gate and up in turn -> gate rows first."""
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1)


def pack_experts(
    w13: Tensor, w13_scale: Tensor, w13_global_scale: Tensor, w2: Tensor, w2_scale: Tensor, w2_global_scale: Tensor,
    *, gated: bool = True, interleaved: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[E, 2I, K / 2], [E, 2I, K / 16], [E, 2] and [E, K, I / 2], [E, K, I / 16], [E] -> packed w13 and w2.

    Args:
        gated: False: w13 has I rows, and [E] global scales.
        interleaved: the rows of w13 alternate between gate and up.

    Raises:
        RuntimeError: w13 is packed already: the conversion frees what was loaded, and cannot be done twice. Or it has
            other rows than the activation wants.
        ValueError, TypeError: see ``torch_nvfp4.pack``; for instance for NaN scales.
    """
    if w13.dim() != 3:
        raise RuntimeError(
            f"expected w13 as the checkpoint has it, [E, {2 if gated else ''}I, K / 2], got shape {list(w13.shape)}, "
            "which is packed: process_weights_after_loading came twice for weights that were loaded once. vLLM's "
            "reload_weights loads and converts them again"
        )
    rows = w2.shape[2] * 2 * (2 if gated else 1)
    if w13.shape[1] != rows:
        raise RuntimeError(f"expected w13 with {rows} rows {'with' if gated else 'without'} a gate, got {w13.shape[1]}")
    codes, scale = w13.detach(), w13_scale.detach()
    if interleaved:
        codes, scale = deinterleave(codes), deinterleave(scale.view(torch.uint8)).view(scale.dtype)
    return (
        pack(NVFP4Weight(codes, scale, w13_global_scale), gated=gated),
        pack(NVFP4Weight(w2.detach(), w2_scale.detach(), w2_global_scale)),
    )
