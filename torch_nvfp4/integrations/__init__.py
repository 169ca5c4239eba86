"""torch_nvfp4 inside the engines that serve models. Nothing here is imported by ``import torch_nvfp4``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_nvfp4.integrations import transformers as transformers

# Hidden from type checkers, for which every name would be there, as Any.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "transformers":  # the engines call the others by themselves
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
