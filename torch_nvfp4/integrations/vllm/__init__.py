"""The plug-in for vLLM: NVFP4 experts of its models run on torch_nvfp4's kernels.

``torch_nvfp4_vllm.register``, vLLM's entry point, calls ``install``. vLLM chooses a backend for NVFP4 experts, converts
their weights and configures the kernel in three functions of one module (its oracle), whichever checkpoint format they
came from; ``oracle`` wraps the three, ``support`` says which layers are taken and why not the others, ``experts`` holds
the classes that vLLM calls, ``weights`` the conversion, ``parameters`` the biases of experts, for which vLLM's methods
make no parameters, ``versions`` what is known of each version of vLLM.

MXFP4 experts (gpt-oss, DeepSeek-V4-Flash as published) are left to vLLM. It has another oracle for them, with two
choices and several conversions, and on GPUs without FP4 tensor cores runs them on Triton's or Marlin's kernels, to
which it gives the layer's limit. Here they would take 6 % more bytes, and a matrix whose exponents span more than 18
octaves could not be loaded. ``torch-nvfp4 quantize`` makes NVFP4 of such a checkpoint with every value the same.

Importing this package does not import vLLM.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["install"]


def install(mode: Callable[[], str]) -> None:
    """Wraps vLLM's choice of a backend for NVFP4 experts; once per process.

    Args:
        mode: gives "auto", "require" or "off"; asked for each layer.

    Raises RuntimeError where this vLLM is not one of the known versions, or a signature differs from what is known.
    """
    import vllm

    from torch_nvfp4.integrations.vllm.versions import check_installed

    check_installed(vllm.__version__)  # before oracle, which cannot be imported beside every other vLLM
    from torch_nvfp4.integrations.vllm import oracle

    oracle.install(mode)
