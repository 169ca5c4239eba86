"""Tensors that lie inside NVFP4 modules and belong to none of the leaves that are read: nothing may be dropped there.

An adapter (`experts.0.w1.lora_A.weight`), a quantizer's own scale, an online rotation, a bias or a further projection
changes what the experts compute. Such a tensor is refused by name, unless it is known to change nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable

from torch_nvfp4.checkpoint.headers import TensorInfo

__all__ = ["Leftover", "leftovers"]

# (what stands after the root, tensor)
Leftover = tuple[str, TensorInfo]

# Scales and ranges of activations, which stay 16-bit; the router and the shared expert of models that name them so.
_HARMLESS = re.compile(
    r"(?:.*[._])?(?:input_scale|input_global_scale)|(?:.*\.)?(?:input|weight|output)_quantizer\._amax"
    r"|(?:router|e_score_correction_bias|shared?_experts?)(?:[._].*)?",
    re.DOTALL,
)
# A node called moe is the whole block, router included: only what names a projection belongs to the experts.
_PROJECTION = re.compile(r"(?:w\d+|gate_proj|(?:gate_up|up|down)(?:_proj)?|\w*quant\w*|lora\w*)(?:[._]|$)")


def leftovers(roots: Iterable[str], tensors: Iterable[TensorInfo]) -> dict[str, list[Leftover]]:
    """By root ("layers.0.ffn.experts."): those of the tensors under it that are not known to change nothing.

    The time is that of sorting, whatever the names. Of roots inside one another the outermost has them.
    """
    outermost: list[str] = []
    for root in sorted(roots):
        if not outermost or not root.startswith(outermost[-1]):
            outermost.append(root)
    found: dict[str, list[Leftover]] = {}
    for info in tensors:
        at = bisect_right(outermost, info.name) - 1
        if at < 0 or not info.name.startswith(outermost[at]):
            continue
        root, leaf = outermost[at], info.name[len(outermost[at]) :]
        if _HARMLESS.fullmatch(leaf) or (root.endswith(".moe.") and not _PROJECTION.match(leaf)):
            continue
        found.setdefault(root, []).append((leaf, info))
    return found
