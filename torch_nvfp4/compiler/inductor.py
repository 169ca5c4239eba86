"""The rewrites as an Inductor pass, and the options that switch it on."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from torch_nvfp4.compiler.decomposition import decompose_moe
from torch_nvfp4.compiler.fusion import fuse_gates

__all__ = ["GraphPass", "inductor_options"]

_PACKAGE = Path(__file__).resolve().parent.parent


def inductor_options(*, fuse_gates: bool = True, decompose_moe: bool = False) -> dict[str, Any]:
    """Options for ``torch.compile(model, options=...)`` and AOTInductor's ``inductor_configs=...``.

    Args:
        fuse_gates: an eager gate after ``grouped_gemm`` or ``linear`` becomes ``grouped_gemm_swiglu``, with the limit
            read from the graph (see ``fuse_gates``).
        decompose_moe: ``moe`` and ``batched_moe`` become their steps, with clamp and activation in aten for Inductor to
            compile. With ``fuse_gates`` the activation is then fused into the first GEMM again; pass
            ``fuse_gates=False`` to leave it to Inductor.

    The limit has to be a constant of the graph. ``torch.compile(dynamic=True)`` of torch 2.15 makes an input of every
    float that the model does not spell out, and the gate stays as it is: mark the token dimension with ``mark_dynamic``
    or ``mark_unbacked`` instead, or set ``torch._dynamo.config.specialize_float``.

    The pass counts what it did: ``inductor_options()["joint_custom_pre_pass"].fused`` and ``.decomposed``. Nothing is
    counted where a compiled graph comes out of a cache.
    """
    return {"joint_custom_pre_pass": GraphPass(fuse_gates=fuse_gates, decompose_moe=decompose_moe)}


class GraphPass(CustomGraphPass):
    """``decompose_moe``, then ``fuse_gates``, as an Inductor pass whose ``uuid`` keys the compile caches."""

    def __init__(self, *, fuse_gates: bool, decompose_moe: bool) -> None:
        self.fuse_gates, self.decompose_moe = fuse_gates, decompose_moe
        self.fused, self.decomposed = 0, 0

    def __call__(self, graph: Graph) -> None:
        if self.decompose_moe:
            self.decomposed += decompose_moe(graph)
        if self.fuse_gates:
            self.fused += fuse_gates(graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphPass:
        # AOTInductor copies its configuration; the counts are to be read from the original.
        return self

    def uuid(self) -> str:
        """What Inductor's caches take for this pass: its switches and a digest of the package's sources."""
        return f"torch_nvfp4 {self.fuse_gates} {self.decompose_moe} {_package_digest()}"


def source_digest(folder: Path) -> str:
    """A digest of the name and content of every Python file below ``folder``.

    What a rewrite makes of a graph depends on its own modules, on the gate, on the ops' decompositions and on their
    fakes. All of the package is hashed, so that no later module can be forgotten: a cached graph that a changed rewrite
    would no longer produce is a wrong result, one that is compiled again without need costs seconds.
    """
    digest = hashlib.sha256()
    for source in sorted(folder.rglob("*.py")):
        content = source.read_bytes()
        digest.update(f"{source.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@cache
def _package_digest() -> str:
    """``source_digest`` of this package, read once per process, which also imports it once."""
    return source_digest(_PACKAGE)
