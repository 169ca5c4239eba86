"""The quantization config of a checkpoint with NVFP4 or MXFP4 weights, and how to recognise one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from torch_nvfp4.ops.pack import check_input_quant

__all__ = ["METHOD", "TorchNVFP4Config", "is_mxfp4_config", "is_nvfp4_config"]

METHOD = "torch_nvfp4"
"""What transformers knows this quantization as; config.json keeps the checkpoint's own ``quant_method``."""

_ALGORITHMS = {"NVFP4", "W4A16_NVFP4"}
_FORMAT, _MXFP4_FORMAT = "nvfp4-pack-quantized", "mxfp4-pack-quantized"


class TorchNVFP4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """How to run a checkpoint with NVFP4 weights or MXFP4 experts; also what its config.json says about them, as it is.

    Given to ``from_pretrained`` of transformers after ``register()``, it takes a checkpoint of MXFP4 experts too.

    Args:
        backend: a name of ``torch_nvfp4.backends`` for the experts, or None for the first that can run a layer.
        source: the ``quantization_config`` of the checkpoint, which save_pretrained writes again.
        input_quant: "fp8" for experts with activations in FP8, as ``NVFP4Experts`` takes it: an error where a layer or
            its device cannot have them. None: 16 bits.
    """

    def __init__(
        self, backend: str | None = None, source: Mapping[str, Any] | None = None, input_quant: str | None = None
    ) -> None:
        if backend is not None and not isinstance(backend, str):
            raise TypeError(f"backend: expected a string or None, got {type(backend).__name__}")
        check_input_quant(input_quant)
        self.quant_method = METHOD
        self.backend = backend
        self.input_quant = input_quant
        self.source = copy.deepcopy(dict(source or {}))

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:  # the type is that of transformers' own from_dict
        """From a checkpoint's ``quantization_config``."""
        config = cls(source=config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config given to from_pretrained adds to the one of the checkpoint."""
        return {"backend": self.backend, "input_quant": self.input_quant}

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: what the checkpoint's had."""
        return copy.deepcopy(self.source) if self.source else {"quant_method": METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        """As ``to_dict``."""
        return self.to_dict()


def is_nvfp4_config(config: Any) -> bool:
    """Whether a ``quantization_config`` (or hf_quant_config.json) declares NVFP4 weights, alone or beside others.

    ``quant_method`` alone does not tell: DeepSeek-V4's says "fp8", and compressed-tensors has many formats.
    """
    if not isinstance(config, Mapping):
        return False
    section = config.get("quantization", config)
    if not isinstance(section, Mapping):
        return False
    layers = section.get("quantized_layers")
    of_layers = layers.values() if isinstance(layers, Mapping) else ()
    algorithms = [section.get("quant_algo"), section.get("moe_quant_algo")]
    algorithms += [layer.get("quant_algo") for layer in of_layers if isinstance(layer, Mapping)]
    if any(str(algorithm).upper() in _ALGORITHMS for algorithm in algorithms):
        return True
    return section.get("quant_method") == "compressed-tensors" and _FORMAT in _formats(section)


def is_mxfp4_config(config: Any) -> bool:
    """Whether a ``quantization_config`` declares MXFP4 experts and no NVFP4 weights.

    gpt-oss's method is called so; DeepSeek-V4's is "fp8" with an ``expert_dtype`` (which stands beside the section in
    its config.json, and transformers moves into it); Quark describes the scales of all weights.
    """
    if not isinstance(config, Mapping) or is_nvfp4_config(config):
        return False
    method = config.get("quant_method")
    if method == "fp8":
        return config.get("expert_dtype") == "fp4"
    if method == "compressed-tensors":
        return _MXFP4_FORMAT in _formats(config)
    if method == "quark":
        scheme = config.get("global_quant_config")
        weight = scheme.get("weight") if isinstance(scheme, Mapping) else None
        wanted = {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0"}
        return isinstance(weight, Mapping) and all(weight.get(key) == value for key, value in wanted.items())
    return method == "mxfp4"


def _formats(section: Mapping[str, Any]) -> list[Any]:
    """Of compressed-tensors: the format of the model, and those of its groups of modules."""
    groups = section.get("config_groups")
    of_groups = groups.values() if isinstance(groups, Mapping) else ()
    return [section.get("format"), *(group.get("format") for group in of_groups if isinstance(group, Mapping))]
