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

from typing import TYPE_CHECKING, Any

from torch_nvfp4._lazy import imported_at_first_use

if TYPE_CHECKING:
    from torch_nvfp4.integrations.transformers.config import TorchNVFP4Config
    from torch_nvfp4.integrations.transformers.registry import from_pretrained, register, unregister

__all__ = ["TorchNVFP4Config", "from_pretrained", "register", "unregister"]

if not TYPE_CHECKING:
    _get, __dir__ = imported_at_first_use(
        __name__,
        {
            "TorchNVFP4Config": "config",
            "from_pretrained": "registry",
            "register": "registry",
            "unregister": "registry",
        },
    )

    def __getattr__(name: str) -> Any:
        try:
            return _get(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("transformers", "accelerate"):
                raise
            raise ImportError(
                f"{__name__}: expected {error.name} to be installed, got none; pip install 'torch-nvfp4[transformers]'"
            ) from error
