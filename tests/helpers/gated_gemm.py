"""Gated GEMMs with their arguments packed, and what they give when the gate is fused into them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torch_nvfp4
from torch_nvfp4.testing import random_routing, random_weight

E, K, TOKENS, TOP_K = 4, 64, 10, 2
I = 32  # noqa: E741  (the intermediate size, as everywhere)


class Layer(NamedTuple):
    """A GEMM's arguments, and the weight that they hold."""

    op: Any
    args: tuple[Tensor, ...]
    weight: torch_nvfp4.NVFP4Weight

    def fused(self, **gate: Any) -> Tensor:
        if self.op is torch.ops.nvfp4.grouped_gemm:
            return torch_nvfp4.grouped_gemm_swiglu(*self.args, **gate)
        x, packed, scale = self.args
        rows = x.reshape(-1, K)
        order = torch.arange(len(rows), dtype=torch.int32, device=x.device)
        offsets = torch.tensor([0, len(rows)], dtype=torch.int32, device=x.device)
        out = torch_nvfp4.grouped_gemm_swiglu(rows, packed[None], scale[None], order, offsets, **gate)
        return out.reshape(*x.shape[:-1], I)

    def reference(self, **gate: Any) -> Tensor:
        if self.op is torch.ops.nvfp4.grouped_gemm:
            x, _, _, *routing = self.args
            return torch_nvfp4.reference.grouped_gemm_swiglu(x, self.weight, *routing, **gate)
        return torch_nvfp4.reference.swiglu(torch_nvfp4.reference.linear(self.args[0], self.weight), **gate)


@cache
def grouped_layer(
    dtype: torch.dtype = torch.bfloat16, *, device: str = "cpu", router_weights: bool = False, scale: float = 20.0
) -> Layer:
    """Routed experts; ``scale`` is the standard deviation of the activations; pre-activations have about twice that."""
    generator = torch.Generator().manual_seed(0)
    weight = random_weight((E, 2 * I, K), gated=True, generator=generator, device=device)
    x = (torch.randn(TOKENS, K, generator=generator) * scale).to(device, dtype)
    topk_weights, topk_ids = random_routing(TOKENS, E, TOP_K, generator=generator, device=device)
    routing = torch_nvfp4.route(topk_ids, None, E)
    extra = (topk_weights,) if router_weights else ()
    packed = torch_nvfp4.pack(weight, gated=True)
    return Layer(torch.ops.nvfp4.grouped_gemm, (x, packed, weight.global_scale, *routing, *extra), weight)


@cache
def linear_layer(
    dtype: torch.dtype = torch.bfloat16, *, device: str = "cpu", shape: tuple[int, ...] = (3, 5), scale: float = 20.0
) -> Layer:
    """The same as one dense layer, with activations of shape [*shape, K]."""
    generator = torch.Generator().manual_seed(1)
    weight = random_weight((2 * I, K), gated=True, generator=generator, device=device)
    x = (torch.randn(*shape, K, generator=generator) * scale).to(device, dtype)
    return Layer(torch.ops.nvfp4.linear, (x, torch_nvfp4.pack(weight, gated=True), weight.global_scale), weight)
