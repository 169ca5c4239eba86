"""One table of bad input for every op: kernel and fake raise the same words, with what was expected and what came."""

from __future__ import annotations

import math
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_nvfp4
from helpers.error_rows import ACTIVATIONS, ROWS, ROWS_WITHOUT_GATE, elsewhere
from torch_nvfp4 import NVFP4Weight
from torch_nvfp4.ops import _autograd
from torch_nvfp4.testing import random_routing, random_weight

M, TOP_K, E, K, I, N = 5, 2, 3, 80, 32, 48  # noqa: E741
ACTIVATION = {"activation": 0, "clamp_limit": 7.0, "alpha": 1.0, "beta": 0.0}


def without_gate(op: str, good: dict[str, Any]) -> dict[str, Any]:
    """The good arguments of an op for experts without a gate."""
    device = next(iter(good.values())).device
    weight = random_weight((E, I, K), generator=torch.Generator().manual_seed(1), device=device)
    packed, bias = torch_nvfp4.pack(weight), torch.zeros(E, I, device=device)
    weights = {
        "w13": {"w13": packed, "w13_global_scale": weight.global_scale, "w13_bias": bias},
        "weight": {"weight": packed, "global_scale": weight.global_scale, "bias": bias},
        "gate_up": {"gated": False},
    }
    relu2 = {"activation": 4, "clamp_limit": None}
    return good | next(changes for name, changes in weights.items() if name in good) | relu2


def good_arguments(op: str, device: str) -> dict[str, Any]:
    """Arguments that the op accepts, by the names of its schema."""
    generator = torch.Generator().manual_seed(0)

    def packed(*shape: int, gated: bool = False) -> tuple[Tensor, Tensor]:
        weight = random_weight(shape, gated=gated, generator=generator, device=device)
        return torch_nvfp4.pack(weight, gated=gated), weight.global_scale

    x = torch.randn(M, K, generator=generator).to(device, torch.bfloat16)
    weights, ids = random_routing(M, 2 * E, TOP_K, generator=generator, device=device)
    expert_map = torch.tensor([0, -1, 1, -1, 2, -1], dtype=torch.int32, device=device)
    biases = {"w13_bias": torch.randn(E, 2 * I, generator=generator).to(device)}
    biases["w2_bias"] = torch.randn(E, K, generator=generator).to(device)
    if op.endswith(".out"):
        good = good_arguments(op.removesuffix(".out"), device)
        return {**good, "out": torch.zeros_like(good["hidden_states"])}
    if op.endswith("_backward"):
        return backward_arguments(op, good_arguments(op.removesuffix("_backward"), device))
    if op == "moe":
        (w13, g13), (w2, g2) = packed(E, 2 * I, K, gated=True), packed(E, K, I)
        tensors = {"hidden_states": x, "w13": w13, "w13_global_scale": g13, "w2": w2, "w2_global_scale": g2}
        routing = {"topk_weights": weights, "topk_ids": ids, "expert_map": expert_map}
        return {**tensors, **routing, **biases, **ACTIVATION, "apply_router_weight_on_input": False}
    if op == "batched_moe":
        (w13, g13), (w2, g2) = packed(E, 2 * I, K, gated=True), packed(E, K, I)
        tensors = {"hidden_states": x[:4].repeat(E, 1, 1), "w13": w13, "w13_global_scale": g13}
        tensors |= {"w2": w2, "w2_global_scale": g2}
        counts = torch.tensor([0, 4, 2], dtype=torch.int32, device=device)
        return {**tensors, "expert_num_tokens": counts, **biases, **ACTIVATION}
    if op == "route":
        return {"topk_ids": ids, "expert_map": expert_map, "num_experts": E}
    if op in ("grouped_gemm", "grouped_gemm_swiglu"):
        gated = op == "grouped_gemm_swiglu"
        weight, scale = packed(E, 2 * I if gated else N, K, gated=gated)
        order, offsets = torch_nvfp4.route(ids, expert_map, E)
        gemm = {"x": x, "weight": weight, "global_scale": scale, "order": order, "offsets": offsets}
        bias = torch.randn(E, 2 * I if gated else N, generator=generator).to(device)
        return {**gemm, "topk_weights": weights, "bias": bias, **(ACTIVATION if gated else {})}
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


def backward_arguments(op: str, good: dict[str, Any]) -> dict[str, Any]:
    """From the forward op's."""
    result = call(op.removesuffix("_backward"), good)
    good = {"grad_output": torch.ones_like(result), **good}
    if op == "linear_backward":
        return {name: good[name] for name in ("grad_output", "weight", "global_scale")} | {"in_features": K}
    if op == "grouped_gemm_backward":
        del good["bias"]
    if op.startswith("grouped_gemm"):
        good["needs_topk_weights"] = True
    return good


def call(op: str, arguments: dict[str, Any]) -> Any:
    name, _, overload = op.partition(".")
    return getattr(getattr(torch.ops.nvfp4, name), overload or "default")(**arguments)


def map_tensors(arguments: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(a) if isinstance(a, Tensor) else a for name, a in arguments.items()}


def on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def message_of(op: str, arguments: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as raised:
        call(op, arguments)
    return str(raised.value)


@pytest.mark.parametrize("op", ROWS)
def test_good_arguments_are_accepted(op: str, device: str) -> None:
    """Every row changes these, so its error comes from the change alone."""
    call(op, good_arguments(op, device))


@pytest.mark.parametrize("op", ROWS)
def test_kernel_and_fake_raise_the_same_words(op: str, device: str) -> None:
    good = good_arguments(op, device)
    for row in (row for row in ROWS[op] if device in row.backends):
        expected, arguments = row.expected(op, device), row.arguments(good)
        assert message_of(op, arguments) == expected, row
        with FakeTensorMode() as mode:
            assert message_of(op, map_tensors(arguments, mode.from_tensor)) == expected, row
        if device == "cpu" and elsewhere not in row.changes.values():
            assert message_of(op, map_tensors(arguments, on_meta)) == expected, row


@pytest.mark.parametrize("op", ROWS_WITHOUT_GATE)
def test_kernel_and_fake_raise_the_same_words_without_a_gate(op: str, device: str) -> None:
    good = without_gate(op, good_arguments(op, device))
    call(op, good)
    for row in (row for row in ROWS_WITHOUT_GATE[op] if device in row.backends):
        expected, arguments = row.expected(op, device), row.arguments(good)
        assert message_of(op, arguments) == expected, row
        with FakeTensorMode() as mode:
            assert message_of(op, map_tensors(arguments, mode.from_tensor)) == expected, row


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
    expected = r"^expected activation to be one of silu, swiglustep, gelu, gelu_tanh, relu2, situ, got 'swish'$"
    for op in ("moe", "batched_moe", "grouped_gemm_swiglu", "swiglu"):
        arguments = good_arguments(op, device) | {"activation": "swish"}
        with pytest.raises(ValueError, match=expected):
            getattr(torch_nvfp4, op)(**arguments)
        with pytest.raises(ValueError, match=re.escape(f"{ACTIVATIONS}, got 6")):
            getattr(torch_nvfp4, op)(**(arguments | {"activation": 6}))


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


FLOAT_ARGUMENTS = [
    ("moe", ["hidden_states", "w13_global_scale", "w2_global_scale", "topk_weights", "w13_bias", "w2_bias"]),
    ("batched_moe", ["hidden_states", "w13_global_scale", "w2_global_scale", "w13_bias", "w2_bias"]),
    ("grouped_gemm", ["x", "global_scale", "topk_weights", "bias"]),
    ("grouped_gemm_swiglu", ["x", "global_scale", "topk_weights", "bias"]),
    ("combine", ["x", "topk_weights"]),
    ("linear", ["x", "global_scale", "bias"]),
    ("swiglu", ["gate_up"]),
]


DIFFERENTIABLE = {("linear", "bias"), ("moe", "hidden_states")}
DIFFERENTIABLE |= {(op, name) for op, names in FLOAT_ARGUMENTS for name in names if name in ("x", "gate_up")}
DIFFERENTIABLE |= {(op, "topk_weights") for op, names in FLOAT_ARGUMENTS if "topk_weights" in names}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in FLOAT_ARGUMENTS for name in names])
def test_every_other_derivative_is_refused(op: str, name: str, device: str) -> None:
    """In backward, and not before: a forward pass whose derivative nobody takes runs. The functions pass the op's
    autograd kernel only where nothing requires a gradient."""
    public, arguments = getattr(torch_nvfp4, op), good_arguments(op, device)
    floats = {key for key, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()}
    assert floats <= set(dict(FLOAT_ARGUMENTS)[op])
    expected = public(**arguments)
    assert not expected.requires_grad
    arguments[name] = arguments[name].requires_grad_()
    out = public(**arguments)
    assert torch.equal(out, expected)
    if (op, name) in DIFFERENTIABLE:
        out.sum().backward()
        assert arguments[name].grad.shape == arguments[name].shape
        return
    words = rf"^nvfp4::{op} has no gradient with respect to {name}\. .*torch_nvfp4\.reference\.{op} "
    with pytest.raises(NotImplementedError, match=words):
        out.sum().backward()
    assert arguments[name].grad is None
    with torch.no_grad():
        assert not public(**arguments).requires_grad


@pytest.mark.parametrize("op", [op for op, _ in FLOAT_ARGUMENTS])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_without_a_derivative_no_python_runs_below_the_function(
    op: str, mode: type[torch.no_grad], device: str
) -> None:
    public, arguments = getattr(torch_nvfp4, op), good_arguments(op, device)
    names: list[str] = []
    with mode():
        public(**arguments)
        sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
        public(**arguments)
        sys.setprofile(None)
    assert "call" in names
    assert "autograd" not in names


@pytest.mark.parametrize("op", [op for op in ROWS if op.endswith(".out")])
def test_out_has_no_gradient(op: str, device: str) -> None:
    """It raises at once: a result that is the caller's buffer could not raise in backward."""
    name = op.removesuffix(".out")
    words = rf"^nvfp4::{re.escape(op)} has no gradient.*torch_nvfp4\.reference\.{name} "
    for needs_grad in ("hidden_states", "out"):
        arguments = good_arguments(op, device)
        arguments[needs_grad] = arguments[needs_grad].requires_grad_()
        with pytest.raises(NotImplementedError, match=words):
            call(op, arguments)
        with torch.no_grad():
            call(op, arguments)


def test_no_gradient_for_a_reason_of_another_version() -> None:
    """As in a graph out of a compiler's cache; what a number means does not follow from the order of the reasons."""
    for words in _autograd._REASONS.values():
        with pytest.raises(NotImplementedError, match=re.escape(words)):
            torch.ops.nvfp4.no_gradient(torch.ones(1), torch.ones(1), zlib.crc32(words.encode()))
    with pytest.raises(NotImplementedError, match=r"an op of nvfp4 has no gradient .* compile again"):
        torch.ops.nvfp4.no_gradient(torch.ones(1), torch.ones(1), 7)


@pytest.mark.parametrize("op", ["moe", "batched_moe", "grouped_gemm", "grouped_gemm_swiglu", "linear"])
def test_unknown_cpu_level(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", "sse2")
    with pytest.raises(
        RuntimeError, match=r"TORCH_NVFP4_CPU_LEVEL: expected one of amx, avx512, avx2, portable, got 'sse2'"
    ):
        call(op, good_arguments(op, "cpu"))
