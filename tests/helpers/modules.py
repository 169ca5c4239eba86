"""Small modules with NVFP4 weights, inputs for them, and comparisons of what they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_nvfp4 import testing
from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.nn import NVFP4Experts, NVFP4Linear

E, K, I, TOP_K = 4, 64, 48, 2  # noqa: E741
LIMIT = 0.6  # clamps a good part of the pre-activations of these weights
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(device: str = "cpu") -> tuple[NVFP4Weight, NVFP4Weight]:
    generator = torch.Generator().manual_seed(0)
    w13 = testing.random_weight((E, 2 * I, K), gated=True, generator=generator, device=device)
    return w13, testing.random_weight((E, K, I), generator=generator, device=device)


def inputs(tokens: int = 7, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, K, generator=generator).to(device, dtype)
    return x, *testing.random_routing(tokens, E, TOP_K, generator=generator, device=device)


def experts(backend: str | None = None, **kwargs: Any) -> NVFP4Experts:
    return NVFP4Experts.from_weights(*weights(), clamp_limit=LIMIT, backend=backend, **kwargs)


def linear(bias: bool = True) -> NVFP4Linear:
    generator = torch.Generator().manual_seed(2)
    weight = testing.random_weight((48, K), generator=generator)
    return NVFP4Linear.from_weight(weight, torch.randn(48, generator=generator) if bias else None)


def make(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A module and inputs for it."""
    return (linear(), inputs()[:1]) if kind == "linear" else (experts(kind.partition("-")[2] or None), inputs())


def same_weight(got: NVFP4Weight, expected: NVFP4Weight) -> bool:
    return (
        torch.equal(got.data, expected.data)
        and torch.equal(raw(got.scale), raw(expected.scale))
        and torch.equal(got.global_scale, expected.global_scale)
    )


def raw(tensor: Tensor) -> Tensor:
    """As bytes: torch compares no E4M3 tensors on every device."""
    return tensor.reshape(-1).view(torch.uint8)


def unpacked(module: nn.Module) -> tuple[NVFP4Weight, ...]:
    if isinstance(module, NVFP4Linear):
        return (module.unpacked_weight(),)
    assert isinstance(module, NVFP4Experts)
    return module.unpacked_weights()
