"""The former name of ``torch_nvfp4.compiler.tensorrt``."""

from torch_nvfp4.compiler.tensorrt import available, bind_arguments, unavailable_reason, unsupported_reason

__all__ = ["available", "bind_arguments", "unavailable_reason", "unsupported_reason"]
