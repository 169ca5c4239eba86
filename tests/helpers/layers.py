"""MoE layers, activations and gates for the tests of the ops, on the CPU and in fp64 until a test moves them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import torch_nvfp4
from torch_nvfp4 import NVFP4Weight, reference
from torch_nvfp4.format import dequantize, row_global_scale
from torch_nvfp4.testing import random_routing, random_weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]


def dtypes_of(device: str) -> list[torch.dtype]:
    return DTYPES if device == "cpu" else DTYPES[:2]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """fp64 values that bf16, fp16 and fp32 all hold exactly, so that one reference serves the three."""
    x = (torch.randn(shape, generator=seeded(seed)) * scale).to(BF16)
    return torch.where(x.abs() < 2.0**-16, 0.0, x.double())


def to(device: str, *tensors: Any) -> tuple[Any, ...]:
    return tuple(t.to(device) if isinstance(t, Tensor) else t for t in tensors)


class PackedLayer(NamedTuple):
    """The weight arguments of ``moe``."""

    w13: Tensor
    w13_global_scale: Tensor
    w2: Tensor
    w2_global_scale: Tensor


class Layer(NamedTuple):
    """The weights of one MoE layer, on the CPU."""

    w13: NVFP4Weight  # [E, 2I, K]
    w2: NVFP4Weight  # [E, K, I]

    def packed(self, device: str) -> PackedLayer:
        w13, w2 = (NVFP4Weight(*to(device, *weight)) for weight in self)
        return PackedLayer(torch_nvfp4.pack(w13, gated=True), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale)


def make_layer(e: int, k: int, i: int, *, seed: int, global_scale: float | None = None, **options: Any) -> Layer:
    generator = seeded(seed)
    w13 = random_weight((e, 2 * i, k), gated=True, global_scale=global_scale, generator=generator, **options)
    return Layer(w13, random_weight((e, k, i), global_scale=global_scale, generator=generator, **options))


def preactivation_scale(w13: NVFP4Weight, std: float) -> float:
    """The scale of normal activations for which pre-activations have this standard deviation, from a sample of rows."""
    rows = slice(None, None, max(1, w13.data.shape[-2] // 64))
    data, scale = w13.data[..., rows, :], w13.scale.view(torch.uint8)[..., rows, :].view(torch.float8_e4m3fn)
    sample = dequantize(NVFP4Weight(data, scale, torch.ones(w13.data.shape[:-2])))
    sample = sample * row_global_scale(w13)[..., rows, None]
    return std / float(sample.square().sum(-1).mean().sqrt())


def run_moe(
    layer: Layer | PackedLayer, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None, *,
    device: str, dtype: torch.dtype, **options: Any,
) -> Tensor:  # fmt: skip
    packed = layer.packed(device) if isinstance(layer, Layer) else layer
    routing = to(device, topk_weights, topk_ids, expert_map)
    out = torch_nvfp4.moe(x.to(device, dtype), *packed, *routing, **options)
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert out.device.type == device
    assert out.is_contiguous()
    return out.cpu()


# A limit below 0.278, the depth of silu's minimum: only there does a lower bound on a gate that has none show.
TIGHT = 0.125
GATES: dict[str, dict[str, Any]] = {
    "silu": {"activation": "silu"},
    "silu-clamped": {"activation": "silu", "clamp_limit": 7.0},
    "gpt-oss": {"activation": "silu", "clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0},
    "alpha-beta": {"activation": "silu", "alpha": -0.5, "beta": -2.0},
    "swiglustep": {"activation": "swiglustep"},
    "swiglustep-clamped": {"activation": "swiglustep", "clamp_limit": 7.0},
    "silu-tight": {"activation": "silu", "clamp_limit": TIGHT},
    "gpt-oss-tight": {"activation": "silu", "clamp_limit": TIGHT, "alpha": 1.702, "beta": 1.0},
    "swiglustep-tight": {"activation": "swiglustep", "clamp_limit": TIGHT},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu2": {"activation": "relu2"},
    "situ": {"activation": "situ", "alpha": 4.0, "beta": 25.0},
    "situ-tight": {"activation": "situ", "alpha": 0.5},
}


def routed(m: int, e: int, top_k: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """topk_weights, topk_ids (a few of them out of range), order, offsets."""
    topk_weights, topk_ids = random_routing(m, e, top_k, generator=seeded(seed))
    topk_ids.view(-1)[3::7] = -1
    return topk_weights, topk_ids, *reference.route(topk_ids, None, e)
