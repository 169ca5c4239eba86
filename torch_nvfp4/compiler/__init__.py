"""What torch.compile, AOTInductor and TensorRT make of the ops.

- ``inductor_options()`` switches the graph passes on in torch.compile and AOTInductor: ``fuse_gates`` fuses an eager
  clamp-SwiGLU gate into its GEMM, ``decompose_moe`` turns ``moe`` and ``batched_moe`` into their steps. Both work
  on any aten graph whose nodes carry ``meta["val"]`` (make_fx, torch.export, a backend of torch.compile).
- ``torch_nvfp4.compiler.tensorrt`` registers a plugin and a converter where it is imported.

The names below are imported when they are first asked for: they need Inductor, which takes seconds that neither
TensorRT nor eager mode should pay.

Private torch APIs, all of them in this folder, run with torch 2.11, 2.13 and 2.15 on the CPU, and what ``fuse_gates``
and ``decompose_moe`` use also with 2.11 on a GPU:

- ``torch._inductor.custom_graph_pass.CustomGraphPass`` and the Inductor option ``joint_custom_pre_pass``. The joint
  passes run for inference graphs too, before Inductor changes strides, and both compile caches key on ``uuid()``.
- ``torch._inductor.decomposition.select_decomp_table``: a replacement is traced with the decompositions that Inductor
  applied to the rest of the graph.
- ``OpOverload._schema``, to read arguments by name.
"""

from typing import TYPE_CHECKING

from torch_nvfp4._lazy import imported_at_first_use

if TYPE_CHECKING:
    from torch_nvfp4.compiler.decomposition import decompose_moe
    from torch_nvfp4.compiler.fusion import fuse_gates
    from torch_nvfp4.compiler.inductor import GraphPass, inductor_options

__all__ = ["GraphPass", "decompose_moe", "fuse_gates", "inductor_options"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = imported_at_first_use(
        __name__,
        {
            "GraphPass": "inductor",
            "decompose_moe": "decomposition",
            "fuse_gates": "fusion",
            "inductor_options": "inductor",
        },
    )
