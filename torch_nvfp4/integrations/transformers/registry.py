"""Makes transformers choose this integration's quantizer for NVFP4 (and MXFP4) checkpoints, and takes that back."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, modeling_utils
from transformers.models.auto import modeling_auto
from transformers.quantizers import auto
from transformers.utils import cached_file

from torch_nvfp4.checkpoint.headers import load_json
from torch_nvfp4.integrations.transformers.config import (
    METHOD,
    TorchNVFP4Config,
    is_mxfp4_config,
    is_nvfp4_config,
)
from torch_nvfp4.integrations.transformers.quantizer import TorchNVFP4Quantizer
from torch_nvfp4.integrations.transformers.versions import check_installed

__all__ = ["from_pretrained", "register", "unregister"]

_SHARED_METHODS = ("fp8", "compressed-tensors", "modelopt", "nvfp4", "mxfp4", "quark")
"""The values of ``quant_method`` under which NVFP4 and MXFP4 checkpoints are published."""

_QUANT_FILE = "hf_quant_config.json"
_HUB_KEYWORDS = (
    "revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder", "force_download",
)  # fmt: skip


class _Dispatch:
    """In place of the config class of a ``quant_method``: NVFP4 configs are this package's, the rest go on.

    Attributes:
        takes_mxfp4: whether those of MXFP4 experts are this package's too.
    """

    def __init__(self, method: str, original: Any) -> None:
        self.method = method
        self.original = original
        self.takes_mxfp4 = False

    def from_dict(self, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if is_nvfp4_config(config_dict) or (self.takes_mxfp4 and is_mxfp4_config(config_dict)):
            return TorchNVFP4Config.from_dict(config_dict, *args, **kwargs)
        if self.original is None:
            raise ValueError(
                f"quantization_config: expected NVFP4 weights beside quant_method {self.method!r}, got "
                f"quant_algo {config_dict.get('quant_algo')!r}, which transformers does not know"
            )
        return self.original.from_dict(config_dict, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def register(*, mxfp4: bool = False) -> None:
    """From here on ``from_pretrained`` of transformers takes NVFP4 checkpoints; all others load as before.

    Calling it twice is calling it once; the last ``mxfp4`` counts. Raises RuntimeError, with what differs, where the
    installed transformers is not one that this was written for; nothing is changed then.

    Args:
        mxfp4: take checkpoints of MXFP4 experts (gpt-oss, the original DeepSeek-V4, Quark's, compressed-tensors')
            too, which transformers loads in its own way. Without it ``quantization_config=TorchNVFP4Config()`` takes a
            single one.
    """
    mapping = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    if not _is_registered():
        check_installed()
        _register_method()
        for method in _SHARED_METHODS:
            mapping[method] = _Dispatch(method, mapping.get(method))
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, TorchNVFP4Config)
        modeling_utils.get_hf_quantizer = _with_quant_file(modeling_utils.get_hf_quantizer)
    for dispatch in mapping.values():
        if isinstance(dispatch, _Dispatch):
            dispatch.takes_mxfp4 = mxfp4


def unregister() -> None:
    """Takes ``register`` back; models that are loaded stay as they are."""
    if not _is_registered():
        return
    mapping = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    for method in _SHARED_METHODS:
        dispatch = mapping.get(method)
        if not isinstance(dispatch, _Dispatch):
            continue
        if dispatch.original is None:
            del mapping[method]
        else:
            mapping[method] = dispatch.original
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = tuple(
        kind for kind in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if kind is not TorchNVFP4Config
    )
    # Where someone wrapped it after `register`, it stays inside and does nothing.
    ours = getattr(modeling_utils.get_hf_quantizer, "reads_quant_file", None)
    if ours is not None and ours is modeling_utils.get_hf_quantizer:
        modeling_utils.get_hf_quantizer = ours.__wrapped__
    mapping.pop(METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)


def from_pretrained(
    path: str | Path, *args: Any, backend: str | None = None, input_quant: str | None = None, auto_class: Any = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """A model of transformers from a checkpoint of NVFP4 weights or MXFP4 experts; ``register`` is not needed.

    Args:
        path: a directory, or the name of a repository on the Hub.
        backend, input_quant: of the experts, as ``TorchNVFP4Config`` has them.
        auto_class: which class of transformers builds the model; None: AutoModelForCausalLM, or for a model that it
            does not know, of images and text, AutoModelForImageTextToText.
        args, kwargs: those of ``auto_class.from_pretrained``.

    Raises ValueError for a checkpoint whose configs declare neither, and what ``register`` raises.
    """
    check_installed()
    _register_method()
    config, kwargs = _config_of(path, kwargs)
    declared = _declared(config) or _read_quant_file(config)
    if not (is_nvfp4_config(declared) or is_mxfp4_config(declared)):
        got = "no quantization_config and no hf_quant_config.json" if declared is None else f"{declared!r:.200}"
        advice = "; torch-nvfp4 quantize makes such a checkpoint" if declared is None else ""
        raise ValueError(f"{path}: expected a config that declares NVFP4 weights or MXFP4 experts, got {got}{advice}")
    _undeclare(config)
    quantization = TorchNVFP4Config(backend, declared, input_quant)
    if auto_class is None:
        known = type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        auto_class = AutoModelForCausalLM if known or not _has_images(config) else AutoModelForImageTextToText
    return auto_class.from_pretrained(path, *args, config=config, quantization_config=quantization, **kwargs)


def _has_images(config: Any) -> bool:
    return type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _config_of(path: str | Path, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(a config that is the model's own, the keywords that are not about it), as from_pretrained of transformers."""
    config = kwargs.pop("config", None)
    if config is not None and not isinstance(config, (str, os.PathLike)):
        return copy.deepcopy(config), kwargs
    hub = {name: kwargs[name] for name in _HUB_KEYWORDS if name in kwargs}
    # Not about the config: "auto" is no dtype, and these are the model's in any case.
    model = hub | {name: kwargs[name] for name in ("dtype", "torch_dtype") if name in kwargs}
    others = {name: value for name, value in kwargs.items() if name not in model}
    config, unused = AutoConfig.from_pretrained(
        path if config is None else config, return_unused_kwargs=True, **hub, **others
    )
    return config, {name: value for name, value in unused.items() if name not in hub} | model


def _is_registered() -> bool:
    mapping = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    return any(isinstance(mapping.get(method), _Dispatch) for method in _SHARED_METHODS)


def _register_method() -> None:
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(TorchNVFP4Config)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(TorchNVFP4Quantizer)


def _with_quant_file(original: Any) -> Any:
    """``get_hf_quantizer`` that also looks into hf_quant_config.json where config.json says nothing."""

    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_registered():
            return original(config, quantization_config, *args, **kwargs)
        declared = getattr(config, "quantization_config", None)
        if isinstance(declared, TorchNVFP4Config):  # the config of a loaded model; transformers wants a dict
            config.quantization_config = copy.deepcopy(declared.source) or None
            own = declared.get_loading_attributes() != TorchNVFP4Config().get_loading_attributes()
            if quantization_config is None and (own or not declared.source or is_mxfp4_config(declared.source)):
                quantization_config = TorchNVFP4Config(**declared.get_loading_attributes())
        found = _declared(config)
        if isinstance(quantization_config, TorchNVFP4Config) and is_mxfp4_config(found):
            # Asked for: transformers would compare the class with that of its own config.
            _undeclare(config)
            quantization_config = TorchNVFP4Config(source=found, **quantization_config.get_loading_attributes())
        elif found is None and (
            quantization_config is None
            or (isinstance(quantization_config, TorchNVFP4Config) and not quantization_config.source)
        ):
            section = _read_quant_file(config)
            if section is not None:
                config.quantization_config = section
        return original(config, quantization_config, *args, **kwargs)

    get_hf_quantizer.__wrapped__ = original  # type: ignore[attr-defined]
    get_hf_quantizer.reads_quant_file = get_hf_quantizer  # type: ignore[attr-defined]
    return get_hf_quantizer


def _undeclare(config: Any) -> None:
    for section in (config, config.get_text_config(decoder=True)):
        if getattr(section, "quantization_config", None) is not None:
            del section.quantization_config


def _declared(config: Any) -> dict[str, Any] | None:
    for section in (config, config.get_text_config(decoder=True)):
        declared = getattr(section, "quantization_config", None)
        if declared is not None:
            return declared if isinstance(declared, dict) else dict(declared.to_dict())
    return None


def _read_quant_file(config: Any) -> dict[str, Any] | None:
    """hf_quant_config.json of the checkpoint as a ``quantization_config``, None where it has none about NVFP4."""
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name:
        return None
    file: Any = os.path.join(name, _QUANT_FILE) if os.path.isdir(name) else None
    if file is None:
        file = cached_file(
            name,
            _QUANT_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if file is None or not os.path.isfile(file):
        return None
    content = load_json(Path(file))
    if not is_nvfp4_config(content):
        return None
    section = dict(content.get("quantization", content))
    if "exclude_modules" in section:
        section["ignore"] = section.pop("exclude_modules")
    return {"quant_method": "modelopt", **section, "producer": content.get("producer", {"name": "modelopt"})}
