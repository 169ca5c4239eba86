"""What the configs of a quantized checkpoint say about its quantization."""

from __future__ import annotations

import re
from typing import Any

from torch_nvfp4._version import __version__
from torch_nvfp4.convert.selection import Selection
from torch_nvfp4.format import GROUP_SIZE

__all__ = ["hf_quant_config", "quantization_config"]

_PRODUCER = {"name": "torch_nvfp4", "version": __version__}


def quantization_config(selection: Selection, layout: str) -> dict[str, Any]:
    """The section of config.json, for weights in NVFP4 and activations that stay 16-bit."""
    if layout == "modelopt":
        weights: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP_SIZE}
        return {
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": _ignored_globs(selection),
            "producer": _PRODUCER,
            "quant_algo": "W4A16_NVFP4",
            "quant_method": "modelopt",
        }
    weights = {
        "dynamic": False,
        "group_size": GROUP_SIZE,
        "num_bits": 4,
        "scale_dtype": "torch.float8_e4m3fn",
        "strategy": "tensor_group",
        "symmetric": True,
        "type": "float",
        "zp_dtype": "torch.float8_e4m3fn",
    }
    group = {
        "format": "nvfp4-pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": "nvfp4-pack-quantized",
        "ignore": [*selection.left_modules, *(f"re:{re.escape(root)}.*" for root in selection.left_experts)],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def hf_quant_config(selection: Selection) -> dict[str, Any]:
    """ModelOpt's own file, which says the same as its section in config.json."""
    section = {
        "quant_algo": "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": GROUP_SIZE,
        "exclude_modules": _ignored_globs(selection),
    }
    return {"producer": _PRODUCER, "quantization": section}


def _ignored_globs(selection: Selection) -> list[str]:
    return [*selection.left_modules, *(f"{root[:-1]}*" for root in selection.left_experts)]
