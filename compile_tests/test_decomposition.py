"""``moe`` and ``batched_moe`` as their steps: in make_fx, in run_decompositions, and as a pass inside torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx

import torch_nvfp4
from torch_nvfp4.compiler import decompose_moe, inductor_options
from torch_nvfp4.ops import decompositions
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight, relative_l2

EXPERTS, TOKENS, TOP_K = 4, 10, 2

Render = Callable[[fx.Graph], str]


class Experts(nn.Module):
    def __init__(
        self, *, hidden: int = 64, intermediate: int = 32, experts: int = EXPERTS, device: str = "cpu", **gate: Any
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.dense13 = random_weight(
            (experts, 2 * intermediate, hidden), gated=True, generator=generator, device=device
        )
        self.dense2 = random_weight((experts, hidden, intermediate), generator=generator, device=device)
        self.register_buffer("w13", torch_nvfp4.pack(self.dense13, gated=True))
        self.register_buffer("w13_global_scale", self.dense13.global_scale)
        self.register_buffer("w2", torch_nvfp4.pack(self.dense2))
        self.register_buffer("w2_global_scale", self.dense2.global_scale)
        self.gate = gate

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
        weights = (self.w13, self.w13_global_scale, self.w2, self.w2_global_scale)
        return torch_nvfp4.moe(x, *weights, topk_weights, topk_ids, expert_map, **self.gate)

    def reference(self, *args: Tensor | None) -> Tensor:
        x, *routing = args
        return torch_nvfp4.reference.moe(x, self.dense13, self.dense2, *routing, **self.gate)


def inputs(
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int = TOKENS,
    hidden: int = 64,
    experts: int = EXPERTS,
    top_k: int = TOP_K,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(tokens, hidden, generator=generator) * 5).to(device, dtype)
    return x, *random_routing(tokens, experts, top_k, generator=generator, device=device)


def trace(model: nn.Module, args: tuple[Tensor | None, ...], table: Any) -> fx.GraphModule:
    """A graph of (buffers, *args)."""

    def call(buffers: dict[str, Tensor], *args: Tensor | None) -> Tensor:
        return torch.func.functional_call(model, buffers, args)

    with torch.no_grad():
        return make_fx(call, table, tracing_mode="fake")(dict(model.named_buffers()), *args)


def decomposed(model: nn.Module, args: tuple[Tensor | None, ...]) -> fx.GraphModule:
    return trace(model, args, decompositions())


def run(gm: fx.GraphModule, model: nn.Module, args: tuple[Tensor | None, ...]) -> Tensor:
    return gm(dict(model.named_buffers()), *args)


def ops(graph: fx.Graph) -> list[str]:
    return [node.target._opname for node in graph.nodes if "nvfp4" in str(node.target)]


STEPS = ["route", "grouped_gemm", "grouped_gemm", "combine"]


class OtherExperts(nn.Module):
    """Experts with biases, and with a gate or without."""

    def __init__(
        self, *, gated: bool, hidden: int = 64, intermediate: int = 32, device: str = "cpu", **gate: Any
    ) -> None:
        super().__init__()
        generator, rows = torch.Generator().manual_seed(0), 2 * intermediate if gated else intermediate
        w13 = random_weight((EXPERTS, rows, hidden), gated=gated, generator=generator, device=device)
        w2 = random_weight((EXPERTS, hidden, intermediate), generator=generator, device=device)
        self.register_buffer("w13", torch_nvfp4.pack(w13, gated=gated))
        self.register_buffer("w13_global_scale", w13.global_scale)
        self.register_buffer("w2", torch_nvfp4.pack(w2))
        self.register_buffer("w2_global_scale", w2.global_scale)
        self.register_buffer("w13_bias", torch.randn(EXPERTS, rows, generator=generator).to(device))
        self.register_buffer("w2_bias", torch.randn(EXPERTS, hidden, generator=generator).to(device))
        self.dense, self.gate = (w13, w2), gate

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        weights = (self.w13, self.w13_global_scale, self.w2, self.w2_global_scale)
        biases = {"w13_bias": self.w13_bias, "w2_bias": self.w2_bias}
        return torch_nvfp4.moe(x, *weights, topk_weights, topk_ids, **biases, **self.gate)

    def reference(self, *args: Tensor) -> Tensor:
        x, *routing = args
        return torch_nvfp4.reference.moe(x, *self.dense, *routing, None, self.w13_bias, self.w2_bias, **self.gate)


def test_table_has_the_fused_layers_alone() -> None:
    assert list(decompositions()) == [torch.ops.nvfp4.moe.default, torch.ops.nvfp4.batched_moe.default]


def test_moe_stays_one_node_without_the_table() -> None:
    assert ops(trace(Experts(), inputs(), {}).graph) == ["moe"]


def test_make_fx_graph(render: Render) -> None:
    model = Experts(clamp_limit=7.0, alpha=1.702, beta=1.0, apply_router_weight_on_input=True)
    assert_expected_inline(
        render(decomposed(model, inputs()).graph),
        """\
%1: (int32[20], int32[5]) = nvfp4.route.default(%0: int64[10, 2], None, 4)
%2: int32[20] = getitem(%1, 0)
%3: int32[5] = getitem(%1, 1)
%8: bfloat16[20, 64] = nvfp4.grouped_gemm.default(%4: bfloat16[10, 64], %5: uint8[4, 2, 32, 1, 36], %6:
    float32[4, 2], %2, %3, %7: float32[10, 2])
%9: float32[20, 64] = aten._to_copy.default(%8, dtype=torch.float32)
%10: (float32[20, 32], float32[20, 32]) = aten.split.Tensor(%9, 32, -1)
%11: float32[20, 32] = getitem(%10, 0)
%12: float32[20, 32] = getitem(%10, 1)
%13: float32[20, 32] = aten.clamp.default(%12, -7.0, 7.0)
%14: float32[20, 32] = aten.clamp.default(%11, None, 7.0)
%15: float32[20, 32] = aten.mul.Tensor(%14, 1.702)
%16: float32[20, 32] = aten.sigmoid.default(%15)
%17: bool[20, 32] = aten.eq.Scalar(%16, 0)
%18: float32[] = aten.scalar_tensor.default(0.0, device=device(type='cpu'), dtype=torch.float32,
    layout=torch.strided)
%19: float32[20, 32] = aten.where.self(%17, %18, %14)
%20: float32[20, 32] = aten.mul.Tensor(%19, %16)
%21: float32[20, 32] = aten.add.Tensor(%13, 1.0)
%22: float32[20, 32] = aten.mul.Tensor(%20, %21)
%23: bfloat16[20, 32] = aten._to_copy.default(%22, dtype=torch.bfloat16)
%26: bfloat16[20, 64] = nvfp4.grouped_gemm.default(%23, %24: uint8[4, 64, 1, 36], %25: float32[4], %2, %3)
%27: float32[10, 2] = aten.ones_like.default(%7, pin_memory=False)
%28: bfloat16[10, 64] = nvfp4.combine.default(%26, %27, %0, None, 4)
return [%28]""",
    )


def test_run_decompositions_graph(render: Render) -> None:
    """A dynamic batch, an expert map, and an activation whose clamp is outside."""
    model = Experts(activation="swiglustep", clamp_limit=5.0)
    args = (*inputs(), torch.tensor([1, -1, 0, 3], dtype=torch.int32))
    tokens = {0: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(model, args, dynamic_shapes=(tokens, tokens, tokens, None))
    assert ops(program.graph) == ["moe"]
    steps = program.run_decompositions(decompositions())
    assert_expected_inline(
        render(steps.graph),
        """\
%2: (int32[2*M], int32[5]) = nvfp4.route.default(%0: int64[M, 2], %1: int32[4], 4)
%3: int32[2*M] = getitem(%2, 0)
%4: int32[5] = getitem(%2, 1)
%8: bfloat16[2*M, 64] = nvfp4.grouped_gemm.default(%5: bfloat16[M, 64], %6: uint8[4, 2, 32, 1, 36], %7:
    float32[4, 2], %3, %4)
%9: float32[2*M, 64] = aten._to_copy.default(%8, dtype=torch.float32)
%10: (float32[2*M, 32], float32[2*M, 32]) = aten.split.Tensor(%9, 32, -1)
%11: float32[2*M, 32] = getitem(%10, 0)
%12: float32[2*M, 32] = getitem(%10, 1)
%13: float32[2*M, 32] = aten.clamp.default(%12, -5.0, 5.0)
%14: float32[2*M, 32] = aten.sigmoid.default(%11)
%15: bool[2*M, 32] = aten.eq.Scalar(%14, 0)
%16: float32[2*M, 32] = aten.where.ScalarSelf(%15, 0.0, %11)
%17: float32[2*M, 32] = aten.mul.Tensor(%16, %14)
%18: float32[2*M, 32] = aten.clamp.default(%17, None, 5.0)
%19: float32[2*M, 32] = aten.mul.Tensor(%18, %13)
%20: bfloat16[2*M, 32] = aten._to_copy.default(%19, dtype=torch.bfloat16)
%23: bfloat16[2*M, 64] = nvfp4.grouped_gemm.default(%20, %21: uint8[4, 64, 1, 36], %22: float32[4], %3, %4)
%25: bfloat16[M, 64] = nvfp4.combine.default(%23, %24: float32[M, 2], %0, %1, 4)
return [%25]""",
    )
    for few in (args, (*(a[:3] for a in args[:3]), args[3])):
        assert relative_l2(steps.module()(*few), model.reference(*few)) <= TOLERANCE[torch.bfloat16]


# Twice the fused op's bounds in 16 bits: the pre-activations are rounded before relu2 squares them, and few and short
# sums do not average the roundings out.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}

GATES = {
    "silu": {},
    "silu 10": {"clamp_limit": 10.0},
    "gpt-oss": {"clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0},
    "swiglustep 5": {"activation": "swiglustep", "clamp_limit": 5.0},
    # Below 0.278, the depth of silu's minimum: only there does a lower bound on a gate that has none show.
    "silu 0.125": {"clamp_limit": 0.125},
    "swiglustep 0.125": {"activation": "swiglustep", "clamp_limit": 0.125},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu2": {"activation": "relu2"},
}


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values(dtype: torch.dtype, gate: str, mapped: bool, on_input: bool, device: str) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernels take 16-bit activations")
    model = Experts(**GATES[gate], apply_router_weight_on_input=on_input, device=device)
    x, topk_weights, topk_ids = inputs(dtype, device=device)
    topk_ids[0] = -1  # no expert at all
    expert_map = torch.tensor([2, 0, -1, 1], dtype=torch.int32, device=device) if mapped else None
    args = (x, topk_weights, topk_ids, expert_map)
    gm = decomposed(model, args)
    assert ops(gm.graph) == STEPS
    out = run(gm, model, args)
    assert out.dtype == dtype
    assert not out[0].any()
    assert relative_l2(out, model.reference(*args)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("gate", ["silu", "silu 10", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accuracy_at_full_size(dtype: torch.dtype, gate: str) -> None:
    """The bound of the fused op holds for the models' activations."""
    model = Experts(hidden=4096, intermediate=2048, experts=2, **GATES[gate])
    x, *routing = inputs(dtype, tokens=4, hidden=4096, experts=2, top_k=2)
    args = (x / 5, *routing)
    assert_accurate(run(decomposed(model, args), model, args), model.reference(*args))


def test_empty_batch() -> None:
    model = Experts(clamp_limit=7.0)
    args = inputs(tokens=0)
    assert run(decomposed(model, args), model, args).shape == (0, 64)


def test_clamp_of_nan_and_infinity() -> None:
    model = Experts(clamp_limit=7.0)
    x, *routing = inputs()
    x[0, 0], x[1, 0] = torch.nan, torch.inf
    args = (x, *routing)
    out = run(decomposed(model, args), model, args)
    assert out[:2].isnan().all()
    assert_accurate(out[2:], model.reference(*args)[2:])


def test_bad_arguments_raise_as_from_moe() -> None:
    """The fake of moe has checked them before the decomposition runs, or the steps do."""
    model = Experts(clamp_limit=-1.0)
    with pytest.raises((RuntimeError, ValueError), match=r"clamp_limit to be finite and positive.*got -1"):
        decomposed(model, inputs())


# Inside torch.compile.
@pytest.fixture(scope="module")
def inductor_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def compile_with(model: nn.Module, options: dict[str, Any] | None, **kwargs: Any) -> Any:
    """Compiled as by a new process that finds the caches as they are."""
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, fullgraph=True, options=options, **kwargs)


def out_of_the_cache(model: nn.Module, options: Callable[[], dict[str, Any] | None], args: tuple[Tensor, ...]) -> Any:
    """(The values of a graph that Inductor has had in its cache, the options). In one of eight runs of the whole suite
    it compiled a graph again that it had; so it is asked up to three times."""
    for _ in range(3):
        given = options()
        result = compile_with(model, given)(*args)
        if counters["inductor"]["fxgraph_cache_hit"] == 1:
            return result, given
    raise AssertionError(f"expected a graph of the cache, got {dict(counters['inductor'])}")


def test_pass_in_a_graph() -> None:
    model = Experts(clamp_limit=7.0)
    args = inputs()
    gm = trace(model, args, {})
    assert decompose_moe(gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    assert ops(gm.graph) == STEPS
    torch.testing.assert_close(run(gm, model, args), run(decomposed(model, args), model, args), rtol=0, atol=0)
    assert decompose_moe(gm.graph) == 0


def test_caches_keep_decomposed_and_whole_apart(inductor_cache: None) -> None:
    """With the gate fused again there is nothing to compile, but the two graphs round differently."""
    model, args = Experts(clamp_limit=7.0), inputs()
    reference = model.reference(*args)
    whole = model(*args)
    with torch.no_grad():
        # Whole first: its cached graph must not answer for the decomposed one.
        torch.testing.assert_close(compile_with(model, None)(*args), whole, rtol=0, atol=0)
        options = inductor_options(decompose_moe=True)
        steps = compile_with(model, options)(*args)
        assert counters["inductor"]["fxgraph_cache_hit"] == 0
        assert options["joint_custom_pre_pass"].decomposed == 1
        assert options["joint_custom_pre_pass"].fused == 1
        assert not torch.equal(steps, whole)
        assert_accurate(steps, reference)

        # Then both, and the pass without the decomposition, with warm caches.
        torch.testing.assert_close(out_of_the_cache(model, lambda: None, args)[0], whole, rtol=0, atol=0)
        torch.testing.assert_close(compile_with(model, inductor_options())(*args), whole, rtol=0, atol=0)
        assert counters["inductor"]["fxgraph_cache_hit"] == 0
        cached, options = out_of_the_cache(model, lambda: inductor_options(decompose_moe=True), args)
        torch.testing.assert_close(cached, steps, rtol=0, atol=0)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
        assert options["joint_custom_pre_pass"].decomposed == 0  # the cache answered before the pass


def test_left_to_inductor() -> None:
    """Clamp and activation compiled by Inductor, once for every batch."""
    model = Experts(clamp_limit=7.0, alpha=1.702, beta=1.0)
    options = inductor_options(fuse_gates=False, decompose_moe=True)
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):
        compiled = compile_with(model, options, dynamic=True)
        for tokens in (TOKENS, 3):
            args = inputs(tokens=tokens)
            assert_accurate(compiled(*args), model.reference(*args))
    assert (options["joint_custom_pre_pass"].decomposed, options["joint_custom_pre_pass"].fused) == (1, 0)
    assert counters["stats"]["unique_graphs"] == 1


# batched_moe.
ROWS = 5
COUNTS = (3, 0, ROWS, 1)


class BatchedExperts(Experts):
    def forward(self, x: Tensor, counts: Tensor) -> Tensor:  # type: ignore[override]
        weights = (self.w13, self.w13_global_scale, self.w2, self.w2_global_scale)
        return torch_nvfp4.batched_moe(x, *weights, counts, **self.gate)

    def reference(self, x: Tensor, counts: Tensor) -> Tensor:  # type: ignore[override]
        return torch_nvfp4.reference.batched_moe(x, self.dense13, self.dense2, counts, **self.gate)


def batch(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """hidden_states with NaN behind the counts, and the counts."""
    x = torch.randn(EXPERTS, ROWS, 64, generator=torch.Generator().manual_seed(1)) * 5
    for rows, count in zip(x, COUNTS, strict=True):
        rows[count:] = torch.nan
    return x.to(device, dtype), torch.tensor(COUNTS, dtype=torch.int32, device=device)


def error_up_to_the_counts(out: Tensor, expected: Tensor) -> float:
    """The relative error of the counted rows; the others have to be zeros."""
    counted = torch.arange(ROWS) < torch.tensor(COUNTS).unsqueeze(1)
    assert not out.cpu()[~counted].any()
    return relative_l2(out.cpu()[counted], expected.cpu()[counted])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_batched_values(dtype: torch.dtype, gate: str, device: str) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernels take 16-bit activations")
    model = BatchedExperts(**GATES[gate], device=device)
    args = batch(dtype, device)
    gm = decomposed(model, args)
    assert ops(gm.graph) == STEPS
    out = run(gm, model, args)
    assert out.dtype == dtype
    assert error_up_to_the_counts(out, model.reference(*args)) <= TOLERANCE[dtype]


def test_batched_run_decompositions_graph(render: Render) -> None:
    """The number of rows per expert is dynamic; the counts are a tensor, which no step reads on the host."""
    model, args = BatchedExperts(clamp_limit=7.0), batch()
    program = torch.export.export(model, args, dynamic_shapes=({1: torch.export.Dim("rows", min=2)}, None))
    assert ops(program.graph) == ["batched_moe"]
    steps = program.run_decompositions(decompositions())
    assert_expected_inline(
        render(steps.graph),
        """\
%1: M = aten.sym_size.int(%0: bfloat16[4, M, 64], 1)
%2: int32[M] = aten.arange.default(M, device=device(type='cpu'), dtype=torch.int32, pin_memory=False)
%3: int32[4] = aten.arange.default(4, device=device(type='cpu'), dtype=torch.int32, pin_memory=False)
%4: int32[4, 1] = aten.unsqueeze.default(%3, 1)
%6: int32[4, 1] = aten.unsqueeze.default(%5: int32[4], 1)
%7: bool[4, M] = aten.lt.Tensor(%2, %6)
%8: int32[4, M] = aten.where.ScalarOther(%7, %4, -1)
%9: 4*M = mul(4, M)
%10: int32[4*M, 1] = aten.view.default(%8, [4*M, 1])
%11: bfloat16[4*M, 64] = aten.view.default(%0, [4*M, 64])
%12: float32[4*M, 1] = aten.ones_like.default(%10, dtype=torch.float32, pin_memory=False)
%13: (int32[4*M], int32[5]) = nvfp4.route.default(%10, None, 4)
%14: int32[4*M] = getitem(%13, 0)
%15: int32[5] = getitem(%13, 1)
%18: bfloat16[4*M, 64] = nvfp4.grouped_gemm.default(%11, %16: uint8[4, 2, 32, 1, 36], %17: float32[4, 2], %14,
    %15)
%19: float32[4*M, 64] = aten._to_copy.default(%18, dtype=torch.float32)
%20: (float32[4*M, 32], float32[4*M, 32]) = aten.split.Tensor(%19, 32, -1)
%21: float32[4*M, 32] = getitem(%20, 0)
%22: float32[4*M, 32] = getitem(%20, 1)
%23: float32[4*M, 32] = aten.clamp.default(%22, -7.0, 7.0)
%24: float32[4*M, 32] = aten.clamp.default(%21, None, 7.0)
%25: float32[4*M, 32] = aten.mul.Tensor(%24, 1.0)
%26: float32[4*M, 32] = aten.sigmoid.default(%25)
%27: bool[4*M, 32] = aten.eq.Scalar(%26, 0)
%28: float32[4*M, 32] = aten.where.ScalarSelf(%27, 0.0, %24)
%29: float32[4*M, 32] = aten.mul.Tensor(%28, %26)
%30: float32[4*M, 32] = aten.add.Tensor(%23, 0.0)
%31: float32[4*M, 32] = aten.mul.Tensor(%29, %30)
%32: bfloat16[4*M, 32] = aten._to_copy.default(%31, dtype=torch.bfloat16)
%35: bfloat16[4*M, 64] = nvfp4.grouped_gemm.default(%32, %33: uint8[4, 64, 1, 36], %34: float32[4], %14, %15)
%36: bfloat16[4*M, 64] = nvfp4.combine.default(%35, %12, %10, None, 4)
%37: bfloat16[4, M, 64] = aten.view.default(%36, [4, M, 64])
return [%37]""",
    )
    expected = model.reference(*args)
    assert error_up_to_the_counts(steps.module()(*args), expected) <= TOLERANCE[torch.bfloat16]
    x, counts = args
    fewer = torch.minimum(counts, torch.tensor(2, dtype=torch.int32))
    out = steps.module()(x[:, :2].contiguous(), fewer)
    for rows, wanted, count in zip(out, model.reference(x[:, :2], fewer), fewer.tolist(), strict=True):
        assert not rows[count:].any()
        assert count == 0 or relative_l2(rows[:count], wanted[:count]) <= TOLERANCE[torch.bfloat16]


def test_counts_out_of_range_are_those_of_cuda() -> None:
    """The op on the CPU names them; in a graph nothing can wait for them."""
    model, (x, _) = BatchedExperts(), batch()
    x = x.nan_to_num()
    gm = decomposed(model, (x, torch.zeros(EXPERTS, dtype=torch.int32)))
    out = run(gm, model, (x, torch.tensor([-7, ROWS + 1, 2**31 - 1, -(2**31)], dtype=torch.int32)))
    expected = model.reference(x, torch.tensor([0, ROWS, ROWS, 0], dtype=torch.int32))
    assert not out[0].any()
    assert not out[3].any()
    assert relative_l2(out[1:3], expected[1:3]) <= TOLERANCE[torch.bfloat16]


def test_pass_takes_batched_calls_too() -> None:
    """Compiled, with the gate fused again, the values are those of the steps."""
    model, args = BatchedExperts(clamp_limit=7.0), batch()
    gm = trace(model, args, {})
    assert ops(gm.graph) == ["batched_moe"]
    assert decompose_moe(gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    assert ops(gm.graph) == STEPS
    torch.testing.assert_close(run(gm, model, args), run(decomposed(model, args), model, args), rtol=0, atol=0)
    options = inductor_options(decompose_moe=True)
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):
        out = compile_with(model, options)(*args)
    assert (options["joint_custom_pre_pass"].decomposed, options["joint_custom_pre_pass"].fused) == (1, 1)
    assert error_up_to_the_counts(out, model.reference(*args)) <= TOLERANCE[torch.bfloat16]


def test_graph_of_biases(render: Render) -> None:
    model = OtherExperts(gated=True, clamp_limit=7.0, alpha=1.702, beta=1.0)
    assert_expected_inline(
        render(decomposed(model, inputs()).graph),
        """\
%1: (int32[20], int32[5]) = nvfp4.route.default(%0: int64[10, 2], None, 4)
%2: int32[20] = getitem(%1, 0)
%3: int32[5] = getitem(%1, 1)
%8: bfloat16[20, 64] = nvfp4.grouped_gemm.default(%4: bfloat16[10, 64], %5: uint8[4, 2, 32, 1, 36], %6:
    float32[4, 2], %2, %3, None, %7: float32[4, 64])
%9: float32[20, 64] = aten._to_copy.default(%8, dtype=torch.float32)
%10: (float32[20, 32], float32[20, 32]) = aten.split.Tensor(%9, 32, -1)
%11: float32[20, 32] = getitem(%10, 0)
%12: float32[20, 32] = getitem(%10, 1)
%13: float32[20, 32] = aten.clamp.default(%12, -7.0, 7.0)
%14: float32[20, 32] = aten.clamp.default(%11, None, 7.0)
%15: float32[20, 32] = aten.mul.Tensor(%14, 1.702)
%16: float32[20, 32] = aten.sigmoid.default(%15)
%17: bool[20, 32] = aten.eq.Scalar(%16, 0)
%18: float32[] = aten.scalar_tensor.default(0.0, device=device(type='cpu'), dtype=torch.float32,
    layout=torch.strided)
%19: float32[20, 32] = aten.where.self(%17, %18, %14)
%20: float32[20, 32] = aten.mul.Tensor(%19, %16)
%21: float32[20, 32] = aten.add.Tensor(%13, 1.0)
%22: float32[20, 32] = aten.mul.Tensor(%20, %21)
%23: bfloat16[20, 32] = aten._to_copy.default(%22, dtype=torch.bfloat16)
%27: bfloat16[20, 64] = nvfp4.grouped_gemm.default(%23, %24: uint8[4, 64, 1, 36], %25: float32[4], %2, %3,
    None, %26: float32[4, 64])
%29: bfloat16[10, 64] = nvfp4.combine.default(%27, %28: float32[10, 2], %0, None, 4)
return [%29]""",
    )


def test_graph_without_a_gate(render: Render) -> None:
    model = OtherExperts(gated=False, activation="relu2")
    assert_expected_inline(
        render(decomposed(model, inputs()).graph),
        """\
%1: (int32[20], int32[5]) = nvfp4.route.default(%0: int64[10, 2], None, 4)
%2: int32[20] = getitem(%1, 0)
%3: int32[5] = getitem(%1, 1)
%8: bfloat16[20, 32] = nvfp4.grouped_gemm.default(%4: bfloat16[10, 64], %5: uint8[4, 32, 1, 36], %6:
    float32[4], %2, %3, None, %7: float32[4, 32])
%9: float32[20, 32] = aten._to_copy.default(%8, dtype=torch.float32)
%10: float32[20, 32] = aten.relu.default(%9)
%11: float32[20, 32] = aten.pow.Tensor_Scalar(%10, 2)
%12: bfloat16[20, 32] = aten._to_copy.default(%11, dtype=torch.bfloat16)
%16: bfloat16[20, 64] = nvfp4.grouped_gemm.default(%12, %13: uint8[4, 64, 1, 36], %14: float32[4], %2, %3,
    None, %15: float32[4, 64])
%18: bfloat16[10, 64] = nvfp4.combine.default(%16, %17: float32[10, 2], %0, None, 4)
return [%18]""",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("gated", "gate"),
    [(True, {"clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0}), (False, {"activation": "relu2"}), (False, {})],
)
def test_other_experts_compiled(gated: bool, gate: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """As steps the activation is found again, with biases and without a gate, and nothing but the one op is left."""
    model = OtherExperts(gated=gated, device=device, **gate)
    x, *routing = inputs(dtype, device=device)
    args = (x / 5, *routing)
    options = inductor_options(decompose_moe=True)
    with fresh_cache(), torch.no_grad():
        torch._dynamo.reset()
        out = torch.compile(model, fullgraph=True, options=options)(*args)
    counts = options["joint_custom_pre_pass"]
    assert (counts.decomposed, counts.fused) == (1, 1)
    assert relative_l2(out, model.reference(*args)) <= 3 * TOLERANCE[dtype]
    assert_accurate(model(*args), model.reference(*args))
