"""Groups token slots by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_nvfp4.ops import _checks
from torch_nvfp4.ops._library import register_fake


def route(topk_ids: Tensor, expert_map: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """The slots, stably sorted by local expert, and where each expert's slots begin.

    Slot s is ``token * top_k + j``. Slots whose id has no local expert come last.

    Args:
        topk_ids: [M, top_k] int32 or int64.
        expert_map: [global experts] int32, local expert or -1; None: ids are local.
        num_experts: E, the number of local experts.

    Returns ``order`` int32 [M * top_k] and ``offsets`` int32 [E + 1]; expert e owns
    ``order[offsets[e]:offsets[e + 1]]``. Raises RuntimeError (expected and got).
    """
    return torch.ops.nvfp4.route(topk_ids, expert_map, num_experts)


@register_fake("route")
def _(topk_ids: Tensor, expert_map: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    op = "route"
    _checks.check_routing(op, topk_ids, expert_map, ["M", "top_k"], "topk_ids", topk_ids)
    _checks.check_num_experts(op, num_experts)
    order = topk_ids.new_empty((topk_ids.shape[0] * topk_ids.shape[1],), dtype=torch.int32)
    return order, topk_ids.new_empty((num_experts + 1,), dtype=torch.int32)
