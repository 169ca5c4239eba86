"""Graph passes over the ops: fusing an eager clamp-SwiGLU gate into its GEMM, and decomposing ``moe``.

``inductor_options()`` switches them on in torch.compile and AOTInductor; ``fuse_gates`` and ``decompose_moe`` work on
any aten graph whose nodes carry ``meta["val"]`` (make_fx, torch.export, a backend of torch.compile).

The fusion reads the graph as an expression instead of comparing it with traced patterns: one rule then covers every
spelling of the halves, the clamps and the sigmoid, and whatever the rule does not know stays as it was.

Private torch APIs, all of them in this file, run with torch 2.11, 2.13 and 2.15 on the CPU, and what ``fuse_gates`` and
``decompose_moe`` use also with 2.11 on a GPU:

- ``torch._inductor.custom_graph_pass.CustomGraphPass`` and the Inductor option ``joint_custom_pre_pass``. The joint
  passes run for inference graphs too, before Inductor changes strides, and both compile caches key on ``uuid()``.
- ``torch._inductor.decomposition.select_decomp_table``: a replacement is traced with the decompositions that Inductor
  applied to the rest of the graph.
- ``OpOverload._schema``, to read arguments by name.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_nvfp4.gate import Activation, Gate
from torch_nvfp4.ops.moe import decomposed_moe

aten, prims, nvfp4 = torch.ops.aten, torch.ops.prims, torch.ops.nvfp4


def inductor_options(*, fuse_gates: bool = True, decompose_moe: bool = False) -> dict[str, Any]:
    """Options for ``torch.compile(model, options=...)`` and AOTInductor's ``inductor_configs=...``.

    Args:
        fuse_gates: an eager gate after ``grouped_gemm`` or ``linear`` becomes ``grouped_gemm_swiglu``, with the limit
            read from the graph (see ``fuse_gates``).
        decompose_moe: ``moe`` becomes its steps, with clamp and activation in aten for Inductor to compile. With
            ``fuse_gates`` the activation is then fused into the first GEMM again; pass ``fuse_gates=False`` to leave
            it to Inductor.

    The limit has to be a constant of the graph. ``torch.compile(dynamic=True)`` of torch 2.15 makes an input of every
    float that the model does not spell out, and the gate stays as it is: mark the token dimension with ``mark_dynamic``
    or ``mark_unbacked`` instead, or set ``torch._dynamo.config.specialize_float``.

    The pass counts what it did: ``inductor_options()["joint_custom_pre_pass"].fused`` and ``.decomposed``. Nothing is
    counted where a compiled graph comes out of a cache.
    """
    return {"joint_custom_pre_pass": GraphPass(fuse_gates=fuse_gates, decompose_moe=decompose_moe)}


class GraphPass(CustomGraphPass):
    """``decompose_moe``, then ``fuse_gates``, as an Inductor pass whose ``uuid`` keys the compile caches."""

    def __init__(self, *, fuse_gates: bool, decompose_moe: bool) -> None:
        self.fuse_gates, self.decompose_moe = fuse_gates, decompose_moe
        self.fused, self.decomposed = 0, 0

    def __call__(self, graph: Graph) -> None:
        if self.decompose_moe:
            self.decomposed += decompose_moe(graph)
        if self.fuse_gates:
            self.fused += fuse_gates(graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphPass:
        # AOTInductor copies its configuration; the counts are to be read from the original.
        return self

    def uuid(self) -> str:
        package = Path(__file__).resolve().parent
        digest = hashlib.sha256(f"{self.fuse_gates} {self.decompose_moe}".encode())
        for source in (Path(__file__).resolve(), package / "gate.py", package / "ops" / "moe.py"):
            digest.update(source.read_bytes())
        return digest.hexdigest()


def decompose_moe(graph: Graph) -> int:
    """Replaces every ``moe`` in the graph by its steps (``torch_nvfp4.decompositions()``); returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=nvfp4.moe.default):
        arguments = _arguments(node)
        nodes = {name: value for name, value in arguments.items() if isinstance(value, Node)}
        if any(not isinstance(value.meta["val"], Tensor) for value in nodes.values()):
            continue  # a limit that is only known at run time

        def steps(*tensors: Tensor, names: Sequence[str] = tuple(nodes), fixed: dict[str, Any] = arguments) -> Tensor:
            return decomposed_moe(**{**fixed, **dict(zip(names, tensors, strict=True))})

        with graph.inserting_before(node):
            node.replace_all_uses_with(_insert(graph, steps, list(nodes.values())))
        graph.erase_node(node)
        count += 1
    return count


def fuse_gates(graph: Graph) -> int:
    """Replaces each GEMM and the eager gate after it by ``grouped_gemm_swiglu``; returns how many there were.

    The GEMM is ``grouped_gemm``, or ``linear`` without bias, with a weight that was packed with gated=True. The gate is
    one of (g, u: the halves of the GEMM's output, by chunk, split, slice, unbind or select)

    - ``min(g, L) * sigmoid(alpha * min(g, L)) * (clamp(u, -L, L) + beta)``, of DeepSeek-V4, MiniMax-M3, gpt-oss
    - ``min(silu(g), L) * clamp(u, -L, L)``, of Step-3.5
    - either without its clamps, or with an infinite limit

    in any order of the factors, and with or without an upcast of the halves to fp32. The result has the GEMM's dtype.

    It stays as it is where the meaning would differ or the work would be done twice: limits that are unequal or only
    known at run time, gate and up swapped or interleaved, a GEMM output (or anything up to the result) that something
    else reads, a broadcast, a cast to a narrower dtype, halves that are written in place.
    """
    if not any(graph.find_nodes(op="call_function", target=target) for target in _GEMMS):
        return 0  # the usual graph is not worth reading
    count = 0
    # From the end, so that a product is tried before its factors.
    for node in reversed(list(graph.nodes)):
        if _packet(node) in (aten.mul, aten.div) and not node._erased:
            gate = _match(node)
            if gate is not None:
                _replace(graph, gate)
                count += 1
    return count


_GEMMS = (nvfp4.grouped_gemm.default, nvfp4.linear.default)


@dataclass(frozen=True)
class _Half:
    """A half of a GEMM's output; ``source`` is the view that gave it its shape, or the GEMM."""

    gemm: Node
    index: int
    source: Node = field(compare=False)


@dataclass(frozen=True)
class _Clamp:
    x: _Expression
    low: float | None
    high: float | None


@dataclass(frozen=True)
class _Sigmoid:
    x: _Expression


@dataclass(frozen=True)
class _Exp:
    x: _Expression


@dataclass(frozen=True)
class _Sum:
    x: _Expression
    constant: float


@dataclass(frozen=True)
class _Product:
    factors: tuple[_Expression, ...]
    scale: float


_Expression = _Half | _Clamp | _Sigmoid | _Exp | _Sum | _Product


@dataclass
class _Match:
    root: Node
    half: _Half
    nodes: set[Node]
    gate: Gate


class _NoMatchError(Exception):
    pass


def _match(node: Node) -> _Match | None:
    reader = _Reader()
    try:
        gate = _gate_form(reader.read(node))
        half = reader.halves[0]
        like = _val(half.gemm)
        root = node
        if _val(node).dtype != like.dtype and len(node.users) == 1:
            root = next(iter(node.users))
            if _packet(root) not in _CASTS:
                return None
            reader.read(root)
        shaped = [_val(n) for n in (*reader.half_nodes, *reader.pointwise)]
        values = [*shaped, *(_val(n) for n in reader.upcasts)]
        result = _val(root)
    except _NoMatchError:
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
    if not all(_same_shape(value.shape, shaped[0].shape) for value in shaped):
        return None
    nodes = {*reader.half_nodes, *reader.pointwise, *reader.upcasts, *reader.plumbing}
    if any(user not in nodes for n in nodes - {root} for user in n.users):
        return None
    return _Match(root, half, nodes, gate)


def _gate_form(product: _Expression) -> Gate:
    """The gate that a product is."""
    if not isinstance(product, _Product) or product.scale != 1.0 or len(product.factors) not in (2, 3):
        raise _NoMatchError
    for i, factor in enumerate(product.factors):
        try:
            up_limit, beta = _up_form(factor)
            activation, gate_limit, alpha = _activated_form(product.factors[:i] + product.factors[i + 1 :])
        except _NoMatchError:
            continue
        # swiglustep has no beta; without a clamp it is silu.
        if gate_limit == up_limit and not (activation is Activation.swiglustep and beta != 0.0):
            try:
                return Gate(activation, gate_limit, alpha, beta)
            except ValueError:
                raise _NoMatchError from None
    raise _NoMatchError


def _up_form(factor: _Expression) -> tuple[float | None, float]:
    """(limit, beta) of ``clamp(u, -limit, limit) + beta``."""
    limit, beta = None, 0.0
    if isinstance(factor, _Sum):
        beta = factor.constant
        factor = factor.x
    if isinstance(factor, _Clamp):
        if factor.low is None or factor.high is None or factor.low != -factor.high:
            raise _NoMatchError
        limit = factor.high
        factor = factor.x
    if not isinstance(factor, _Half) or factor.index != 1:
        raise _NoMatchError
    return limit, beta


def _activated_form(factors: Sequence[_Expression]) -> tuple[Activation, float | None, float]:
    """(activation, limit, alpha) of ``g * sigmoid(alpha * g)`` with the clamp inside, or outside for swiglustep."""
    if len(factors) == 1:
        outer = factors[0]
        if not isinstance(outer, _Clamp) or outer.low is not None or not isinstance(outer.x, _Product):
            raise _NoMatchError
        _, limit, alpha = _activated_form(outer.x.factors)
        if outer.x.scale != 1.0 or limit is not None or alpha != 1.0:
            raise _NoMatchError
        return Activation.swiglustep, outer.high, alpha
    for gate, sigmoid in (factors, factors[::-1]):
        if not isinstance(sigmoid, _Sigmoid):
            continue
        if sigmoid.x == gate:
            alpha = 1.0
        elif isinstance(sigmoid.x, _Product) and sigmoid.x.factors == (gate,):
            alpha = sigmoid.x.scale
        else:
            continue
        limit = None
        if isinstance(gate, _Clamp) and gate.low is None:
            limit = gate.high
            gate = gate.x
        if isinstance(gate, _Half) and gate.index == 0:
            return Activation.silu, limit, alpha
    raise _NoMatchError


class _Reader:
    """Reads nodes back to the halves of one GEMM's output, and remembers which nodes it passed."""

    def __init__(self) -> None:
        self.halves: list[_Half] = []
        self.half_nodes: list[Node] = []
        self.pointwise: set[Node] = set()  # elementwise on a half: all of the halves' shape
        self.upcasts: set[Node] = set()  # before the split
        self.plumbing: set[Node] = set()  # the GEMM, its views and splits
        self._read: dict[Node, _Expression] = {}

    def read(self, node: object) -> _Expression:
        if not isinstance(node, Node) or node.op != "call_function" or "val" not in node.meta:
            raise _NoMatchError
        if node not in self._read:
            self._read[node] = self._expression(node)
        return self._read[node]

    def _expression(self, node: Node) -> _Expression:
        packet = _packet(node)
        if packet in (aten.slice, aten.select) or node.target is operator.getitem:
            return self._half(node)
        args = _arguments(node)
        self.pointwise.add(node)
        if packet in _CASTS:
            return self.read(node.args[0])
        if packet in (aten.clone, aten.alias, aten.detach):
            return self.read(args["self"])
        if packet in (aten.clamp, aten.clamp_min, aten.clamp_max):
            return self._clamp(args["self"], _bound(args.get("min")), _bound(args.get("max")))
        if packet in (aten.minimum, aten.maximum):
            x, bound = _constant_last(args["self"], args["other"])
            return self._clamp(x, None, bound) if packet is aten.minimum else self._clamp(x, bound, None)
        if packet is aten.sigmoid:
            return _Sigmoid(self.read(args["self"]))
        if packet is aten.silu:
            x = self.read(args["self"])
            return _product((x, _Sigmoid(x)))
        if packet is aten.neg:
            return _product((self.read(args["self"]),), -1.0)
        if packet is aten.exp:
            return _Exp(self.read(args["self"]))
        if packet is aten.reciprocal:
            return self._inverse(args["self"])
        if packet is aten.add:
            x, constant = _constant_last(args["self"], args["other"])
            if args["alpha"] != 1:
                raise _NoMatchError
            return _Sum(self.read(x), constant)
        if packet is aten.mul:
            return self._mul(args["self"], args["other"])
        if packet is aten.div and args.get("rounding_mode") is None:
            if _constant(args["self"]) == 1.0:
                return self._inverse(args["other"])
            divisor = _constant(args["other"])
            if divisor is None:
                return _product((self.read(args["self"]), self._inverse(args["other"])))
            if divisor != 0.0:
                return _product((self.read(args["self"]),), 1.0 / divisor)
        raise _NoMatchError

    def _mul(self, a: object, b: object) -> _Expression:
        if _constant(a) is None and _constant(b) is None:
            return _product((self.read(a), self.read(b)))
        x, scale = _constant_last(a, b)
        return _product((self.read(x),), scale)

    def _inverse(self, node: object) -> _Expression:
        """``1 / (1 + exp(x))``, which is ``sigmoid(-x)``: what Inductor makes of silu."""
        x = self.read(node)
        if isinstance(x, _Sum) and x.constant == 1.0 and isinstance(x.x, _Exp):
            return _Sigmoid(_product((x.x.x,), -1.0))
        raise _NoMatchError

    def _clamp(self, node: object, low: float | None, high: float | None) -> _Expression:
        x = self.read(node)
        # Step-3.7's layers without a limit clamp at infinity.
        low = None if low == -math.inf else low
        high = None if high == math.inf else high
        if low is None and high is None:
            return x
        if isinstance(x, _Clamp):
            low = x.low if low is None else low if x.low is None else max(low, x.low)
            high = x.high if high is None else high if x.high is None else min(high, x.high)
            x = x.x
        # Crossed bounds would make the order of two clamps matter.
        if low is not None and high is not None and not low <= high:
            raise _NoMatchError
        return _Clamp(x, low, high)

    def _half(self, node: Node) -> _Half:
        if node.target is operator.getitem:
            split, index = node.args
            if not isinstance(split, Node) or not isinstance(index, int):
                raise _NoMatchError
            packet = _packet(split)
            if packet not in _SPLITS or len(split.meta.get("val", ())) != 2:
                raise _NoMatchError
            args = _arguments(split)
            self.plumbing.add(split)
            index %= 2
            stacked = packet is aten.unbind
        else:
            args = _arguments(node)
            stacked = _packet(node) is aten.select
            index = args["index"] if stacked else -1
        gemm, source = self._gemm_of(args["self"])
        shape, half, width = _val(source).shape, _val(node).shape, _val(gemm).shape[-1]
        if not _equal(2 * half[-1], width):
            raise _NoMatchError
        dim = args["dim"] % len(shape)
        if stacked:
            # [..., 2, I]: the gate's columns, then the up columns.
            if len(shape) < 2 or dim != len(shape) - 2 or not _equal(shape[-2], 2) or not _equal(shape[-1], half[-1]):
                raise _NoMatchError
        elif dim != len(shape) - 1 or not _equal(shape[-1], width):
            raise _NoMatchError
        if _packet(node) is aten.slice:
            start = args["start"].meta["val"] if isinstance(args["start"], Node) else args["start"] or 0
            if args["step"] != 1:
                raise _NoMatchError
            index = 0 if _equal(start, 0) else 1 if _equal(start, half[-1]) or _equal(start, -half[-1]) else -1
        if index not in (0, 1):
            raise _NoMatchError
        result = _Half(gemm, index, source)
        self.halves.append(result)
        self.half_nodes.append(node)
        return result

    def _gemm_of(self, node: object) -> tuple[Node, Node]:
        """The gated GEMM that a node is the output of, and the last view of that output on the way (or the GEMM)."""
        source: Node | None = None
        while isinstance(node, Node) and node.target not in _GEMMS:
            if _packet(node) in _VIEWS:
                source = source or node
                self.plumbing.add(node)
            elif _packet(node) in _CASTS:
                self.upcasts.add(node)
            else:
                raise _NoMatchError
            node = node.args[0]
        if not isinstance(node, Node):
            raise _NoMatchError
        args = _arguments(node)
        batched = node.target is nvfp4.grouped_gemm.default
        if _val(args["global_scale"]).dim() != (2 if batched else 1) or args.get("bias") is not None:
            raise _NoMatchError
        if any(half.gemm is not node for half in self.halves):
            raise _NoMatchError
        self.plumbing.add(node)
        return node, source or node


_CASTS = (prims.convert_element_type, aten._to_copy, aten.to)
_VIEWS = (aten.view, aten._unsafe_view, aten.reshape)
_SPLITS = (aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unbind)
_FULLS = (aten.full, aten.full_like, aten.new_full, aten.scalar_tensor)


def _product(factors: Sequence[_Expression], scale: float = 1.0) -> _Expression:
    flat: list[_Expression] = []
    for factor in factors:
        if isinstance(factor, _Product):
            flat.extend(factor.factors)
            scale *= factor.scale
        else:
            flat.append(factor)
    return flat[0] if len(flat) == 1 and scale == 1.0 else _Product(tuple(flat), scale)


def _packet(node: Node) -> Any:
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else None


def _arguments(node: Node) -> dict[str, Any]:
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


def _val(node: object) -> Tensor:
    val = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(val, Tensor):
        raise _NoMatchError
    return val


def _constant(value: object) -> float | None:
    """The number that an argument is, or the one value of a tensor that it is filled with."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Node) and _packet(value) in _FULLS:
        args = _arguments(value)
        fill = args["fill_value"] if "fill_value" in args else args["s"]
        if isinstance(fill, (int, float)) and not isinstance(fill, bool):
            return float(torch.tensor(fill, dtype=_val(value).dtype))
    return None


def _constant_last(a: object, b: object) -> tuple[object, float]:
    for x, other in ((a, b), (b, a)):
        constant = _constant(other)
        if constant is not None:
            return x, constant
    raise _NoMatchError


def _bound(value: object) -> float | None:
    if value is None:
        return None
    constant = _constant(value)
    if constant is None:
        raise _NoMatchError
    return constant


def _equal(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(_equal, a, b))


def _insert(graph: Graph, fn: Callable[..., Tensor], args: Sequence[Node]) -> Node:
    """Traces ``fn`` on the nodes' values and copies what it does to the graph's insertion point."""
    values = [_val(arg) for arg in args]
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


def _replace(graph: Graph, match: _Match) -> None:
    args = _arguments(match.half.gemm)
    parameters = match.gate.kwargs()

    def grouped(*tensors: Tensor) -> Tensor:
        return nvfp4.grouped_gemm_swiglu(*tensors, **parameters)

    def dense(x: Tensor, weight: Tensor, global_scale: Tensor) -> Tensor:
        # One expert that owns every row: order is 0 .. rows - 1, offsets are 0 and rows.
        rows = x.reshape(-1, x.shape[-1])
        order = torch.arange(rows.shape[0], dtype=torch.int32, device=x.device)
        offsets = torch.arange(2, dtype=torch.int32, device=x.device) * rows.shape[0]
        out = nvfp4.grouped_gemm_swiglu(
            rows, weight.unsqueeze(0), global_scale.unsqueeze(0), order, offsets, **parameters
        )
        return out.reshape(*x.shape[:-1], out.shape[-1])

    # The fused op stands where the GEMM stood, so that it reads what the GEMM read.
    gemm = match.half.gemm
    with graph.inserting_before(gemm):
        fn = grouped if gemm.target is nvfp4.grouped_gemm.default else dense
        fused = _insert(graph, fn, [value for value in args.values() if isinstance(value, Node)])
    if match.half.source is not gemm:
        with graph.inserting_before(match.root):
            fused = _view_like(graph, fused, match)
    match.root.replace_all_uses_with(fused)
    for node in reversed(list(graph.nodes)):
        if node in match.nodes:
            graph.erase_node(node)


def _view_like(graph: Graph, fused: Node, match: _Match) -> Node:
    """The fused output in the shape that the view before the split gave to the halves."""
    source, shape = match.half.source, _val(match.root).shape
    sizes = _arguments(source)
    leading = sizes["shape" if "shape" in sizes else "size"][: len(shape) - 1]
    last: Any = shape[-1]
    if isinstance(last, torch.SymInt):
        last = graph.call_function(aten.sym_size.int, (fused, 1))
        last.meta["val"] = _val(fused).shape[1]
    view = graph.call_function(aten.view.default, (fused, [*leading, last]))
    view.meta["val"] = _val(fused).view(shape)
    return view
