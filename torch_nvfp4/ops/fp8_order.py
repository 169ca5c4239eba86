"""The way back from the order of codes that ``moe_fp8`` reads to that of ``pack`` on CUDA.

Both keep the 16 codes of a row and scale group in 8 bytes (csrc/cuda/device/packed_block.h) and have every bit of them
once, so that the way back moves bits within 8 bytes. Scales and places are the same.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_SIGN = 3  # of a code's bits; 0..2 are its magnitude
_LEFTOVER = frozenset((4, 5, 13, 14, 20, 21, 29, 30))  # kLeftoverMask of csrc/cuda/device/decode.cuh
_BLOCK_ROWS = _BLOCK_K = 64
_BLOCK_CODES, _BLOCK_UNITS = 256, 288  # of 8 bytes: of codes, and of codes and scales
_UNITS_AT_ONCE = 2**23  # 64 MB


def _packed_place(code: int, bit: int) -> int:
    """Where the order of ``pack`` has a bit of a code (csrc/cuda/device/decode.cuh)."""
    pair, lane = divmod(code, 2)
    word, kind = divmod(pair, 4)
    at = 16 * lane + (15 if bit == _SIGN else 6 + bit)
    if kind < 3:
        return 32 * word + (at + (0, 4, -6)[kind]) % 32
    at = (at + (8 if word else -2)) % 32  # of the word that leftovers of both make
    return at if at in _LEFTOVER else 32 + (at - 2) % 32


def _ordered_place(code: int, bit: int) -> int:
    """Where the order for FP8 has it (csrc/cuda/device/decode_fp8.cuh)."""
    word, i = divmod(code, 8)
    return 32 * word + (i % 4 * 8 + (7 if i < 4 else 3) if bit == _SIGN else 4 * i + bit)


@cache
def _moves() -> tuple[tuple[int, int], ...]:
    """(bits to the right, which bits of the result have come so), with masks as int64 has them."""
    masks: dict[int, int] = {}
    for code in range(16):
        for bit in range(4):
            to = _packed_place(code, bit)
            by = _ordered_place(code, bit) - to
            masks[by] = masks.get(by, 0) | 1 << to
    return tuple((by, mask - 2**64 if mask >= 2**63 else mask) for by, mask in masks.items())


def _moved(units: Tensor) -> Tensor:
    """Codes in the order for FP8, 16 in an int64, in the order of ``pack``."""
    result = torch.zeros_like(units)
    for by, mask in _moves():
        result |= (units >> by if by >= 0 else units << -by) & mask
    return result


def from_fp8_order(ordered: Tensor, rows: int, in_features: int) -> Tensor:
    """The exact inverse of ``order_for_fp8``: int8 [E, ...] of ``rows`` x ``in_features`` (N, K) -> uint8 of the same
    shape, in plain torch, with one copy and a few times 64 MB beside it."""
    packed = ordered.contiguous().view(torch.uint8).clone()
    units = packed.view(ordered.shape[0], -1).view(torch.int64)
    blocks = -(-rows // _BLOCK_ROWS) * -(-in_features // _BLOCK_K)
    # An expert may end in bytes of no block. Indexing and Tensor.copy_ would ask for a CUDA device even of fakes.
    codes = units.narrow(1, 0, blocks * _BLOCK_UNITS).unflatten(1, (blocks, _BLOCK_UNITS)).narrow(2, 0, _BLOCK_CODES)
    for part in codes.split(max(1, _UNITS_AT_ONCE // units.shape[1])):
        torch.ops.aten.copy_(part, _moved(part))
    return packed
