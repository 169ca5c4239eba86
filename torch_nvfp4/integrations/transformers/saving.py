"""What save_pretrained writes: the checkpoint's own names and bytes, so that every other tool can read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.integrations.transformers.modules import PackedExperts, PackedLinear, Shell
from torch_nvfp4.integrations.transformers.placement import Placement

__all__ = ["published_state"]

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def published_state(model: Any, checkpoint: Checkpoint, placement: Placement, conversions: Any) -> dict[str, Tensor]:
    """Every tensor of the checkpoint under its name, with the model's values for those that are not quantized.

    NVFP4 weights, and what the model has no use for (input scales, scales of a KV cache, layers of multi-token
    prediction), are the checkpoint's: it has to be where it was loaded from. Parameters that no tensor of it is go
    through transformers' own ``conversions``.

    Raises ValueError for a model whose NVFP4 or FP8 weights are other than the checkpoint's, or that holds only a part
    of them (tensor or expert parallelism), and CheckpointError where the checkpoint is gone.
    """
    shells = {name: module for name, module in model.named_modules() if isinstance(module, Shell)}
    state = model.state_dict()
    if any(isinstance(value, DTensor) for value in state.values()) or _is_distributed(model):
        raise ValueError(
            "expected a model on one device, to save it with NVFP4 weights, got one of several ranks; each rank has a "
            f"part of every layer: copy {checkpoint.path}, or load the model without a plan and save that"
        )
    for name, shell in shells.items():
        _check_unchanged(name, shell, checkpoint)
    inside = tuple(f"{name}.packed." for name in shells)
    state = {name: value for name, value in state.items() if not name.startswith(inside)}
    published: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, source in placement.names.items():
        if name in state:
            written.add(state[name].data_ptr())
            published[source] = _as_stored(state.pop(name), checkpoint.tensors[source].dtype)
    for name, weight in placement.fp8.items():
        if name in state:
            published[weight.name] = weight.quantized_again(checkpoint, state.pop(name))
    # A tied parameter is written once, under the name that the checkpoint has for it.
    rest = {name: value for name, value in state.items() if value.data_ptr() not in written}
    model._weight_conversions = conversions
    published.update(revert_weight_conversion(model, rest))
    model._weight_conversions = []
    for name in checkpoint.tensors.keys() - published.keys():
        published[name] = checkpoint.tensor(name)
    return published


def _as_stored(value: Tensor, dtype: str) -> Tensor:
    """``value`` in the dtype that the checkpoint has it in, where that keeps every value."""
    stored = _FLOATS.get(dtype)
    if stored is None or value.dtype not in _FLOATS.values() or stored == value.dtype:
        return value
    converted = value.to(stored)
    return converted if torch.equal(converted.to(value.dtype), value) else value


def _is_distributed(model: Any) -> bool:
    return getattr(model, "_tp_size", None) not in (None, 1)


def _check_unchanged(name: str, shell: Shell, checkpoint: Checkpoint) -> None:
    """Raises ValueError unless a shell's weights are the checkpoint's, bit for bit."""
    expected: list[Tensor | None]
    got: list[Tensor | None]
    if isinstance(shell, PackedExperts):
        assert shell.packed is not None
        weights = checkpoint.experts(shell.layer)
        expected = [*weights.w13, *weights.w2, weights.w13_bias, weights.w2_bias]
        w13, w2 = shell.packed.unpacked_weights()
        got = [*w13, *w2, shell.packed.w13_bias, shell.packed.w2_bias]
    elif isinstance(shell, PackedLinear):
        assert shell.packed is not None
        expected, got = [*checkpoint.linear(shell.name)], [*shell.packed.unpacked_weight()]
    else:
        return
    for a, b in zip(expected, got, strict=True):
        if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(_bytes(a), _bytes(b))):
            raise ValueError(
                f"{name}: expected the packed weights and biases of {checkpoint.path}, to write them again, got "
                "others; write changed weights with safetensors, from the module's unpacked weights"
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().reshape(-1).view(torch.uint8)
