"""What an instruction level of the CPU promises beyond the ops' own accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from helpers.layers import BF16, FP16, FP32, activations, make_layer, seeded
from helpers.levels import LEVELS
from torch_nvfp4 import NVFP4Weight, reference
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("all_scales", [False, True], ids=["close-scales", "all-scales"])
@pytest.mark.parametrize("level", [level for level in LEVELS if level in ("avx2", "portable")])
def test_a_row_has_the_same_bits_in_every_batch(
    level: str, all_scales: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without batch_invariant too. Scales that lie close together are multiplied in another way than others."""
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", level)
    layer = make_layer(2, 208, 80, seed=1, all_scales=all_scales).packed("cpu")
    weights, ids = random_routing(64, 2, 1, generator=seeded(2))
    x = activations(64, 208, seed=3, scale=1e-2).to(dtype)
    whole = torch_nvfp4.moe(x, *layer, weights, ids, clamp_limit=7.0)
    assert bool(whole.isfinite().all())
    for count in (*range(1, 20), 40):
        rows = torch.randperm(64, generator=seeded(count))[:count]
        some = torch_nvfp4.moe(x[rows], *layer, weights[rows], ids[rows], clamp_limit=7.0)
        assert torch.equal(some.view(torch.int16), whole[rows].view(torch.int16)), count


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("all_scales", [False, True], ids=["close-scales", "all-scales"])
@pytest.mark.parametrize("level", [level for level in LEVELS if level == "amx"])
def test_a_row_of_tiles_has_the_same_bits_in_every_batch(
    level: str, all_scales: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From five tokens on: one or two token tiles keep their sums, more of them take the blocks in chunks.

    The last chunk has one block, the last pair one panel, and a chunk fewer or more passes than blocks to decode.
    """
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", level)
    stored = make_layer(1, 400, 208, seed=7, all_scales=all_scales)
    layer = stored.packed("cpu")
    weights, ids = random_routing(260, 1, 1, generator=seeded(8))
    x = activations(260, 400, seed=9, scale=1e-2).to(dtype)
    whole = torch_nvfp4.moe(x, *layer, weights, ids, clamp_limit=7.0)
    assert_accurate(whole, reference.moe(x, *stored, weights, ids, clamp_limit=7.0))
    for count in (5, 16, 17, 32, 33, 49, 80, 97, 129, 194):
        rows = torch.randperm(260, generator=seeded(count))[:count]
        some = torch_nvfp4.moe(x[rows], *layer, weights[rows], ids[rows], clamp_limit=7.0)
        assert torch.equal(some.view(torch.int16), whole[rows].view(torch.int16)), count


@pytest.mark.parametrize("m", [1, 3, 4, 5, 12, 17])
def test_largest_sums(m: int, target: str) -> None:
    """Rows whose scales can just be made integers of one unit, or just not: no sum of products may overflow."""
    # As integers the scales of a block are 3 * 224 and 8 to 15: with codes 6 and activations near 2^14 their sum fills
    # 31 bits or just does not. A panel of 16 rows has one kind.
    rows, k = 96, 128
    scale = torch.tensor([0x7E, 0x7E, 0x7E, 0]).repeat(rows, k // 64)  # 448 448 448
    # 16 18 30 32 15 0
    scale[:, 3::4] = torch.tensor([0x58, 0x59, 0x5F, 0x60, 0x57, 0x00]).repeat_interleave(16)[:, None]
    scale = scale.unflatten(1, (-1, 4))[:, :, torch.randperm(4, generator=seeded(5))].flatten(1)
    codes = torch.full((rows, k // 2), 0x77, dtype=torch.uint8)
    codes[1::2] = 0xFF
    weight = NVFP4Weight(codes, scale.to(torch.uint8).view(torch.float8_e4m3fn), torch.tensor(2.0**-8))
    x = torch.full((m, k), 1.9921875)
    x[1::2] = -1.9921875
    packed = torch_nvfp4.pack(NVFP4Weight(*(part.to(target) for part in weight)))
    out = torch_nvfp4.linear(x.to(target, BF16), packed, weight.global_scale.to(target)).cpu()
    assert_accurate(out, reference.linear(x, weight))


def test_random_weights_reach_both_kinds_of_blocks() -> None:
    """Rows of four scales that fit integers of one unit, as FoldedScales (avx2_decode.inl) has it, or do not."""

    def share_that_fits(all_scales: bool) -> float:
        scale = random_weight((256, 1024), generator=seeded(6), all_scales=all_scales).scale.float()
        rows = scale.unflatten(-1, (-1, 4))
        unit = torch.exp2(rows.abs().amin(-1, keepdim=True).clamp(min=2.0**-6).log2().floor() - 3)
        fits = (rows >= 0).all(-1) & ((rows / unit).sum(-1) <= 680)
        return float(fits.unflatten(0, (-1, 16)).all(1).double().mean())

    assert share_that_fits(all_scales=False) > 0.9
    assert share_that_fits(all_scales=True) < 0.1


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads and this thread's treatment of subnormal numbers."""
    before = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(before)


def results_of_subnormals(dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """The ops with activations that are subnormal in fp16, or of which in bf16 and fp32 some are."""
    layer, dense = make_layer(3, 96, 48, seed=31).packed("cpu"), make_layer(1, 96, 48, seed=32).packed("cpu")
    layer = layer._replace(
        w13_global_scale=layer.w13_global_scale * 2**12, w2_global_scale=layer.w2_global_scale * 2**12
    )
    routing = random_routing(40, 3, 2, generator=seeded(33))
    x = (torch.randn(40, 96, generator=seeded(34)) * (2e-5 if dtype is FP16 else 1e-38)).to(dtype)
    gate_up = torch.cat([x, torch.randn(40, 96, generator=seeded(35)).to(dtype)], 1)
    rows = x[:, :48].contiguous()

    def results() -> list[Tensor]:
        leaf = gate_up.clone().requires_grad_()
        activated = torch_nvfp4.swiglu(leaf)
        activated.backward(x)
        assert leaf.grad is not None
        return [
            *(torch_nvfp4.linear(rows[:count], dense.w2[0], torch.tensor(1.0)) for count in (1, 4, 40)),
            torch_nvfp4.moe(x, *layer, *routing, activation="gelu"),
            activated.detach(),
            leaf.grad,
        ]

    return results


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.usefixtures("threads")
def test_subnormal_numbers_do_not_depend_on_the_mode_of_a_thread(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.set_flush_denormal sets the calling thread's mode alone: rows would differ by the thread that has them."""
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", level)
    results_now = results_of_subnormals(dtype)
    torch.set_num_threads(1)
    expected = results_now()
    assert dtype is not FP16 or all(bool(result.any()) for result in expected)
    for count in (1, 4):
        torch.set_num_threads(count)
        assert torch.set_flush_denormal(True)
        results = results_now()
        assert not bool((torch.tensor([1.5e-38]) * 0.5).any()), "expected the caller's mode again after the ops"
        torch.set_flush_denormal(False)
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result.view(torch.uint8), wanted.view(torch.uint8))
