"""No value in any tensor, and nothing that other threads do meanwhile, makes an op leave its tensors.

A hostile value gives an error on the CPU and a documented result on CUDA. ``make fuzz`` runs far more of this, on
libraries built with sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from helpers.levels import LEVELS
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


def beside(work: Callable[[], Any], disturb: Callable[[int], Any], rounds: int = 100) -> list[Any]:
    """What ``work`` returns, time after time, while another thread calls ``disturb`` as often."""
    turns = 0
    stop = threading.Event()

    def loop() -> None:
        nonlocal turns
        while not stop.is_set():
            disturb(turns)
            turns += 1

    thread = threading.Thread(target=loop)
    thread.start()
    results = []
    try:
        while len(results) < rounds or turns < rounds:
            results.append(work())
    finally:
        stop.set()
        thread.join()
    return results


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        pytest.param(
            lambda: torch_nvfp4.combine(
                torch.zeros(0, 16), torch.zeros(2**43, 0), torch.zeros(2**43, 0, dtype=torch.int32), None, 1
            ),
            "nvfp4::combine: expected to allocate 562949953421312 bytes of memory for out [8796093022208, 16] on cpu, "
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
    for out in beside(layer.moe, change, rounds=50):
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


# order and offsets that route did not make


def routed_gemm(layer: Layer, order: Tensor, offsets: Tensor, *, gated: bool, rows: int = M) -> Tensor:
    op = torch_nvfp4.grouped_gemm_swiglu if gated else torch_nvfp4.grouped_gemm
    return op(layer.x[:rows], *layer.packed[:2], order.to(layer.x.device), offsets.to(layer.x.device))


SLOTS = M * TOP_K
ORDER_RULE = f"order must hold every slot from 0 to {SLOTS - 1} once, got"
OFFSETS_RULE = f"offsets must begin with 0, not decrease and not exceed the {SLOTS} slots, got"
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
BAD_ROUTINGS = {
    # which tensor, at which index, becomes what; the error
    "slot too large": ("order", 3, SLOTS, f"{ORDER_RULE} {SLOTS} at index 3"),
    "slot negative": ("order", SLOTS - 1, -1, f"{ORDER_RULE} -1 at index {SLOTS - 1}"),
    "slot smallest": ("order", 0, INT_MIN, f"{ORDER_RULE} {INT_MIN} at index 0"),
    "slot largest": ("order", 0, INT_MAX, f"{ORDER_RULE} {INT_MAX} at index 0"),
    "slot repeated": ("order", 7, 2, f"{ORDER_RULE} 2 again at index 7"),
    "offsets begin late": ("offsets", 0, 1, f"{OFFSETS_RULE} 1 at index 0"),
    "offsets begin below": ("offsets", 0, -3, f"{OFFSETS_RULE} -3 at index 0"),
    "offsets smallest": ("offsets", 2, INT_MIN, f"{OFFSETS_RULE} {INT_MIN} at index 2"),
    "offsets largest": ("offsets", 2, INT_MAX, f"{OFFSETS_RULE} {INT_MAX} at index 2"),
    "offsets decrease": ("offsets", 3, 4, f"{OFFSETS_RULE} 4 at index 3"),
    "offsets end late": ("offsets", E, SLOTS + 1, f"{OFFSETS_RULE} {SLOTS + 1} at index {E}"),
}


def bad_routing(tensor: str, index: int, value: int) -> tuple[Tensor, Tensor]:
    order = torch.arange(SLOTS, dtype=torch.int32)
    offsets = torch.tensor([0, 3, 5, 10, SLOTS - 2], dtype=torch.int32)
    (order if tensor == "order" else offsets)[index] = value
    return order, offsets


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", BAD_ROUTINGS)
def test_a_routing_of_no_slots(name: str, gated: bool) -> None:
    tensor, index, value, expected = BAD_ROUTINGS[name]
    order, offsets = bad_routing(tensor, index, value)
    op = "grouped_gemm_swiglu" if gated else "grouped_gemm"
    assert message_of(lambda: routed_gemm(Layer(), order, offsets, gated=gated)) == f"nvfp4::{op}: {expected}"


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["", "80"])
@pytest.mark.parametrize("slots_per_expert", [4, 64], ids=["few", "many"])
def test_a_routing_of_no_slots_gives_nan_on_cuda(
    arch: str, slots_per_expert: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_NVFP4_ARCH", arch)
    slots = slots_per_expert * E
    layer = Layer("cuda", tokens=slots)
    good = torch.arange(slots, dtype=torch.int32), torch.tensor([0, 3, 5, 10, slots - 2], dtype=torch.int32)
    bad_values = (-1, slots, INT_MIN, INT_MAX)
    hostile = [("order", i, value) for i in (0, slots // 2, slots - 1) for value in (*bad_values, 1)]
    hostile += [("offsets", i, value) for i in (0, 2, E) for value in (*bad_values, slots + 1)]
    hostile += [("offsets", 0, 1), ("offsets", 3, 4)]
    for gated in (False, True):
        expected = reference.grouped_gemm(layer.x, layer.w13, *(tensor.cuda() for tensor in good))
        expected = reference.swiglu(expected) if gated else expected
        for tensor, index, value in hostile:
            order, offsets = (tensor.clone() for tensor in good)
            changed = order if tensor == "order" else offsets
            if (tensor == "offsets" and index == E and value == slots) or changed[index] == value:
                continue
            changed[index] = value
            out = routed_gemm(layer, order, offsets, gated=gated, rows=slots)
            assert bool(out.isnan().all()), (tensor, index, value)
        assert_accurate(routed_gemm(layer, *good, gated=gated, rows=slots), expected)


def test_slots_without_rows() -> None:
    layer = Layer()
    order, offsets = torch.arange(5, dtype=torch.int32), torch.tensor([0, 1, 2, 3, 5], dtype=torch.int32)
    expected = "nvfp4::grouped_gemm: order must hold a multiple of x's rows (0), got 5"
    arguments = (layer.x[:0], *layer.packed[:2], order, offsets)
    assert message_of(lambda: torch_nvfp4.grouped_gemm(*arguments)) == expected
    assert message_of(lambda: torch_nvfp4.grouped_gemm(*(a.to("meta") for a in arguments))) == expected
    none = torch_nvfp4.grouped_gemm(*arguments[:3], order[:0], torch.zeros_like(offsets))
    assert none.shape == (0, 2 * I)


# ids and maps


HOSTILE_IDS = [-(2**63), 2**63 - 1, -(2**31), 2**31, 2**32, 2**32 + 1, -1, 0, E - 1, E, 5, 6]
HOSTILE_MAP = [INT_MIN, INT_MAX, -1, E, E - 1, 0, E + 1]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mapped", [False, True])
def test_hostile_ids(device: str, ids_dtype: torch.dtype, mapped: bool) -> None:
    tokens = 40  # more slots than CUDA takes without sorting them
    values = torch.tensor([i for i in HOSTILE_IDS if ids_dtype == torch.int64 or INT_MIN <= i <= INT_MAX])
    layer = Layer(device, tokens=tokens)
    choice = torch.randint(len(values), (tokens, TOP_K), generator=seeded(3))
    layer.ids = values[choice].to(device, ids_dtype)
    expert_map = torch.tensor(HOSTILE_MAP, dtype=torch.int32, device=device) if mapped else None
    for rows in (tokens, 3):
        ids, weights, x = layer.ids[:rows], layer.weights[:rows], layer.x[:rows]
        expected = reference.moe(x, layer.w13, layer.w2, weights, ids, expert_map)
        assert_accurate(torch_nvfp4.moe(x, *layer.packed, weights, ids, expert_map), expected)
        got, wanted = torch_nvfp4.route(ids, expert_map, E), reference.route(ids, expert_map, E)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        outputs = torch.randn(rows * TOP_K, 24, generator=seeded(4)).to(device, torch.bfloat16)
        expected = reference.combine(outputs, weights, ids, expert_map, E)
        assert_accurate(torch_nvfp4.combine(outputs, weights, ids, expert_map, E), expected)


def scribble(*tensors: Tensor) -> Callable[[int], None]:
    """Writes hostile values into the tensors, which an op reads meanwhile."""
    values = torch.tensor([0, 1, -1, 3, INT_MAX, 2, INT_MIN, E])

    def write(turn: int) -> None:
        for tensor in tensors:
            flat = tensor.view(-1)
            flat.copy_(values[(torch.arange(flat.numel()) * (turn % 5) + turn) % len(values)])

    return write


def test_ids_change_while_they_are_read() -> None:
    """Every id counts as one of the values that it had: the order stays one of all slots, and nothing is overrun."""
    layer = Layer(tokens=300)
    ids, expert_map = layer.ids.clone(), torch.zeros(5, dtype=torch.int32)
    slots = torch.arange(ids.numel(), dtype=torch.int32)
    for order, offsets in beside(lambda: torch_nvfp4.route(ids, None, E), scribble(ids, expert_map)):
        assert torch.equal(order.sort().values, slots)
        assert offsets[0] == 0
        assert bool((offsets.diff() >= 0).all())
        assert int(offsets[-1]) <= len(slots)
    beside(lambda: layer.moe(ids, expert_map), scribble(ids, expert_map), rounds=30)
    rows = torch.zeros(ids.numel(), 16)
    beside(lambda: torch_nvfp4.combine(rows, layer.weights, ids, expert_map, E), scribble(ids, expert_map), rounds=100)


def batch_of(layer: Layer, counts: list[int], rows: int) -> tuple[Tensor, Tensor]:
    """hidden_states [E, rows, K] and expert_num_tokens on the layer's device."""
    device = layer.x.device
    x = torch.randn(E, rows, K, generator=seeded(5)).to(device, torch.bfloat16)
    return x, torch.tensor(counts, dtype=torch.int32, device=device)


def test_counts_change_while_they_are_read() -> None:
    """Every count is checked as it is used, so a call gives the rows of good counts or an error."""
    layer, rows = Layer(), 70
    x, counts = batch_of(layer, [0, 1, 70, 40], rows)
    out = torch.empty_like(x)
    rule = f"nvfp4::batched_moe.out: expert_num_tokens must be from 0 to T = {rows}, got "

    def call() -> str:
        try:
            torch_nvfp4.batched_moe(x, *layer.packed, counts, out=out)
        except RuntimeError as error:
            return str(error)
        return ""

    values = torch.tensor([0, 1, rows, 40, INT_MAX, INT_MIN, -1, rows + 1])

    def write(turn: int) -> None:
        counts.copy_(values[(torch.arange(E) * (turn % 3) + turn) % (4 if turn % 4 else len(values))])

    said = set(beside(call, write))
    assert all(error.startswith(rule) for error in said - {""})


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["", "80"])
def test_counts_change_while_they_are_read_on_cuda(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_ARCH", arch)
    layer, rows = Layer("cuda"), 70
    x, counts = batch_of(layer, [0, 1, 70, 40], rows)
    values = torch.tensor([0, 1, rows, 40, INT_MAX, INT_MIN, -1, rows + 1], dtype=torch.int32, device="cuda")
    choices = [values[(torch.arange(E) * (turn % 3) + turn) % len(values)] for turn in range(50)]
    writer = torch.cuda.Stream()
    torch.cuda.synchronize()
    room = torch.full((3, E, rows, K), 3.0, dtype=torch.bfloat16, device="cuda")
    for turn in range(200):
        with torch.cuda.stream(writer):
            for choice in choices[turn % 7 :: 7]:
                counts.copy_(choice)
        torch_nvfp4.batched_moe(x, *layer.packed, counts, out=room[1])
    torch.cuda.synchronize()
    assert bool((room[0] == 3).all())
    assert bool((room[2] == 3).all())
    counts.copy_(torch.tensor([0, 1, 70, 40]))
    assert_accurate(
        torch_nvfp4.batched_moe(x, *layer.packed, counts), reference.batched_moe(x, layer.w13, layer.w2, counts)
    )


def test_order_changes_while_it_is_read() -> None:
    layer = Layer()
    order, offsets = torch.arange(SLOTS, dtype=torch.int32), torch.tensor([0, 3, 5, 10, SLOTS], dtype=torch.int32)

    def gemm() -> str:
        try:
            routed_gemm(layer, order, offsets, gated=False)
        except RuntimeError as error:
            return str(error)
        return ""

    def write(turn: int) -> None:
        order.copy_(torch.arange(SLOTS))
        offsets.copy_(torch.tensor([0, 3, 5, 10, SLOTS]))
        scribble(order, offsets)(turn)

    errors = set(beside(gemm, write)) - {""}
    assert all(ORDER_RULE in error or OFFSETS_RULE in error for error in errors)


# sizes and layouts


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def huge(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A contiguous tensor of sizes that no memory holds, one of which is 0."""
    assert 0 in sizes
    return torch.empty(sizes, dtype=dtype)


UINT8, INT32 = torch.uint8, torch.int32
SIZES: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "linear": (
        lambda: (huge(0, 2**62), huge(0, 2, 36, dtype=UINT8), torch.ones(())),
        "x's last dimension must be below 2**31, got 4611686018427387904",
    ),
    "grouped_gemm": (
        lambda: (
            huge(0, 2**63 - 16),
            huge(1, 0, 2, 36, dtype=UINT8),
            torch.ones(1),
            huge(0, dtype=INT32),
            torch.zeros(2, dtype=INT32),
            None,
        ),
        "x's last dimension must be below 2**31, got 9223372036854775792",
    ),
    "combine": (
        lambda: (torch.zeros(0, 16), torch.zeros(2**62, 0), torch.zeros(2**62, 0, dtype=INT32), None, 1),
        "expected to allocate 2**63 or more bytes of memory for out [4611686018427387904, 16] on {device}, got none; "
        "use a smaller batch or free memory",
    ),
    "route": (
        lambda: (torch.zeros(2, 2, dtype=INT32), None, 2**63 - 1),
        "num_experts must be below 2**31, where offsets take 8 GiB of memory, got 9223372036854775807",
    ),
    "pack": (
        lambda: (huge(0, 1, 2**62, dtype=UINT8), huge(0, 1, 2**59, dtype=UINT8), False),
        "weight's last dimension K / 2 must be below 2**30, got 4611686018427387904",
    ),
    "pack rows": (
        lambda: (huge(0, 2**31, 8, dtype=UINT8), huge(0, 2**31, 1, dtype=UINT8), True),
        "the weight's output dimension N must be below 2**31, got 2147483648",
    ),
    "unpack": (
        lambda: (huge(1, 0, 2, 36, dtype=UINT8), 2**62, False),
        "the weight's input dimension K must be below 2**31, got 4611686018427387904",
    ),
    "unpack rows": (
        lambda: (huge(0, 2**40, 2, 36, dtype=UINT8), 128, False),
        "packed's dimension 1 must be below 2**31, got 1099511627776",
    ),
    "unpack gated rows": (
        lambda: (huge(0, 2, 2**40, 2, 36, dtype=UINT8), 128, True),
        "packed's dimension 2 must be below 2**30, got 1099511627776",
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_beyond_what_kernels_count(name: str) -> None:
    arguments, expected = SIZES[name]
    op = name.split()[0]
    call = getattr(torch.ops.nvfp4, op)
    assert message_of(lambda: call(*arguments())) == f"nvfp4::{op}: " + expected.replace("{device}", "cpu")
    meta = [on_meta(argument) for argument in arguments()]
    if any(isinstance(argument, Tensor) for argument in meta):
        assert message_of(lambda: call(*meta)) == f"nvfp4::{op}: " + expected.replace("{device}", "meta")


def test_sizes_that_only_meta_tensors_have() -> None:
    weight, scale = torch.empty(16, 1, 36, dtype=UINT8, device="meta"), torch.empty((), device="meta")
    x = torch.empty(2**31, 16, device="meta")
    expected = "nvfp4::linear: the number of x's rows must be below 2**31, got 2147483648; split the batch"
    assert message_of(lambda: torch_nvfp4.linear(x, weight, scale)) == expected
    weight, scale = torch.empty(2**31, 1, 36, dtype=UINT8, device="meta"), torch.empty((), device="meta")
    expected = "nvfp4::linear: weight's dimension 0 must be below 2**31, got 2147483648"
    assert message_of(lambda: torch_nvfp4.linear(x[:3], weight, scale)) == expected


def test_more_slots_than_int32_counts(tmp_path: Path) -> None:
    """A sparse file stands in for 8 GB of slots, which are not read before the check."""
    slots = 2**31
    path = tmp_path / "order"
    with path.open("wb") as file:
        file.truncate(slots * 4)
    order = torch.from_file(str(path), shared=True, size=slots, dtype=torch.int32)
    layer, offsets = Layer(), torch.zeros(E + 1, dtype=torch.int32)
    expected = f"nvfp4::grouped_gemm: order's size must be below 2**31, got {slots}; split the batch"
    arguments = (layer.x[:1], *layer.packed[:2], order, offsets)
    assert message_of(lambda: torch_nvfp4.grouped_gemm(*arguments)) == expected
    assert message_of(lambda: torch_nvfp4.grouped_gemm(*(a.to("meta") for a in arguments))) == expected


def misaligned(good: Tensor) -> Tensor:
    """The same values one byte further on in memory."""
    size = good.numel() * good.element_size()
    there = torch.empty(size + 64, dtype=torch.uint8)
    offset = (1 - there.data_ptr()) % good.element_size()
    there = there[offset or 1 :][:size]
    there.copy_(good.contiguous().view(-1).view(torch.uint8))
    return torch.frombuffer(there.numpy(), dtype=good.dtype).view(good.shape)


def test_views_that_begin_between_elements() -> None:
    layer = Layer()
    arguments = dict(
        zip(
            ("hidden_states", "w13", "w13_global_scale", "w2", "w2_global_scale", "topk_weights", "topk_ids"),
            (layer.x, *layer.packed, layer.weights, layer.ids),
            strict=True,
        )
    )
    for name, good in arguments.items():
        moved = misaligned(good)
        assert torch.equal(moved, good)
        call = lambda name=name, moved=moved: torch.ops.nvfp4.moe(**(arguments | {name: moved}), clamp_limit=7.0)  # noqa: E731
        if good.element_size() == 1:
            assert torch.equal(call(), layer.moe())
            continue
        assert message_of(call) == (
            f"nvfp4::moe: {name} must begin at a multiple of {good.element_size()} bytes in memory, got a view that "
            "does not; call .clone() first"
        )


def test_storage_that_was_freed_under_a_tensor(device: str) -> None:
    """Sharded data parallelism frees a parameter's storage between its uses."""
    layer = Layer(device)
    expert_map = torch.arange(E, dtype=torch.int32, device=device)
    names = ("hidden_states", "w13", "w13_global_scale", "w2", "w2_global_scale", "topk_weights", "topk_ids")
    tensors = (layer.x, *layer.packed, layer.weights, layer.ids)
    arguments = dict(zip(names, tensors, strict=True)) | {"expert_map": expert_map}
    for name, good in arguments.items():
        freed = good.clone()
        storage = freed.untyped_storage()
        nbytes = storage.nbytes()
        storage.resize_(0)
        call = lambda name=name, freed=freed: torch.ops.nvfp4.moe(**(arguments | {name: freed}), clamp_limit=7.0)  # noqa: E731
        assert message_of(call) == (
            f"nvfp4::moe: {name} must have its memory, got a tensor whose storage was freed; give the storage its size "
            "and contents back first"
        )
        storage.resize_(nbytes)
        freed.copy_(good)
        assert_accurate(call(), layer.expected())
    empty = layer.x[:0].clone()
    empty.untyped_storage().resize_(0)
    assert torch_nvfp4.moe(empty, *layer.packed, layer.weights[:0], layer.ids[:0]).shape == (0, K)


@pytest.mark.gpu
def test_packed_weights_that_begin_between_vectors_on_cuda() -> None:
    layer = Layer("cuda")
    w2 = layer.packed[2]
    moved = torch.empty(w2.numel() + 8, dtype=torch.uint8, device="cuda")[8:].view(w2.shape).copy_(w2)
    call = lambda: torch_nvfp4.moe(layer.x, *layer.packed[:2], moved, layer.packed[3], layer.weights, layer.ids)  # noqa: E731
    assert message_of(call) == (
        "nvfp4::moe: w2 must begin at a multiple of 16 bytes in memory, got a view that does not; call .clone() first"
    )


def test_sizes_of_nothing(device: str) -> None:
    layer = Layer(device)
    empty = torch_nvfp4.moe(layer.x[:0], *layer.packed, layer.weights[:0], layer.ids[:0])
    assert empty.shape == (0, K)
    no_experts = torch_nvfp4.moe(layer.x, *layer.packed, layer.weights[:, :0], layer.ids[:, :0])
    assert torch.equal(no_experts, torch.zeros_like(layer.x))
    no_map = layer.ids.new_empty(0, dtype=torch.int32)
    assert torch.equal(layer.moe(expert_map=no_map), torch.zeros_like(layer.x))
    for ids in (layer.ids[:0], layer.ids[:, :0]):
        order, offsets = torch_nvfp4.route(ids, None, E)
        assert order.shape == (0,)
        assert offsets.tolist() == [0] * (E + 1)
    order = torch.empty(0, dtype=torch.int32, device=device)
    offsets = torch.zeros(E + 1, dtype=torch.int32, device=device)
    assert routed_gemm(layer, order, offsets, gated=True).shape == (0, I)
    combined = torch_nvfp4.combine(layer.x[:0], layer.weights[:, :0], layer.ids[:, :0], None, E)
    assert torch.equal(combined, torch.zeros_like(layer.x))
    assert torch_nvfp4.combine(layer.x.new_empty(SLOTS, 0), layer.weights, layer.ids, None, E).shape == (M, 0)


# block scales that are no numbers


@pytest.mark.parametrize(("byte", "name"), [(0x7F, "0x7F"), (0xFF, "0xFF")])
def test_the_op_pack_refuses_nan(byte: int, name: str) -> None:
    weight = random_weight((E, 32, K), generator=seeded(0))
    scale = weight.scale.view(torch.uint8).clone()
    scale[2, 17, 3] = scale[3, 0, 0] = byte
    rule = f"nvfp4::pack: scale must hold finite E4M3 values, got NaN (byte {name}) at index"
    assert message_of(lambda: torch.ops.nvfp4.pack(weight.data, scale, False)) == f"{rule} [2, 17, 3]"
    assert message_of(lambda: torch.ops.nvfp4.pack(weight.data[2], scale[2], False)) == f"{rule} [17, 3]"


def test_packed_nan_scales_count_as_480(device: str) -> None:
    """Nothing reads packed bytes before the kernels do, which take E4M3's NaN for the next number, 480."""
    weight = random_weight((16, K), generator=seeded(0), device=device)
    scale = weight.scale.view(torch.uint8).clone()
    scale[:] = 0x7E  # 448, which only the test's one NaN follows
    packed = torch.ops.nvfp4.pack(weight.data, scale, False)
    assert int((packed == 0x7E).sum()) >= scale.numel()
    x = torch.randn(5, K, generator=seeded(1)).to(device, torch.bfloat16)
    finite = torch_nvfp4.linear(x, packed, weight.global_scale)
    scale[:] = 0x7F
    if device == "cuda":
        hostile = torch.ops.nvfp4.pack(weight.data, scale, False)
    else:
        hostile = packed.clone()
        tail = hostile.view(-1, 36 * 16)[:, 512:]  # a block's scales follow its codes
        tail[tail == 0x7E] = 0x7F
    assert_accurate(torch_nvfp4.linear(x, hostile, weight.global_scale), finite.double() * (480 / 448))


# everything at once


def test_a_few_fuzzed_calls() -> None:
    run = [sys.executable, str(Path(__file__).with_name("fuzz_ops.py")), "--calls", "400", "--seed", "0"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("400 calls from seed 0: ")
