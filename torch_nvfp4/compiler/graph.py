"""Reading and writing the nodes of an aten graph: what the rewrites share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

_FULLS = (aten.full, aten.full_like, aten.new_full, aten.scalar_tensor)


class NoMatchError(Exception):
    """The nodes are not what a rule looks for."""


def packet_of(node: Node) -> Any:
    """The op that a node calls, whichever of its overloads that is, or None for what is no op."""
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else None


def arguments_of(node: Node) -> dict[str, Any]:
    """Every argument of an op by its name in the schema, defaults included."""
    assert isinstance(node.target, OpOverload)
    bound = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def value_of(node: object) -> Tensor:
    """The fake tensor in a node's ``meta["val"]``; NoMatchError for what is no node or has no tensor there."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(val, Tensor):
        raise NoMatchError
    return val


def constant_of(value: object) -> float | None:
    """The number that an argument is, or the one value of a tensor that it is filled with."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Node) and packet_of(value) in _FULLS:
        args = arguments_of(value)
        fill = args["fill_value"] if "fill_value" in args else args["s"]
        if isinstance(fill, (int, float)) and not isinstance(fill, bool):
            return float(torch.tensor(fill, dtype=value_of(value).dtype))
    return None


def constant_last(a: object, b: object) -> tuple[object, float]:
    """(the other argument, the number that one of the two is); NoMatchError where neither is a constant."""
    for x, other in ((a, b), (b, a)):
        constant = constant_of(other)
        if constant is not None:
            return x, constant
    raise NoMatchError


def bound_of(value: object) -> float | None:
    """The number that a bound of a clamp is, or None where it has none; NoMatchError where it is not a constant."""
    if value is None:
        return None
    constant = constant_of(value)
    if constant is None:
        raise NoMatchError
    return constant


def equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every value of their symbols; adds no guard."""
    return statically_known_true(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are ``equal`` in every dimension."""
    return len(a) == len(b) and all(map(equal, a, b))


def insert(graph: Graph, fn: Callable[..., Tensor], args: Sequence[Node]) -> Node:
    """Traces ``fn`` on the nodes' values and copies what it does to the graph's insertion point; returns the result."""
    values = [value_of(arg) for arg in args]
    with torch.no_grad(), values[0].fake_mode:  # type: ignore[attr-defined]
        traced = make_fx(fn, select_decomp_table())(*values).graph
    traced.eliminate_dead_code()
    placeholders = traced.find_nodes(op="placeholder")
    copies: dict[Node, Node] = dict(zip(placeholders, args, strict=True))
    for node in traced.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    (result,) = traced.find_nodes(op="output")[0].args
    return copies[result]
