"""The order of codes for FP8 and back, on the CPU, against the kernels' own formulas in integers."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_nvfp4
from torch_nvfp4 import NVFP4Weight
from torch_nvfp4.ops.fp8_order import from_fp8_order
from torch_nvfp4.testing import random_weight

WORD = 2**32 - 1
LEFTOVER = 0x60306030


def rotate_left(word: int, by: int) -> int:
    return (word << by | word >> (32 - by)) & WORD


def packed_words(codes: list[int]) -> tuple[int, int]:
    """gather_codes of csrc/cuda/device/decode.cuh, over its spread_pair."""
    pair = []
    for low, high in zip(codes[::2], codes[1::2], strict=True):
        both = low | high << 16
        pair.append((both & 0x00080008) << 12 | (both & 0x00070007) << 6)
    z = pair[3] >> 2 | rotate_left(pair[7], 8)
    q0 = pair[0] | rotate_left(pair[1], 4) | pair[2] >> 6 | z & LEFTOVER
    q1 = pair[4] | rotate_left(pair[5], 4) | pair[6] >> 6 | rotate_left(z & ~LEFTOVER & WORD, 30)
    return q0, q1


def ordered_words(codes: list[int]) -> tuple[int, ...]:
    """order_kernel of csrc/cuda/kernels/order_for_fp8.cu."""
    words = [0, 0]
    for c, code in enumerate(codes):
        sign = c % 4 * 8 + (7 if c % 8 < 4 else 3)
        words[c // 8] |= (code & 7) << 4 * (c % 8) | code >> 3 << sign
    return tuple(words)


def stack(experts: int, rows: int, k: int, spare: int, seed: int) -> tuple[Tensor, Tensor]:
    """(packed, ordered) bytes [E, ...] of the same random codes, scales and spare bytes behind the blocks."""
    source = random.Random(seed)
    packed, ordered = bytearray(), bytearray()
    for _ in range(experts):
        for _ in range(-(-rows // 64) * -(-k // 64)):
            for _ in range(256):
                codes = [source.randrange(16) for _ in range(16)]
                packed += b"".join(word.to_bytes(4, "little") for word in packed_words(codes))
                ordered += b"".join(word.to_bytes(4, "little") for word in ordered_words(codes))
            scales = source.randbytes(256)
            packed, ordered = packed + scales, ordered + scales
        behind = source.randbytes(spare)
        packed, ordered = packed + behind, ordered + behind
    return tuple(  # type: ignore[return-value]
        torch.frombuffer(part, dtype=dtype).view(experts, -1)
        for part, dtype in ((packed, torch.uint8), (ordered, torch.int8))
    )


def test_each_code_alone() -> None:
    for place in range(16):
        for code in range(1, 16):
            codes = [0] * 16
            codes[place] = code
            words = [b"".join(w.to_bytes(4, "little") for w in make(codes)) for make in (packed_words, ordered_words)]
            packed, ordered = (torch.frombuffer(bytearray(word * 288), dtype=torch.uint8).view(1, -1) for word in words)
            got = from_fp8_order(ordered.view(torch.int8), 16, 16)
            assert torch.equal(got[:, :2048], packed[:, :2048])


@pytest.mark.parametrize(
    ("experts", "rows", "k", "spare"), [(1, 64, 64, 0), (3, 16, 80, 0), (2, 144, 16, 16), (5, 80, 64, 40)]
)
def test_back_is_the_inverse(experts: int, rows: int, k: int, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, ordered = stack(experts, rows, k, spare, seed=experts)
    before = ordered.clone()
    for at_once in (2**23, 1, 700):  # all, one expert at a time, some
        monkeypatch.setattr("torch_nvfp4.ops.fp8_order._UNITS_AT_ONCE", at_once)
        got = from_fp8_order(ordered, rows, k)
        assert got.dtype == torch.uint8
        assert torch.equal(got, packed)
    assert torch.equal(ordered, before)


def fake_weight(shape: tuple[int, ...], gated: bool) -> NVFP4Weight:
    *rows, k = shape
    codes = torch.empty(*rows, k // 2, dtype=torch.uint8, device="cuda")
    scale = torch.empty(*rows, k // 16, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    return NVFP4Weight(codes, scale, torch.empty(*rows[:1], *([2] if gated else []), device="cuda"))


def test_unpack_of_fakes_has_the_shapes_that_pack_was_given() -> None:
    """On a GPU that need not be here; tests/ops/test_moe_fp8.py has the values."""
    with FakeTensorMode():
        for shape, gated in (((3, 96, 80), True), ((2, 48, 16), False)):
            weight = fake_weight(shape, gated)
            packed = torch_nvfp4.pack(weight, gated=gated, input_quant="fp8")
            assert (packed.dtype, packed.device.type) == (torch.int8, "cuda")
            assert packed.shape == torch_nvfp4.pack(weight, gated=gated).shape
            back = torch_nvfp4.unpack(packed, shape[-1], weight.global_scale, gated=gated)
            for got, given in zip(back, weight, strict=True):
                assert (got.shape, got.dtype, got.device) == (given.shape, given.dtype, given.device)
            with pytest.raises(RuntimeError, match=rf"nvfp4::unpack: packed must have shape .*K = {shape[-1] + 64}"):
                torch_nvfp4.unpack(packed, shape[-1] + 64, weight.global_scale, gated=gated)


def test_there_is_none_on_the_cpu() -> None:
    words = "expected tensors on a CUDA device, got them on the cpu, which has no kernels for FP8; use moe"
    with pytest.raises(RuntimeError, match=f"nvfp4::order_for_fp8: {words}"):
        torch_nvfp4.pack(random_weight((2, 32, 64)), input_quant="fp8")
    with pytest.raises(RuntimeError, match=f"nvfp4::unpack: {words}"):
        torch_nvfp4.unpack(torch.zeros(2, 32, 36, dtype=torch.int8), 64, torch.ones(2))
