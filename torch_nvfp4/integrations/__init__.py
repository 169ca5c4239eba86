"""torch_nvfp4 inside the engines that serve models. Nothing here is imported by ``import torch_nvfp4``."""

from typing import TYPE_CHECKING

from torch_nvfp4._lazy import imported_at_first_use

if TYPE_CHECKING:
    from torch_nvfp4.integrations import transformers as transformers

# The engines call the others by themselves.
if not TYPE_CHECKING:
    __getattr__, __dir__ = imported_at_first_use(__name__, {"transformers": ""})
