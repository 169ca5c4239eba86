"""Slots sorted by expert, in tiles of one expert each: what an indexed GEMM takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def align(order: Tensor, offsets: Tensor, tile: int) -> dict[str, Tensor]:
    """The slots as ``route`` sorted them, those of each expert filled up to whole tiles with a number that is no slot.

    Returns Humming's operands, all int32: the slots, the expert of each tile, and the number of slots in use. The first
    two are as long as any routing may need.
    """
    slots, experts = order.numel(), offsets.numel() - 1
    tiles = min(slots, experts) + slots // tile
    sorted_ids, expert_ids, used = (order.new_empty(size) for size in (tiles * tile, tiles, 1))
    lanes, expert_lanes = triton.next_power_of_2(tile), triton.next_power_of_2(experts)
    with torch.cuda.device_of(order):
        _kernel[(tiles,)](order, offsets, sorted_ids, expert_ids, used, slots, experts, tile, expert_lanes, lanes)
    return {"sorted_ids": sorted_ids, "expert_ids": expert_ids, "num_tokens_padded": used}


def _align(
    order: tl.tensor, offsets: tl.tensor, sorted_ids: tl.tensor, expert_ids: tl.tensor, used: tl.tensor,
    slots: tl.tensor, EXPERTS: tl.constexpr, TILE: tl.constexpr, EXPERT_LANES: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0)
    lane, expert = tl.arange(0, LANES), tl.arange(0, EXPERT_LANES)
    first = tl.load(offsets + expert, mask=expert < EXPERTS, other=0)
    last = tl.load(offsets + expert + 1, mask=expert < EXPERTS, other=0)
    tiles = tl.cdiv(last - first, TILE)
    end = tl.cumsum(tiles)
    # One expert owns this tile, or none does and the tile lies behind those in use.
    mine = (end - tiles <= tile) & (tile < end)
    position = tl.sum(tl.where(mine, first + (tile - end + tiles) * TILE, 0)) + lane
    slot = tl.load(order + position, mask=position < tl.sum(tl.where(mine, last, 0)), other=slots)
    tl.store(sorted_ids + tile * TILE + lane, slot, mask=lane < TILE)
    tl.store(expert_ids + tile, tl.sum(tl.where(mine, expert, 0)))
    if tile == 0:
        tl.store(used, tl.sum(tiles) * TILE)


_kernel = triton.jit(_align)
