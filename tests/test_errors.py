"""One table of bad input for every op: kernel and fake raise the same words, with what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_nvfp4
from torch_nvfp4 import NVFP4Weight
from torch_nvfp4.testing import random_routing, random_weight

M, TOP_K, E, K, I, N = 5, 2, 3, 80, 32, 48  # noqa: E741
ACTIVATION = {"activation": 0, "clamp_limit": 7.0, "alpha": 1.0, "beta": 0.0}
# The words for an activation number that is not in the table.
ACTIVATIONS = "expected activation to be one of 0 (silu), 1 (swiglustep), 2 (gelu), 3 (gelu_tanh), 4 (relu2)"
LIMIT = "expected clamp_limit to be finite and positive (in fp32) or None for no clamp"


def good_arguments(op: str, device: str) -> dict[str, Any]:
    """Arguments that the op accepts, by the names of its schema."""
    generator = torch.Generator().manual_seed(0)

    def packed(*shape: int, gated: bool = False) -> tuple[Tensor, Tensor]:
        weight = random_weight(shape, gated=gated, generator=generator, device=device)
        return torch_nvfp4.pack(weight, gated=gated), weight.global_scale

    x = torch.randn(M, K, generator=generator).to(device, torch.bfloat16)
    weights, ids = random_routing(M, 2 * E, TOP_K, generator=generator, device=device)
    expert_map = torch.tensor([0, -1, 1, -1, 2, -1], dtype=torch.int32, device=device)
    if op == "moe":
        (w13, g13), (w2, g2) = packed(E, 2 * I, K, gated=True), packed(E, K, I)
        tensors = {"hidden_states": x, "w13": w13, "w13_global_scale": g13, "w2": w2, "w2_global_scale": g2}
        routing = {"topk_weights": weights, "topk_ids": ids, "expert_map": expert_map}
        return {**tensors, **routing, **ACTIVATION, "apply_router_weight_on_input": False}
    if op == "route":
        return {"topk_ids": ids, "expert_map": expert_map, "num_experts": E}
    if op in ("grouped_gemm", "grouped_gemm_swiglu"):
        gated = op == "grouped_gemm_swiglu"
        weight, scale = packed(E, 2 * I if gated else N, K, gated=gated)
        order, offsets = torch_nvfp4.route(ids, expert_map, E)
        gemm = {"x": x, "weight": weight, "global_scale": scale, "order": order, "offsets": offsets}
        return {**gemm, "topk_weights": weights, **(ACTIVATION if gated else {})}
    if op == "combine":
        rows = torch.randn(M * TOP_K, N, generator=generator).to(device, torch.bfloat16)
        routing = {"topk_weights": weights, "topk_ids": ids, "expert_map": expert_map}
        return {"x": rows, **routing, "num_experts": E}
    if op == "linear":
        weight, scale = packed(N, K)
        return {"x": x, "weight": weight, "global_scale": scale, "bias": torch.zeros_like(x[0, :N])}
    if op == "swiglu":
        return {"gate_up": x, **ACTIVATION}
    if op == "pack":
        dense = random_weight((E, 2 * I, K), generator=generator, device=device)
        return {"weight": dense.data, "scale": dense.scale.view(torch.uint8), "gated": True}
    assert op == "unpack"
    return {"packed": packed(E, 2 * I, K, gated=True)[0], "in_features": K, "gated": True}


Change = Callable[[Any], Any]


def dtype(wanted: torch.dtype) -> Change:
    return lambda good: torch.zeros_like(good, dtype=wanted)


def shape(*sizes: int) -> Change:
    return lambda good: good.new_zeros(sizes)


def value(bad: Any) -> Change:
    return lambda good: bad


def elsewhere(good: Tensor) -> Tensor:
    return good.to("cpu" if good.is_cuda else "meta")


def strided(good: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return good.unsqueeze(-1).repeat(*[1] * good.dim(), 2)[..., 0]


class Row(NamedTuple):
    op: str
    changes: dict[str, Change]
    message: str  # without the op's prefix; {device} is the device of the other arguments

    @property
    def name(self) -> str:
        changed = "-".join(self.changes)
        return f"{self.op}-{changed}"


def rows(backend: str) -> list[Row]:
    """The table for the kernels of ``backend``, whose packed layout stands in the messages."""
    there = "meta" if backend == "cpu" else "cpu"  # where `elsewhere` puts a tensor

    def layout(n: int, k: int, of: str = backend) -> str:
        if of == "cpu":
            return f"{math.ceil(k / 64)}, 36"
        return str(math.ceil(math.ceil(n / 64) * math.ceil(k / 64) * 64 * 36 / n))

    def sizes(text: str) -> list[int]:
        return [int(size) for size in text.split(", ")]

    def by_pack(gated: bool, k: int) -> str:
        return f", as torch_nvfp4.pack(gated={gated}) gives on {backend} for K = {k}"

    activations = "bfloat16 or float16" + (" or float32" if backend == "cpu" else "")
    table: list[Row] = []

    def add(op: str, changes: dict[str, Change], message: str) -> None:
        table.append(Row(op, changes, message))

    def tensor(op: str, name: str, good: str, like: str = "", bad_dtype: torch.dtype = torch.int8) -> None:
        """dtype, device and contiguity of one argument; ``good`` holds its dtypes and its sizes."""
        dtypes, _, size = good.partition(" [")
        bad = str(bad_dtype).removeprefix("torch.")
        add(op, {name: dtype(bad_dtype)}, f"{name} must be {dtypes}, got {bad}")
        if like:
            add(op, {name: elsewhere}, f"{name} must be on {{device}} like {like}, got {there}")
        add(
            op,
            {name: strided},
            f"{name} must be contiguous, got a tensor of shape [{size} that is not; call .contiguous() first",
        )

    def wrong_shape(op: str, name: str, expected: str, *bad: int, note: str = "") -> None:
        add(op, {name: shape(*bad)}, f"{name} must have shape {expected}{note}, got {list(bad)}")

    def packed_rows(op: str, name: str, like: str, x: str, lead: str, n: int, k: int, gated: bool) -> None:
        """What a packed weight with any number of rows must be; ``lead`` is "E, " for experts."""
        tail = layout(n, k)
        size = [*([E] if lead else []), *([2, n // 2] if gated else [n]), *sizes(tail)]
        expected = f"[{lead}{'2, I' if gated else 'N'}, {tail}]"
        note = by_pack(gated, k)
        tensor(op, name, f"uint8 {size}", like)
        rank = len(size)
        row_dim = rank - 1 - len(sizes(tail))
        # The other layout of the same backend, then the other backend's.
        other = [*([E] if lead else []), *([n] if gated else [2, n // 2]), *sizes(tail)]
        for bad in (
            other,
            [*size[: row_dim + 1], *sizes(layout(n, k, "cuda" if backend == "cpu" else "cpu"))],
            size[1:],
        ):
            rows_known = len(bad) == rank
            if backend == "cuda" and not rows_known:
                add(op, {name: shape(*bad)}, f"{name} must have shape {expected.replace(tail, 'R')}{note}, got {bad}")
            else:
                wrong_shape(op, name, expected, *bad, note=note)
        if backend == "cpu":
            # CUDA's last size follows from the rows, so it would be wrong too.
            few = 24
            message = f"{name}'s dimension {row_dim} must be a positive multiple of 16, got {{}}"
            for count in (0, few):
                add(op, {name: shape(*size[:row_dim], count, *sizes(tail))}, message.format(count))
        if x:
            longer = K + 64
            add(
                op,
                {x: shape(M, longer)},
                f"{name} must have shape [{lead}{'2, I' if gated else 'N'}, {layout(n, longer)}]"
                f"{by_pack(gated, longer)}, got {size}",
            )
        if lead:
            add(op, {name: shape(0, *size[1:])}, f"{name} must hold at least one expert, got 0")

    def activations_rows(op: str, name: str, size: str, expected: str, *bad: int, multiple: int = 16) -> None:
        tensor(op, name, f"{activations} [{size}]", bad_dtype=torch.float64)
        wrong_shape(op, name, expected, *bad)
        for last in (0, K + multiple // 2):
            message = f"{name}'s last dimension must be a positive multiple of {multiple}, got {last}"
            add(op, {name: shape(M, last)}, message)

    def gate_rows(op: str) -> None:
        for number in (-1, 5):
            add(op, {"activation": value(number)}, f"{ACTIVATIONS}, got {number}")
        for limit, text in (
            (0.0, "0"),
            (-0.0, "-0"),
            (-1.0, "-1"),
            (math.nan, "nan"),
            (-math.nan, "nan"),
            (math.inf, "inf"),
            (-math.inf, "-inf"),
            (1e39, "1e+39"),
        ):
            add(op, {"clamp_limit": value(limit)}, f"{LIMIT}, got {text}")
        for number, name in ((2, "gelu"), (3, "gelu_tanh"), (4, "relu2")):
            add(
                op,
                {"activation": value(number)},
                f"expected clamp_limit to be None for activation {name}, which has no clamp, got 7; "
                "a clamp is never skipped silently: pass None or use silu or swiglustep",
            )
        for name, bad, got in (
            ("alpha", math.nan, "alpha=nan, beta=0"),
            ("alpha", -math.inf, "alpha=-inf, beta=0"),
            ("beta", math.inf, "alpha=1, beta=inf"),
            ("beta", 1e300, "alpha=1, beta=1e+300"),
        ):
            add(op, {name: value(bad)}, f"expected alpha and beta to be finite (in fp32), got {got}")
        for number, activation, limit in ((1, "swiglustep", 7.0), (4, "relu2", None)):
            for name, bad, got in (("alpha", 1.702, "alpha=1.702, beta=0"), ("beta", 1.0, "alpha=1, beta=1")):
                add(
                    op,
                    {"activation": value(number), "clamp_limit": value(limit), name: value(bad)},
                    f"expected alpha=1, beta=0 for activation {activation}, which takes neither (only silu does), "
                    f"got {got}",
                )

    def routing_rows(op: str, like: str, expected: str, *bad: int) -> None:
        tensor(op, "topk_ids", f"int32 or int64 [{M}, {TOP_K}]", like, torch.int16)
        wrong_shape(op, "topk_ids", expected, *bad)
        tensor(op, "expert_map", f"int32 [{2 * E}]", like or "topk_ids", torch.int64)
        wrong_shape(op, "expert_map", "[global_experts]", 2, 3)

    def num_experts_rows(op: str) -> None:
        for count in (0, -1):
            add(op, {"num_experts": value(count)}, f"num_experts must be positive, got {count}")

    op, like = "moe", "hidden_states"
    activations_rows(op, like, f"{M}, {K}", "[M, K]", K)
    packed_rows(op, "w13", like, like, "E, ", 2 * I, K, True)
    tensor(op, "w13_global_scale", f"float32 [{E}, 2]", like, torch.float64)
    wrong_shape(op, "w13_global_scale", f"[{E}, 2]", E)
    tail = layout(K, I)
    tensor(op, "w2", f"uint8 [{E}, {K}, {tail}]", like)
    for bad in (
        f"{E + 1}, {K}, {tail}",
        f"{E}, {K + 16}, {tail}",
        f"{E}, {K}, {layout(K, I + 64)}",
        f"{E}, 2, {K // 2}, {tail}",
    ):
        wrong_shape(op, "w2", f"[{E}, {K}, {tail}]", *sizes(bad), note=by_pack(False, I))
    tensor(op, "w2_global_scale", f"float32 [{E}]", like, torch.bfloat16)
    wrong_shape(op, "w2_global_scale", f"[{E}]", E, 2)
    tensor(op, "topk_weights", f"float32 [{M}, {TOP_K}]", like, torch.bfloat16)
    wrong_shape(op, "topk_weights", f"[{M}, top_k]", M + 1, TOP_K)
    wrong_shape(op, "topk_weights", f"[{M}, top_k]", M)
    routing_rows(op, like, f"[{M}, {TOP_K}]", M, TOP_K + 1)
    gate_rows(op)

    op = "route"
    routing_rows(op, "", "[M, top_k]", M)
    num_experts_rows(op)

    for op in ("grouped_gemm", "grouped_gemm_swiglu"):
        gated = op == "grouped_gemm_swiglu"
        activations_rows(op, "x", f"{M}, {K}", "[rows, K]", K)
        packed_rows(op, "weight", "x", "x", "E, ", 2 * I if gated else N, K, gated)
        scale = f"{E}, 2" if gated else f"{E}"
        tensor(op, "global_scale", f"float32 [{scale}]", "x", torch.float64)
        wrong_shape(op, "global_scale", f"[{scale}]", E + 1, *([2] if gated else []))
        tensor(op, "order", f"int32 [{M * TOP_K}]", "x", torch.int64)
        wrong_shape(op, "order", "[slots]", M, TOP_K)
        tensor(op, "offsets", f"int32 [{E + 1}]", "x", torch.int64)
        wrong_shape(op, "offsets", f"[{E + 1}]", E)
        tensor(op, "topk_weights", f"float32 [{M}, {TOP_K}]", "x", torch.float16)
        wrong_shape(op, "topk_weights", f"[{M}, top_k]", M + 1, TOP_K)
        add(
            op,
            {"topk_weights": shape(M, 3)},
            f"order must hold as many slots as topk_weights ({3 * M}), got {M * TOP_K}",
        )
        add(
            op,
            {"topk_weights": value(None), "order": shape(M * TOP_K + 1)},
            f"order must hold a multiple of x's rows ({M}), got {M * TOP_K + 1}",
        )
    for bad in ((), (E, 2, 1)):
        add(
            "grouped_gemm",
            {"global_scale": shape(*bad)},
            f"global_scale must have shape [E], or [E, 2] for a weight packed with gated=True, got {list(bad)}",
        )
    # A gated global scale says that the weight is gated.
    add(
        "grouped_gemm",
        {"global_scale": shape(E, 2)},
        f"weight must have shape [E, 2, I, {layout(N, K) if backend == 'cpu' else 'R'}]{by_pack(True, K)}, "
        f"got [{E}, {N}, {layout(N, K)}]",
    )
    gate_rows("grouped_gemm_swiglu")

    op = "combine"
    tensor(op, "x", f"{activations} [{M * TOP_K}, {N}]", bad_dtype=torch.float64)
    wrong_shape(op, "x", "[M * top_k, N]", N)
    add(op, {"x": shape(M, N)}, f"x must have M * top_k = {M * TOP_K} rows, got {M}")
    tensor(op, "topk_weights", f"float32 [{M}, {TOP_K}]", "x", torch.bfloat16)
    wrong_shape(op, "topk_weights", "[M, top_k]", M)
    routing_rows(op, "x", f"[{M}, {TOP_K}]", M, TOP_K + 1)
    num_experts_rows(op)

    op = "linear"
    tensor(op, "x", f"{activations} [{M}, {K}]", bad_dtype=torch.float64)
    for bad in (0, K + 8):
        add(op, {"x": shape(M, bad)}, f"x's last dimension must be a positive multiple of 16, got {bad}")
    wrong_shape(op, "x", "[K]")
    packed_rows(op, "weight", "x", "x", "", N, K, False)
    tensor(op, "global_scale", "float32 []", "x", torch.float64)
    table.pop()  # a scalar is always contiguous
    add(
        op,
        {"global_scale": shape(1, 2)},
        "global_scale must have shape [], or [2] for a weight packed with gated=True, got [1, 2]",
    )
    add(
        op,
        {"global_scale": shape(2)},
        f"weight must have shape [2, I, {layout(N, K) if backend == 'cpu' else 'R'}]{by_pack(True, K)}, "
        f"got [{N}, {layout(N, K)}]",
    )
    tensor(op, "bias", f"bfloat16 [{N}]", "x", torch.float32)
    wrong_shape(op, "bias", f"[{N}]", N + 1)
    wrong_shape(op, "bias", f"[{N}]", 1, N)

    op = "swiglu"
    tensor(op, "gate_up", f"{activations} [{M}, {K}]", bad_dtype=torch.float64)
    for bad in (0, 3):
        add(op, {"gate_up": shape(M, bad)}, f"gate_up's last dimension must be a positive multiple of 2, got {bad}")
    wrong_shape(op, "gate_up", "[2I]")
    gate_rows(op)

    op = "pack"
    tensor(op, "weight", f"uint8 [{E}, {2 * I}, {K // 2}]")
    for size in ((K,), (1, E, 2 * I, K // 2)):
        wrong_shape(op, "weight", "[E, N, K / 2]", *size, note=" or [N, K / 2]")
    for bad in (0, 20):
        add(
            op,
            {"weight": shape(E, 2 * I, bad)},
            f"the weight's input dimension K must be a positive multiple of 16, got {2 * bad}",
        )
    for bad in (0, 16, 40):
        add(
            op,
            {"weight": shape(E, bad, K // 2)},
            f"the weight's output dimension N must be a positive multiple of 32 (gated=True), got {bad}",
        )
    add(
        op,
        {"weight": shape(24, K // 2), "gated": value(False)},
        "the weight's output dimension N must be a positive multiple of 16, got 24",
    )
    tensor(op, "scale", f"float8_e4m3fn or uint8 [{E}, {2 * I}, {K // 16}]", "weight", torch.float32)
    wrong_shape(op, "scale", f"[{E}, {2 * I}, {K // 16}]", E, 2 * I, K // 16 + 1)
    wrong_shape(op, "scale", f"[{E}, {2 * I}, {K // 16}]", 2 * I, K // 16)

    op = "unpack"
    for bad in (0, -16, 72):
        add(
            op,
            {"in_features": value(bad)},
            f"the weight's input dimension K must be a positive multiple of 16, got {bad}",
        )
    # Without experts in front, the rank says so; any rank but that of one matrix is taken for a stack of experts.
    tail = layout(2 * I, K)
    tensor(op, "packed", f"uint8 [{E}, 2, {I}, {tail}]")
    batched, single = f"[E, 2, I, {tail if backend == 'cpu' else 'R'}]", f"[2, I, {tail}]"
    wrong_shape(op, "packed", batched, E, note=by_pack(True, K))
    wrong_shape(op, "packed", single, E, I, *sizes(tail), note=by_pack(True, K))
    wrong_shape(op, "packed", single, 2, I, *(size + 1 for size in sizes(tail)), note=by_pack(True, K))
    wrong_shape(op, "packed", f"[E, 2, I, {tail}]", E, 3, I, *sizes(tail), note=by_pack(True, K))
    add(
        op,
        {"in_features": value(K + 64)},
        f"packed must have shape [E, 2, I, {layout(2 * I, K + 64)}]{by_pack(True, K + 64)}, got [{E}, 2, {I}, {tail}]",
    )
    add(
        op,
        {"gated": value(False)},
        f"packed must have shape [E, N, {tail if backend == 'cpu' else 'R'}]{by_pack(False, K)}, "
        f"got [{E}, 2, {I}, {tail}]",
    )
    if backend == "cpu":
        for bad in (0, 24):
            message = f"packed's dimension 2 must be a positive multiple of 16, got {bad}"
            add(op, {"packed": shape(E, 2, bad, *sizes(tail))}, message)
    add(op, {"packed": shape(0, 2, I, *sizes(tail))}, "packed must hold at least one expert, got 0")
    return table


def call(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.nvfp4, op)(**arguments)


def map_tensors(arguments: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(a) if isinstance(a, Tensor) else a for name, a in arguments.items()}


def on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def message_of(op: str, arguments: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as raised:
        call(op, arguments)
    return str(raised.value)


OPS = sorted({row.op for row in rows("cpu")})


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_are_accepted(op: str, device: str) -> None:
    """Every row below changes these, so its error comes from the change alone."""
    call(op, good_arguments(op, device))


@pytest.mark.parametrize("op", OPS)
def test_kernel_and_fake_raise_the_same_words(op: str, device: str) -> None:
    where = "cuda:0" if device == "cuda" else "cpu"
    for row in (row for row in rows(device) if row.op == op):
        arguments = good_arguments(op, device)
        expected = f"nvfp4::{op}: " + row.message.replace("{device}", where)
        for name, change in row.changes.items():
            arguments[name] = change(arguments[name])

        assert message_of(op, arguments) == expected, row.name
        with FakeTensorMode() as mode:
            assert message_of(op, map_tensors(arguments, mode.from_tensor)) == expected, row.name
        if device == "cpu" and elsewhere not in row.changes.values():
            assert message_of(op, map_tensors(arguments, on_meta)) == expected, row.name


def test_too_many_slots(tmp_path: Path) -> None:
    """A sparse file stands in for 8 GB of ids, which are not read before the check."""
    slots = 2**31
    expected = f"nvfp4::route: M * top_k must be below 2**31, got {slots}; split the batch"
    ids = torch.empty(slots // 8, 8, dtype=torch.int32, device="meta")
    assert message_of("route", {"topk_ids": ids, "expert_map": None, "num_experts": 4}) == expected
    path = tmp_path / "ids"
    with path.open("wb") as file:
        file.truncate(slots * 4)
    mapped = torch.from_file(str(path), shared=True, size=slots, dtype=torch.int32).view(-1, 8)
    assert message_of("route", {"topk_ids": mapped, "expert_map": None, "num_experts": 4}) == expected


def test_wrappers_name_the_activations(device: str) -> None:
    expected = r"^expected activation to be one of silu, swiglustep, gelu, gelu_tanh, relu2, got 'swish'$"
    for op in ("moe", "grouped_gemm_swiglu", "swiglu"):
        arguments = good_arguments(op, device) | {"activation": "swish"}
        with pytest.raises(ValueError, match=expected):
            getattr(torch_nvfp4, op)(**arguments)
        with pytest.raises(ValueError, match=re.escape(f"{ACTIVATIONS}, got 5")):
            getattr(torch_nvfp4, op)(**(arguments | {"activation": 5}))


def replace(weight: NVFP4Weight, **tensors: Tensor) -> NVFP4Weight:
    return weight._replace(**tensors)


def nan_scale(weight: NVFP4Weight, byte: int) -> NVFP4Weight:
    scale = weight.scale.view(torch.uint8).clone()
    scale[1, 17, 3] = byte
    return replace(weight, scale=scale.view(torch.float8_e4m3fn))


WEIGHT_ERRORS: dict[str, tuple[Callable[[NVFP4Weight], NVFP4Weight], bool, type[Exception], str]] = {
    "nan scale": (
        lambda w: nan_scale(w, 0x7F),
        False,
        ValueError,
        "scale: expected finite E4M3 values, got NaN (byte 0x7F) at index [1, 17, 3]",
    ),
    "negative nan scale": (
        lambda w: nan_scale(w, 0xFF),
        True,
        ValueError,
        "scale: expected finite E4M3 values, got NaN (byte 0xFF) at index [1, 17, 3]",
    ),
    "nan global scale": (
        lambda w: replace(w, global_scale=torch.full_like(w.global_scale, math.nan)),
        False,
        ValueError,
        "global_scale: expected finite values, got nan at index [0]",
    ),
    "data dtype": (
        lambda w: replace(w, data=w.data.to(torch.int8)),
        False,
        TypeError,
        "data: expected dtype torch.uint8, got torch.int8",
    ),
    "scale dtype": (
        lambda w: replace(w, scale=w.scale.to(torch.float32)),
        False,
        TypeError,
        "scale: expected dtype torch.float8_e4m3fn, got torch.float32",
    ),
    "scale shape": (
        lambda w: replace(w, scale=w.scale[..., 1:]),
        False,
        ValueError,
        f"scale: expected shape [{E}, {2 * I}, {K // 16}], got [{E}, {2 * I}, {K // 16 - 1}]",
    ),
    "global scale shape": (
        lambda w: replace(w, global_scale=w.global_scale[:-1]),
        True,
        ValueError,
        f"global_scale: expected shape [{E}] or [{E}, 2], got [{E - 1}]",
    ),
}


@pytest.mark.parametrize("name", WEIGHT_ERRORS)
def test_pack_refuses_what_is_not_nvfp4(name: str, device: str) -> None:
    change, gated, error, expected = WEIGHT_ERRORS[name]
    weight = change(random_weight((E, 2 * I, K), device=device))
    with pytest.raises(error) as raised:
        torch_nvfp4.pack(weight, gated=gated)
    assert str(raised.value) == expected


@pytest.mark.parametrize("op", ["moe", "grouped_gemm", "grouped_gemm_swiglu", "combine", "linear", "swiglu"])
def test_backward_names_the_alternative(op: str, device: str) -> None:
    arguments = good_arguments(op, device)
    activations = next(iter(arguments.values())).requires_grad_()
    out = call(op, arguments)
    assert out.requires_grad
    with pytest.raises(NotImplementedError, match=rf"^nvfp4::{op} has no gradient.*torch_nvfp4\.reference\.{op} "):
        out.sum().backward()
    assert activations.grad is None
    with torch.no_grad():
        assert not call(op, arguments).requires_grad


@pytest.mark.parametrize("op", ["moe", "grouped_gemm", "grouped_gemm_swiglu", "linear"])
def test_unknown_cpu_level(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", "sse2")
    with pytest.raises(
        RuntimeError, match=r"TORCH_NVFP4_CPU_LEVEL: expected one of avx512, avx2, portable, got 'sse2'"
    ):
        call(op, good_arguments(op, "cpu"))
