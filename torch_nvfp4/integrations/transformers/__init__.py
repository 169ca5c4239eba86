"""transformers with NVFP4 checkpoints: ``from_pretrained`` keeps experts and linears packed, on torch_nvfp4's kernels.

After ``register()``, ``AutoModelForCausalLM.from_pretrained(DIR)`` takes checkpoints with NVFP4 experts in every layout
of ``torch_nvfp4.checkpoint``, and leaves all others to transformers. ``from_pretrained`` here does the same for one
model without changing anything for others, and takes MXFP4 experts (gpt-oss, the original DeepSeek-V4) too; so does
``register(mxfp4=True)``. Experts may have biases, and no gate (Nemotron-3), as the model's class has them.

Adapters of PEFT train beside it (QLoRA). ``target_modules`` names linears of the model, NVFP4 or not, such as
``["q_proj", "o_proj"]``; never the experts, through which gradients pass. An adapter can be saved and loaded, but not
merged into packed weights. Kernels on a GPU take 16 bits: load with ``dtype=torch.bfloat16``, and train under
``torch.autocast`` (``TrainingArguments(bf16=True)``) after ``prepare_model_for_kbit_training``.

transformers builds the model and loads whatever is not quantized. The experts, the NVFP4 linears and the FP8 weights
come from ``torch_nvfp4.checkpoint``, one layer after the other, so that memory holds at most one layer twice.

``registry`` hooks into transformers, and ``versions`` says what it relies on there. transformers calls ``quantizer``
while it loads: ``placement`` finds the module of each tensor, ``expert_layout`` says how a class holds its experts,
``gates`` compares gates, ``modules`` take the place of the model's own, ``fp8`` dequantizes, and ``saving`` writes the
published names again.

Importing this package does not import transformers; the first use of one of its names does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_nvfp4.integrations.transformers.config import TorchNVFP4Config
    from torch_nvfp4.integrations.transformers.registry import from_pretrained, register, unregister

__all__ = ["TorchNVFP4Config", "from_pretrained", "register", "unregister"]

_MODULES = {
    "TorchNVFP4Config": "config",
    "from_pretrained": "registry",
    "register": "registry",
    "unregister": "registry",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # the names that are imported at their first use, too


# Hidden from type checkers, for which every name would be there, as Any.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("transformers", "accelerate"):
                raise
            raise ImportError(
                f"{__name__}: expected {error.name} to be installed, got none; pip install 'torch-nvfp4[transformers]'"
            ) from error
