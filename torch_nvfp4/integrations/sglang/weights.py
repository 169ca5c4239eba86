"""From the tensors that SGLang has loaded into a layer to those of the op ``moe``. Does not import SGLang."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.ops import pack

__all__ = ["PACKED", "pack_layer"]

PACKED = ("nvfp4_w13", "nvfp4_w13_global_scale", "nvfp4_w2", "nvfp4_w2_global_scale")
"""The parameters of a layer whose weights are packed, in the op's order."""


def pack_layer(
    layer: Any, names: tuple[str, str], scale_2: tuple[Tensor, Tensor], factor: float, *, gated: bool
) -> None:
    """Packs a layer's weights into the parameters ``PACKED`` and frees what SGLang loaded.

    Of every parameter that was loaded an empty one stays behind, whose ``weight_loader`` raises: SGLang's models look
    parameters up by name when weights are updated, and must not find fewer weights than they think.

    Args:
        layer: SGLang's FusedMoE, with ``w13_weight_scale`` [E, 2I, K / 16] and ``w2_weight_scale`` [E, K, I / 16].
        names: of the codes, [E, 2I, K / 2] with gate rows first and [E, K, I / 2].
        scale_2: the global scales of w13, [E, 2] (gate, up) or [E] for both, and of w2, [E]; factors, not divisors.
        factor: what the layer's output is multiplied by.
        gated: False: w13 has I rows, and global scales [E] or [E, 1].

    Raises ValueError or TypeError (see ``torch_nvfp4.pack``), for instance for NaN scales; RuntimeError (expected and
    got) where w13 has other rows.
    """
    loaded = dict(layer.named_parameters(recurse=False))
    w13_global, w2_global = (scale.detach().to(torch.float32) for scale in scale_2)
    w13_global = w13_global.reshape(len(w2_global), -1)
    w13_global = w13_global.expand(-1, 2) if gated else w13_global.flatten()
    w13_global, w2_global = w13_global.clone(memory_format=torch.contiguous_format), w2_global * factor
    rows = loaded[names[1]].shape[2] * (4 if gated else 2)
    if loaded[names[0]].shape[1] != rows or w13_global.shape[0] != len(w2_global):
        got = f"{loaded[names[0]].shape[1]} and global scales {list(scale_2[0].shape)}"
        raise RuntimeError(
            f"torch_nvfp4: expected w13 with {rows} rows {'with' if gated else 'without'} a gate, got {got}"
        )
    w13 = pack(NVFP4Weight(loaded[names[0]].detach(), loaded["w13_weight_scale"].detach(), w13_global), gated=gated)
    _free(layer, names[0], "w13_weight_scale")
    del loaded
    w2 = pack(NVFP4Weight(getattr(layer, names[1]).detach(), layer.w2_weight_scale.detach(), w2_global))
    _free(layer, *[name for name, _ in layer.named_parameters(recurse=False)])
    for name, tensor in zip(PACKED, (w13, w13_global, w2, w2_global), strict=True):
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


def _free(layer: torch.nn.Module, *names: str) -> None:
    for name in names:
        old = getattr(layer, name)
        empty = torch.nn.Parameter(old.detach().new_empty(0), requires_grad=False)
        empty.weight_loader = _refuse  # type: ignore[attr-defined]
        delattr(layer, name)
        layer.register_parameter(name, empty)


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "torch_nvfp4: expected no new weights after loading, got some: the experts' weights are packed once. Restart "
        "the server to serve others, or set TORCH_NVFP4_SGLANG=off."
    )
