"""The ops on DTensors, each against the same op on whole tensors; see helpers/ranks.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import torch_nvfp4
from torch_nvfp4.distributed import expert_maps, sharding
from torch_nvfp4.testing import FP8_TOLERANCE, TOLERANCE, random_routing, random_weight, relative_l2

DEVICE = os.environ["RANKS_DEVICE"]
DTYPE = torch.float32 if DEVICE == "cpu" else torch.float16
# Parts of a sum are rounded to 16 bits on each rank, and so is the sum of each two.
ERROR = TOLERANCE[DTYPE] * (1 if DEVICE == "cpu" else 2)
E, K, INNER, TOP_K = 7, 64, 128, 3
WORLD = int(os.environ["WORLD_SIZE"])
R, S0 = Replicate(), Shard(0)
WEIGHTS = ("w13", "w13_global_scale", "w2", "w2_global_scale")
CLAMP = {"clamp_limit": 0.5}


def one_dimension() -> DeviceMesh:
    return init_device_mesh(DEVICE, (WORLD,))


def layer(experts: int = E) -> dict[str, Tensor]:
    """The weight arguments of ``moe``, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    w13 = random_weight((experts, 2 * INNER, K), gated=True, generator=generator, device=DEVICE)
    w2 = random_weight((experts, K, INNER), generator=generator, device=DEVICE)
    packed = (torch_nvfp4.pack(w13, gated=True), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale)
    return dict(zip(WEIGHTS, packed, strict=True))


def tokens(count: int, experts: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, topk_weights, topk_ids, the same on every rank."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, K, generator=generator).to(DEVICE, DTYPE)
    weights, ids = random_routing(count, experts, TOP_K, generator=generator, device=DEVICE)
    return x, weights, ids


def placed(tensor: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    return distribute_tensor(tensor, mesh, placements)


def check(result: Any, expected: Tensor, *placements: Placement, exact: bool = False) -> None:
    """The placements, and the values: of sums over ranks within the op's tolerance, else exactly."""
    assert isinstance(result, DTensor)
    assert result.placements == placements
    whole = result.full_tensor()
    if exact:
        assert torch.equal(whole, expected)
    else:
        assert relative_l2(whole, expected) < ERROR, relative_l2(whole, expected)


def moe(mesh: DeviceMesh, w: dict[str, Tensor], routing: tuple[Tensor, Tensor, Tensor], experts: Any, by_token: Any,
        expert_map: Any = None) -> Any:  # fmt: skip
    """``torch_nvfp4.moe`` with these placements of weights and of tokens."""
    x, weights, ids = (placed(tensor, mesh, *by_token) for tensor in routing)
    return torch_nvfp4.moe(x, *(placed(w[name], mesh, *experts) for name in WEIGHTS), weights, ids, expert_map, **CLAMP)


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(RuntimeError) as error:
        call()
    for word in words:
        assert word in str(error.value), (word, str(error.value))


def case_moe_by_tokens() -> None:
    mesh, w = one_dimension(), layer()
    for count in (1, 3, 9, 0):  # uneven, and ranks without tokens
        routing = tokens(count)
        expected = torch_nvfp4.moe(routing[0], *w.values(), *routing[1:], **CLAMP)
        check(moe(mesh, w, routing, [R], [S0]), expected, S0)
        check(moe(mesh, w, routing, [R], [R]), expected, R, exact=True)


def case_moe_redistributes_tokens() -> None:
    mesh, w, routing = one_dimension(), layer(), tokens(5)
    expected = torch_nvfp4.moe(routing[0], *w.values(), *routing[1:], **CLAMP)
    weights = [placed(w[name], mesh, R) for name in WEIGHTS]
    x, topk_weights, topk_ids = (placed(tensor, mesh, R) for tensor in routing)
    check(torch_nvfp4.moe(placed(routing[0], mesh, Shard(1)), *weights, topk_weights, topk_ids, **CLAMP), expected, R)
    check(torch_nvfp4.moe(x, *weights, placed(routing[1], mesh, S0), topk_ids, **CLAMP), expected, S0)
    part = DTensor.from_local(routing[0] / WORLD, mesh, [Partial()])
    check(torch_nvfp4.moe(part, *weights, topk_weights, topk_ids, **CLAMP), expected, R)


def case_moe_by_experts() -> None:
    mesh, w = one_dimension(), layer()  # 7 experts: uneven
    expert_map = placed(expert_maps(E, WORLD).to(DEVICE), mesh, S0)
    for count in (1, 6, 0):
        routing = tokens(count)
        expected = torch_nvfp4.moe(routing[0], *w.values(), *routing[1:], **CLAMP)
        for by_token in (R, S0):
            check(moe(mesh, w, routing, [S0], [by_token], expert_map), expected, Partial())


def case_moe_with_biases() -> None:
    mesh, w, routing = one_dimension(), layer(), tokens(5)
    generator = torch.Generator().manual_seed(6)
    biases = [torch.randn(E, size, generator=generator).to(DEVICE) for size in (2 * INNER, K)]
    expected = torch_nvfp4.moe(routing[0], *w.values(), *routing[1:], w13_bias=biases[0], w2_bias=biases[1], **CLAMP)
    maps = placed(expert_maps(E, WORLD).to(DEVICE), mesh, S0)
    for placement, expert_map, result in ((S0, maps, Partial()), (R, None, S0)):
        x, weights, ids = (placed(tensor, mesh, S0) for tensor in routing)
        packed = [placed(w[name], mesh, placement) for name in WEIGHTS]
        w13_bias, w2_bias = (placed(bias, mesh, placement) for bias in biases)
        given = {"w13_bias": w13_bias, "w2_bias": w2_bias, **CLAMP}
        check(torch_nvfp4.moe(x, *packed, weights, ids, expert_map, **given), expected, result)
    by_half = {"w13_bias": placed(biases[0], mesh, R), "w2_bias": placed(biases[1], mesh, S0)}
    refused(
        lambda: torch_nvfp4.moe(x, *packed, weights, ids, **by_half), "to be all replicated or all sharded", "w2_bias"
    )


def case_moe_on_two_dimensions_4() -> None:
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("tokens", "experts"))
    w, routing = layer(), tokens(5)
    expected = torch_nvfp4.moe(routing[0], *w.values(), *routing[1:], **CLAMP)
    maps = placed(expert_maps(E, 2).to(DEVICE), mesh, R, S0)
    check(moe(mesh, w, routing, [R, S0], [S0, R], maps), expected, S0, Partial())
    maps = placed(expert_maps(E, 2, 2).to(DEVICE), mesh, S0, S0)
    check(moe(mesh, w, routing, [S0, S0], [R, S0], maps), expected, Partial(), Partial())
    check(moe(mesh, w, routing, [R, R], [S0, S0]), expected, S0, S0)


def case_moe_compiles() -> None:
    mesh, w, routing = one_dimension(), layer(), tokens(4)
    expected = torch_nvfp4.moe(routing[0], *w.values(), *routing[1:], **CLAMP)
    weights = [placed(w[name], mesh, S0) for name in WEIGHTS]
    maps = placed(expert_maps(E, WORLD).to(DEVICE), mesh, S0)

    def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        result: DTensor = torch_nvfp4.moe(x, *weights, topk_weights, topk_ids, maps, **CLAMP)
        return result.redistribute(mesh, [R]).to_local()

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        result = compiled(*(placed(tensor, mesh, S0) for tensor in routing))
    assert relative_l2(result, expected) < ERROR


def case_moe_gradients() -> None:
    mesh, w, routing = one_dimension(), layer(), tokens(5)
    leaves = [tensor.requires_grad_() for tensor in routing[:2]]
    direction = torch.randn(5, K, generator=torch.Generator().manual_seed(2)).to(DEVICE, DTYPE)
    expected = torch.autograd.grad(torch_nvfp4.moe(leaves[0], *w.values(), *routing[1:], **CLAMP), leaves, direction)
    maps = placed(expert_maps(E, WORLD).to(DEVICE), mesh, S0)
    for by_expert, by_token in ((R, S0), (S0, R), (R, R)):
        weights = [placed(w[name], mesh, by_expert) for name in WEIGHTS]
        given = [placed(tensor.detach(), mesh, by_token).requires_grad_() for tensor in leaves]
        expert_map = maps if by_expert is S0 else None
        result = torch_nvfp4.moe(given[0], *weights, given[1], placed(routing[2], mesh, by_token), expert_map, **CLAMP)
        whole: DTensor = result.redistribute(mesh, [R])
        grads = torch.autograd.grad(whole.to_local(), given, direction)
        for grad, exact in zip(grads, expected, strict=True):
            check(grad, exact, Partial() if by_expert is S0 else by_token)


def case_gradients_of_the_steps() -> None:
    """Of linear and swiglu along what stays sharded; what is not is replicated."""
    mesh, w, routing = one_dimension(), layer(), tokens(5)
    generator = torch.Generator().manual_seed(3)
    dense = random_weight((2 * INNER, K), gated=True, generator=generator, device=DEVICE)
    packed, scale = torch_nvfp4.pack(dense, gated=True), dense.global_scale
    bias = torch.randn(2 * INNER, generator=generator).to(DEVICE, DTYPE)
    order, offsets = torch_nvfp4.route(routing[2], None, E)

    def dense_layer(x: Tensor, bias: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return torch_nvfp4.swiglu(torch_nvfp4.linear(x, weight, scale, bias), **CLAMP)

    def grouped(x: Tensor, topk_weights: Tensor, weight: Tensor, scale: Tensor, *plan: Tensor) -> Tensor:
        return torch_nvfp4.grouped_gemm_swiglu(x, weight, scale, *plan, topk_weights, **CLAMP)

    def plain(x: Tensor, topk_weights: Tensor, weight: Tensor, scale: Tensor, *plan: Tensor) -> Tensor:
        return torch_nvfp4.grouped_gemm(x, weight, scale, *plan, topk_weights)

    experts = (w["w13"], w["w13_global_scale"], order, offsets)
    for run, leaves, frozen, placement in (
        (dense_layer, (routing[0], bias), (packed, scale), S0),
        (grouped, routing[:2], experts, R),
        (plain, routing[:2], experts, R),
    ):
        for both in (True, False):
            inputs = [leaf.detach().requires_grad_(both or index == 0) for index, leaf in enumerate(leaves)]
            output = run(*inputs, *frozen)
            expected = torch.autograd.grad(output.square().sum(), inputs if both else inputs[:1])
            given = [placed(leaf.detach(), mesh, place) for leaf, place in zip(inputs, (S0, R), strict=True)]
            given = [leaf.requires_grad_(both or index == 0) for index, leaf in enumerate(given)]
            result = run(*given, *(placed(tensor, mesh, R) for tensor in frozen))
            check(result, output, placement)
            grads = torch.autograd.grad(result.square().sum().full_tensor(), given if both else given[:1])
            for grad, exact in zip(grads, expected, strict=True):
                assert relative_l2(grad.full_tensor(), exact) < ERROR  # type: ignore[attr-defined]


def case_words_of_refusals() -> None:
    mesh, w, routing = one_dimension(), layer(), tokens(4)
    maps = placed(expert_maps(E, WORLD).to(DEVICE), mesh, S0)
    slices = "slice the canonical weights, then pack"
    sliced = [placed(w[name], mesh, Shard(2) if name == "w13" else R) for name in WEIGHTS]
    x, weights, ids = (placed(tensor, mesh, R) for tensor in routing)
    words = ("w13 to be replicated or sharded by experts", "S(2)", slices)
    refused(lambda: torch_nvfp4.moe(x, *sliced, weights, ids), *words)
    refused(lambda: moe(mesh, w, routing, [S0], [R]), "expected an expert_map beside experts", "expert_maps(E, ranks)")
    whole = placed(expert_maps(E, 1).to(DEVICE), mesh, R)
    refused(lambda: moe(mesh, w, routing, [S0], [R], whole), "to be all replicated or all sharded", "expert_map R")
    refused(lambda: moe(mesh, w, routing, [R], [R], maps), "to be all replicated or all sharded", "expert_map S(0)")
    odd = placed(torch.zeros(E * WORLD + 1, dtype=torch.int32, device=DEVICE), mesh, S0)
    few = layer(1)
    if WORLD > 1:
        refused(lambda: moe(mesh, few, routing, [S0], [R], maps), "at least one of 1 experts on each", "a rank without")
        refused(lambda: moe(mesh, w, routing, [S0], [R], odd), f"an expert_map of [{WORLD} * global experts]")
    part = [DTensor.from_local(w[name], mesh, [Partial()]) if name == "w2_global_scale" else placed(w[name], mesh, R)
            for name in WEIGHTS]  # fmt: skip
    refused(lambda: torch_nvfp4.moe(x, *part, weights, ids), "w2_global_scale to be replicated", "P")
    everywhere = [placed(w[name], mesh, R) for name in WEIGHTS]
    out = placed(torch.empty_like(routing[0]), mesh, R)
    refused(lambda: torch_nvfp4.moe(x, *everywhere, weights, ids, out=out), "moe.out", "call nvfp4::moe, or this op on")


def case_moe_maps_words() -> None:
    with pytest.raises(ValueError, match=r"expected at least one expert per rank, got .*2, 2, 1, 0.* for 5 experts"):
        expert_maps(5, 4)
    assert expert_maps(3, 2).tolist() == [0, 1, -1, -1, -1, 0]
    assert expert_maps(4, 2, 2).view(4, 4).tolist() == [
        [0, -1, -1, -1],
        [-1, 0, -1, -1],
        [-1, -1, 0, -1],
        [-1, -1, -1, 0],
    ]


def case_moe_fp8() -> None:
    mesh, w, routing = one_dimension(), layer(), tokens(9)
    if DEVICE == "cpu":
        whole = placed(w["w2"], mesh, R)
        words = "nvfp4::order_for_fp8: expected tensors on a CUDA device, got them on the cpu"
        refused(lambda: torch_nvfp4.order_for_fp8(whole, INNER), words)
        return
    if torch.cuda.get_device_capability()[0] != 9:
        return
    ordered = dict(w)
    for name, features, gated in (("w13", K, True), ("w2", INNER, False)):
        ordered[name] = torch_nvfp4.order_for_fp8(w[name], features, gated=gated)
        for given in (S0, R):
            result = torch_nvfp4.order_for_fp8(placed(w[name], mesh, given), features, gated=gated)
            check(result, ordered[name], given, exact=True)
        by_row = placed(w[name], mesh, Shard(2 if gated else 1))
        refused(lambda by_row=by_row, features=features, gated=gated: torch_nvfp4.order_for_fp8(
            by_row, features, gated=gated), "packed to be replicated or sharded by experts")  # fmt: skip
    expected = torch_nvfp4.moe(routing[0], *ordered.values(), *routing[1:], input_quant="fp8", **CLAMP)
    maps = placed(expert_maps(E, WORLD).to(DEVICE), mesh, S0)
    for by_expert, by_token, expert_map, placement in ((R, S0, None, S0), (S0, R, maps, Partial()), (R, R, None, R)):
        x, topk_weights, ids = (placed(tensor, mesh, by_token) for tensor in routing)
        weights = [placed(ordered[name], mesh, by_expert) for name in WEIGHTS]
        result: Any = torch_nvfp4.moe(x, *weights, topk_weights, ids, expert_map, input_quant="fp8", **CLAMP)
        assert result.placements == (placement,)
        assert relative_l2(result.full_tensor(), expected) < FP8_TOLERANCE


def case_batched_moe() -> None:
    mesh, w = one_dimension(), layer()
    x = torch.randn(E, 5, K, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    counts = torch.arange(E, dtype=torch.int32, device=DEVICE) % 6
    expected = torch_nvfp4.batched_moe(x, *w.values(), counts, **CLAMP)
    for placement, given in ((S0, S0), (R, R), (S0, R), (R, Shard(1))):  # of the weights, of the tokens
        weights = [placed(w[name], mesh, placement) for name in WEIGHTS]
        tokens = placed(x, mesh, given)
        if given == Shard(1) and not sharding._CLOSES_GAPS:  # torch 2.11, and 5 tokens are uneven
            tokens = tokens.redistribute(placements=[R]).clone(memory_format=torch.contiguous_format)
        result = torch_nvfp4.batched_moe(tokens, *weights, placed(counts, mesh, R), **CLAMP)
        check(result, expected, placement)


def case_words_where_gathering_leaves_gaps() -> None:
    mesh, w = one_dimension(), layer()
    x = torch.randn(E, 5, K, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    counts = placed(torch.arange(E, dtype=torch.int32, device=DEVICE) % 6, mesh, R)
    weights = [placed(w[name], mesh, R) for name in WEIGHTS]
    words = f"of [{E}, 5, {K}] over {WORLD} ranks", "redistribute(placements=[...]).clone("
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_CLOSES_GAPS", False)
        rows = placed(x, mesh, Shard(1))
        # A limit of its own, because DTensor keeps what a rule has once said of a call.
        refused(lambda: torch_nvfp4.batched_moe(rows, *weights, counts, clamp_limit=0.25), "hidden_states", *words)
    whole = rows.redistribute(placements=[R]).clone(memory_format=torch.contiguous_format)
    assert whole.to_local().is_contiguous()


def case_linear_and_swiglu() -> None:
    mesh = one_dimension()
    generator = torch.Generator().manual_seed(2)
    weight = random_weight((32, K), generator=generator, device=DEVICE)
    packed, scale = torch_nvfp4.pack(weight), weight.global_scale
    x = torch.randn(2, 5, K, generator=generator).to(DEVICE, DTYPE)
    bias = torch.randn(32, generator=generator).to(DEVICE, DTYPE)
    expected = torch_nvfp4.linear(x, packed, scale, bias)
    whole = [placed(tensor, mesh, R) for tensor in (packed, scale, bias)]
    for given, result in ((Shard(1), Shard(1)), (S0, S0), (Shard(2), R), (R, R)):
        check(torch_nvfp4.linear(placed(x, mesh, given), *whole), expected, result)
        check(
            torch_nvfp4.swiglu(placed(x, mesh, given), clamp_limit=0.3), torch_nvfp4.swiglu(x, clamp_limit=0.3), result
        )
    sliced = placed(packed, mesh, S0)
    refused(lambda: torch_nvfp4.linear(placed(x, mesh, R), sliced, whole[1]), "replicated", "S(0)", "from_weight")


def case_steps() -> None:
    mesh, w, (x, _, ids) = one_dimension(), layer(), tokens(8)
    order, offsets = torch_nvfp4.route(ids, None, E)
    for given in (R, S0):
        dtensors = torch_nvfp4.route(placed(ids, mesh, given), None, E)
        for result, expected in zip(dtensors, (order, offsets), strict=True):
            check(result, expected, R, exact=True)
        arguments = [placed(w[name], mesh, R) for name in WEIGHTS[:2]]
        routed = [placed(tensor, mesh, R) for tensor in (order, offsets)]
        gate_up = torch_nvfp4.grouped_gemm(x, w["w13"], w["w13_global_scale"], order, offsets)
        check(torch_nvfp4.grouped_gemm(placed(x, mesh, given), *arguments, *routed), gate_up, R, exact=True)
        half = torch_nvfp4.grouped_gemm_swiglu(x, w["w13"], w["w13_global_scale"], order, offsets, **CLAMP)
        check(torch_nvfp4.grouped_gemm_swiglu(placed(x, mesh, given), *arguments, *routed, **CLAMP), half, R)
    maps = placed(expert_maps(E, WORLD).to(DEVICE), mesh, S0)
    refused(lambda: torch_nvfp4.route(placed(ids, mesh, R), maps, E), "expert_map to be replicated", "S(0)")
    by_expert = placed(w["w13"], mesh, S0)
    refused(lambda: torch_nvfp4.grouped_gemm(placed(x, mesh, R), by_expert, arguments[1], *routed), "w", "replicated")


def case_combine() -> None:
    mesh = one_dimension()
    for count, by_token in ((8, S0), (5, S0 if WORLD == 1 else R)):  # 5 tokens of 3 slots split elsewhere than 15 slots
        _, weights, ids = tokens(count)
        slots = torch.randn(count * TOP_K, K, generator=torch.Generator().manual_seed(3)).to(DEVICE, DTYPE)
        expected = torch_nvfp4.combine(slots, weights, ids, None, E)
        for given, result in ((S0, by_token), (Shard(1), Shard(1)), (R, R)):
            routing = [placed(tensor, mesh, R) for tensor in (weights, ids)]
            check(torch_nvfp4.combine(placed(slots, mesh, given), *routing, None, E), expected, result, exact=True)


def case_pack() -> None:
    mesh = one_dimension()
    weight = random_weight((E, 32, K), generator=torch.Generator().manual_seed(4), device=DEVICE)
    scale = weight.scale.view(torch.uint8)
    expected = torch_nvfp4.pack(weight)
    op, undo = torch.ops.nvfp4.pack, torch.ops.nvfp4.unpack
    check(op(placed(weight.data, mesh, S0), placed(scale, mesh, S0)), expected, S0, exact=True)
    check(op(placed(weight.data, mesh, R), placed(scale, mesh, R)), expected, R, exact=True)
    data, _ = undo(placed(expected, mesh, R), K)
    check(data, weight.data, R, exact=True)
    by_row = [placed(tensor, mesh, Shard(1)) for tensor in (weight.data, scale)]
    refused(lambda: op(*by_row), "weight to be replicated or sharded by experts", "S(1)", "pack what to_local() gives")
    refused(lambda: undo(placed(expected, mesh, S0), K), "packed to be replicated", "S(0)")


def case_every_op_has_a_rule_or_a_refusal() -> None:
    funcs = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nvfp4::")]
    ops = [getattr(getattr(torch.ops.nvfp4, name[7:].partition(".")[0]), name.partition(".")[2] or "default")
           for name in names]  # fmt: skip
    assert len(ops) >= 12
    assert all(op in funcs for op in ops), [op for op in ops if op not in funcs]
    distributed.barrier()
