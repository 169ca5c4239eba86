"""What ranks exchange: sums of partial results, and tokens with their routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["gradients_added", "nothing_added", "sent_to_experts", "summed"]

Groups = Sequence[Any]
"""Process groups, one per dimension of the mesh; a sum over all of them is one over each after the other."""


def summed(partial: Tensor, groups: Groups, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over the ranks of the groups, in ``dtype`` (None: partial's own), in partial's dtype.

    ``partial`` may be overwritten. The gradient of the sum, which every rank has, is that of its own part.
    """
    if partial.requires_grad:
        result: Tensor = _Summed.apply(partial, groups, dtype)
        return result
    return _all_reduce(partial, groups, dtype)


def gradients_added(tensor: Tensor, groups: Groups) -> Tensor:
    """``tensor``, which every rank has and uses for its own part: its gradient is the sum of theirs."""
    result: Tensor = _GradientsAdded.apply(tensor, groups)
    return result


def nothing_added(hidden_states: Tensor, topk_weights: Tensor) -> Tensor:
    """Zeros like hidden_states, of a rank without experts. Its backward passes zeros on to both: the other ranks wait
    for it where gradients are added."""
    result: Tensor = _NothingAdded.apply(hidden_states, topk_weights)
    return result


def _all_reduce(tensor: Tensor, groups: Groups, dtype: torch.dtype | None) -> Tensor:
    total = tensor if dtype is None else tensor.to(dtype)
    for group in groups:
        distributed.all_reduce(total, group=group)
    return total.to(tensor.dtype)


# With setup_context, which torch.func asks for.
class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(partial: Tensor, groups: Groups, dtype: torch.dtype | None) -> Tensor:
        return _all_reduce(partial.clone(), groups, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _GradientsAdded(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, groups: Groups) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.groups = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0].clone(), ctx.groups, None), None


class _NothingAdded(torch.autograd.Function):
    @staticmethod
    def forward(hidden_states: Tensor, topk_weights: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (topk_weights,) = ctx.saved_tensors
        return torch.zeros_like(grads[0]), torch.zeros_like(topk_weights)


def sent_to_experts(
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    owner: Tensor,
    group: Any,
) -> Tensor:
    """Every token goes once to each rank that has one of its experts, and the results are added where it came from.

    Args:
        run: the experts of this rank, over tokens [n, K] with their whole routing: its part of their results.
        hidden_states, topk_weights, topk_ids: [M, K], [M, top_k], [M, top_k], of this rank; M may differ, and be 0.
        owner: int64 [E + 1], the rank of each expert, and behind the last the number of ranks.

    Returns [M, K] in hidden_states' dtype: sums in fp32, in the order of the ranks. Waits for the device once, to know
    how many tokens come.
    """
    ranks, experts = distributed.get_world_size(group), owner.shape[0] - 1
    ids = torch.where((topk_ids >= 0) & (topk_ids < experts), topk_ids, experts).long()
    goes = torch.zeros((ids.shape[0], ranks + 1), dtype=torch.bool, device=ids.device)
    goes.scatter_(1, owner[ids], True)
    by_rank = goes[:, :ranks].t()
    token = by_rank.nonzero()[:, 1]  # by rank, then in the order of the tokens
    sends = by_rank.sum(1)
    receives = torch.empty_like(sends)
    distributed.all_to_all_single(receives, sends, group=group)
    sent, received = torch.stack((sends, receives)).tolist()

    # One message per pair of ranks: states, weights and ids of a token as the bytes of one row.
    rows = [hidden_states[token], topk_weights[token].float(), topk_ids[token].int()]
    widths = [row.shape[1] * row.itemsize for row in rows]
    there = _exchange(torch.cat([row.contiguous().view(torch.uint8) for row in rows], 1), received, sent, group)
    parts = [
        part.contiguous().view(row.dtype) for part, row in zip(there.split(widths, dim=1), rows, strict=True)
    ]  # fmt: skip
    back = _exchange(run(*parts), sent, received, group)

    output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    # Rank after rank: within one, no token is there twice, so the order of additions is fixed on CUDA too.
    for index, part in zip(token.split(sent), back.split(sent), strict=True):
        output.index_add_(0, index, part.to(output.dtype))
    return output.to(hidden_states.dtype)


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    """The rows that the ranks have for this one, in their order; ``sent`` rows go to each."""
    result = rows.new_empty((sum(received), rows.shape[1]))
    distributed.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
