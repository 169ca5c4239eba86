"""The former name of ``torch_nvfp4.compiler.tensorrt``."""

from torch_nvfp4.compiler.tensorrt import (
    PLUGIN_NAME,
    PLUGIN_NAMESPACE,
    available,
    bind_arguments,
    unavailable_reason,
    unsupported_reason,
)

__all__ = [
    "PLUGIN_NAME",
    "PLUGIN_NAMESPACE",
    "available",
    "bind_arguments",
    "unavailable_reason",
    "unsupported_reason",
]
