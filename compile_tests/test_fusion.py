"""The pass that fuses an eager clamp-SwiGLU gate into the GEMM before it: what it finds and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import torch_nvfp4
from helpers.gated_gemm import TOKENS, TOP_K, E, I, K, Layer, grouped_layer, linear_layer
from torch_nvfp4.compiler import fuse_gates
from torch_nvfp4.testing import assert_accurate, random_weight

L = 7.0

Gate = Callable[[Tensor], Tensor]

# As aten, and as Inductor decomposes it before its passes.
TABLES = {"aten": dict, "inductor": select_decomp_table}


def trace(layer: Layer, gate: Gate, table: str = "inductor", mode: str = "fake") -> torch.fx.GraphModule:
    def model(*args: Tensor) -> Tensor:
        return gate(layer.op(*args))

    with torch.no_grad():
        return make_fx(model, TABLES[table](), tracing_mode=mode)(*layer.args)


def fuse(gm: torch.fx.GraphModule) -> int:
    count = fuse_gates(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return count


def gemms(gm: torch.fx.GraphModule) -> list[str]:
    return [node.target._opname for node in gm.graph.nodes if "nvfp4" in str(node.target)]


def assert_fused(layer: Layer, gate: Gate, table: str = "inductor", **parameters: Any) -> None:
    gm = trace(layer, gate, table)
    assert fuse(gm) == 1
    assert gemms(gm) == ["grouped_gemm_swiglu"]
    out = gm(*layer.args)
    torch.testing.assert_close(out, layer.fused(**parameters), rtol=0, atol=0)
    assert_accurate(out, layer.reference(**parameters))


# The gates as the models' code has them.
def deepseek_v4(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=10.0)
    up = up.clamp(min=-10.0, max=10.0)
    return F.silu(gate) * up


def minimax_m3(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=7.0)
    up = up.clamp(min=-7.0, max=7.0)
    glu = gate * torch.sigmoid(gate * 1.702)
    return (up + 1.0) * glu


def gpt_oss(gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., :I], gate_up[..., I:]
    gate = gate.clamp(min=None, max=7.0)
    up = up.clamp(min=-7.0, max=7.0)
    glu = gate * torch.sigmoid(gate * 1.702)
    return (up + 1) * glu


def step_3_5(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = F.silu(gate).clamp(min=None, max=5.0)
    up = up.clamp(min=-5.0, max=5.0)
    return gate * up


# Below 0.278, the depth of silu's minimum: only there does a lower bound on a gate that has none show.
TIGHT = 0.125


def tight_silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=TIGHT)) * up.clamp(-TIGHT, TIGHT)


def tight_step(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).clamp(max=TIGHT) * up.clamp(-TIGHT, TIGHT)


def unclamped(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


MODELS = {
    deepseek_v4: {"clamp_limit": 10.0},
    minimax_m3: {"clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0},
    gpt_oss: {"clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0},
    step_3_5: {"activation": "swiglustep", "clamp_limit": 5.0},
    tight_silu: {"clamp_limit": TIGHT},
    tight_step: {"activation": "swiglustep", "clamp_limit": TIGHT},
    unclamped: {},
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [grouped_layer, linear_layer])
def test_models(make: Callable[..., Layer], dtype: torch.dtype, model: Gate, table: str, device: str) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernels take 16-bit activations")
    limit = MODELS[model].get("clamp_limit", 10.0)
    layer = make(dtype, device=device, scale=2 * limit)
    assert torch_nvfp4.reference.clamped_share(layer.op(*layer.args), clamp_limit=limit) > 0.1
    assert_fused(layer, model, table, **MODELS[model])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 4)], ids=str)
def test_linear_shapes(shape: tuple[int, ...], device: str) -> None:
    assert_fused(linear_layer(shape=shape, device=device), deepseek_v4, **MODELS[deepseek_v4])


def test_router_weights_on_the_input(device: str) -> None:
    assert_fused(grouped_layer(router_weights=True, device=device), deepseek_v4, **MODELS[deepseek_v4])


@pytest.mark.parametrize("make", [grouped_layer, linear_layer])
def test_batch_invariance_goes_on_to_the_fused_op(make: Callable[..., Layer]) -> None:
    layer = make()
    for batch_invariant in (False, True):
        op = partial(layer.op, batch_invariant=batch_invariant)
        gm = trace(layer._replace(op=op), deepseek_v4)
        assert fuse(gm) == 1
        (node,) = [node for node in gm.graph.nodes if "grouped_gemm_swiglu" in str(node.target)]
        assert node.kwargs.get("batch_invariant", False) is batch_invariant


# The halves, by every way of writing them.
def by_size(y: Tensor) -> Any:
    return y.split(I, dim=-1)


def by_sizes(y: Tensor) -> Any:
    return torch.split(y, [I, I], 1)


def by_sections(y: Tensor) -> Any:
    return torch.tensor_split(y, 2, -1)


def by_slice(y: Tensor) -> Any:
    return y[:, :I], y[:, -I:]


def by_narrow(y: Tensor) -> Any:
    return y.narrow(-1, 0, I), y.narrow(-1, I, I)


def by_unbind(y: Tensor) -> Any:
    return y.unflatten(-1, (2, I)).unbind(-2)


def by_select(y: Tensor) -> Any:
    stacked = y.view(-1, 2, I)
    return stacked[:, 0], stacked.select(1, 1)


def by_copies(y: Tensor) -> Any:
    return tuple(half.contiguous() for half in y.chunk(2, -1))


def by_upcast(y: Tensor) -> Any:
    return y.float().chunk(2, -1)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "halves",
    [by_size, by_sizes, by_sections, by_slice, by_narrow, by_unbind, by_select, by_copies, by_upcast],
)
def test_halves(halves: Callable[[Tensor], Any], table: str) -> None:
    def gate(y: Tensor) -> Tensor:
        g, u = halves(y)
        return (F.silu(g.clamp(max=L)) * u.clamp(-L, L)).to(y.dtype)

    assert_fused(grouped_layer(), gate, table, clamp_limit=L)


def test_halves_of_a_view_keep_its_shape() -> None:
    def gate(y: Tensor) -> Tensor:
        g, u = y.view(TOKENS, TOP_K, 2 * I).chunk(2, -1)
        return F.silu(g.clamp(max=L)) * u.clamp(-L, L)

    layer = grouped_layer()
    gm = trace(layer, gate)
    assert fuse(gm) == 1
    expected = layer.fused(clamp_limit=L).view(TOKENS, TOP_K, I)
    torch.testing.assert_close(gm(*layer.args), expected, rtol=0, atol=0)


# The clamps of g and u, by every way of writing them.
def clamp_int(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return g.clamp(max=7), u.clamp(-7, 7)


def clamp_mixed_numbers(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return g.clamp(max=7), u.clamp(-7.0, 7)


def clamp_one_sided(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return torch.clamp_max(g, L), u.clamp_max(L).clamp_min(-L)


def clamp_other_order(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return torch.clip(g, None, L), u.clamp_min(-L).clamp_max(L)


def clamp_full(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    bound = torch.full((TOKENS * TOP_K, I), L)
    low = torch.full((I,), -L)
    return torch.minimum(bound, g), torch.maximum(low, torch.minimum(u, bound))


def clamp_tensor(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return g.clamp(max=torch.full((), L)), u.clamp(torch.full((), -L), torch.full((), L))


def clamp_twice(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return g.clamp(max=9.0).clamp(max=L), u.clamp(-L, 8.0).clamp(-8.0, L)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "clamps",
    [clamp_int, clamp_mixed_numbers, clamp_one_sided, clamp_other_order, clamp_full, clamp_tensor, clamp_twice],
)
def test_clamps(clamps: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], table: str) -> None:
    def gate(y: Tensor) -> Tensor:
        g, u = clamps(*y.chunk(2, -1))
        return (F.silu(g) * u).to(y.dtype)

    assert_fused(grouped_layer(), gate, table, clamp_limit=L)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("outside", [False, True])
def test_infinite_limit_is_no_clamp(outside: bool, table: str) -> None:
    """How Step-3.7's code has a layer without a limit."""

    def gate(y: Tensor) -> Tensor:
        g, u = y.chunk(2, -1)
        activated = F.silu(g).clamp(max=torch.inf) if outside else F.silu(g.clamp(max=torch.inf))
        return activated * u.clamp(min=-torch.inf, max=torch.inf)

    assert_fused(grouped_layer(), gate, table)


# The activation, by every way of writing it.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "silu_inplace_of_a_copy": lambda g: F.silu(g.clone(), inplace=True),
    "x_sigmoid": lambda g: g * torch.sigmoid(g),
    "sigmoid_x": lambda g: g.sigmoid() * g,
    "division": lambda g: g / (1 + torch.exp(-g)),
    "reciprocal": lambda g: (1.0 + (-g).exp()).reciprocal() * g,
    "one_over": lambda g: g * (1 / (1 + torch.exp(-g))),
}
ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "act_up": lambda a, u: a * u,
    "up_act": lambda a, u: u * a,
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, order: str, table: str) -> None:
    def gate(y: Tensor) -> Tensor:
        g, u = y.chunk(2, -1)
        return ORDERS[order](ACTIVATIONS[activation](g.clamp(max=L)), u.clamp(-L, L))

    if activation == "silu_inplace_of_a_copy":
        gate = torch.func.functionalize(gate)
    assert_fused(grouped_layer(), gate, table, clamp_limit=L)


FACTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "glu_up": lambda g, u: g * torch.sigmoid(1.5 * g) * (u + 0.5),
    "up_first": lambda g, u: (0.5 + u) * torch.sigmoid(g * 1.5) * g,
    "grouped": lambda g, u: ((u + 0.5) * g) * torch.sigmoid(1.5 * g),
    "divided": lambda g, u: (u + 0.5) * g / (1 + torch.exp(-1.5 * g)),
    "alpha_divided": lambda g, u: (u + 0.5) * g * torch.sigmoid(g / (1 / 1.5)),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("factors", FACTORS)
def test_alpha_and_beta(factors: str, table: str) -> None:
    def gate(y: Tensor) -> Tensor:
        g, u = y.chunk(2, -1)
        return FACTORS[factors](g.clamp(max=L), u.clamp(-L, L))

    assert_fused(grouped_layer(), gate, table, clamp_limit=L, alpha=1.5, beta=0.5)


def upcast_all(y: Tensor) -> Tensor:
    g, u = (half.float() for half in y.chunk(2, -1))
    return (F.silu(g.clamp(max=L)) * u.clamp(-L, L)).to(y.dtype)


def upcast_gate(y: Tensor) -> Tensor:
    g, u = y.chunk(2, -1)
    return F.silu(g.clamp(max=L).to(torch.float32)).to(y.dtype) * u.clamp(-L, L)


def upcast_twice(y: Tensor) -> Tensor:
    g, u = y.chunk(2, -1)
    return (F.silu(g.float().clamp(max=L)) * u.double().clamp(-L, L)).type_as(y)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("gate", [upcast_all, upcast_gate, upcast_twice])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_upcasts(gate: Gate, dtype: torch.dtype, table: str) -> None:
    assert_fused(grouped_layer(dtype), gate, table, clamp_limit=L)


def no_match(gate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gate of (output, gate half, up half)."""
    return lambda y: gate(y, *y.chunk(2, -1))


def silu_mul(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


REJECTED: dict[str, Gate] = {
    "unequal limits": no_match(lambda y, g, u: silu_mul(g.clamp(max=7.0), u.clamp(-8.0, 8.0))),
    "gate limit infinite": no_match(lambda y, g, u: silu_mul(g.clamp(max=torch.inf), u.clamp(-L, L))),
    "up limit infinite": no_match(lambda y, g, u: silu_mul(g.clamp(max=L), u.clamp(-torch.inf, torch.inf))),
    "unequal by rounding": no_match(lambda y, g, u: silu_mul(g.clamp(max=0.1 + 0.2), u.clamp(-0.3, 0.3))),
    "up clamped unevenly": no_match(lambda y, g, u: silu_mul(g.clamp(max=L), u.clamp(-6.0, L))),
    "up without a lower bound": no_match(lambda y, g, u: silu_mul(g.clamp(max=L), u.clamp(max=L))),
    "up without a clamp": no_match(lambda y, g, u: silu_mul(g.clamp(max=L), u)),
    "gate without a clamp": no_match(lambda y, g, u: silu_mul(g, u.clamp(-L, L))),
    "gate clamped on both sides": no_match(lambda y, g, u: silu_mul(g.clamp(-L, L), u.clamp(-L, L))),
    "negative limit": no_match(lambda y, g, u: silu_mul(g.clamp(max=-L), u.clamp(L, -L))),
    "limit zero": no_match(lambda y, g, u: silu_mul(g.clamp(max=0.0), u.clamp(0.0, 0.0))),
    "limit beyond fp32": no_match(lambda y, g, u: silu_mul(g.clamp(max=1e39), u.clamp(-1e39, 1e39))),
    "crossed bounds": no_match(lambda y, g, u: silu_mul(g.clamp(max=L), u.clamp_min(9.0).clamp_max(L).clamp_min(-L))),
    "fmin, which drops NaN": no_match(
        lambda y, g, u: silu_mul(torch.fmin(g, torch.full((), L, dtype=g.dtype)), u.clamp(-L, L))
    ),
    "gate and up swapped": no_match(lambda y, g, u: silu_mul(u.clamp(max=L), g.clamp(-L, L))),
    "gate with itself": no_match(lambda y, g, u: silu_mul(g.clamp(max=L), g.clamp(-L, L))),
    "interleaved": lambda y: silu_mul(y[..., ::2].clamp(max=L), y[..., 1::2].clamp(-L, L)),
    "interleaved view": lambda y: silu_mul(*y.unflatten(-1, (I, 2)).unbind(-1)),
    "split of the rows": lambda y: silu_mul(*y.chunk(2, 0)),
    "uneven halves": lambda y: silu_mul(y[:, : I + 16], y[:, I - 16 :]),
    "overlapping halves": lambda y: silu_mul(y[:, :I], y[:, I // 2 : I + I // 2]),
    "quarters": lambda y: silu_mul(*y.view(-1, 4, I // 2).unbind(1)[:2]),
    "halves moved": lambda y: silu_mul(*y.view(TOKENS, TOP_K, 2 * I).transpose(0, 1).chunk(2, -1)),
    "broadcast": lambda y: silu_mul(y[:1, :I], y[:, I:]),
    "outer product": lambda y: silu_mul(y[:, None, :I], y[None, :, I:]),
    "another activation": no_match(lambda y, g, u: torch.tanh(g.clamp(max=L)) * u.clamp(-L, L)),
    "sigmoid of the other half": no_match(lambda y, g, u: g.clamp(max=L) * torch.sigmoid(u) * u.clamp(-L, L)),
    "sigmoid of the unclamped gate": no_match(lambda y, g, u: g.clamp(max=L) * torch.sigmoid(g) * u.clamp(-L, L)),
    "no gate factor": no_match(lambda y, g, u: torch.sigmoid(g.clamp(max=L)) * u.clamp(-L, L)),
    "gate squared": no_match(lambda y, g, u: F.silu(g) * g * u),
    "scaled": no_match(lambda y, g, u: F.silu(2 * g) * u),
    "beta inside the clamp": no_match(lambda y, g, u: silu_mul(g.clamp(max=L), (u + 1).clamp(-L, L))),
    "step with alpha": no_match(lambda y, g, u: (g * torch.sigmoid(1.5 * g)).clamp(max=L) * u.clamp(-L, L)),
    "step with beta": no_match(lambda y, g, u: F.silu(g).clamp(max=L) * (u.clamp(-L, L) + 1)),
    "step clamped on both sides": no_match(lambda y, g, u: F.silu(g).clamp(-L, L) * u.clamp(-L, L)),
    "step with a tight lower bound": no_match(
        lambda y, g, u: F.silu(g).clamp(-TIGHT, TIGHT) * u.clamp(-TIGHT, TIGHT)
    ),
    "clamped twice, differently": no_match(lambda y, g, u: F.silu(g.clamp(max=L)).clamp(max=L) * u.clamp(-L, L)),
    "rounded to fp16": no_match(lambda y, g, u: F.silu(g.half()).to(y.dtype) * u),
    "rounded to an integer": no_match(lambda y, g, u: F.silu(g) * u.int().to(y.dtype)),
    "result in fp32": no_match(lambda y, g, u: F.silu(g.float()) * u.float()),
    "output read elsewhere": no_match(lambda y, g, u: torch.cat((silu_mul(g.clamp(max=L), u.clamp(-L, L)), y), -1)),
    "half read elsewhere": no_match(lambda y, g, u: silu_mul(g, u) + g.amax()),
    "clamp read elsewhere": no_match(lambda y, g, u: (c := g.clamp(max=L), silu_mul(c, u.clamp(-L, L)) + c.sum())[1]),
    "activation read elsewhere": no_match(lambda y, g, u: (a := F.silu(g), a * u + a.sum())[1]),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str, table: str) -> None:
    layer = grouped_layer()
    gm = trace(layer, REJECTED[name], table)
    before = gm.code
    assert fuse(gm) == 0
    assert gm.code == before


def test_product_with_something_else_fuses_the_gate_in_it() -> None:
    layer = grouped_layer(router_weights=True)

    def model(x: Tensor, weight: Tensor, scale: Tensor, order: Tensor, offsets: Tensor, topk: Tensor) -> Tensor:
        gated = deepseek_v4(torch_nvfp4.grouped_gemm(x, weight, scale, order, offsets))
        return 2.0 * gated * topk.reshape(-1, 1)

    gm = make_fx(model, select_decomp_table(), tracing_mode="fake")(*layer.args)
    assert fuse(gm) == 1
    expected = 2.0 * Layer(layer.op, layer.args[:-1], layer.weight).fused(clamp_limit=10.0)
    torch.testing.assert_close(gm(*layer.args), expected * layer.args[-1].reshape(-1, 1), rtol=0, atol=0)


def test_rejected_weights() -> None:
    """A weight that was not packed as gated has no halves."""
    plain = random_weight((E, 2 * I, K))
    layer = grouped_layer()
    layer = layer._replace(args=(layer.args[0], torch_nvfp4.pack(plain), plain.global_scale, *layer.args[3:]))
    assert fuse(trace(layer, deepseek_v4)) == 0
    dense = random_weight((2 * I, K))
    layer = linear_layer()
    assert (
        fuse(trace(layer._replace(args=(layer.args[0], torch_nvfp4.pack(dense), dense.global_scale)), deepseek_v4)) == 0
    )


@pytest.mark.parametrize("router_weights", [False, True])
def test_biases_of_experts(router_weights: bool, device: str) -> None:
    """gpt-oss: the gate's halves hold the biases that the GEMM added; the router's weights stand before them."""
    layer = grouped_layer(device=device, router_weights=router_weights)
    bias = torch.randn(E, 2 * I, generator=torch.Generator().manual_seed(2)).to(device) * 20
    args = (*layer.args, bias) if router_weights else (*layer.args, None, bias)
    gm = trace(layer._replace(args=args), gpt_oss)
    assert fuse(gm) == 1
    assert gemms(gm) == ["grouped_gemm_swiglu"]
    out = gm(*args)
    torch.testing.assert_close(out, torch_nvfp4.grouped_gemm_swiglu(*args, **MODELS[gpt_oss]), rtol=0, atol=0)
    x, _, _, *routing = args
    expected = torch_nvfp4.reference.grouped_gemm_swiglu(x, layer.weight, *routing, **MODELS[gpt_oss])
    assert_accurate(out, expected)


def test_bias_of_a_dense_layer(device: str) -> None:
    layer = linear_layer(device=device)
    bias = torch.randn(2 * I, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16) * 20
    args = (*layer.args, bias)
    gm = trace(layer._replace(args=args), deepseek_v4)
    assert fuse(gm) == 1
    assert gemms(gm) == ["grouped_gemm_swiglu"]
    dense = torch_nvfp4.reference.linear(args[0], layer.weight, bias)
    assert_accurate(gm(*args), torch_nvfp4.reference.swiglu(dense, **MODELS[deepseek_v4]))


def plain_layer(device: str, bias: bool = False) -> Layer:
    """Experts without a gate, whose pre-activations have a deviation of about 2."""
    layer = grouped_layer(device=device, scale=1.0)
    weight = random_weight((E, I, K), generator=torch.Generator().manual_seed(3), device=device)
    args = (layer.args[0], torch_nvfp4.pack(weight), weight.global_scale, *layer.args[3:])
    return Layer(layer.op, (*args, None, torch.randn(E, I, device=device)) if bias else args, weight)


def nemotron_3(x: Tensor) -> Tensor:
    return torch.relu(x).square()


PLAIN = {
    "relu2": nemotron_3,
    "relu2 in fp32": lambda x: (torch.relu(x.float()) ** 2).to(x.dtype),
    "relu2 as a product": lambda x: F.relu(x) * F.relu(x),
    "silu": F.silu,
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_activations_without_a_gate(name: str, bias: bool, table: str, device: str) -> None:
    layer = plain_layer(device, bias)
    gm = trace(layer, PLAIN[name], table)
    if name == "silu" and table == "aten":
        assert fuse(gm) == 0  # aten.silu is no product; Inductor makes one of it
        return
    assert fuse(gm) == 1
    assert gemms(gm) == ["grouped_gemm_swiglu"]
    activation = name.split()[0]
    out = gm(*layer.args)
    expected = torch_nvfp4.grouped_gemm_swiglu(*layer.args, activation=activation)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    x, _, _, *routing = layer.args
    reference = torch_nvfp4.reference.grouped_gemm_swiglu(x, layer.weight, *routing, activation=activation, gated=False)
    assert_accurate(out, reference)


# A factor or a clamp of the result is applied to the fused op's.
OTHERS: list[tuple[Gate, int]] = [
    (lambda x: torch.relu(x) ** 3, 0),
    (lambda x: torch.relu(x), 0),
    (lambda x: x**2, 0),
    (lambda x: x.clamp(min=0.5) ** 2, 0),
    (lambda x: torch.relu(x).square() + x, 0),
    (lambda x: F.silu(2 * x), 0),
    (lambda x: 2 * torch.relu(x) ** 2, 1),
    (lambda x: F.silu(x).clamp(max=7.0), 1),
]


@pytest.mark.parametrize(("gate", "fused"), OTHERS)
def test_other_activations_without_a_gate(gate: Gate, fused: int) -> None:
    layer = plain_layer("cpu")
    gm = trace(layer, gate)
    expected = gm(*layer.args)
    assert fuse(gm) == fused
    assert gemms(gm) == (["grouped_gemm_swiglu"] if fused else ["grouped_gemm"])
    torch.testing.assert_close(gm(*layer.args), expected, rtol=0.05 if fused else 0, atol=0.5 if fused else 0)


def test_halves_of_two_gemms() -> None:
    layer = grouped_layer()

    def model(*args: Tensor) -> Tensor:
        first, second = torch_nvfp4.grouped_gemm(*args), torch_nvfp4.grouped_gemm(*args)
        return silu_mul(first[:, :I], second[:, I:])

    gm = make_fx(model, tracing_mode="fake")(*layer.args)
    assert fuse(gm) == 0


def test_limit_known_only_at_run_time() -> None:
    layer = grouped_layer()

    def model(limit: Tensor, *args: Tensor) -> Tensor:
        g, u = torch_nvfp4.grouped_gemm(*args).chunk(2, -1)
        return silu_mul(torch.minimum(g, limit), torch.maximum(torch.minimum(u, limit), -limit))

    gm = make_fx(model, tracing_mode="fake")(torch.tensor(L, dtype=torch.bfloat16), *layer.args)
    assert fuse(gm) == 0


def test_input_overwritten_after_the_gemm() -> None:
    """The fused op reads the input where the GEMM read it."""
    layer = grouped_layer()

    def model(*args: Tensor) -> Tensor:
        y = torch_nvfp4.grouped_gemm(*args)
        args[0].zero_()
        return deepseek_v4(y)

    gm = make_fx(model, tracing_mode="fake")(*layer.args)
    expected = layer.fused(clamp_limit=10.0)
    assert fuse(gm) == 1
    args = (layer.args[0].clone(), *layer.args[1:])
    torch.testing.assert_close(gm(*args), expected, rtol=0, atol=0)
    assert not args[0].any()


def test_nan_and_infinity_pass_through() -> None:
    layer = grouped_layer()
    x = layer.args[0].clone()
    x[0, 0], x[1, 0] = torch.nan, torch.inf
    args = (x, *layer.args[1:])
    gm = trace(layer, deepseek_v4)
    expected = deepseek_v4(layer.op(*args))
    assert fuse(gm) == 1
    assert expected.isnan().any()
    torch.testing.assert_close(gm(*args).isnan(), expected.isnan(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [grouped_layer, linear_layer])
def test_dynamic_shapes(make: Callable[..., Layer]) -> None:
    """Every size is symbolic, those of the weight too."""

    def gate(y: Tensor) -> Tensor:
        g, u = y.unflatten(-1, (2, I)).unbind(-2)
        return F.silu(g.clamp(max=L)) * u.clamp(-L, L)

    layer = make()
    gm = trace(layer, gate, mode="symbolic")
    assert fuse(gm) == 1
    for args in (layer.args, (layer.args[0][:1], *layer.args[1:])):
        if make is grouped_layer and args is not layer.args:
            ids = torch.tensor([[3, 1]])
            args = (*args[:3], *torch_nvfp4.route(ids, None, E))
        expected = layer._replace(args=args).fused(clamp_limit=L)
        torch.testing.assert_close(gm(*args), expected, rtol=0, atol=0)
