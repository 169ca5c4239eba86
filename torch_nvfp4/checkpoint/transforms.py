"""Online transforms of a quantized checkpoint: rotations that a model applies while it runs.

compressed-tensors declares them in quantization_config.transform_config: groups of {"type": "hadamard", "apply":
[{"targets": [...], "location": ..., "ignore": [...]}]}. At weight_input and weight_output a rotation is part of the
stored weights. At input and output the model rotates activations, and nothing would rotate those of experts here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch_nvfp4.checkpoint.layouts import Unsupported
from torch_nvfp4.errors import refusal, shown

__all__ = ["check_transforms"]

_FOLDED_IN = ("weight_input", "weight_output")
_OF_ATTENTION = ("q_attn", "k_cache")
# Patterns that take no exponential time: characters, classes and dots, of which some may repeat.
_SIMPLE = re.compile(r"(?:\\[.dw]|[\w\-^$.:/]|\[[\w\-]+\]|(?<=[.dw\]])[*+](?![*+?]))*", re.ASCII)
_MOST_REPEATS = 2
_LONGEST = 200  # characters of a pattern, and of a name that one is tried on
_MOST_TARGETS = 1000
# Classes of modules that hold experts; other classes (LlamaAttention) are not theirs.
_CLASSES = re.compile(r"linear|mlp|moe|expert", re.IGNORECASE)


def check_transforms(where: str, transforms: Any, modules: Iterable[str]) -> None:
    """Raises Unsupported where one of the modules (its names) would have its input or output transformed."""
    if transforms is None or transforms == {}:
        return
    names = list(modules)
    for label, scheme in _schemes(where, transforms):
        location = scheme.get("location")
        if location in _FOLDED_IN or location in _OF_ATTENTION:
            continue
        targets, ignored = _texts(scheme.get("targets")), _texts(scheme.get("ignore") or [])
        for name in names:
            if targets is not None and not any(_matches(target, name, unclear=True) for target in targets):
                continue
            if any(_matches(target, name, unclear=False) for target in ignored or []):
                continue
            expected = "transforms of experts that are folded into their weights (weight_input, weight_output)"
            got = f"location {shown(location)} for {shown(scheme.get('targets'))}, which targets {shown(name)}"
            advice = "nothing would apply it here: quantize without online transforms"
            raise Unsupported(refusal(label, expected, got, advice))


def _schemes(where: str, transforms: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every entry of "apply" with its path."""
    groups = transforms.get("config_groups") if isinstance(transforms, Mapping) else None
    if not isinstance(groups, Mapping):
        raise _unknown(f"{where}.transform_config", transforms)
    for name, group in groups.items():
        label = f"{where}.transform_config.config_groups.{name}"
        schemes = group.get("apply") if isinstance(group, Mapping) else None
        if not isinstance(schemes, (list, tuple)) or not all(isinstance(scheme, Mapping) for scheme in schemes):
            raise _unknown(label, group)
        yield from ((label, scheme) for scheme in schemes)


def _unknown(label: str, value: Any) -> Unsupported:
    expected = "config_groups of {apply: [{targets, location}]}, as compressed-tensors writes them"
    return Unsupported(refusal(label, expected, shown(value), "a transform that is not understood is not dropped"))


def _texts(value: Any) -> list[str] | None:
    """The names in a list, or one name; None where it is neither, or a list too long to try."""
    values = [value] if isinstance(value, str) else value
    is_list = isinstance(values, (list, tuple)) and all(isinstance(text, str) for text in values)
    return list(values) if is_list and len(values) <= _MOST_TARGETS else None


def _matches(target: str, name: str, *, unclear: bool) -> bool:
    """Whether a target ("re:" and a pattern, a module's name or its class) is the module; `unclear` if none can say."""
    if not target.startswith("re:"):
        is_class = target.isidentifier() and _CLASSES.search(target) is not None
        return target == name or is_class
    pattern = target[3:]
    repeats = pattern.count("*") + pattern.count("+")
    if max(len(pattern), len(name)) > _LONGEST or repeats > _MOST_REPEATS or not _SIMPLE.fullmatch(pattern):
        return unclear
    return re.match(pattern, name) is not None
