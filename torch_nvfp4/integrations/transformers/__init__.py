"""transformers with NVFP4 checkpoints: ``from_pretrained`` keeps experts and linears packed, on torch_nvfp4's kernels.

After ``register()``, ``AutoModelForCausalLM.from_pretrained(DIR)`` takes checkpoints with NVFP4 experts in every layout
of ``torch_nvfp4.checkpoint``, and leaves all others to transformers. ``from_pretrained`` here does the same for one
model without changing anything for others.

transformers builds the model and loads whatever is not quantized. The experts, the NVFP4 linears and the FP8 weights
come from ``torch_nvfp4.checkpoint``, one layer after the other, so that memory holds at most one layer twice.

``registry`` hooks into transformers, and ``versions`` says what it relies on there. transformers calls ``quantizer``
while it loads: ``placement`` finds the module of each tensor, ``gates`` compares gates, ``modules`` take the place of
the model's own, ``fp8`` dequantizes, and ``saving`` writes the published names again.
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "torch_nvfp4.integrations.transformers: expected transformers to be installed, got none; "
        "pip install 'torch-nvfp4[transformers]'"
    ) from error

from torch_nvfp4.integrations.transformers.config import TorchNVFP4Config
from torch_nvfp4.integrations.transformers.registry import from_pretrained, register, unregister

__all__ = ["TorchNVFP4Config", "from_pretrained", "register", "unregister"]
