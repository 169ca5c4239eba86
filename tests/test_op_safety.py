"""No value in any tensor, and nothing that other threads do meanwhile, makes an op leave its tensors.

A hostile value gives an error on the CPU and a documented result on CUDA. ``make fuzz`` runs far more of this, on
libraries built with sanitizers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from conftest import LEVELS
from torch_nvfp4 import reference
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight

E, K, I, M, TOP_K = 4, 96, 48, 11, 2  # noqa: E741


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Layer:
    """A small MoE layer with its routing, and what the op and the reference make of them."""

    def __init__(self, device: str = "cpu", seed: int = 0, tokens: int = M) -> None:
        generator = seeded(seed)
        self.w13 = random_weight((E, 2 * I, K), gated=True, generator=generator, device=device)
        self.w2 = random_weight((E, K, I), generator=generator, device=device)
        self.packed = (
            torch_nvfp4.pack(self.w13, gated=True), self.w13.global_scale, torch_nvfp4.pack(self.w2),
            self.w2.global_scale,
        )  # fmt: skip
        self.x = torch.randn(tokens, K, generator=generator).to(device, torch.bfloat16)
        self.weights, self.ids = random_routing(tokens, E, TOP_K, generator=generator, device=device)

    def moe(self, ids: Tensor | None = None, expert_map: Tensor | None = None) -> Tensor:
        ids = self.ids if ids is None else ids
        return torch_nvfp4.moe(self.x, *self.packed, self.weights, ids, expert_map, clamp_limit=7.0)

    def expected(self) -> Tensor:
        return reference.moe(self.x, self.w13, self.w2, self.weights, self.ids, clamp_limit=7.0)


def beside(work: Callable[[], Any], disturb: Callable[[int], Any], rounds: int = 200) -> list[Any]:
    """What ``work`` returns, time after time, while another thread calls ``disturb``."""
    stop = threading.Event()

    def loop() -> None:
        turn = 0
        while not stop.is_set():
            disturb(turn)
            turn += 1

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        return [work() for _ in range(rounds)]
    finally:
        stop.set()
        thread.join()


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        pytest.param(
            lambda: torch_nvfp4.route(torch.zeros(2, 2, dtype=torch.int64), None, 2**40),
            "nvfp4::route: expected to allocate 4398046511108 bytes of memory for offsets [1099511627777] on cpu, "
            "got none; use a smaller batch or free memory",
            id="out of memory",
        ),
        pytest.param(
            lambda: torch_nvfp4.combine(
                torch.zeros(0, 16), torch.zeros(2**62, 0), torch.zeros(2**62, 0, dtype=torch.int32), None, 1
            ),
            "nvfp4::combine: expected to allocate 2**63 or more bytes of memory for out [4611686018427387904, 16] on "
            "cpu, got none; use a smaller batch or free memory",
            id="more than 63 bits",
        ),
    ],
)
def test_no_memory(call: Callable[[], Any], expected: str) -> None:
    assert message_of(call) == expected


def test_the_level_holds_for_a_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace is laid out for one level, whatever the environment says when the kernel begins."""
    layer = Layer()
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", LEVELS[0])

    def change(turn: int) -> None:
        os.environ["TORCH_NVFP4_CPU_LEVEL"] = LEVELS[turn % len(LEVELS)]

    expected = layer.expected()
    for out in beside(layer.moe, change):
        assert_accurate(out, expected)


def test_two_callers_at_once() -> None:
    layer, other = Layer(seed=1), Layer(seed=2)
    expected, other_expected = layer.moe(), other.moe()
    results: list[Tensor] = []
    assert all(torch.equal(out, expected) for out in beside(layer.moe, lambda _: results.append(other.moe())))
    assert results
    assert all(torch.equal(out, other_expected) for out in results)


def test_the_number_of_threads_changes_between_calls() -> None:
    layer = Layer()
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2, 1):
            torch.set_num_threads(threads)
            assert_accurate(layer.moe(), layer.expected())
    finally:
        torch.set_num_threads(before)
