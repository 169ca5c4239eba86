"""One rank's part of a layer's experts, cut out of canonical weights: packed bytes cannot be sliced along I."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight
from torch_nvfp4.nn import NVFP4Experts

__all__ = ["checked_part", "expert_range", "slice_biases", "slice_experts"]


def expert_range(num_experts: int, rank: int, size: int) -> range:
    """The experts of one rank: as even as possible, those with one more first."""
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"expected size >= 1 and 0 <= rank < size, got rank {rank}, size {size}")
    each, more = divmod(num_experts, size)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def slice_experts(
    w13: NVFP4Weight, w2: NVFP4Weight, experts: range, tp_rank: int = 0, tp_size: int = 1
) -> tuple[NVFP4Weight, NVFP4Weight]:
    """One rank's part of canonical weights, contiguous: w13 [E, 2I, K] (or [E, I, K]) and w2 [E, K, I] give
    [len(experts), 2I / tp_size, K] and [len(experts), K, I / tp_size].

    Raises ValueError unless I / tp_size is a multiple of 16.
    """
    size = 2 * w2.data.shape[-1]
    part = checked_part(size, tp_rank, tp_size)
    rows = slice(part.start, part.stop)
    chosen = slice(experts.start, experts.stop)

    def rows13(tensor: Tensor) -> Tensor:
        """The rank's rows of gate and its rows of up."""
        halves = tensor[chosen].unflatten(1, (-1, size))
        return halves[:, :, rows].flatten(1, 2).contiguous()

    def columns2(tensor: Tensor, values: int) -> Tensor:
        return tensor[chosen, :, part.start // values : part.stop // values].contiguous()

    # Bytes: indexing and contiguous() of float8 are not there on every device.
    scale13, scale2 = w13.scale.view(torch.uint8), w2.scale.view(torch.uint8)
    return (
        NVFP4Weight(
            rows13(w13.data), rows13(scale13).view(torch.float8_e4m3fn), w13.global_scale[chosen].contiguous()
        ),
        NVFP4Weight(
            columns2(w2.data, 2),
            columns2(scale2, GROUP_SIZE).view(torch.float8_e4m3fn),
            w2.global_scale[chosen].contiguous(),
        ),
    )  # fmt: skip


def slice_biases(
    module: NVFP4Experts, experts: range, tp_rank: int, tp_size: int
) -> tuple[Tensor | None, Tensor | None]:
    """The rank's part of w13_bias and w2_bias.

    w2's belongs to the first of the tensor parallel ranks, since the ranks' results are added.
    """
    part = checked_part(module.intermediate_size, tp_rank, tp_size)
    w13_bias, w2_bias = module.w13_bias, module.w2_bias
    if w13_bias is not None:
        halves = w13_bias[experts.start : experts.stop].unflatten(1, (-1, module.intermediate_size))
        w13_bias = halves[:, :, part.start : part.stop].flatten(1).contiguous()
    if w2_bias is not None:
        w2_bias = w2_bias[experts.start : experts.stop].clone()
        w2_bias = w2_bias if tp_rank == 0 else torch.zeros_like(w2_bias)
    return w13_bias, w2_bias


def checked_part(intermediate_size: int, rank: int, size: int) -> range:
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"expected tp_size >= 1 and 0 <= tp_rank < tp_size, got tp_rank {rank}, tp_size {size}")
    if intermediate_size % (size * GROUP_SIZE):
        raise ValueError(
            f"expected a tp_size that splits the intermediate size {intermediate_size} into multiples of {GROUP_SIZE} "
            f"(the group of an NVFP4 scale), got tp_size {size}: {intermediate_size / size:g} each"
        )
    part = intermediate_size // size
    return range(rank * part, (rank + 1) * part)
