"""Fusing an eager clamp-SwiGLU gate into the GEMM whose output it halves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from torch_nvfp4.compiler.expression import CASTS, GEMMS, Reader, gate_form, plain_form
from torch_nvfp4.compiler.graph import NoMatchError, arguments_of, insert, packet_of, same_shape, value_of
from torch_nvfp4.gate import Gate
from torch_nvfp4.ops.batch_invariance import invariance_keywords
from torch_nvfp4.ops.optional import optional_arguments

__all__ = ["fuse_gates"]

aten, nvfp4 = torch.ops.aten, torch.ops.nvfp4


def fuse_gates(graph: Graph) -> int:
    """Replaces each GEMM and the eager gate after it by ``grouped_gemm_swiglu``; returns how many there were.

    The GEMM is ``grouped_gemm`` or ``linear`` with a weight that was packed with gated=True. The gate is one of
    (g, u: the halves of the GEMM's output, by chunk, split, slice, unbind or select)

    - ``min(g, L) * sigmoid(alpha * min(g, L)) * (clamp(u, -L, L) + beta)``, of DeepSeek-V4, MiniMax-M3, gpt-oss
    - ``min(silu(g), L) * clamp(u, -L, L)``, of Step-3.5
    - either without its clamps, or with an infinite limit

    in any order of the factors, and with or without an upcast of the halves to fp32. The result has the GEMM's dtype.
    After a ``grouped_gemm`` whose weight has no gate rows, ``relu(x)^2`` and ``silu(x)`` of all of its output become
    ``grouped_gemm_swiglu`` too.

    It stays as it is where the meaning would differ or the work would be done twice: limits that are unequal or only
    known at run time, gate and up swapped or interleaved, a GEMM output (or anything up to the result) that something
    else reads, a broadcast, a cast to a narrower dtype, halves that are written in place.
    """
    if not any(graph.find_nodes(op="call_function", target=target) for target in GEMMS):
        return 0  # the usual graph is not worth reading
    count = 0
    # From the end, so that a product is tried before its factors.
    for node in reversed(list(graph.nodes)):
        if packet_of(node) in (aten.mul, aten.div, aten.pow) and not node._erased:
            gate = _match(node)
            if gate is not None:
                _replace(graph, gate)
                count += 1
    return count


@dataclass
class _Match:
    """A gate that was found."""

    root: Node  # its result, which the fused op's output replaces
    gemm: Node
    source: Node  # the view that shaped the GEMM's output, or the GEMM
    nodes: set[Node]  # everything from the GEMM to the root, which the replacement leaves without a user
    gate: Gate


def _match(node: Node) -> _Match | None:
    """The gate whose last product ``node`` is, or None."""
    reader = Reader()
    try:
        gemm, source, gate = _gate_of(reader, node)
        like = value_of(gemm)
        root = node
        if value_of(node).dtype != like.dtype and len(node.users) == 1:
            root = next(iter(node.users))
            if packet_of(root) not in CASTS:
                return None
            reader.read(root)
        shaped = [value_of(n) for n in (*reader.half_nodes, *reader.pointwise)]
        values = [*shaped, *(value_of(n) for n in reader.upcasts)]
        result = value_of(root)
    except NoMatchError:
        return None
    if result.dtype != like.dtype:
        return None
    # A narrower dtype in between rounds more than the fused op may leave out, an integer truncates, and another shape
    # is a broadcast.
    for value in values:
        if not value.dtype.is_floating_point or torch.promote_types(value.dtype, like.dtype) != value.dtype:
            return None
        if value.device != like.device:
            return None
    if not all(same_shape(value.shape, shaped[0].shape) for value in shaped):
        return None
    nodes = {*reader.half_nodes, *reader.pointwise, *reader.upcasts, *reader.plumbing}
    if any(user not in nodes for n in nodes - {root} for user in n.users):
        return None
    return _Match(root, gemm, source, nodes, gate)


def _gate_of(reader: Reader, node: Node) -> tuple[Node, Node, Gate]:
    """(the GEMM, the view that shaped its output or the GEMM, the gate)."""
    product = reader.read(node)
    if reader.halves:
        return reader.halves[0].gemm, reader.halves[0].source, gate_form(product)
    gemm, gate = plain_form(product)
    return gemm, gemm, gate


def _replace(graph: Graph, match: _Match) -> None:
    args = arguments_of(match.gemm)
    parameters = match.gate.kwargs() | invariance_keywords(args["batch_invariant"])
    nodes = {name: value for name, value in args.items() if isinstance(value, Node)}

    def grouped(*tensors: Tensor) -> Tensor:
        given = dict(zip(nodes, tensors, strict=True))
        required = (given.pop(name) for name in ("x", "weight", "global_scale", "order", "offsets"))
        optional = optional_arguments(given.get("topk_weights"), given.get("bias"))
        return nvfp4.grouped_gemm_swiglu(*required, *optional, **parameters)

    def dense(x: Tensor, weight: Tensor, global_scale: Tensor, *bias: Tensor) -> Tensor:
        # One expert that owns every row: order is 0 .. rows - 1, offsets are 0 and rows.
        rows = x.reshape(-1, x.shape[-1])
        order = torch.arange(rows.shape[0], dtype=torch.int32, device=x.device)
        offsets = torch.arange(2, dtype=torch.int32, device=x.device) * rows.shape[0]
        biases = (None, *(b.to(torch.float32).unsqueeze(0) for b in bias)) if bias else ()
        out = nvfp4.grouped_gemm_swiglu(
            rows, weight.unsqueeze(0), global_scale.unsqueeze(0), order, offsets, *biases, **parameters
        )
        return out.reshape(*x.shape[:-1], out.shape[-1])

    # The fused op stands where the GEMM stood, so that it reads what the GEMM read.
    gemm = match.gemm
    with graph.inserting_before(gemm):
        fn = grouped if gemm.target is nvfp4.grouped_gemm.default else dense
        fused = insert(graph, fn, list(nodes.values()))
    if match.source is not gemm:
        with graph.inserting_before(match.root):
            fused = _view_like(graph, fused, match)
    match.root.replace_all_uses_with(fused)
    for node in reversed(list(graph.nodes)):
        if node in match.nodes:
            graph.erase_node(node)


def _view_like(graph: Graph, fused: Node, match: _Match) -> Node:
    """The fused output in the shape that the view before the split gave to the halves."""
    source, shape = match.source, value_of(match.root).shape
    sizes = arguments_of(source)
    leading = sizes["shape" if "shape" in sizes else "size"][: len(shape) - 1]
    last: Any = shape[-1]
    if isinstance(last, torch.SymInt):
        last = graph.call_function(aten.sym_size.int, (fused, 1))
        last.meta["val"] = value_of(fused).shape[1]
    view = graph.call_function(aten.view.default, (fused, [*leading, last]))
    view.meta["val"] = value_of(fused).view(shape)
    return view
