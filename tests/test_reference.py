"""The specification against independent spellings: formulas in numpy and as models write them, MoE as a loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_nvfp4 import reference
from torch_nvfp4.format import NVFP4Weight, dequantize
from torch_nvfp4.gate import (
    Activation,
    Gate,
    check_gate,
    gate_error,
    gated_activation,
    parse_activation,
    plain_activation,
)
from torch_nvfp4.testing import TOLERANCE, assert_accurate, random_routing, random_weight, relative_l2

Array = np.ndarray[Any, np.dtype[np.float64]]

# Every activation with every limit that it can apply. One is below 0.278, the depth of silu's minimum: only there does
# a lower bound on a gate that has none show.
GATES = [(a, limit) for a in Activation for limit in (None, 0.125, 0.6, 5.0, 7.0, 10.0) if limit is None or a.can_clamp]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def clamped_silu(g: Array, u: Array, limit: float, alpha: float = 1.0, beta: float = 0.0) -> Array:
    g = np.minimum(g, limit)
    return g * sigmoid(alpha * g) * (np.clip(u, -limit, limit) + beta)


NUMPY: dict[str, Callable[..., Array]] = {
    "silu": clamped_silu,
    "swiglustep": lambda g, u, limit: np.minimum(g * sigmoid(g), limit) * np.clip(u, -limit, limit),
    "gelu": lambda g, u, limit: 0.5 * g * (1 + erf(g / math.sqrt(2))) * u,
    "gelu_tanh": lambda g, u, limit: 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u,
    "relu2": lambda g, u, limit: np.maximum(g, 0) ** 2 * u,
    "situ": lambda g, u, limit: np.tanh(g) * sigmoid(g) * u,
}


@pytest.mark.parametrize(("activation", "limit"), GATES)
def test_formulas_match_numpy(activation: Activation, limit: float | None) -> None:
    gate_up = 8 * torch.randn(64, 64, dtype=torch.float64, generator=generator(0))
    gate, up = gate_up.numpy()[:, :32], gate_up.numpy()[:, 32:]
    expected = NUMPY[activation.name](gate, up, math.inf if limit is None else limit)
    got = reference.swiglu(gate_up, activation.name, limit)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(gated_activation(gate_up[:, :32], gate_up[:, 32:], activation, limit), got)


def test_silu_is_deepseek_v4s_gate() -> None:
    gate, up = 8 * torch.randn(2, 32, 16, dtype=torch.float64, generator=generator(1))
    limit = 10.0
    expected = F.silu(torch.minimum(gate, torch.tensor(limit))) * torch.clamp(up, min=-limit, max=limit)
    torch.testing.assert_close(gated_activation(gate, up, Activation.silu, limit), expected)


def test_silu_with_alpha_and_beta_is_gpt_oss_gate() -> None:
    interleaved = 8 * torch.randn(32, 64, dtype=torch.float64, generator=generator(2))
    gate, up = interleaved[..., ::2].clamp(max=7.0), interleaved[..., 1::2].clamp(min=-7.0, max=7.0)
    expected = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    gate_up = torch.cat((interleaved[..., ::2], interleaved[..., 1::2]), -1)
    torch.testing.assert_close(reference.swiglu(gate_up, "silu", 7.0, 1.702, 1.0), expected)


def test_the_two_clamped_activations_differ_where_they_should() -> None:
    """The gate is clamped before silu in one and after it in the other; neither has a lower bound for the gate."""
    gate, up = torch.tensor([20.0, -20.0, 5.0], dtype=torch.float64), torch.tensor([-9.0, 9.0, 1.0])
    silu = gated_activation(gate, up.double(), Activation.silu, 5.0)
    step = gated_activation(gate, up.double(), Activation.swiglustep, 5.0)
    s5, s20 = 5 / (1 + math.exp(-5)), -20 / (1 + math.exp(20))
    torch.testing.assert_close(silu, torch.tensor([-5 * s5, 5 * s20, s5], dtype=torch.float64))
    torch.testing.assert_close(step, torch.tensor([-25.0, 5 * s20, s5], dtype=torch.float64))


@pytest.mark.parametrize(("activation", "limit"), GATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nan_passes_through_gate_and_up(activation: Activation, limit: float | None, dtype: torch.dtype) -> None:
    values = torch.tensor([[math.nan, 2.0, math.nan, 2.0], [2.0, math.nan, math.nan, 2.0]], dtype=dtype)
    out = gated_activation(values[0], values[1], activation, limit)
    assert out.isnan().tolist() == [True, True, True, False]
    assert out.dtype == dtype


def test_infinities_are_clamped() -> None:
    gate, up = torch.tensor([math.inf, 1.0]), torch.tensor([1.0, -math.inf])
    for activation in (Activation.silu, Activation.swiglustep):
        out = gated_activation(gate, up, activation, 4.0)
        assert out.isfinite().all()
        assert out[1] < 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", Activation)
def test_minus_infinity_gives_the_limit(activation: Activation, dtype: torch.dtype) -> None:
    gate, up = torch.tensor([-math.inf, -1e30], dtype=dtype), torch.tensor([3.0, 3.0], dtype=dtype)
    limits = [None, 4.0] if activation.can_clamp else [None]
    for out in [gated_activation(gate, up, activation, limit) for limit in limits]:
        assert out.tolist() == [0.0, 0.0]
    if activation.works_without_gate:
        assert plain_activation(gate, activation).tolist() == [0.0, 0.0]
    if activation is Activation.silu:
        assert gated_activation(gate, up, activation, alpha=-1.0)[0] == -math.inf


FLOAT32_TOO_LARGE = 1e39
CLAMP_WORDS = "expected clamp_limit to be finite and positive (in fp32) or None for no clamp, got "


@pytest.mark.parametrize(
    ("activation", "limit", "alpha", "beta", "message"),
    [
        (0, None, 1.0, 0.0, None),
        (0, 10.0, 1.702, 1.0, None),
        (1, 7.0, 1.0, 0.0, None),
        (2, None, 1.0, 0.0, None),
        (0, 0.0, 1.0, 0.0, CLAMP_WORDS + "0"),
        (0, -7.5, 1.0, 0.0, CLAMP_WORDS + "-7.5"),
        (1, math.nan, 1.0, 0.0, CLAMP_WORDS + "nan"),
        (1, math.inf, 1.0, 0.0, CLAMP_WORDS + "inf"),
        (0, FLOAT32_TOO_LARGE, 1.0, 0.0, CLAMP_WORDS + "1e+39"),
        (
            3,
            7.0,
            1.0,
            0.0,
            "expected clamp_limit to be None for activation gelu_tanh, which has no clamp, got 7; "
            "a clamp is never skipped silently: pass None or use silu or swiglustep",
        ),
        (0, None, math.inf, 0.0, "expected alpha and beta to be finite (in fp32), got alpha=inf, beta=0"),
        (0, None, 1.0, math.nan, "expected alpha and beta to be finite (in fp32), got alpha=1, beta=nan"),
        (
            1,
            7.0,
            1.702,
            1.0,
            "expected alpha=1, beta=0 for activation swiglustep, which takes neither (only silu and situ do), "
            "got alpha=1.702, beta=1",
        ),
        (
            6,
            None,
            1.0,
            0.0,
            "expected activation to be one of 0 (silu), 1 (swiglustep), 2 (gelu), 3 (gelu_tanh), 4 (relu2), 5 (situ), "
            "got 6",
        ),
    ],
)
def test_gate_errors(activation: int, limit: float | None, alpha: float, beta: float, message: str | None) -> None:
    """The words are part of the interface: the kernels repeat them."""
    assert gate_error(activation, limit, alpha, beta) == message
    if message is None:
        check_gate(activation, limit, alpha, beta)
        return
    with pytest.raises(ValueError, match=r"^expected ") as raised:
        gated_activation(torch.ones(1), torch.ones(1), activation, limit, alpha, beta)
    assert str(raised.value) == message


def test_situ_is_kimi_k3s_gate() -> None:
    """Soft limits of gate (alpha) and up (beta), which for large limits are silu without any."""
    gate_up = 8 * torch.randn(64, 64, dtype=torch.float64, generator=generator(0))
    gate, up = gate_up.numpy()[:, :32], gate_up.numpy()[:, 32:]
    expected = 4 * np.tanh(gate / 4) * sigmoid(gate) * 25 * np.tanh(up / 25)
    got = reference.swiglu(gate_up, "situ", None, 4.0, 25.0)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert float(got.abs().max()) < 100
    torch.testing.assert_close(reference.swiglu(gate_up, "situ", None, 1e6, 1e6), reference.swiglu(gate_up))
    torch.testing.assert_close(reference.swiglu(gate_up, "situ", None, 1e6), reference.swiglu(gate_up))


def test_plain_activations_are_torchs() -> None:
    x = 8 * torch.randn(64, dtype=torch.float64, generator=generator(0))
    expected = {
        "silu": torch.nn.functional.silu(x),
        "gelu": torch.nn.functional.gelu(x),
        "gelu_tanh": torch.nn.functional.gelu(x, approximate="tanh"),
        "relu2": torch.relu(x) ** 2,
    }
    for name, values in expected.items():
        torch.testing.assert_close(plain_activation(x, Activation[name]), values)
        torch.testing.assert_close(reference.swiglu(x, name, gated=False), values)
    for name in ("swiglustep", "situ"):
        with pytest.raises(ValueError, match=f"gelu_tanh, relu2 for experts without a gate, got {name}$"):
            plain_activation(x, Activation[name])


def test_a_gate_without_a_gate() -> None:
    gate = Gate("relu2", gated=False)
    assert str(gate) == "relu2 without a gate"
    assert gate != Gate("relu2")
    assert gate.kwargs() == Gate("relu2").kwargs()
    with pytest.raises(
        ValueError, match=r"^expected a gate with gate and up rows, got relu2 without a gate; use plain"
    ):
        gate(torch.ones(1), torch.ones(1))
    for bad, words in (
        (
            ("silu", 7.0),
            r"expected clamp_limit to be None for experts without a gate, .* got 7; a clamp is never skipped",
        ),
        (("silu", None, 1.702), "expected alpha=1, beta=0 for experts without a gate, got alpha=1.702, beta=0"),
        (
            ("situ", None, 4.0, 25.0),
            "expected activation to be one of silu, gelu, gelu_tanh, relu2 for experts without",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            Gate(*bad, gated=False)


def test_gate_checks_itself_and_gives_the_keywords_of_the_op() -> None:
    gate = Gate("silu", 7.0, 1.702, 1.0)
    assert gate.kwargs() == {"activation": 0, "clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0}
    assert gate == Gate(Activation.silu, 7.0, 1.702, 1.0)
    assert (str(gate), str(Gate("gelu"))) == ("silu (alpha 1.702, beta 1), clamp_limit 7", "gelu, no clamp")
    g, u = torch.tensor([-9.0, 2.0, 9.0]), torch.tensor([-9.0, 0.5, 9.0])
    expected = g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)) * (u.clamp(-7, 7) + 1)
    torch.testing.assert_close(gate(g, u), expected)
    for bad in (("gelu", 7.0), ("silu", 0.0), ("silu", math.nan), ("silu", None, math.inf), ("gelu", None, 2.0)):
        with pytest.raises(ValueError, match=r"expected .*, got"):
            Gate(*bad)
    with pytest.raises(ValueError, match=r"expected activation to be one of silu, .*, got 'swish'"):
        Gate("swish")


def test_parse_activation() -> None:
    assert [parse_activation(name) for name in Activation.__members__] == [0, 1, 2, 3, 4, 5]
    assert list(Activation.__members__) == ["silu", "swiglustep", "gelu", "gelu_tanh", "relu2", "situ"]
    assert parse_activation(3) is Activation.gelu_tanh
    words = "^expected activation to be one of silu, swiglustep, gelu, gelu_tanh, relu2, situ, got 'swish'$"
    with pytest.raises(ValueError, match=words):
        parse_activation("swish")
    with pytest.raises(ValueError, match=r"got -1$"):
        parse_activation(-1)


EXPERT_MAP = torch.tensor([2, -1, 0, 7, 1], dtype=torch.int32)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("expert_map", [None, EXPERT_MAP, EXPERT_MAP[:0]], ids=["local", "map", "empty map"])
def test_route_sorts_slots_by_expert(ids_dtype: torch.dtype, expert_map: Tensor | None) -> None:
    ids = torch.randint(-2, 7, (13, 3), generator=generator(3)).to(ids_dtype)
    order, offsets = reference.route(ids, expert_map, 3)

    groups: list[list[int]] = [[], [], [], []]
    for slot, expert in enumerate(ids.reshape(-1).tolist()):
        local = expert
        if expert_map is not None:
            local = int(expert_map[expert]) if 0 <= expert < len(expert_map) else -1
        groups[local if 0 <= local < 3 else 3].append(slot)
    assert order.tolist() == [slot for group in groups for slot in group]
    assert offsets.tolist() == [sum(len(g) for g in groups[:e]) for e in range(4)]
    assert order.dtype == offsets.dtype == torch.int32
    if expert_map is None or len(expert_map):
        assert groups[0]
        assert groups[3]


def test_route_of_no_tokens() -> None:
    order, offsets = reference.route(torch.zeros(0, 2, dtype=torch.int32), None, 4)
    assert order.shape == (0,)
    assert offsets.tolist() == [0] * 5


def moe_loop(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    act: Callable[[Array, Array], Array],
    on_input: bool,
) -> Array:
    """The layer as one loop over tokens and their experts, in numpy; ids outside the local experts are skipped."""
    experts, intermediate = w13.shape[0], w13.shape[1] // 2
    out = np.zeros((x.shape[0], w2.shape[1]))
    for m, token in enumerate(x.double().numpy()):
        for weight, e in zip(weights[m].tolist(), ids[m].tolist(), strict=True):
            if 0 <= e < experts:
                pre = w13[e].numpy() @ (token * weight if on_input else token)
                y = w2[e].numpy() @ act(pre[:intermediate], pre[intermediate:])
                out[m] += y if on_input else weight * y
    return out


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(
    ("activation", "limit", "alpha_beta"),
    [
        ("silu", None, {}),
        ("silu", 0.6, {}),
        ("silu", 0.6, {"alpha": 1.702, "beta": 1.0}),
        ("silu", 0.125, {}),
        ("swiglustep", 0.6, {}),
        ("swiglustep", 0.125, {}),
        ("relu2", None, {}),
    ],
)
def test_moe_is_the_loop(activation: str, limit: float | None, alpha_beta: dict[str, float], on_input: bool) -> None:
    g = generator(4)
    w13 = random_weight((5, 64, 48), gated=True, generator=g)
    w2 = random_weight((5, 48, 32), generator=g)
    x = torch.randn(9, 48, generator=g).bfloat16()
    weights, ids = random_routing(9, 7, 3, generator=g)
    ids[0] = torch.tensor([2, 2, 4])
    ids[1] = torch.tensor([5, 6, -1])
    ids[2] = torch.tensor([2**40, 3, -(2**40)])
    dense13, dense2 = dequantize(w13, torch.float64), dequantize(w2, torch.float64)

    def act(gate: Array, up: Array) -> Array:
        return NUMPY[activation](gate, up, math.inf if limit is None else limit, **alpha_beta)

    expected = moe_loop(x, dense13, dense2, weights, ids, act, on_input)
    kwargs: dict[str, Any] = {"activation": activation, "clamp_limit": limit, "apply_router_weight_on_input": on_input}
    kwargs |= alpha_beta
    out = reference.moe(x, w13, w2, weights, ids, **kwargs)
    assert out.dtype == torch.float64
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert not out[1].any()
    assert torch.equal(reference.moe(x, dense13, dense2, weights, ids, **kwargs), out)
    single = reference.moe(x, w13, w2, weights, ids, dtype=torch.float32, **kwargs)
    assert single.dtype == torch.float32
    assert_accurate(single, out)


def test_moe_is_its_steps() -> None:
    g = generator(5)
    w13, w2 = random_weight((4, 64, 32), gated=True, generator=g), random_weight((4, 32, 32), generator=g)
    x = torch.randn(6, 32, generator=g)
    weights, ids = random_routing(6, 8, 2, generator=g)
    expert_map = torch.tensor([-1, 2, -1, 0, 3, -1, 1, 9], dtype=torch.int32)
    order, offsets = reference.route(ids, expert_map, 4)
    middle = reference.grouped_gemm_swiglu(x, w13, order, offsets, activation="silu", clamp_limit=0.5)
    down = reference.grouped_gemm(middle, w2, order, offsets)
    out = reference.combine(down, weights, ids, expert_map, 4)
    result = reference.moe_with_clamped_share(x, w13, w2, weights, ids, expert_map, clamp_limit=0.5)
    assert torch.equal(out, result.output)

    # Remapping the ids by hand is the same as the map.
    local = torch.where(expert_map[ids] < 4, expert_map[ids], -1)
    assert torch.equal(reference.moe(x, w13, w2, weights, local, clamp_limit=0.5), out)
    # Slots of experts that are elsewhere do not count.
    pre = torch.stack(
        [dequantize(w13, torch.float64)[e] @ x[m].double() for m in range(6) for e in local[m].tolist() if e >= 0]
    )
    changed = (pre[:, :32] > 0.5).sum() + (pre[:, 32:].abs() > 0.5).sum()
    assert 0.05 < result.clamped_share < 0.95
    assert result.clamped_share == int(changed) / pre.numel()


def test_grouped_gemm_scales_rows_and_zeroes_skipped_ones() -> None:
    g = generator(6)
    weight = random_weight((2, 16, 32), generator=g)
    x, ids = torch.randn(3, 32, generator=g), torch.tensor([[0, 9], [1, 0], [-1, 1]])
    scale = torch.rand(3, 2, generator=g)
    order, offsets = reference.route(ids, None, 2)
    out = reference.grouped_gemm(x, weight, order, offsets, scale)
    dense = dequantize(weight, torch.float64)
    for slot, e in enumerate(ids.reshape(-1).tolist()):
        if 0 <= e < 2:
            expected = dense[e] @ x[slot // 2].double() * scale.reshape(-1)[slot].double()
            torch.testing.assert_close(out[slot], expected)
        else:
            assert not out[slot].any()
    with pytest.raises(ValueError, match="offsets: expected 3 elements for 2 experts, got 2"):
        reference.grouped_gemm(x, weight, order, offsets[:2])
    with pytest.raises(ValueError, match="rows that divides the 6 slots, got 4"):
        reference.grouped_gemm(torch.zeros(4, 32), weight, order, offsets)


def test_combine_does_not_read_skipped_slots() -> None:
    ids = torch.tensor([[0, 5], [1, 0]])
    x = torch.tensor([[1.0], [math.nan], [2.0], [3.0]])
    weights = torch.tensor([[0.5, math.inf], [0.25, 2.0]])
    assert reference.combine(x, weights, ids, None, 2).tolist() == [[0.5], [6.5]]
    x[2] = math.nan
    assert reference.combine(x, weights, ids, None, 2).isnan().tolist() == [[False], [True]]


def test_nan_in_a_token_stays_in_that_token() -> None:
    g = generator(7)
    w13, w2 = random_weight((2, 32, 32), gated=True, generator=g), random_weight((2, 32, 16), generator=g)
    x = torch.randn(3, 32, generator=g)
    x[1, 7] = math.nan
    weights, ids = random_routing(3, 2, 1, generator=g)
    out = reference.moe(x, w13, w2, weights, ids, clamp_limit=1.0)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_no_tokens_and_gradients() -> None:
    g = generator(8)
    w13, w2 = random_weight((2, 32, 32), gated=True, generator=g), random_weight((2, 32, 16), generator=g)
    weights, ids = random_routing(0, 2, 2)
    assert reference.moe(torch.zeros(0, 32), w13, w2, weights, ids).shape == (0, 32)
    x = torch.randn(3, 32, dtype=torch.float64, generator=g, requires_grad=True)
    weights, ids = random_routing(3, 2, 2, generator=g)
    assert torch.autograd.gradcheck(lambda x: reference.moe(x, w13, w2, weights, ids, clamp_limit=2.0), x)


def test_experts_are_dequantized_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def spy(weight: NVFP4Weight, dtype: torch.dtype) -> Tensor:
        shapes.append(tuple(weight.data.shape))
        return dequantize(weight, dtype)

    monkeypatch.setattr(reference, "dequantize", spy)
    weights, ids = random_routing(4, 8, 1, generator=generator(9))
    reference.moe(torch.ones(4, 32), random_weight((8, 32, 32), gated=True), random_weight((8, 32, 16)), weights, ids)
    used = len(ids.unique())
    assert shapes == [(32, 16)] * used + [(32, 8)] * used


def test_linear() -> None:
    g = generator(10)
    weight, x, bias = (
        random_weight((16, 32), generator=g),
        torch.randn(2, 3, 32, generator=g),
        torch.randn(16, generator=g),
    )
    expected = np.einsum("abk,nk->abn", x.double().numpy(), dequantize(weight, torch.float64).numpy())
    np.testing.assert_allclose(reference.linear(x, weight).numpy(), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(reference.linear(x, weight, bias).numpy(), expected + bias.double().numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w2": random_weight((2, 32, 32))}, r"got \[2, 32, 32\] and \[2, 32, 32\]"),
        ({"w2": random_weight((2, 32, 64)), "w13": random_weight((2, 32, 32))}, r"got \[2, 32, 32\] and \[2, 32, 64\]"),
        ({"w13_bias": torch.zeros(2, 16)}, r"w13_bias: expected shape \[2, 32\], got \[2, 16\]"),
        ({"w2_bias": torch.zeros(1, 32)}, r"w2_bias: expected shape \[2, 32\], got \[1, 32\]"),
        ({"hidden_states": torch.zeros(3, 16)}, r"hidden_states: expected shape \[M, 32\], got \[3, 16\]"),
        ({"topk_ids": torch.zeros(2, 1, dtype=torch.int64)}, r"topk_ids: expected shape \[3, top_k\], got \[2, 1\]"),
        ({"topk_weights": torch.zeros(3, 2)}, r"topk_weights: expected shape \[3, 1\], got \[3, 2\]"),
        ({"clamp_limit": -1.0}, "clamp_limit to be finite and positive .*got -1"),
        ({"activation": "gelu", "clamp_limit": 1.0}, "never skipped silently"),
    ],
)
def test_moe_errors(change: dict[str, object], words: str) -> None:
    arguments: dict[str, Any] = {
        "hidden_states": torch.zeros(3, 32),
        "w13": random_weight((2, 32, 32), gated=True),
        "w2": random_weight((2, 32, 16)),
        "topk_weights": torch.zeros(3, 1),
        "topk_ids": torch.zeros(3, 1, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=words):
        reference.moe(**(arguments | change))


def test_clamped_share() -> None:
    gate_up = torch.tensor([[1.0, 8.0, -9.0, 7.0, -8.0, 0.0]])
    assert reference.clamped_share(gate_up, clamp_limit=7.0) == 2 / 6
    assert reference.clamped_share(gate_up, clamp_limit=None) == 0.0
    # silu(7.004) is just below 7.
    step = torch.tensor([[7.004, 7.5, 0.0, 0.0]])
    assert reference.clamped_share(step, activation="swiglustep", clamp_limit=7.0) == 1 / 4
    assert reference.clamped_share(step, activation="silu", clamp_limit=7.0) == 2 / 4
    assert reference.clamped_share(gate_up[:0], clamp_limit=7.0) == 0.0


def test_relative_l2() -> None:
    ref = torch.tensor([3.0, 4.0])
    assert relative_l2(torch.tensor([3.0, 4.5]), ref) == pytest.approx(0.1)
    assert relative_l2(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_l2(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative_l2(torch.zeros(0), torch.zeros(0)) == 0.0
    special = torch.tensor([math.nan, math.inf, 5.0])
    assert relative_l2(special, special) == 0.0
    for out in ([1.0, math.inf, 5.0], [math.nan, -math.inf, 5.0], [math.nan, math.inf, math.nan], [math.nan, 1.0, 5.0]):
        with pytest.raises(AssertionError, match="1 of 3 elements differ"):
            relative_l2(torch.tensor(out), special)
    with pytest.raises(AssertionError, match=r"expected shape \[2\], got \[1\]"):
        relative_l2(torch.zeros(1), torch.zeros(2))
    assert_accurate(torch.tensor([3.0, 4.0001]), ref, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="at most 1e-05, got 2"):
        assert_accurate(torch.tensor([3.0, 4.0001]), ref)
    assert TOLERANCE[torch.bfloat16] == 4e-3


def test_random_weights_and_routings() -> None:
    weight = random_weight((4, 64, 256), gated=True, all_scales=True, generator=generator(11))
    assert weight.data.unique().numel() == 256
    assert weight.scale.view(torch.uint8).unique().numel() == 254
    assert weight.global_scale.shape == (4, 2)
    realistic = random_weight((4, 64, 256), generator=generator(11))
    assert torch.equal(random_weight((4, 64, 256), generator=generator(11)).data, realistic.data)
    assert 27 < realistic.scale.float().min() <= realistic.scale.float().max() == 448
    assert ((realistic.global_scale >= 2**-13) & (realistic.global_scale <= 2**-9)).all()
    assert (random_weight((2, 16, 16), global_scale=0.25).global_scale == 0.25).all()

    weights, ids = random_routing(50, 8, 6, generator=generator(12), ids_dtype=torch.int32)
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    assert ids.dtype == torch.int32
    assert all(len(set(row)) == 6 for row in ids.tolist())
    assert (random_routing(5, 1, 8)[1] == 0).all()
    skewed = random_routing(200, 16, 1, skew=1.0, generator=generator(13))[1]
    assert (skewed < 4).float().mean() > 0.6
