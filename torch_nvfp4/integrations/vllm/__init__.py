"""The plug-in for vLLM: NVFP4 experts of its models run on torch_nvfp4's kernels.

``torch_nvfp4_vllm.register``, vLLM's entry point, calls ``install``. vLLM chooses a backend for NVFP4 experts, converts
their weights and configures the kernel in three functions of one module (its oracle), whichever checkpoint format they
came from; ``oracle`` wraps the three, ``support`` says which layers are taken and why not the others, ``experts`` holds
the classes that vLLM calls, ``weights`` the conversion, ``versions`` what is known of each version of vLLM.

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
