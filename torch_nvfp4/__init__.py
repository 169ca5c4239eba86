"""NVFP4 mixture-of-experts layers with the SwiGLU clamp, as torch.compile custom ops for pre-Blackwell GPUs and CPUs.

Importing the package loads the op libraries and registers everything about the ops (fakes, autograd), which has to
happen before the first trace.
"""

from typing import TYPE_CHECKING

from torch_nvfp4 import _start, reference  # noqa: F401  (_start comes before whatever imports torch)
from torch_nvfp4._lazy import imported_at_first_use
from torch_nvfp4._version import __version__
from torch_nvfp4.backends import select_moe_backend
from torch_nvfp4.format import NVFP4Weight, dequantize, quantize
from torch_nvfp4.gate import Activation, Gate
from torch_nvfp4.nn import NVFP4Experts, NVFP4Linear
from torch_nvfp4.ops import (
    batched_moe,
    call_with_dtensor,
    combine,
    decompositions,
    grouped_gemm,
    grouped_gemm_swiglu,
    is_batch_invariant,
    library_paths,
    linear,
    moe,
    moe_fp8,
    order_for_fp8,
    pack,
    route,
    set_batch_invariant,
    swiglu,
    unpack,
)
from torch_nvfp4.quant_config import MoEQuantConfig

if TYPE_CHECKING:
    from torch_nvfp4 import compiler as compiler
    from torch_nvfp4 import distributed as distributed
    from torch_nvfp4 import integrations as integrations
    from torch_nvfp4 import reference_fp8 as reference_fp8
    from torch_nvfp4 import testing as testing
    from torch_nvfp4.compiler import inductor_options

__all__ = [
    "Activation",
    "Gate",
    "MoEQuantConfig",
    "NVFP4Experts",
    "NVFP4Linear",
    "NVFP4Weight",
    "__version__",
    "batched_moe",
    "combine",
    "decompositions",
    "dequantize",
    "grouped_gemm",
    "grouped_gemm_swiglu",
    "inductor_options",
    "is_batch_invariant",
    "library_paths",
    "linear",
    "moe",
    "moe_fp8",
    "order_for_fp8",
    "pack",
    "quantize",
    "reference",
    "route",
    "select_moe_backend",
    "set_batch_invariant",
    "swiglu",
    "unpack",
]


@call_with_dtensor
def _register_sharding_rules() -> None:
    from torch_nvfp4.distributed.sharding import register_rules

    register_rules()


# What ``import torch_nvfp4`` does not wait for: submodules, and a name that Inductor is imported with, which takes
# seconds that only those who compile should pay.
if not TYPE_CHECKING:
    __getattr__, __dir__ = imported_at_first_use(
        __name__,
        {
            **dict.fromkeys(("compiler", "distributed", "integrations", "reference_fp8", "testing"), ""),
            "inductor_options": "compiler",
        },
    )
