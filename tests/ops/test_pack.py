"""The packed layout: every code and scale comes back, and through the kernels each counts what it should."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_nvfp4
from helpers.layers import (
    BF16,
    FP32,
    activations,
    dtypes_of,
    seeded,
    to,
)
from torch_nvfp4 import NVFP4Weight, reference
from torch_nvfp4.format import dequantize, pack_codes, row_global_scale
from torch_nvfp4.testing import assert_accurate, random_weight

PACK_SHAPES = [(16, 16), (48, 80), (64, 64), (208, 144), (1, 16, 48), (3, 96, 64), (5, 160, 272)]


@pytest.mark.parametrize("shape", PACK_SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_pack_round_trip(shape: tuple[int, ...], gated: bool, target: str) -> None:
    if gated:
        shape = (*shape[:-2], 2 * shape[-2], shape[-1])
    *experts, n, k = shape
    weight = random_weight(shape, gated=gated, all_scales=True, generator=seeded(58))
    w = NVFP4Weight(*to(target, *weight))
    packed = torch_nvfp4.pack(w, gated=gated)
    assert packed.dtype == torch.uint8
    rows = [2, n // 2] if gated else [n]
    if target == "cpu":
        assert list(packed.shape) == [*experts, *rows, math.ceil(k / 64), 36]
    else:
        assert list(packed.shape[:-1]) == [*experts, *rows]
    back = torch_nvfp4.unpack(packed, k, w.global_scale, gated=gated)
    assert torch.equal(back.data.cpu(), weight.data)
    assert torch.equal(back.scale.cpu().view(torch.uint8), weight.scale.view(torch.uint8))
    assert back.global_scale is w.global_scale
    # From other strides, the same bytes.
    transposed = w._replace(data=w.data.mT.contiguous().mT)
    assert torch.equal(torch_nvfp4.pack(transposed, gated=gated), packed)


def test_large_weights_ask_for_huge_pages() -> None:
    weight = NVFP4Weight(
        torch.zeros(4096, 2048, dtype=torch.uint8), torch.zeros(4096, 256).to(torch.float8_e4m3fn), torch.ones(())
    )
    packed = torch_nvfp4.pack(weight)
    # Only Linux takes such advice, and a kernel that was built without huge pages refuses it.
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        return
    middle = packed.data_ptr() + packed.nbytes // 2
    mapping = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", re.DOTALL | re.MULTILINE)
    found = mapping.findall(Path("/proc/self/smaps").read_text())
    [flags] = [flags for begin, end, flags in found if int(begin, 16) <= middle < int(end, 16)]
    assert "hg" in flags.split()


@pytest.mark.parametrize("gated", [False, True])
def test_a_stack_without_experts(gated: bool, device: str) -> None:
    codes = torch.empty(0, 32, 24, dtype=torch.uint8, device=device)
    scale = torch.empty(0, 32, 3, dtype=torch.uint8, device=device)
    packed = torch.ops.nvfp4.pack(codes, scale, gated)
    unpacked = torch.ops.nvfp4.unpack(packed, 48, gated)
    assert [part.shape for part in unpacked] == [codes.shape, scale.shape]
    with FakeTensorMode() as mode:
        fake = torch.ops.nvfp4.unpack(mode.from_tensor(packed), 48, gated)
    assert [part.shape for part in fake] == [codes.shape, scale.shape]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_packed_bytes_do_not_depend_on_the_level(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed weight that was saved on one machine serves another."""
    weight = random_weight((2, 96, 144), gated=gated, all_scales=True, generator=seeded(59))
    best = torch_nvfp4.pack(weight, gated=gated)
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", "portable")
    assert torch.equal(torch_nvfp4.pack(weight, gated=gated), best)


FINITE_SCALES = [byte for byte in range(256) if byte & 0x7F != 0x7F]


@st.composite
def every_code_and_scale(draw: st.DrawFn) -> NVFP4Weight:
    """A weight [N, K] with all 16 codes under each of the 254 finite scales, in a random order."""
    groups = draw(st.sampled_from([1, 2, 3, 4, 5, 9, 16]))
    n = math.ceil(len(FINITE_SCALES) / groups / 32) * 32
    generator = seeded(draw(st.integers(0, 2**32 - 1)))
    count = n * groups
    extra = torch.randint(len(FINITE_SCALES), (count - len(FINITE_SCALES),), generator=generator)
    scales = torch.tensor(FINITE_SCALES, dtype=torch.uint8)
    scales = torch.cat((scales, scales[extra]))[torch.randperm(count, generator=generator)]
    codes = torch.rand(count, 16, generator=generator).argsort(-1).to(torch.uint8)
    exponent = st.integers(-13, -9)
    gated = draw(st.booleans())
    powers = [draw(exponent), draw(exponent)] if gated else draw(exponent)
    return NVFP4Weight(
        pack_codes(codes.view(n, groups * 16)),
        scales.view(n, groups).view(torch.float8_e4m3fn),
        torch.tensor(powers, dtype=FP32).exp2(),
    )


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weight=every_code_and_scale(), tokens=st.sampled_from([1, 2, 3, 8, 64, 256]))
def test_every_code_times_every_scale_is_exact(target: str, weight: NVFP4Weight, tokens: int) -> None:
    """Identity activations read the weights back through the kernels: each product has 6 significant bits, which
    bf16, fp16 and fp32 hold."""
    gated = weight.global_scale.dim() == 1
    n, k = weight.data.shape[0], weight.data.shape[1] * 2
    w = NVFP4Weight(*to(target, *weight))
    packed = torch_nvfp4.pack(w, gated=gated)
    back = torch_nvfp4.unpack(packed, k, w.global_scale, gated=gated)
    assert torch.equal(back.data.cpu(), weight.data)
    assert torch.equal(back.scale.cpu().view(torch.uint8), weight.scale.view(torch.uint8))

    expected = dequantize(weight, torch.float64).T
    ids = torch.zeros(k, 1, dtype=torch.int32, device=target)
    order, offsets = torch_nvfp4.route(ids, None, 1)
    # One token per call costs k calls; a few of them will do.
    chunks = range(0, k, tokens) if tokens > 2 else range(0, k, max(k // 8, tokens))
    for dtype in dtypes_of(target):
        identity = torch.eye(k, dtype=dtype, device=target)
        for start in chunks:
            rows = slice(start, start + tokens)
            out = torch_nvfp4.linear(identity[rows], packed, w.global_scale)
            assert torch.equal(out.cpu().double(), expected[rows])
        grouped = torch_nvfp4.grouped_gemm(identity, packed[None], w.global_scale[None], order, offsets)
        assert grouped.shape == (k, n)
        assert torch.equal(grouped.cpu().double(), expected)
        assert torch.equal(expected.to(dtype).double(), expected)


def test_gate_and_up_have_their_own_global_scale(target: str) -> None:
    weight = random_weight((2, 64, 80), gated=True, generator=seeded(60))
    weight = weight._replace(global_scale=torch.tensor([[2.0**-9, 2.0**-13], [2.0**-12, 2.0**-10]]))
    assert not torch.equal(row_global_scale(weight)[:, 0], row_global_scale(weight)[:, -1])
    w = NVFP4Weight(*to(target, *weight))
    x = activations(4, 80, seed=61)
    ids = torch.tensor([[0], [1], [0], [1]])
    order, offsets = reference.route(ids, None, 2)
    out = torch_nvfp4.grouped_gemm(
        *to(target, x.to(BF16), torch_nvfp4.pack(w, gated=True), w.global_scale, order, offsets)
    )
    expected = reference.grouped_gemm(x, weight, order, offsets)
    assert_accurate(out[:, :32].cpu(), expected[:, :32])
    assert_accurate(out[:, 32:].cpu(), expected[:, 32:])
