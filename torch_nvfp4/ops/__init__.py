"""The ops of ``torch.ops.nvfp4``: one file per op with its typed wrapper, docstring, fake and autograd."""

from torch_nvfp4.ops import _autocast, flops, gradients  # noqa: F401  (they register kernels, formulas, derivatives)
from torch_nvfp4.ops._library import call_before_fakes, call_with_dtensor, library_paths
from torch_nvfp4.ops.batch_invariance import is_batch_invariant, set_batch_invariant
from torch_nvfp4.ops.batched_moe import batched_moe
from torch_nvfp4.ops.combine import combine
from torch_nvfp4.ops.decomposition import decompositions
from torch_nvfp4.ops.grouped_gemm import grouped_gemm, grouped_gemm_swiglu
from torch_nvfp4.ops.linear import linear
from torch_nvfp4.ops.moe import moe
from torch_nvfp4.ops.moe_fp8 import moe_fp8, order_for_fp8
from torch_nvfp4.ops.pack import pack, unpack
from torch_nvfp4.ops.route import route
from torch_nvfp4.ops.swiglu import swiglu

__all__ = [
    "batched_moe",
    "call_before_fakes",
    "call_with_dtensor",
    "combine",
    "decompositions",
    "grouped_gemm",
    "grouped_gemm_swiglu",
    "is_batch_invariant",
    "library_paths",
    "linear",
    "moe",
    "moe_fp8",
    "order_for_fp8",
    "pack",
    "route",
    "set_batch_invariant",
    "swiglu",
    "unpack",
]
