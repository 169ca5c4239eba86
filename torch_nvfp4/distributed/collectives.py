"""What ranks exchange: sums of partial results, and tokens with their routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import _functional_collectives as functional

from torch_nvfp4.errors import CheckpointError

__all__ = ["gradients_added", "on_every_rank", "sent_to_experts", "summed"]

_Result = TypeVar("_Result")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NONE = [-1, -1, -1]  # in the place of K, top_k and dtype: the rank raises

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


def on_every_rank(action: Callable[[], _Result], groups: Groups, device: str) -> _Result:
    """What ``action`` returns; where it raises on one rank, every other one raises CheckpointError: it would wait for
    that rank, which does not come, in the first sum."""
    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    failed = torch.tensor(int(error is not None), dtype=torch.int32, device=device)
    for group in groups:
        distributed.all_reduce(failed, group=group)
    if error is not None:
        raise error
    if int(failed):
        raise CheckpointError("expected every rank to read its part, got an error on another rank: see its own words")
    return result


def _all_reduce(tensor: Tensor, groups: Groups, dtype: torch.dtype | None) -> Tensor:
    total = tensor if dtype is None else tensor.to(dtype)
    for group in groups:
        if torch.compiler.is_compiling():
            total = functional.all_reduce(total, "sum", group)
        else:
            distributed.all_reduce(total, group=group)
    # Neither summed in place nor through a to() that changes nothing: where an autograd function's result is an alias,
    # torch 2.11's compiler begins its backward with zeros.
    return total if total.dtype == tensor.dtype else total.to(tensor.dtype)


# With setup_context, which torch.func asks for.
class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(partial: Tensor, groups: Groups, dtype: torch.dtype | None) -> Tensor:
        # What is sent is memory: on every rank in the same order.
        return _all_reduce(partial.clone(memory_format=torch.contiguous_format), groups, dtype)

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
        return _all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.groups, None), None


def sent_to_experts(
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    owner: Tensor,
    group: Any,
    problem: str | None = None,
) -> Tensor:
    """Every token goes once to each rank that has one of its experts, and the results are added where it came from.

    Args:
        run: the experts of this rank, over tokens [n, K] with their whole routing: its part of their results.
        hidden_states, topk_weights, topk_ids: [M, K], [M, top_k], [M, top_k], of this rank; M may differ, and be 0.
        owner: int64 [E + 1], the rank of each expert, and behind the last the number of ranks.
        problem: why this rank's arguments cannot be sent; then it raises ValueError once the others know.

    Returns [M, K] in hidden_states' dtype: sums in fp32, in the order of the ranks. Waits for the device once, to know
    how many tokens come, and whether all ranks send the same kind of row: RuntimeError on every rank if not, since what
    is sent are bytes, and ValueError on a rank whose own arguments do not fit together.
    """
    ranks, experts = distributed.get_world_size(group), owner.shape[0] - 1
    problem = problem or _problem(hidden_states, topk_weights, topk_ids)
    ids = topk_ids if problem is None else topk_ids.new_empty((0, 1), dtype=torch.int64)
    # Ids of no expert as -1, since they are sent as int32, in which a larger one would be another.
    ids = torch.where((ids >= 0) & (ids < experts), ids, -1)
    goes = torch.zeros((ids.shape[0], ranks + 1), dtype=torch.bool, device=ids.device)
    goes.scatter_(1, owner[ids.long()], True)  # behind the last expert is no rank
    by_rank = goes[:, :ranks].t()
    token = by_rank.nonzero()[:, 1]  # by rank, then in the order of the tokens
    kind = [hidden_states.shape[1], topk_ids.shape[1], _DTYPES.index(hidden_states.dtype)] if problem is None else _NONE
    sends = torch.cat((by_rank.sum(1, keepdim=True), owner.new_tensor(kind).expand(ranks, -1)), 1)
    receives = torch.empty_like(sends)
    distributed.all_to_all_single(receives, sends, group=group)
    to_ranks, from_ranks = torch.stack((sends, receives)).tolist()
    if problem is not None:
        raise ValueError(problem)
    _check_kinds(kind, from_ranks)
    sent, received = ([row[0] for row in rows] for rows in (to_ranks, from_ranks))

    # One message per pair of ranks: states, weights and ids of a token as the bytes of one row.
    rows = [hidden_states[token], topk_weights[token].float(), ids[token].int()]
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


def _problem(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> str | None:
    """Why these cannot be sent. The op of the rank that receives them sees other tensors."""
    if hidden_states.dtype not in _DTYPES:
        return f"hidden_states: expected bfloat16, float16 or float32, got {hidden_states.dtype}"
    if topk_ids.dtype not in (torch.int32, torch.int64) or not topk_weights.is_floating_point():
        got = f"topk_ids {topk_ids.dtype}, topk_weights {topk_weights.dtype}"
        return f"expected topk_ids in int32 or int64 and topk_weights in a floating point dtype, got {got}"
    if topk_weights.shape != topk_ids.shape or topk_ids.shape[0] != hidden_states.shape[0]:
        shapes = ", ".join(
            f"{name} {list(tensor.shape)}"
            for name, tensor in (
                ("hidden_states", hidden_states), ("topk_weights", topk_weights), ("topk_ids", topk_ids),
            )
        )  # fmt: skip
        return f"expected hidden_states [M, K], topk_weights and topk_ids [M, top_k], got {shapes}"
    return None


def _check_kinds(own: list[int], from_ranks: list[list[int]]) -> None:
    for rank, (_, *kind) in enumerate(from_ranks):
        if kind == _NONE:
            raise RuntimeError(f"expected tokens of every rank, got none of rank {rank} of the group: see its error")
        if kind != own:
            here, there = (f"K = {k}, top_k = {top_k}, {_DTYPES[dtype]}" for k, top_k, dtype in (own, kind))
            raise RuntimeError(f"expected the same from every rank, {here}, got {there} of rank {rank} of the group")


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    """The rows that the ranks have for this one, in their order; ``sent`` rows go to each."""
    result = rows.new_empty((sum(received), rows.shape[1]))
    distributed.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
