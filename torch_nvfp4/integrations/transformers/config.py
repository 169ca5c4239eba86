"""The quantization config of a checkpoint with NVFP4 weights, and how to recognise one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["METHOD", "TorchNVFP4Config", "is_nvfp4_config"]

METHOD = "torch_nvfp4"
"""What transformers knows this quantization as; config.json keeps the checkpoint's own ``quant_method``."""

_ALGORITHMS = {"NVFP4", "W4A16_NVFP4"}
_FORMAT = "nvfp4-pack-quantized"


class TorchNVFP4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """How to run a checkpoint with NVFP4 weights; also what its config.json says about them, kept as it is.

    Args:
        backend: a name of ``torch_nvfp4.backends`` for the experts, or None for the first that can run a layer.
        source: the ``quantization_config`` of the checkpoint, which save_pretrained writes again.
    """

    def __init__(self, backend: str | None = None, source: Mapping[str, Any] | None = None) -> None:
        if backend is not None and not isinstance(backend, str):
            raise TypeError(f"backend: expected a string or None, got {type(backend).__name__}")
        self.quant_method = METHOD
        self.backend = backend
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
        return {"backend": self.backend}

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
    groups = section.get("config_groups")
    of_groups = groups.values() if isinstance(groups, Mapping) else ()
    formats = [section.get("format"), *(group.get("format") for group in of_groups if isinstance(group, Mapping))]
    return section.get("quant_method") == "compressed-tensors" and _FORMAT in formats
