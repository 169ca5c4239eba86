"""One layer of a checkpoint, as a model loads and runs it, against the reference in fp64."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4 import reference
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.testing import TOLERANCE, random_routing, relative_l2

__all__ = [
    "LayerCheck",
    "checked_top_k",
    "covering_routing",
    "relative_error",
    "verify_layer",
]

_FEWEST_TOKENS = 16


@dataclass(frozen=True)
class LayerCheck:
    """One layer's kernel against the fp64 reference.

    Attributes:
        layer, backend, gate: what ran; the gate in words, which also say whether there are biases.
        tokens: M, the rows of the input.
        num_experts: of the layer.
        experts_unchecked: those that no token was routed to, so that nothing is known about them.
        clamped_share: share (0..1) of the pre-activations that the limit changed; None without a limit.
        relative_l2: of the output over all tokens; infinite where the reference does not tell what is right.
        tolerance: the largest ``relative_l2`` that passes.
        problem: why the layer did not pass, or None.
        seconds: of loading, running and the reference.
    """

    layer: int
    backend: str
    gate: str
    tokens: int
    num_experts: int
    experts_unchecked: tuple[int, ...]
    clamped_share: float | None
    relative_l2: float
    tolerance: float
    problem: str | None
    seconds: float

    @property
    def passed(self) -> bool:
        return self.problem is None

    @property
    def experts_hit(self) -> int:
        return self.num_experts - len(self.experts_unchecked)

    def to_json(self) -> dict[str, Any]:
        # JSON has no infinity.
        finite = self.relative_l2 if math.isfinite(self.relative_l2) else None
        return asdict(self) | {"relative_l2": finite, "experts_hit": self.experts_hit, "passed": self.passed}


def verify_layer(
    checkpoint: Checkpoint,
    layer: int,
    *,
    tokens: int | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
    backend: str | None = None,
    seed: int = 0,
    tell: Callable[[str], None] | None = None,
) -> LayerCheck:
    """Loads a layer the way a model does, runs it on random tokens and compares with the reference in fp64.

    The layer's own sizes count: those of another layer may differ.

    Args:
        tokens: standard normal rows of hidden_states; None for as many as reach every expert, and at least 16.
        dtype: of hidden_states.
        backend: a name instead of the automatic choice.
        seed: of tokens and routing.
        tell: called with what begins.

    Raises:
        CheckpointError: weights that cannot be loaded, or a top-k in the config that routes no token.
        ValueError, NotImplementedError: no backend, as ``select_moe_backend``.
    """
    started, say = time.perf_counter(), tell or (lambda step: None)
    say(f"loading layer {layer}")
    experts = NVFP4Experts.from_checkpoint(checkpoint, layer, device=device, backend=backend)
    num_experts, hidden_size = experts.num_experts, experts.hidden_size
    top_k = checked_top_k(checkpoint, num_experts, layer)
    if tokens is None:
        tokens = max(_FEWEST_TOKENS, -(-num_experts // top_k))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden_size, generator=generator).to(device, dtype)
    topk_weights, topk_ids = covering_routing(tokens, num_experts, top_k, generator=generator, device=device)
    say(f"running layer {layer} on {tokens} tokens")
    with torch.inference_mode():
        output = experts(x, topk_weights, topk_ids)
        ran_on = experts.backend
        del experts  # the reference needs the memory
        say(f"layer {layer} in fp64")
        expected = _reference(checkpoint, layer, x, topk_weights, topk_ids)
    kind, limit = checkpoint.layer_config(layer).kind, checkpoint.gate(layer).clamp_limit
    local = reference.local_experts(topk_ids, None, num_experts)
    hit = set(local[local < num_experts].tolist())
    error, tolerance = relative_error(output, expected.output), TOLERANCE[dtype]
    return LayerCheck(
        layer=layer,
        backend=ran_on,
        gate=kind,
        tokens=tokens,
        num_experts=num_experts,
        experts_unchecked=tuple(expert for expert in range(num_experts) if expert not in hit),
        clamped_share=None if limit is None else expected.clamped_share,
        relative_l2=error,
        tolerance=tolerance,
        problem=_problem(expected.output, len(hit), error, tolerance),
        seconds=time.perf_counter() - started,
    )


def checked_top_k(checkpoint: Checkpoint, num_experts: int, layer: int | None = None) -> int:
    """Experts per token of a layer, None for the first one.

    Raises CheckpointError for a number with which a routing checks nothing, or cannot exist.
    """
    top_k = checkpoint.top_k if layer is None else checkpoint.layer_top_k(layer)
    if not 1 <= top_k <= num_experts:
        expected = f"between 1 and {num_experts} experts per token (as many as the layer has)"
        raise CheckpointError(
            refusal(checkpoint.path / "config.json", expected, str(top_k) if top_k < 10**9 else "over 10^9")
        )
    return top_k


def covering_routing(
    tokens: int,
    num_experts: int,
    top_k: int,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """``random_routing`` whose first tokens take the experts in turns, so that few tokens reach all of them.

    (topk_weights fp32 [tokens, top_k] that sum to 1 per token, topk_ids int64 [tokens, top_k], distinct per token);
    with ``tokens * top_k >= num_experts`` every expert is there.
    """
    topk_weights, topk_ids = random_routing(tokens, num_experts, top_k, generator=generator)
    rows = min(tokens, -(-num_experts // top_k))
    turns = torch.randperm(num_experts, generator=generator)
    topk_ids[:rows] = turns[torch.arange(rows * top_k) % num_experts].view(rows, top_k)
    return topk_weights.to(device), topk_ids.to(device)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """``relative_l2``; infinity where the output or ``expected`` has NaN or infinities, or ``expected`` only zeros.

    Agreeing with a reference of NaN or of zeros shows nothing.
    """
    if not bool(torch.isfinite(expected).all()) or not bool(expected.count_nonzero()):
        return math.inf
    try:
        return relative_l2(output, expected)
    except AssertionError:
        return math.inf


def _reference(
    checkpoint: Checkpoint, layer: int, x: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> reference.MoEResult:
    """The layer in fp64, from the checkpoint alone: what ``NVFP4Experts`` made of the config is not looked at."""
    weights = checkpoint.experts(layer).to(x.device)
    return reference.moe_with_clamped_share(
        x,
        weights.w13,
        weights.w2,
        topk_weights,
        topk_ids,
        w13_bias=weights.w13_bias,
        w2_bias=weights.w2_bias,
        **checkpoint.gate(layer).kwargs(),
        apply_router_weight_on_input=checkpoint.apply_router_weight_on_input(layer),
    )


def _problem(expected: Tensor, experts_hit: int, error: float, tolerance: float) -> str | None:
    if experts_hit == 0:
        return "no token was routed to an expert, so that nothing was checked"
    if not bool(torch.isfinite(expected).all()):
        return "the reference has NaN or infinities, so that nothing was checked"
    if not bool(expected.count_nonzero()):
        return "the reference is zero everywhere, so that nothing was checked"
    if math.isinf(error):
        return "NaN or infinities in the output"
    if not error <= tolerance:
        return f"a relative error of {error:.2e}"
    return None
