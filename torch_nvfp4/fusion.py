"""The former name of ``torch_nvfp4.compiler``'s graph passes."""

from torch_nvfp4.compiler.decomposition import decompose_moe
from torch_nvfp4.compiler.fusion import fuse_gates
from torch_nvfp4.compiler.inductor import GraphPass, inductor_options

__all__ = ["GraphPass", "decompose_moe", "fuse_gates", "inductor_options"]
