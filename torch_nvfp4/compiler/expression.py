"""Graphs read as expressions: the clamp-SwiGLU gate that a product is, whatever it is spelled with.

``Reader`` turns nodes into ``Expression`` values, whose leaves are the two halves of one GEMM's output, or, of a weight
without gate rows, all of it; ``gate_form`` and ``plain_form`` say which ``Gate`` an expression is. One rule then covers
every spelling of the halves, the clamps and the sigmoid, and whatever the rule does not know raises ``NoMatchError``
and stays as it was.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from torch_nvfp4.compiler.graph import (
    NoMatchError,
    arguments_of,
    bound_of,
    constant_last,
    constant_of,
    equal,
    packet_of,
    value_of,
)
from torch_nvfp4.gate import Activation, Gate

aten, prims, nvfp4 = torch.ops.aten, torch.ops.prims, torch.ops.nvfp4

GEMMS = (nvfp4.grouped_gemm.default, nvfp4.linear.default)
CASTS = (prims.convert_element_type, aten._to_copy, aten.to)
_VIEWS = (aten.view, aten._unsafe_view, aten.reshape)
_SPLITS = (aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unbind)


@dataclass(frozen=True)
class Half:
    """A half of a GEMM's output, 0 for the gate and 1 for up; ``source`` is the view that shaped it, or the GEMM."""

    gemm: Node
    index: int
    source: Node = field(compare=False)


@dataclass(frozen=True)
class Whole:
    """The output of a ``grouped_gemm`` whose weight has no gate rows."""

    gemm: Node


@dataclass(frozen=True)
class Clamp:
    """``clamp(x, low, high)``; None is no bound on that side."""

    x: Expression
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Sigmoid:
    """``1 / (1 + exp(-x))``."""

    x: Expression


@dataclass(frozen=True)
class Exp:
    """``exp(x)``, a part of a sigmoid that was written out."""

    x: Expression


@dataclass(frozen=True)
class Sum:
    """``x + constant``."""

    x: Expression
    constant: float


@dataclass(frozen=True)
class Product:
    """``scale`` times all of ``factors``, none of which is a product."""

    factors: tuple[Expression, ...]
    scale: float


@dataclass(frozen=True)
class Unless:
    """``where(share == 0, 0, x)``, which times ``share`` is 0 for an infinite x too, as in the ops."""

    x: Expression
    share: Expression


Expression = Half | Whole | Clamp | Sigmoid | Exp | Sum | Product | Unless


class Reader:
    """Reads nodes back to the halves of one GEMM's output, and remembers which nodes it passed."""

    def __init__(self) -> None:
        self.halves: list[Half] = []
        self.half_nodes: list[Node] = []
        self.pointwise: set[Node] = set()  # elementwise on a half: all of the halves' shape
        self.upcasts: set[Node] = set()  # before the split
        self.plumbing: set[Node] = set()  # the GEMM, its views and splits
        self._read: dict[Node, Expression] = {}

    def read(self, node: object) -> Expression:
        """The expression that a node is; NoMatchError for anything that the gate of a GEMM cannot hold."""
        if not isinstance(node, Node) or node.op != "call_function" or "val" not in node.meta:
            raise NoMatchError
        if node not in self._read:
            self._read[node] = self._expression(node)
        return self._read[node]

    def _expression(self, node: Node) -> Expression:
        packet = packet_of(node)
        if node.target is nvfp4.grouped_gemm.default:
            return self._whole(node)
        if packet in (aten.slice, aten.select) or node.target is operator.getitem:
            return self._half(node)
        args = arguments_of(node)
        self.pointwise.add(node)
        if packet in CASTS:
            return self.read(node.args[0])
        if packet in (aten.clone, aten.alias, aten.detach):
            return self.read(args["self"])
        if packet in (aten.clamp, aten.clamp_min, aten.clamp_max):
            return self._clamp(args["self"], bound_of(args.get("min")), bound_of(args.get("max")))
        if packet in (aten.minimum, aten.maximum):
            x, bound = constant_last(args["self"], args["other"])
            return self._clamp(x, None, bound) if packet is aten.minimum else self._clamp(x, bound, None)
        if packet is aten.relu:
            return self._clamp(args["self"], 0.0, None)
        if packet is aten.pow and constant_of(args["exponent"]) == 2.0:
            x = self.read(args["self"])
            return _product((x, x))
        if packet is aten.sigmoid:
            return Sigmoid(self.read(args["self"]))
        if packet is aten.silu:
            x = self.read(args["self"])
            return _product((x, Sigmoid(x)))
        if packet is aten.neg:
            return _product((self.read(args["self"]),), -1.0)
        if packet is aten.exp:
            return Exp(self.read(args["self"]))
        if packet is aten.where:
            return self._unless(args["condition"], args["self"], args["other"])
        if packet is aten.reciprocal:
            return self._inverse(args["self"])
        if packet is aten.add:
            x, constant = constant_last(args["self"], args["other"])
            if args["alpha"] != 1:
                raise NoMatchError
            return Sum(self.read(x), constant)
        if packet is aten.mul:
            return self._mul(args["self"], args["other"])
        if packet is aten.div and args.get("rounding_mode") is None:
            if constant_of(args["self"]) == 1.0:
                return self._inverse(args["other"])
            divisor = constant_of(args["other"])
            if divisor is None:
                return _product((self.read(args["self"]), self._inverse(args["other"])))
            if divisor != 0.0:
                return _product((self.read(args["self"]),), 1.0 / divisor)
        raise NoMatchError

    def _mul(self, a: object, b: object) -> Expression:
        if constant_of(a) is None and constant_of(b) is None:
            return _product((self.read(a), self.read(b)))
        x, scale = constant_last(a, b)
        return _product((self.read(x),), scale)

    def _unless(self, condition: object, a: object, b: object) -> Expression:
        if not isinstance(condition, Node) or packet_of(condition) is not aten.eq or constant_of(a) != 0.0:
            raise NoMatchError
        compared = arguments_of(condition)
        share, zero = constant_last(compared["self"], compared["other"])
        if zero != 0.0:
            raise NoMatchError
        self.plumbing.add(condition)
        return Unless(self.read(b), self.read(share))

    def _inverse(self, node: object) -> Expression:
        """``1 / (1 + exp(x))``, which is ``sigmoid(-x)``: what Inductor makes of silu."""
        x = self.read(node)
        if isinstance(x, Sum) and x.constant == 1.0 and isinstance(x.x, Exp):
            return Sigmoid(_product((x.x.x,), -1.0))
        raise NoMatchError

    def _clamp(self, node: object, low: float | None, high: float | None) -> Expression:
        x = self.read(node)
        # Step-3.7's layers without a limit clamp at infinity.
        low = None if low == -math.inf else low
        high = None if high == math.inf else high
        if low is None and high is None:
            return x
        if isinstance(x, Clamp):
            low = x.low if low is None else low if x.low is None else max(low, x.low)
            high = x.high if high is None else high if x.high is None else min(high, x.high)
            x = x.x
        # Crossed bounds would make the order of two clamps matter.
        if low is not None and high is not None and not low <= high:
            raise NoMatchError
        return Clamp(x, low, high)

    def _whole(self, node: Node) -> Whole:
        if value_of(arguments_of(node)["global_scale"]).dim() != 1:
            raise NoMatchError
        self.plumbing.add(node)
        return Whole(node)

    def _half(self, node: Node) -> Half:
        if node.target is operator.getitem:
            split, index = node.args
            if not isinstance(split, Node) or not isinstance(index, int):
                raise NoMatchError
            packet = packet_of(split)
            if packet not in _SPLITS or len(split.meta.get("val", ())) != 2:
                raise NoMatchError
            args = arguments_of(split)
            self.plumbing.add(split)
            index %= 2
            stacked = packet is aten.unbind
        else:
            args = arguments_of(node)
            stacked = packet_of(node) is aten.select
            index = args["index"] if stacked else -1
        gemm, source = self._gemm_of(args["self"])
        shape, half, width = value_of(source).shape, value_of(node).shape, value_of(gemm).shape[-1]
        if not equal(2 * half[-1], width):
            raise NoMatchError
        dim = args["dim"] % len(shape)
        if stacked:
            # [..., 2, I]: the gate's columns, then the up columns.
            if len(shape) < 2 or dim != len(shape) - 2 or not equal(shape[-2], 2) or not equal(shape[-1], half[-1]):
                raise NoMatchError
        elif dim != len(shape) - 1 or not equal(shape[-1], width):
            raise NoMatchError
        if packet_of(node) is aten.slice:
            start = args["start"].meta["val"] if isinstance(args["start"], Node) else args["start"] or 0
            if args["step"] != 1:
                raise NoMatchError
            index = 0 if equal(start, 0) else 1 if equal(start, half[-1]) or equal(start, -half[-1]) else -1
        if index not in (0, 1):
            raise NoMatchError
        result = Half(gemm, index, source)
        self.halves.append(result)
        self.half_nodes.append(node)
        return result

    def _gemm_of(self, node: object) -> tuple[Node, Node]:
        """The gated GEMM that a node is the output of, and the last view of that output on the way (or the GEMM)."""
        source: Node | None = None
        while isinstance(node, Node) and node.target not in GEMMS:
            if packet_of(node) in _VIEWS:
                source = source or node
                self.plumbing.add(node)
            elif packet_of(node) in CASTS:
                self.upcasts.add(node)
            else:
                raise NoMatchError
            node = node.args[0]
        if not isinstance(node, Node):
            raise NoMatchError
        args = arguments_of(node)
        batched = node.target is nvfp4.grouped_gemm.default
        if value_of(args["global_scale"]).dim() != (2 if batched else 1):
            raise NoMatchError
        if any(half.gemm is not node for half in self.halves):
            raise NoMatchError
        self.plumbing.add(node)
        return node, source or node


def _product(factors: Sequence[Expression], scale: float = 1.0) -> Expression:
    flat: list[Expression] = []
    for factor in factors:
        if isinstance(factor, Product):
            flat.extend(factor.factors)
            scale *= factor.scale
        else:
            flat.append(factor)
    return flat[0] if len(flat) == 1 and scale == 1.0 else Product(tuple(flat), scale)


def gate_form(product: Expression) -> Gate:
    """The gate that a product is."""
    if not isinstance(product, Product) or product.scale != 1.0 or len(product.factors) not in (2, 3):
        raise NoMatchError
    for i, factor in enumerate(product.factors):
        try:
            up_limit, beta = _up_form(factor)
            activation, gate_limit, alpha = _activated_form(product.factors[:i] + product.factors[i + 1 :])
        except NoMatchError:
            continue
        # swiglustep has no beta; without a clamp it is silu.
        if gate_limit == up_limit and not (activation is Activation.swiglustep and beta != 0.0):
            try:
                return Gate(activation, gate_limit, alpha, beta)
            except ValueError:
                raise NoMatchError from None
    raise NoMatchError


def plain_form(product: Expression) -> tuple[Node, Gate]:
    """(the GEMM, the activation without a gate that a product is of its output): silu or relu2."""
    if isinstance(product, Product) and product.scale == 1.0 and len(product.factors) == 2:
        for x, other in (product.factors, product.factors[::-1]):
            x = _times(x, other)
            if isinstance(x, Whole) and other == Sigmoid(x):
                return x.gemm, Gate(Activation.silu, gated=False)
            if isinstance(x, Clamp) and isinstance(x.x, Whole) and x == other == Clamp(x.x, 0.0, None):
                return x.x.gemm, Gate(Activation.relu2, gated=False)
    raise NoMatchError


def _times(x: Expression, share: Expression) -> Expression:
    """What x is as a factor beside ``share``."""
    return x.x if isinstance(x, Unless) and x.share == share else x


def _up_form(factor: Expression) -> tuple[float | None, float]:
    """(limit, beta) of ``clamp(u, -limit, limit) + beta``."""
    limit, beta = None, 0.0
    if isinstance(factor, Sum):
        beta = factor.constant
        factor = factor.x
    if isinstance(factor, Clamp):
        if factor.low is None or factor.high is None or factor.low != -factor.high:
            raise NoMatchError
        limit = factor.high
        factor = factor.x
    if not isinstance(factor, Half) or factor.index != 1:
        raise NoMatchError
    return limit, beta


def _activated_form(factors: Sequence[Expression]) -> tuple[Activation, float | None, float]:
    """(activation, limit, alpha) of ``g * sigmoid(alpha * g)`` with the clamp inside, or outside for swiglustep."""
    if len(factors) == 1:
        outer = factors[0]
        if not isinstance(outer, Clamp) or outer.low is not None or not isinstance(outer.x, Product):
            raise NoMatchError
        _, limit, alpha = _activated_form(outer.x.factors)
        if outer.x.scale != 1.0 or limit is not None or alpha != 1.0:
            raise NoMatchError
        return Activation.swiglustep, outer.high, alpha
    for gate, sigmoid in (factors, factors[::-1]):
        if not isinstance(sigmoid, Sigmoid):
            continue
        gate = _times(gate, sigmoid)
        if sigmoid.x == gate:
            alpha = 1.0
        elif isinstance(sigmoid.x, Product) and sigmoid.x.factors == (gate,):
            alpha = sigmoid.x.scale
        else:
            continue
        limit = None
        if isinstance(gate, Clamp) and gate.low is None:
            limit = gate.high
            gate = gate.x
        if isinstance(gate, Half) and gate.index == 0:
            return Activation.silu, limit, alpha
    raise NoMatchError
