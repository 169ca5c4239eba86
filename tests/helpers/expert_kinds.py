"""Experts with and without a gate and biases, and what they compute, written out expert by expert in fp64.

Independent of ``torch_nvfp4.reference`` but for the decoding of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torch_nvfp4
from helpers.layers import GATES, activations, preactivation_scale, seeded, to
from torch_nvfp4 import NVFP4Weight, dequantize
from torch_nvfp4.testing import random_weight


class Kind(NamedTuple):
    """What experts are like."""

    gate: dict[str, Any]
    gated: bool
    biased: bool


KINDS = {
    **{f"{name} with biases": Kind(gate, True, True) for name, gate in GATES.items()},
    **{
        name + (" without a gate, with biases" if biased else " without a gate"): Kind(
            {"activation": name}, False, biased
        )
        for name in ("silu", "gelu", "gelu_tanh", "relu2")
        for biased in (False, True)
    },
}


class Experts(NamedTuple):
    """The weights of a layer, on the CPU; biases are None where there are none."""

    w13: NVFP4Weight  # [E, 2I, K], or [E, I, K]
    w2: NVFP4Weight  # [E, K, I]
    w13_bias: Tensor | None
    w2_bias: Tensor | None
    kind: Kind

    def weights(self, device: str) -> tuple[Tensor, ...]:
        """The weight arguments of ``moe``."""
        w13, w2 = (NVFP4Weight(*to(device, *weight)) for weight in (self.w13, self.w2))
        packed = torch_nvfp4.pack(w13, gated=self.kind.gated), torch_nvfp4.pack(w2)
        return packed[0], w13.global_scale, packed[1], w2.global_scale

    def biases(self, device: str) -> dict[str, Tensor]:
        """The bias arguments of ``moe``."""
        named = {"w13_bias": self.w13_bias, "w2_bias": self.w2_bias}
        return {name: bias.to(device) for name, bias in named.items() if bias is not None}


def make_experts(kind: Kind, e: int, k: int, i: int, *, seed: int) -> Experts:
    generator = seeded(seed)
    rows = 2 * i if kind.gated else i
    w13 = random_weight((e, rows, k), gated=kind.gated, generator=generator)
    w2 = random_weight((e, k, i), generator=generator)
    if not kind.biased:
        return Experts(w13, w2, None, None, kind)
    # As large as what they are added to: `hidden_of` makes pre-activations of deviation 2.
    w13_bias = torch.randn(e, rows, generator=generator) * 2
    size = float(dequantize(w2).square().sum(-1).mean().sqrt())
    return Experts(w13, w2, w13_bias, torch.randn(e, k, generator=generator) * 2 * size, kind)


def hidden_of(experts: Experts, *shape: int, seed: int) -> Tensor:
    """Activations [..., K] in fp64, whose pre-activations have a deviation of 2."""
    return activations(*shape, experts.w13.data.shape[-1] * 2, seed=seed, scale=preactivation_scale(experts.w13, 2.0))


def _act(x: Tensor, name: str) -> Tensor:
    if name == "relu2":
        return torch.where(x > 0, x * x, 0.0)
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1 + torch.exp(-x))


def activated(z: Tensor, kind: Kind) -> Tensor:
    """The intermediate of pre-activations z in fp64."""
    name, limit = kind.gate["activation"], kind.gate.get("clamp_limit", math.inf)
    alpha, beta = kind.gate.get("alpha", 1.0), kind.gate.get("beta", 0.0)
    if not kind.gated:
        return _act(z, name)
    g, u = z[..., : z.shape[-1] // 2], z[..., z.shape[-1] // 2 :]
    if name == "situ":
        return alpha * torch.tanh(g / alpha) / (1 + torch.exp(-g)) * (beta * torch.tanh(u / beta) if beta else u)
    u = u.clamp(-limit, limit)
    if name == "swiglustep":
        return _act(g, "silu").clamp(max=limit) * u
    if name == "silu":
        g = g.clamp(max=limit)
        return g / (1 + torch.exp(-alpha * g)) * (u + beta)
    return _act(g, name) * u


def expert_mlp(experts: Experts, e: int) -> Callable[..., Tensor]:
    """``f(x, scale)``: expert e of rows x in fp64, whose products with w13 are scaled."""
    w13, w2 = (dequantize(NVFP4Weight(w.data[e], w.scale[e], w.global_scale[e]), torch.float64) for w in experts[:2])

    def mlp(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        z = x @ w13.T * scale
        if experts.w13_bias is not None:
            z = z + experts.w13_bias[e].double()
        y = activated(z, experts.kind) @ w2.T
        return y if experts.w2_bias is None else y + experts.w2_bias[e].double()

    return mlp


def expected_moe(
    experts: Experts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, on_input: bool = False
) -> Tensor:
    """[M, K] in fp64; ids outside the experts contribute nothing."""
    y = torch.zeros_like(x)
    for e in range(experts.w13.data.shape[0]):
        mlp = expert_mlp(experts, e)
        for j in range(topk_ids.shape[1]):
            rows = (topk_ids[:, j] == e).nonzero()[:, 0]
            if not rows.numel():
                continue
            weight = topk_weights[rows, j, None].double()
            y[rows] += mlp(x[rows], weight) if on_input else weight * mlp(x[rows])
    return y
