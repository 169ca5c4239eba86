"""Modules that are made under FakeTensorMode, for deferred initialisation and estimates of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

from torch_nvfp4 import NVFP4Experts, NVFP4Linear, NVFP4Weight, dequantize, quantize
from torch_nvfp4.checkpoint import Checkpoint, write_checkpoint

BACKENDS = (None, "reference")


def fill(module: torch.nn.Module) -> list[tuple[torch.Size, torch.dtype]]:
    return [(buffer.shape, buffer.dtype) for buffer in module.buffers()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_have_the_shapes_of_real_ones(backend: str | None) -> None:
    def make() -> list[NVFP4Experts]:
        floats = torch.ones(4, 64, 64), torch.ones(4, 64, 32)
        return [
            NVFP4Experts(4, 64, 32, clamp_limit=7.0, backend=backend),
            NVFP4Experts.from_float(*floats, clamp_limit=7.0, backend=backend),
        ]

    real = make()
    saved = [{key: value.shape for key, value in module.state_dict().items()} for module in real]
    with FakeTensorMode():
        for fake, other, shapes in zip(make(), real, saved, strict=True):
            assert fake.backend == other.backend
            assert fill(fake) == fill(other)
            assert all(map(is_fake, fake.buffers()))
            output = fake(torch.empty(3, 64), torch.empty(3, 2), torch.zeros(3, 2, dtype=torch.int64))
            assert is_fake(output)
            assert output.shape == (3, 64)
            assert {key: value.shape for key, value in fake.state_dict().items()} == shapes


def test_linear_and_float_weights() -> None:
    with FakeTensorMode():
        for linear in (NVFP4Linear(64, 32), NVFP4Linear.from_float(torch.ones(32, 64), torch.ones(32))):
            assert is_fake(linear(torch.empty(2, 5, 64)))
            assert linear(torch.empty(2, 5, 64)).shape == (2, 5, 32)
        weight = quantize(torch.ones(2, 32, 64), global_scale=torch.ones(2, 2), gated=True)
        assert [tuple(part.shape) for part in weight] == [(2, 32, 32), (2, 32, 4), (2, 2)]
        assert dequantize(weight).shape == (2, 32, 64)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NVFP4Experts(4, 64, 24), "K and I to be multiples of 16, got 64, 24"),
        (lambda: quantize(torch.ones(32, 60)), "K a positive multiple of 16, got N=32, K=60"),
        (
            lambda: NVFP4Linear.from_weight(NVFP4Weight(*quantize(torch.ones(32, 64))[:2], torch.ones(2))),
            "global_scale",
        ),
    ],
)
def test_shapes_are_checked_all_the_same(make: Callable[[], object], words: str) -> None:
    with FakeTensorMode(), pytest.raises((ValueError, RuntimeError, NotImplementedError), match=words):
        make()


def test_a_checkpoint_is_not_read_into_fake_tensors(tmp_path: Path) -> None:
    """They have no memory to read into. What was read before goes on working, and the mode leaves nothing behind."""
    write_checkpoint(tmp_path, hidden_size=64, moe_intermediate_size=32, n_routed_experts=8, num_hidden_layers=1)
    checkpoint = Checkpoint.open(tmp_path)
    words = "checkpoint: expected to read outside FakeTensorMode, got one that is active; read before, or make"
    with FakeTensorMode():
        for read in (
            lambda: NVFP4Experts.from_checkpoint(tmp_path, 0),
            lambda: checkpoint.experts(0),
            lambda: checkpoint.tensor(next(iter(checkpoint.tensors))),
        ):
            with pytest.raises(RuntimeError, match=words):
                read()
    assert NVFP4Experts.from_checkpoint(tmp_path, 0)(torch.ones(1, 64), torch.ones(1, 1), torch.zeros(1, 1).int()).any()
