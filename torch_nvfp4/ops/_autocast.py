"""The ops under ``torch.autocast``: float32 activations are rounded to its dtype, as those of ``torch.nn.Linear`` are.

16-bit activations keep their dtype. Autocast leaves norms and residual sums in float32, which the CUDA kernels do not
take: without this, a model whose own parameters are float32 (``peft.prepare_model_for_kbit_training``) could not train
on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.ops import _library  # noqa: F401  (loads the ops)

# By op: the positional arguments in the activations' dtype, of which the first decides. Scales, router weights and the
# experts' biases stay float32, and so do the arguments of route, swiglu and combine, whose results are no products.
_ROUNDED = {
    "moe": (0,), "moe_fp8": (0,), "batched_moe": (0,), "linear": (0, 3), "grouped_gemm": (0,),
    "grouped_gemm_swiglu": (0,),
}  # fmt: skip
_AUTOCAST = torch.library.Library("nvfp4", "FRAGMENT")


def _kernel(overload: Any, positions: tuple[int, ...], device: str, key: Any) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(key)

    def run(*args: Any, **kwargs: Any) -> Any:
        activations = args[0]
        # Autocast of one kind of device also gets the calls on others.
        if activations.dtype == torch.float32 and activations.device.type == device:
            dtype = torch.get_autocast_dtype(device)
            args = tuple(
                arg.to(dtype) if index in positions and isinstance(arg, Tensor) else arg
                for index, arg in enumerate(args)
            )
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*args, **kwargs)

    return run


def _register() -> None:
    for op, positions in _ROUNDED.items():
        overload = getattr(torch.ops.nvfp4, op).default
        for device in ("cpu", "cuda"):
            name = f"Autocast{device.upper()}"
            run = _kernel(overload, positions, device, getattr(torch._C.DispatchKey, name))
            _AUTOCAST.impl(op, run, name)


_register()
