"""A model's config as sections inside sections, and which keys read as if they were about the experts' gate.

A config is a mapping (config.json) or an object with attributes (transformers' PretrainedConfig); its sections are
mappings, objects and lists of both. Nothing here recurses, so that a config may nest as deep as its parser allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, NamedTuple

import torch

from torch_nvfp4.errors import CheckpointError, refusal, shown

__all__ = ["TEXT_SECTIONS", "Key", "as_mapping", "keys_of", "text_chain"]

# Sections that describe the language model; they nest (thinker_config.text_config).
TEXT_SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config")
# Sections about the files and not about the model, and what a class of transformers says about itself.
_NOT_THE_MODEL = {"quantization_config", "compression_config", "attribute_map", "sub_configs"}
_PLAIN = (str, bytes, int, float, complex, type(None))

_GLU = {"swiglu", "geglu", "reglu", "glu", "silu"}
_GATE = _GLU | {"act", "activation", "situ", "mlp", "ffn", "gemm1", "moe", "expert", "experts", "gate"}
_LIMIT = {"limit", "limits", "clamp", "clamps", "clip"}
_SHARED = {"shared", "share"}
# Sections of encoders, which have no routed experts: GLM-5.3-Flash's vision_config has a swiglu_limit of its own.
_ENCODERS = {"vision", "visual", "image", "video", "audio", "speech"}
_ACTIVATION = {"act", "activation"}
# Of what a key or a section consists that names the activation of experts; with another word it names another one
# (mamba_hidden_act, projector_hidden_act, router_activation, vision_config).
_OF_EXPERTS = {"moe", "expert", "experts", "routed", "ffn", "mlp", "ff", "feed", "forward", "gate", "gated"}
_IN_KEYS = _OF_EXPERTS | _ACTIVATION | _GLU | {"hidden", "fn", "func", "function", "type", "name", "text", "language"}
_IN_SECTIONS = _OF_EXPERTS | {
    *("config", "configs", "cfg", "params", "args", "text", "language", "llm", "lm", "decoder", "model", "transformer"),
    *("block", "blocks", "layer", "layers"),
}


class Key(NamedTuple):
    """One key of a config and where it stands.

    Attributes:
        label: with the sections around it ("text_config.hidden_act").
        is_text: whether it is a key of the config itself or of the language model's sections, which are read.
        about: what it reads like: "limit" (a clamp), "activation", "constant" (alpha, beta) of the experts' gate, or
            "experts without weights"; None where it reads like none of them.
    """

    label: str
    name: str
    value: Any
    is_text: bool
    about: str | None


def as_mapping(config: Any) -> dict[str, Any]:
    """The keys of a mapping, or the attributes of an object: the class's too, since a limit may stand there."""
    if isinstance(config, Mapping):
        return dict(config)
    if not callable(getattr(config, "to_dict", None)):
        names = (name for name in dir(config) if not name.startswith("_"))
        return {name: value for name in names if not callable(value := getattr(config, name))}
    # to_dict has the instance's values; of a class, what is no method and no property.
    values = {
        name: value
        for owner in reversed(type(config).__mro__)
        for name, value in vars(owner).items()
        if not name.startswith("_") and not callable(value) and not hasattr(value, "__get__")
    }
    values |= config.to_dict()
    # A section that is an object has a class of its own.
    values |= {
        name: value for name, value in getattr(config, "__dict__", {}).items() if name in values and _is_section(value)
    }
    aliases = values.get("attribute_map")
    for alias, name in aliases.items() if isinstance(aliases, Mapping) else ():
        if name in values:
            values[alias] = values[name]
    return values


def text_chain(file: str | Path, config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The config and the sections of the language model inside it, outermost first, each with its path."""
    chain: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    inside: list[Any] = []  # the objects, so that one inside itself is found
    while True:
        prefix, section = chain[-1]
        key = next((key for key in TEXT_SECTIONS if section.get(key) is not None), None)
        if key is None or any(section[key] is other for other in inside):
            return chain
        if not _is_section(section[key]):
            raise CheckpointError(refusal(f"{file}: {prefix}{key}", "an object", shown(section[key])))
        inside += [] if isinstance(section[key], Mapping) else [section[key]]
        value = section[key] if isinstance(section[key], Mapping) else as_mapping(section[key])
        chain.append((f"{prefix}{key}.", value))


def keys_of(chain: list[tuple[str, Mapping[str, Any]]]) -> Iterator[Key]:
    """Every key of the config that has a `text_chain`, those of nested sections and of lists of sections too.

    Without those of encoders (of images, sound).
    """
    seen: dict[int, Any] = {}  # objects, which may refer to each other; kept alive, so that an id stays theirs
    following = {prefix for prefix, _ in chain[1:]}
    waiting = [(prefix, section, frozenset[str](), True, True) for prefix, section in chain]
    while waiting:
        prefix, section, around, is_text, is_decoder = waiting.pop()
        for name, value in section.items():
            if isinstance(name, str) and name in _NOT_THE_MODEL:
                continue
            words = _words(name)
            if words & _ENCODERS and _is_section(value):
                continue
            yield Key(f"{prefix}{name}", str(name), value, is_text, _about(words, around, value, is_decoder))
            if isinstance(value, _PLAIN) or (is_text and f"{prefix}{name}." in following):
                continue
            inner = is_decoder and words <= _IN_SECTIONS
            for path, nested in _sections_in(f"{prefix}{name}"[-200:], value):
                if id(nested) in seen:
                    continue
                if not isinstance(nested, Mapping):
                    seen[id(nested)] = nested
                values = nested if isinstance(nested, Mapping) else as_mapping(nested)
                waiting.append((f"{path}.", values, words, False, inner))


def _sections_in(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The value, or the entries of a list of lists, as far as they are sections."""
    waiting = [(path, value)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, (list, tuple)):
            waiting += [(f"{path}[{i}]", entry) for i, entry in enumerate(value) if not isinstance(entry, _PLAIN)]
        elif _is_section(value):
            yield path, value


def _is_section(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    no_config = (*_PLAIN, type, ModuleType, Enum, PurePath, torch.Tensor, torch.dtype, torch.device)
    if isinstance(value, no_config) or callable(value):
        return False
    return hasattr(value, "__dict__")


def _words(name: object) -> frozenset[str]:
    """swiglu_limit, swiglu-limit, swigluLimit and swiglulimit: swiglu and limit."""
    parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])", str(name)[:200])}
    for part in list(parts):
        if any(glu in part for glu in _GLU - {"glu"}):
            parts |= {word for word in _GLU | _LIMIT if word in part and word != "glu"}
    return frozenset(parts)


def _about(words: frozenset[str], around: frozenset[str], value: Any, is_decoder: bool) -> str | None:
    """`Key.about` by the words of the key and of the section around it."""
    is_limit = words & _LIMIT and (words | around) & _GATE
    if (is_limit or (words & _GLU and words & {"max", "min", "cap"})) and not words & _SHARED:
        return "limit"
    if not is_decoder or words & _SHARED:
        return None
    if words & {"zero", "identity", "copy"} and words & {"expert", "experts"}:
        return None if isinstance(value, str) else "experts without weights"
    if words & {"alpha", "beta", "offset"} and words & (_GLU | _ACTIVATION | {"gemm1", "situ"}):
        return "constant"
    return "activation" if words & _ACTIVATION and words <= _IN_KEYS else None
