"""One layer of a checkpoint against the reference in fp64."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4 import reference
from torch_nvfp4.checkpoint import Checkpoint, ExpertWeights
from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.gate import Gate
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.testing import TOLERANCE, random_routing, relative_l2

__all__ = ["LayerCheck", "relative_error", "verify_layer"]


@dataclass(frozen=True)
class LayerCheck:
    """One layer's kernel against the fp64 reference. ``error`` is infinite where NaN or infinity stand elsewhere."""

    layer: int
    backend: str
    gate: str
    clamped_share: float
    relative_l2: float
    tolerance: float
    experts_hit: int
    seconds: float

    @property
    def passed(self) -> bool:
        return self.relative_l2 <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        # JSON has no infinity.
        finite = self.relative_l2 if math.isfinite(self.relative_l2) else None
        return asdict(self) | {"relative_l2": finite, "passed": self.passed}


def verify_layer(
    checkpoint: Checkpoint,
    layer: int,
    *,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
    seed: int = 0,
) -> LayerCheck:
    """Loads a layer the way a model does, runs it on random tokens and compares with the reference in fp64."""
    started = time.perf_counter()
    experts = NVFP4Experts.from_checkpoint(checkpoint, layer, device=device, backend=backend)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, checkpoint.hidden_size, generator=generator).to(device, dtype)
    topk_weights, topk_ids = random_routing(
        tokens, checkpoint.num_experts, checkpoint.top_k, generator=generator, device=device
    )
    with torch.inference_mode():
        output = experts(x, topk_weights, topk_ids)
        ran_on = experts.backend
        del experts  # the reference needs the memory
        weights = checkpoint.experts(layer)
        gate = checkpoint.gate(layer)
        expected = _reference(weights, gate, x, topk_weights, topk_ids)
    return LayerCheck(
        layer=layer,
        backend=ran_on,
        gate=str(gate),
        clamped_share=expected.clamped_share,
        relative_l2=relative_error(output, expected.output),
        tolerance=TOLERANCE[dtype],
        experts_hit=int(topk_ids.unique().numel()),
        seconds=time.perf_counter() - started,
    )


def _reference(
    weights: ExpertWeights, gate: Gate, x: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> reference.MoEResult:
    w13, w2 = (NVFP4Weight(*(part.to(x.device) for part in weight)) for weight in weights)
    return reference.moe_with_clamped_share(x, w13, w2, topk_weights, topk_ids, **gate.kwargs())


def relative_error(output: Tensor, expected: Tensor) -> float:
    try:
        return relative_l2(output, expected)
    except AssertionError:
        return float("inf")
