"""Which module of a model each packed weight of a checkpoint belongs to, and which parameter each other tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.checkpoint.layouts import expert_name, split_name
from torch_nvfp4.errors import CheckpointError, refusal, shown
from torch_nvfp4.integrations.transformers.expert_layout import has_fused_experts, kind_error, layout_of
from torch_nvfp4.integrations.transformers.fp8 import FP8Weight, fp8_weights

__all__ = ["Placement", "place"]

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_FLOATS = ("F64", "F32", "BF16", "F16")
_CODES = ("U8", "I8", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# Of formats that pack several codes into an integer.
_PACKED_LEAVES = (".weight_packed", ".qweight", "_packed", "_blocks")


@dataclass
class Placement:
    """Where the tensors of a checkpoint belong.

    Attributes:
        experts: layer -> the name of the module of its experts.
        linears: name of an NVFP4 linear in the checkpoint -> name of the model's linear.
        fp8: name of a parameter -> the FP8 weight that it is dequantized from.
        names: name of a parameter or buffer -> name of the one tensor of the checkpoint that it is.
    """

    experts: dict[int, str] = field(default_factory=dict)
    linears: dict[str, str] = field(default_factory=dict)
    fp8: dict[str, FP8Weight] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def place(model: Any, checkpoint: Checkpoint) -> Placement:
    """For a model on the meta device, before any of its modules is replaced.

    Raises CheckpointError where an NVFP4 or FP8 weight has no place, or one that cannot hold it.
    """
    conversions = list(get_model_conversion_mapping(model))
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if not isinstance(entry, WeightRenaming)]
    state = model.state_dict()

    def renamed(name: str) -> str:
        new, _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
        return name if new not in state and name in state else str(new)

    def checked(name: str, target: str) -> str:
        """``target``, if transformers would copy the tensor into it as it is: packed rows cannot be rearranged."""
        _, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target in state and pattern is not None:
            where, expected = f"{checkpoint.path}: {shown(name)}", "a weight that transformers loads as it is"
            raise CheckpointError(refusal(where, expected, f"one that it converts ({pattern})"))
        return target

    placement = Placement(experts=_expert_modules(model, checkpoint))
    taken: set[str] = set()
    for name in checkpoint.linears:
        target = renamed(f"{name}.weight")
        if target not in state and _is_ignored(model, target):
            continue
        checked(f"{name}.weight", target)
        placement.linears[name] = _checked_linear(model, checkpoint, name, target.removesuffix(".weight"))
        taken.add(name)
    fp8 = fp8_weights(checkpoint)
    scales = {weight.scale for weight in fp8.values()}
    for name in checkpoint.tensors:
        module, _ = split_name(name)
        expert = expert_name(module)
        is_expert = expert is not None and expert.layer in placement.experts
        if is_expert and name not in state:
            continue
        if module in taken and not name.endswith(".bias"):
            continue
        target = renamed(name)
        if name in scales:
            continue
        if name not in fp8 and not is_expert and not _is_ignored(model, target):
            _check_is_dense(checkpoint, name, state.get(target))
        if target not in state:
            if name in fp8 and not _is_ignored(model, target):
                raise CheckpointError(refusal(name, "a parameter of the model for an FP8 weight", f"none ({target})"))
        elif name in fp8:
            if state[target].shape != checkpoint.tensors[name].shape:
                where = f"{checkpoint.path}: {shown(name)}"
                expected = f"shape {list(state[target].shape)}, as {target} has"
                raise CheckpointError(refusal(where, expected, f"{list(checkpoint.tensors[name].shape)}"))
            placement.fp8[checked(name, target)] = fp8[name]
        else:
            placement.names[target] = name
    return placement


def _check_is_dense(checkpoint: Checkpoint, name: str, parameter: Tensor | None) -> None:
    """Raises CheckpointError for codes of a format that is not read here: loaded as values they would be noise.

    transformers copies them into a weight without their scales, or leaves the weight as it was initialised.
    """
    info = checkpoint.tensors[name]
    if parameter is not None:
        is_dense = info.dtype in _FLOATS or not parameter.is_floating_point()
    else:
        is_dense = len(info.shape) < 2 or not (info.dtype in _CODES or name.endswith(_PACKED_LEAVES))
    if not is_dense:
        raise CheckpointError(
            refusal(
                f"{info.file}: tensor {shown(name)}",
                "NVFP4, FP8 (a matrix with its scales), values in 16 or 32 bits, or of experts MXFP4",
                f"{info.dtype} {list(info.shape)}",
                "this format is not supported here",
            )
        )


def _is_ignored(model: Any, name: str) -> bool:
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _expert_modules(model: Any, checkpoint: Checkpoint) -> dict[int, str]:
    """The module of the experts of each layer that is NVFP4 or MXFP4 in the checkpoint."""
    candidates: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        found_layer = _LAYER.search(name)
        if found_layer is not None and has_fused_experts(module):
            candidates.setdefault(int(found_layer[1]), []).append(name)
    found = {}
    for layer in checkpoint.layers:
        sizes = checkpoint.layer_config(layer)
        names = candidates.get(layer, [])
        if len(names) != 1:
            got = f"{len(names)}: {', '.join(names)}" if names else "none"
            where, expected = f"{type(model).__name__}: layer {layer}", "one module with fused experts"
            raise CheckpointError(refusal(where, expected, got, "load another class of the model, or one layer alone"))
        module = model.get_submodule(names[0])
        layout, problem = layout_of(module)
        if problem is not None:
            expected = "experts that are two GEMMs with an activation between them"
            where, advice = f"{names[0]} ({type(module).__name__})", "NVFP4Experts.from_checkpoint runs the layer alone"
            raise CheckpointError(refusal(where, expected, problem, advice))
        problem = kind_error(layout, sizes, module)
        if problem is not None:
            raise CheckpointError(f"{checkpoint.path}: layer {layer}: {problem}")
        got_sizes = layout.sizes(module)
        if got_sizes != sizes[:3]:
            expected = f"[E, K, I] {list(got_sizes)} in layer {layer}, as the model has"
            advice = "transformers' class has one number of experts and one size for all layers"
            raise CheckpointError(refusal(checkpoint.path, expected, f"{list(sizes[:3])}", advice))
        found[layer] = names[0]
    return found


def _checked_linear(model: Any, checkpoint: Checkpoint, name: str, target: str) -> str:
    """``target``, if it is an nn.Linear of the same size."""
    where = f"{checkpoint.path}: NVFP4 linear {shown(name)}"
    try:
        module = model.get_submodule(target)
    except AttributeError:
        raise CheckpointError(refusal(where, f"a linear {target} in {type(model).__name__}", "none")) from None
    if type(module) is not nn.Linear:
        raise CheckpointError(refusal(where, f"{target} to be an nn.Linear", type(module).__name__))
    leaf = ".weight_packed" if f"{name}.weight_packed" in checkpoint.tensors else ".weight"
    rows, half = checkpoint.tensors[name + leaf].shape
    if (module.out_features, module.in_features) != (rows, 2 * half):
        expected = f"[out, in] {[module.out_features, module.in_features]}, as {target} has"
        raise CheckpointError(refusal(where, expected, f"{[rows, 2 * half]}"))
    return target
