"""``moe`` and ``batched_moe`` as their steps, as a rewrite of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from torch_nvfp4.compiler.graph import arguments_of, insert
from torch_nvfp4.ops import decompositions

__all__ = ["decompose_moe"]


def decompose_moe(graph: Graph) -> int:
    """Replaces every ``moe`` and ``batched_moe`` in the graph by its steps (``torch_nvfp4.decompositions()``); returns
    how many."""
    return sum(_replace(graph, op, decomposed) for op, decomposed in decompositions().items())


def _replace(graph: Graph, op: OpOverload, decomposed: Callable[..., Tensor]) -> int:
    count = 0
    for node in graph.find_nodes(op="call_function", target=op):
        arguments = arguments_of(node)
        nodes = {name: value for name, value in arguments.items() if isinstance(value, Node)}
        if any(not isinstance(value.meta["val"], Tensor) for value in nodes.values()):
            continue  # a limit that is only known at run time

        def steps(*tensors: Tensor, names: Sequence[str] = tuple(nodes), fixed: dict[str, Any] = arguments) -> Tensor:
            return decomposed(**{**fixed, **dict(zip(names, tensors, strict=True))})

        with graph.inserting_before(node):
            node.replace_all_uses_with(insert(graph, steps, list(nodes.values())))
        graph.erase_node(node)
        count += 1
    return count
