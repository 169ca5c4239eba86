"""The plug-in for SGLang: NVFP4 experts of its models run on torch_nvfp4's kernels.

``torch_nvfp4_sglang.register``, SGLang's entry point, calls ``install``. SGLang has one class per checkpoint format for
NVFP4 experts (ModelOpt, compressed-tensors), which chooses a runner, converts the weights and calls the runner.
``hooks`` replaces the classes of the layers that are taken by those in ``methods``, ``runner`` is the runner that
SGLang's MoeRunner calls, ``support`` says which layers are taken and why not the others, ``versions`` what is known of
each version of SGLang, ``report`` what ``torch-nvfp4 info`` prints.

Experts with biases are left to SGLang: its NVFP4 classes make no parameters for them, and the one model of its own with
such experts, gpt-oss, has no names for NVFP4 tensors.

Importing this package does not import SGLang.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["install"]


def install(mode: Callable[[], str]) -> None:
    """Registers the runner and wraps SGLang's classes for NVFP4 experts; once per process.

    Args:
        mode: gives "auto", "require" or "off"; asked for each layer.

    Raises RuntimeError where this SGLang is not one of the known versions, or a signature differs from what is known.
    """
    from torch_nvfp4.integrations.sglang.versions import check_installed

    check_installed()  # before hooks, which cannot be imported beside another SGLang
    from torch_nvfp4.integrations.sglang import hooks

    hooks.install(mode)
