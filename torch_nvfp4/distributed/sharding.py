"""How DTensor shards the ops of ``torch.ops.nvfp4``: one rule per op, or words that say why there is none.

======================  =============================================================================================
op                      what stays sharded
======================  =============================================================================================
moe, moe_backward,      tokens: ``Shard(0)`` of hidden_states, topk_weights and topk_ids gives ``Shard(0)``.
moe_fp8                 experts: ``Shard(0)`` of every weight and of ``expert_map`` (see ``expert_maps``) gives
                        ``Partial()``; the tokens are then replicated.
batched_moe             experts: ``Shard(0)`` of everything gives ``Shard(0)``.
linear, swiglu          every dimension of the activations but the last
combine                 columns; tokens, where every rank has the same number
pack, order_for_fp8     experts (dimension 0 of a stack)
route, grouped_gemm...  nothing: ``order`` and ``offsets`` are those of all slots
unpack                  nothing
======================  =============================================================================================

Activations that are sharded otherwise, and partial sums, are redistributed first. Where torch (2.11) leaves gaps in a
tensor that it gathers from uneven parts along another dimension than the first, that is refused, with what to do
instead. Weights never are redistributed: packed bytes that are sliced along N or K pass every check of shapes and are
garbage, and experts that are gathered for every call cost more than they save. A placement that would need it is an
error. Rules hold per dimension of the mesh: tokens can be sharded along one and experts along another.

The rules are registered when the first fake runs after torch.distributed.tensor was imported: DTensor asks an op's fake
for the shape of the result before it looks for a rule, and importing DTensor takes half as long as importing torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import (
    OpSchema,
    OpSpec,
    OpStrategy,
    RuntimeSchemaInfo,
    _rebuild_tensor_from_dtensor_meta,
)
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.placement_types import Placement
from torch.utils._pytree import tree_map_only

from torch_nvfp4.ops import call_before_fakes

__all__ = ["expert_maps", "register_rules"]

Specs = dict[str, DTensorSpec]
"""What DTensor knows of each tensor among an op's arguments, by the argument's name."""

Choice = tuple[dict[str, Placement], Placement]
"""For one dimension of the mesh: the placement that each argument needs, and the one that every result then has."""

Rule = Callable[[str, Specs, int], Choice]
"""``rule(op, specs, mesh_dim)``."""

# Whether a tensor that is gathered from uneven parts is contiguous (torch 2.11 only cuts the padding off).
_CLOSES_GAPS = "contiguous" in Shard._maybe_unpad_tensor.__code__.co_names
_PROPAGATE = ShardingPropagator._propagate_tensor_meta_non_cached.__code__
_EXPERT_ARGUMENTS = ("w13", "w13_global_scale", "w2", "w2_global_scale", "w13_bias", "w2_bias")
_PACKED = ("w13", "w2", "weight", "packed")


def expert_maps(num_experts: int, *ranks: int) -> Tensor:
    """int32 [ranks * E]: every rank's expert_map behind each other, for ``distribute_tensor(..., [Shard(0)])``.

    Rank r has the experts that ``Shard(0)`` of a weight [E, ...] gives it: chunks of ceil(E / ranks), the last shorter.
    For weights that are sharded along several dimensions of the mesh, ``ranks`` has their sizes in the mesh's order.

    Raises ValueError where a rank would have no expert, which the op cannot run with.
    """
    spans = [(0, num_experts)]
    for size in ranks:
        spans = [part for first, last in spans for part in _chunks(first, last, size)]
    if not spans or min(last - first for first, last in spans) < 1:
        got = [last - first for first, last in spans]
        raise ValueError(
            f"expected at least one expert per rank, got {got} for {num_experts} experts; use fewer ranks, or "
            "torch_nvfp4.distributed.parallelize_experts, where a rank may have none"
        )
    maps = torch.full((len(spans), num_experts), -1, dtype=torch.int32, device="cpu")
    for row, (first, last) in zip(maps, spans, strict=True):
        row[first:last] = torch.arange(last - first, dtype=torch.int32, device="cpu")
    return maps.flatten()


def _chunks(first: int, last: int, size: int) -> list[tuple[int, int]]:
    """torch.chunk's parts, of which the last ones may be empty."""
    step = -(-(last - first) // size)
    return [(min(first + step * i, last), min(first + step * (i + 1), last)) for i in range(size)]


def _fail(op: str, expected: str, got: str, advice: str) -> NoReturn:
    raise RuntimeError(f"nvfp4::{op} on DTensors: expected {expected}, got {got}; {advice}")


def _is_shard(placement: Placement, dim: int | None = None) -> bool:
    return isinstance(placement, Shard) and (dim is None or placement.dim == dim)


def _check_weights(op: str, specs: Specs, mesh_dim: int, *, experts: bool) -> None:
    """Weights are replicated, or (``experts``) sharded along dimension 0."""
    for name in (*_EXPERT_ARGUMENTS, "weight", "packed", "global_scale", "bias", "scale"):
        if name not in specs:
            continue
        placement = specs[name].placements[mesh_dim]
        if isinstance(placement, Replicate) or (experts and _is_shard(placement, 0)):
            continue
        allowed = f"{name} to be replicated" + (" or sharded by experts, Shard(0)" if experts else "")
        why = "packed bytes cannot be sliced along N or K" if name in _PACKED else "it has to go with its weight"
        advice = "slice the canonical weights, then pack (torch_nvfp4.distributed.parallelize_experts does)"
        if op.startswith("linear"):
            advice = "NVFP4Linear.from_weight(...) of the rank's rows or columns of NVFP4Linear.unpacked_weight()"
        if op == "pack":
            why, advice = "a part of N or K packs to other bytes", "pack what to_local() gives, on each rank"
        _fail(op, allowed, f"{placement} along mesh dimension {mesh_dim}", f"{why}: {advice}")


def _experts_are_sharded(op: str, specs: Specs, mesh_dim: int, *also: str) -> bool:
    """Whether the weights are; all of them, and ``also``, have to be if one is."""
    _check_weights(op, specs, mesh_dim, experts=True)
    names = [name for name in (*_EXPERT_ARGUMENTS, *also) if name in specs]
    sharded = [_is_shard(specs[name].placements[mesh_dim], 0) for name in names]
    if any(sharded) and not all(sharded):
        got = ", ".join(f"{name} {specs[name].placements[mesh_dim]}" for name in names)
        _fail(
            op, f"{', '.join(names)} to be all replicated or all sharded by experts along mesh dimension {mesh_dim}",
            got, "each rank's weights and its part of the map belong together",
        )  # fmt: skip
    return any(sharded)


def _replicated(op: str, specs: Specs, mesh_dim: int) -> Choice:
    """Nothing stays sharded."""
    _check_weights(op, specs, mesh_dim, experts=False)
    if "expert_map" in specs and not isinstance(specs["expert_map"].placements[mesh_dim], Replicate):
        got = f"{specs['expert_map'].placements[mesh_dim]}"
        _fail(op, "expert_map to be replicated", got, "moe takes one map per rank; call the steps on to_local()")
    return dict.fromkeys(specs, Replicate()), Replicate()


def _moe(op: str, specs: Specs, mesh_dim: int) -> Choice:
    """Tokens, or experts with a map per rank."""
    also = ("expert_map",) if "expert_map" in specs else ()
    weights = [name for name in specs if name in _EXPERT_ARGUMENTS]
    if not _experts_are_sharded(op, specs, mesh_dim, *also):
        tokens = [name for name in specs if name not in (*weights, *also)]
        by_token = any(_is_shard(specs[name].placements[mesh_dim], 0) for name in tokens)
        output: Placement = Shard(0) if by_token else Replicate()
        return dict.fromkeys(specs, Replicate()) | dict.fromkeys(tokens, output), output
    if not also:
        _fail(
            op, "an expert_map beside experts that are sharded", "None",
            "pass distribute_tensor(torch_nvfp4.distributed.expert_maps(E, ranks), mesh, [Shard(0)]): without it every "
            "rank would take the ids for its own",
        )  # fmt: skip
    _check_expert_parts(op, specs)
    return dict.fromkeys(specs, Replicate()) | dict.fromkeys((*weights, *also), Shard(0)), Partial()


def _check_expert_parts(op: str, specs: Specs) -> None:
    """Every rank has an expert, and a map if there are any, which ``Shard(0)`` cuts into equal parts."""
    spec = specs["w2"]
    experts = least = spec.shape[0]
    ranks = 1
    for size, placement in zip(spec.mesh.shape, spec.placements, strict=True):
        if _is_shard(placement):
            least = max(0, least - (size - 1) * -(-least // size))
            ranks *= size
    if least < 1:
        _fail(
            op, f"at least one of {experts} experts on each of {ranks} ranks", "a rank without",
            "use fewer ranks, or torch_nvfp4.distributed.parallelize_experts, where a rank may have none",
        )  # fmt: skip
    maps = specs["expert_map"].shape[0] if "expert_map" in specs else 0
    if maps % ranks:
        _fail(
            op, f"an expert_map of [{ranks} * global experts], one map per rank", f"[{maps}]",
            "torch_nvfp4.distributed.expert_maps makes it",
        )  # fmt: skip


def _batched_moe(op: str, specs: Specs, mesh_dim: int) -> Choice:
    """Experts: each has its own rows, so that nothing has to be added."""
    sharded = _experts_are_sharded(op, specs, mesh_dim)
    if sharded:
        _check_expert_parts(op, specs)
    placement: Placement = Shard(0) if sharded else Replicate()
    return dict.fromkeys(specs, placement), placement


def _leading(op: str, specs: Specs, mesh_dim: int) -> Choice:
    """Any dimension of the activations, the first argument's, but the last."""
    _check_weights(op, specs, mesh_dim, experts=False)
    name, spec = next(iter(specs.items()))
    placement = spec.placements[mesh_dim]
    if not _is_shard(placement) or placement.dim == spec.ndim - 1:  # type: ignore[attr-defined]
        placement = Replicate()
    activations = [other for other in specs if other in (name, "gate_up")]
    return dict.fromkeys(specs, Replicate()) | dict.fromkeys(activations, placement), placement


def _combine(op: str, specs: Specs, mesh_dim: int) -> Choice:
    """Columns, or tokens where x [M * top_k, N] and the routing [M, top_k] split at the same tokens."""
    choice, _ = _replicated(op, specs, mesh_dim)
    x, routing = specs["x"], specs["topk_weights"]
    rows = [name for name in ("x", "topk_weights", "topk_ids") if _is_shard(specs[name].placements[mesh_dim], 0)]
    only_dim = sum(_is_shard(placement) for placement in x.placements) <= 1
    if rows and only_dim and routing.shape[0] % x.mesh.size(mesh_dim) == 0:
        return choice | dict.fromkeys(("x", "topk_weights", "topk_ids"), Shard(0)), Shard(0)
    if _is_shard(x.placements[mesh_dim], 1):
        return choice | {"x": Shard(1)}, Shard(1)
    return choice, Replicate()


def _stack(op: str, specs: Specs, mesh_dim: int) -> Choice:
    """The experts of a stack, which has one dimension more than a matrix."""
    _check_weights(op, specs, mesh_dim, experts=specs["weight"].ndim == 3)
    sharded = any(_is_shard(each.placements[mesh_dim], 0) for each in specs.values())
    placement: Placement = Shard(0) if sharded else Replicate()
    return dict.fromkeys(specs, placement), placement


def _order_for_fp8(op: str, specs: Specs, mesh_dim: int) -> Choice:
    """The experts of a packed stack."""
    _check_weights(op, specs, mesh_dim, experts=True)
    return _same(op, specs, mesh_dim)


def _same(op: str, specs: Specs, mesh_dim: int) -> Choice:
    """The result is placed as the only argument."""
    placement = next(iter(specs.values())).placements[mesh_dim]
    return dict.fromkeys(specs, placement), placement


_RULES: dict[str, Rule] = {
    "moe": _moe,
    "moe_backward": _moe,
    "moe_fp8": _moe,
    "batched_moe": _batched_moe,
    "route": _replicated,
    "grouped_gemm": _replicated,
    "grouped_gemm_backward": _replicated,
    "grouped_gemm_swiglu": _replicated,
    "grouped_gemm_swiglu_backward": _replicated,
    "combine": _combine,
    "linear": _leading,
    "linear_backward": _leading,
    "swiglu": _leading,
    "swiglu_backward": _leading,
    "pack": _stack,
    "order_for_fp8": _order_for_fp8,
    "unpack": _replicated,  # the first dimension of a packed tensor may be experts, halves or rows
    "no_gradient": _same,
}


def _check_gaps(op: str, name: str, spec: DTensorSpec, choice: Placement, mesh_dim: int) -> None:
    """Gathering ``spec`` along a dimension of the mesh gives a contiguous tensor, which the ops want."""
    placement, ranks = spec.placements[mesh_dim], spec.mesh.size(mesh_dim)
    if isinstance(placement, Shard) and placement.dim > 0 and placement != choice and spec.shape[placement.dim] % ranks:
        _fail(
            op, f"{name} sharded evenly, or along dimension 0", f"{placement} of {list(spec.shape)} over {ranks} ranks",
            "this torch gathers uneven parts into a tensor with gaps: pass "
            f"{name}.redistribute(placements=[...]).clone(memory_format=torch.contiguous_format)",
        )  # fmt: skip


def _strategy(name: str, rule: Rule, schema: OpSchema) -> OpStrategy:
    """The one way in which the op runs for these placements."""
    specs: Specs = {}
    for argument, value in zip(schema.op._schema.arguments, schema.args_schema, strict=False):
        if isinstance(value, OpStrategy):
            specs[argument.name] = value.strategies[0].output_spec
    mesh = next(iter(specs.values())).mesh
    choices = [rule(name, specs, mesh_dim) for mesh_dim in range(mesh.ndim)]
    if not _CLOSES_GAPS:
        for mesh_dim, (choice, _) in enumerate(choices):
            for given, spec in specs.items():
                _check_gaps(name, given, spec, choice[given], mesh_dim)
    inputs = [
        DTensorSpec(mesh, tuple(choice[argument] for choice, _ in choices), tensor_meta=spec.tensor_meta)
        for argument, spec in specs.items()
    ]
    results = len(schema.op._schema.returns)
    outputs = [DTensorSpec(mesh, tuple(output for _, output in choices)) for _ in range(results)]
    return OpStrategy(
        [
            OpSpec(
                output_specs=outputs[0] if results == 1 else tuple(outputs),
                input_specs=inputs,
                redistribute_cost=[[0.0] for _ in inputs],
            )
        ]
    )


def _refusal(name: str, schema: OpSchema) -> NoReturn:
    op = name.partition(".")[0]
    advice = f"call nvfp4::{op}, or this op on to_local()" if name.endswith(".out") else "call it on to_local()"
    _fail(name, "an op with a sharding rule", name, advice)


def _on_mesh_device(arguments: Any) -> Any:
    """The arguments of a fake on the mesh's device, where DTensor is who calls it.

    torch 2.11 asks for the result's shape with tensors on the CPU, whatever the mesh is of, and a packed weight has
    another shape there than on a GPU. Nothing but DTensor's own frame says what the mesh is of.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _PROPAGATE:
        frame = frame.f_back
    if frame is None:
        return arguments
    schema: OpSchema = frame.f_locals["op_schema"]
    device = next(spec.mesh.device_type for spec in schema.args_schema if isinstance(spec, DTensorSpec))

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    return tree_map_only(Tensor, moved, arguments)


def register_rules(ops: Sequence[Any] | None = None) -> None:
    """Registers the rules, and a refusal for whatever has none; ``ops``: overloads, by default all of the namespace."""
    if "device_type" not in _rebuild_tensor_from_dtensor_meta.__code__.co_names:
        call_before_fakes(_on_mesh_device)
    propagator = DTensor._op_dispatcher.sharding_propagator
    for overload in _overloads() if ops is None else ops:
        name = overload._schema.name.partition("::")[2]
        if overload._schema.overload_name:
            name += f".{overload._schema.overload_name}"
        strategy = partial(_strategy, name, _RULES[name]) if name in _RULES else partial(_refusal, name)
        # Every argument that is no tensor counts for DTensor's cache: sizes of results follow from them.
        propagator.register_op_strategy(overload, strategy, RuntimeSchemaInfo(static_argnum=0, needs_pytree=True))


def _overloads() -> list[Any]:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nvfp4::")]
    found = []
    for name in sorted(names):
        op, _, overload = name.removeprefix("nvfp4::").partition(".")
        found.append(getattr(getattr(torch.ops.nvfp4, op), overload or "default"))
    return found
