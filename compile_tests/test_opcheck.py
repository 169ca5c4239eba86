"""torch.library.opcheck of every overload of every op: schema, autograd registration, fake and kernel, AOT dispatch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from torch_nvfp4 import Activation
from torch_nvfp4.testing import random_routing, random_weight

UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

Sample = tuple[tuple[Any, ...], dict[str, Any]]

GATES: list[dict[str, Any]] = [
    {},
    {"activation": Activation.silu.value, "clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0},
    {"activation": Activation.swiglustep.value, "clamp_limit": 10.0},
    {"activation": Activation.gelu_tanh.value},
]
SITU = {"activation": Activation.situ.value, "alpha": 4.0, "beta": 25.0}
RELU2 = {"activation": Activation.relu2.value}


class Samples:
    """Sample arguments of each op on one device, a method an op."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)
        self.dtypes = [torch.bfloat16, torch.float16, *([torch.float32] if device == "cpu" else [])]

    def x(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def packed(self, *shape: int, gated: bool = False) -> tuple[Tensor, Tensor]:
        weight = random_weight(shape, gated=gated, generator=self.generator, device=self.device)
        return torch_nvfp4.pack(weight, gated=gated), weight.global_scale

    def bias(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def routing(self, m: int, e: int, top_k: int, ids_dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
        return random_routing(m, e, top_k, ids_dtype=ids_dtype, generator=self.generator, device=self.device)

    def expert_map(self, size: int, experts: int) -> Tensor:
        return torch.arange(-1, size - 1, dtype=torch.int32, device=self.device).clamp(max=experts)

    def moe(self) -> Iterator[Sample]:
        for m, gate, dtype in zip((2, 5, 1, 0), GATES, (*self.dtypes, *self.dtypes), strict=False):
            weights = (*self.packed(4, 64, 80, gated=True), *self.packed(4, 80, 32))
            yield (self.x(m, 80, dtype=dtype), *weights, *self.routing(m, 4, 2)), gate
        weights = (*self.packed(4, 64, 80, gated=True), *self.packed(4, 80, 32))
        routing = self.routing(3, 8, 4, torch.int32)
        on_input = {"apply_router_weight_on_input": True}
        yield (self.x(3, 80), *weights, *routing, self.expert_map(8, 4)), on_input
        yield (self.x(3, 80), *weights, *routing, None, self.bias(4, 64), self.bias(4, 80)), SITU
        yield (self.x(3, 80), *weights, *routing, self.expert_map(8, 4), None, self.bias(4, 80)), GATES[1]
        weights = (*self.packed(4, 32, 80), *self.packed(4, 80, 32))
        yield (self.x(3, 80), *weights, *routing), RELU2
        yield (self.x(3, 80), *weights, *routing, None, self.bias(4, 32)), RELU2 | on_input

    def batched_moe(self) -> Iterator[Sample]:
        weights = (*self.packed(3, 64, 80, gated=True), *self.packed(3, 80, 32))
        counts = torch.tensor([2, 0, 1], dtype=torch.int32, device=self.device)
        for t, gate, dtype in zip((2, 5, 3), GATES, (*self.dtypes, torch.bfloat16), strict=False):
            yield (self.x(3, t, 80, dtype=dtype), *weights, counts), gate
        yield (self.x(3, 0, 80), *weights, torch.zeros_like(counts)), GATES[-1]
        yield (self.x(3, 2, 80), *weights, counts, self.bias(3, 64), self.bias(3, 80)), GATES[1]
        weights = (*self.packed(3, 32, 80), *self.packed(3, 80, 32))
        yield (self.x(3, 2, 80), *weights, counts, None, self.bias(3, 80)), RELU2

    def route(self) -> Iterator[Sample]:
        for m in (0, 1, 6):
            yield (self.routing(m, 5, 3)[1], None, 5), {}
        yield (self.routing(4, 8, 2, torch.int32)[1], self.expert_map(8, 3), 3), {}

    def _routed(self, m: int, gated: bool, rows_per_token: int = 1) -> tuple[Any, ...]:
        topk_weights, ids = self.routing(m, 4, 3)
        order, offsets = torch_nvfp4.route(ids, None, 4)
        weight = self.packed(4, 96, 48, gated=gated)
        scale = topk_weights if rows_per_token == 1 else None
        return self.x(m * rows_per_token, 48), *weight, order, offsets, scale

    def grouped_gemm(self) -> Iterator[Sample]:
        yield self._routed(5, gated=False), {}
        yield self._routed(5, gated=True), {}
        yield self._routed(2, gated=False, rows_per_token=3), {}
        yield self._routed(0, gated=False), {}
        yield (*self._routed(5, gated=True), self.bias(4, 96)), {}

    def grouped_gemm_swiglu(self) -> Iterator[Sample]:
        for m, gate in zip((4, 1, 3, 0), GATES, strict=True):
            yield self._routed(m, gated=True), gate
        yield self._routed(2, gated=True, rows_per_token=3), {}
        yield (*self._routed(4, gated=True), self.bias(4, 96)), SITU
        yield self._routed(4, gated=False), RELU2
        yield (*self._routed(4, gated=False, rows_per_token=3), self.bias(4, 96)), {}

    def combine(self) -> Iterator[Sample]:
        for dtype in self.dtypes:
            yield (self.x(8, 20, dtype=dtype), *self.routing(4, 5, 2), None, 5), {}
        yield (self.x(6, 20), *self.routing(2, 8, 3, torch.int32), self.expert_map(8, 3), 3), {}

    def linear(self) -> Iterator[Sample]:
        for shape, dtype in zip(((80,), (3, 80), (2, 3, 80)), (*self.dtypes, torch.bfloat16), strict=False):
            yield (self.x(*shape, dtype=dtype), *self.packed(48, 80), None), {}
            yield (self.x(*shape, dtype=dtype), *self.packed(64, 80, gated=True), self.x(64, dtype=dtype)), {}

    def swiglu(self) -> Iterator[Sample]:
        for shape, gate in zip(((6,), (3, 20), (2, 3, 8), (0, 4)), GATES, strict=True):
            yield (self.x(*shape),), gate
        yield (self.x(3, 5),), RELU2 | {"gated": False}

    def moe_backward(self) -> Iterator[Sample]:
        wants = ({"needs_topk_weights": False}, {"needs_hidden_states": False}, {})
        for i, (args, kwargs) in enumerate(islice(self.moe(), 0, None, 3)):  # it checks what moe checks
            yield (torch.randn_like(args[0]), *args), kwargs | wants[i % 3]

    def _grouped_gemm_backward(self, samples: Iterator[Sample], with_gate: bool) -> Iterator[Sample]:
        for i, (args, kwargs) in enumerate(samples):
            x, weight, scale, order, offsets, topk_weights, *bias = args
            columns = 48 if with_gate and scale.dim() == 2 else 96
            kwargs = kwargs | {"needs_topk_weights": topk_weights is not None and i % 2 == 0, "needs_x": i != 2}
            grad = self.x(order.shape[0], columns, dtype=x.dtype)
            yield (grad, x, weight, scale, order, offsets, topk_weights, *(bias if with_gate else ())), kwargs

    def grouped_gemm_backward(self) -> Iterator[Sample]:
        yield from self._grouped_gemm_backward(self.grouped_gemm(), with_gate=False)

    def grouped_gemm_swiglu_backward(self) -> Iterator[Sample]:
        yield from self._grouped_gemm_backward(self.grouped_gemm_swiglu(), with_gate=True)

    def linear_backward(self) -> Iterator[Sample]:
        for shape, dtype in zip(((48,), (3, 48), (2, 3, 48)), (*self.dtypes, torch.bfloat16), strict=False):
            yield (self.x(*shape, dtype=dtype), *self.packed(48, 80), 80), {}
        yield (self.x(3, 64), *self.packed(64, 80, gated=True), 80), {}

    def swiglu_backward(self) -> Iterator[Sample]:
        for args, kwargs in self.swiglu():
            halves = 2 if kwargs.get("gated", True) else 1
            *lead, last = args[0].shape
            yield (self.x(*lead, last // halves), *args), kwargs

    def pack(self) -> Iterator[Sample]:
        for shape, gated in (((48, 80), False), ((64, 80), True), ((3, 48, 16), False), ((2, 32, 144), True)):
            weight = random_weight(shape, all_scales=True, generator=self.generator, device=self.device)
            # Block scales as bytes: opcheck compares values, and E4M3 has neither comparison nor addition.
            yield (weight.data, weight.scale.view(torch.uint8), gated), {}

    def has_fp8(self) -> bool:
        return self.device == "cuda" and torch.cuda.get_device_capability()[0] == 9

    def moe_fp8(self) -> Iterator[Sample]:
        if self.has_fp8():
            (p13, g13), (p2, g2) = self.packed(4, 64, 80, gated=True), self.packed(4, 80, 32)
            ordered = torch_nvfp4.order_for_fp8(p13, 80, gated=True), g13, torch_nvfp4.order_for_fp8(p2, 32), g2
            for m, dtype in zip((5, 0), self.dtypes, strict=True):
                yield (self.x(m, 80, dtype=dtype), *ordered, *self.routing(m, 4, 2)), {"clamp_limit": 7.0}
            routing = self.routing(3, 8, 4, torch.int32)
            on_input = {"apply_router_weight_on_input": True}
            yield (self.x(3, 80), *ordered, *routing, self.expert_map(8, 3)), on_input

    def order_for_fp8(self) -> Iterator[Sample]:
        if self.has_fp8():
            for shape, gated in (((3, 48, 16), False), ((2, 32, 144), True)):
                yield (self.packed(*shape, gated=gated)[0], shape[-1], gated), {}

    def unpack(self) -> Iterator[Sample]:
        for shape, gated in (((48, 80), False), ((64, 80), True), ((3, 48, 16), False), ((2, 32, 144), True)):
            yield (self.packed(*shape, gated=gated)[0], shape[-1], gated), {}


OPS = [name for name in vars(Samples) if name.removesuffix("_backward") in torch_nvfp4.__all__]
OUTS = ["moe", "batched_moe"]  # ops with an out overload; their result is as their first argument


def test_every_op_is_checked() -> None:
    registered = {
        (str(schema.name).removeprefix("nvfp4::"), str(schema.overload_name))
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("nvfp4::")
    }
    assert registered == {(op, "") for op in OPS} | {(op, "out") for op in OUTS} | {("no_gradient", "")}


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, device: str) -> None:
    for args, kwargs in getattr(Samples(device), op)():
        result = torch.library.opcheck(getattr(torch.ops.nvfp4, op).default, args, kwargs, test_utils=UTILS)
        assert result == dict.fromkeys(UTILS, "SUCCESS")


@pytest.mark.parametrize("op", OUTS)
def test_opcheck_of_out(op: str, device: str) -> None:
    for args, kwargs in getattr(Samples(device), op)():
        kwargs = {**kwargs, "out": torch.zeros_like(args[0])}
        result = torch.library.opcheck(getattr(torch.ops.nvfp4, op).out, args, kwargs, test_utils=UTILS)
        assert result == dict.fromkeys(UTILS, "SUCCESS")


@pytest.mark.parametrize(
    "op", ["moe", "batched_moe", "grouped_gemm", "grouped_gemm_swiglu", "combine", "linear", "swiglu"]
)
def test_opcheck_with_activations_that_require_grad(op: str, device: str) -> None:
    """AOT dispatch runs backward too, which batched_moe refuses."""
    utils = [name for name in UTILS if op != "batched_moe" or name != "test_aot_dispatch_dynamic"]
    for (x, *rest), kwargs in islice(getattr(Samples(device), op)(), 3):
        args = (x.requires_grad_(), *rest)
        result = torch.library.opcheck(getattr(torch.ops.nvfp4, op).default, args, kwargs, test_utils=utils)
        assert result == dict.fromkeys(utils, "SUCCESS")
