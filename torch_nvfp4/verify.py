"""One layer of a checkpoint, as a model loads and runs it, against the reference in fp64."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nvfp4 import reference, reference_fp8
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.format import is_gated_pair
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.testing import FP8_TOLERANCE, TOLERANCE, fp8_tolerance, random_routing, relative_l2

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
        layer, backend, gate, input_quant: what ran; the gate in words, which also say whether there are biases.
        tokens: M, the rows of the input.
        num_experts: of the layer.
        experts_unchecked: those that no token was routed to, so that nothing is known about them.
        clamped_share: share (0..1) of the pre-activations that the limit changed; None without a limit.
        relative_l2: of the output over all tokens; infinite where the reference does not tell what is right.
        tolerance: the largest ``relative_l2`` that passes; with input_quant ``testing.fp8_tolerance``.
        specification_l2: as relative_l2, against ``reference_fp8``, which rounds as the kernel does; None without
            input_quant. It tells a fault of the kernel from what FP8 costs.
        specification_tolerance: the largest ``specification_l2`` that passes.
        quantization_l2: of ``reference_fp8`` itself against the fp64 reference: what FP8 costs this layer, whatever the
            kernel does; None without input_quant.
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
    input_quant: str | None = None
    specification_l2: float | None = None
    specification_tolerance: float | None = None
    quantization_l2: float | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None

    @property
    def experts_hit(self) -> int:
        return self.num_experts - len(self.experts_unchecked)

    def to_json(self) -> dict[str, Any]:
        # JSON has no infinity.
        fields = asdict(self)
        for name in ("relative_l2", "specification_l2", "quantization_l2"):
            if fields[name] is not None and not math.isfinite(fields[name]):
                fields[name] = None
        return fields | {"experts_hit": self.experts_hit, "passed": self.passed}


def verify_layer(
    checkpoint: Checkpoint,
    layer: int,
    *,
    tokens: int | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
    backend: str | None = None,
    input_quant: str | None = None,
    seed: int = 0,
    tell: Callable[[str], None] | None = None,
) -> LayerCheck:
    """Loads a layer the way a model does, runs it on random tokens and compares with the reference in fp64.

    The layer's own sizes count: those of another layer may differ. With ``input_quant="fp8"`` it is compared with
    ``reference_fp8`` too, and has to be close to both.

    Args:
        tokens: standard normal rows of hidden_states; None for as many as reach every expert, and at least 16.
        dtype: of hidden_states.
        backend: a name instead of the automatic choice.
        input_quant: None or "fp8", as ``NVFP4Experts`` takes it.
        seed: of tokens and routing.
        tell: called with what begins.

    Raises:
        CheckpointError: weights that cannot be loaded, or a top-k in the config that routes no token.
        ValueError, NotImplementedError: no backend, or none for ``input_quant``, as ``select_moe_backend``.
    """
    started, say = time.perf_counter(), tell or (lambda step: None)
    say(f"loading layer {layer}")
    experts = NVFP4Experts.from_checkpoint(checkpoint, layer, device=device, backend=backend, input_quant=input_quant)
    num_experts = experts.num_experts
    top_k = checked_top_k(checkpoint, num_experts, layer)
    if tokens is None:
        tokens = max(_FEWEST_TOKENS, -(-num_experts // top_k))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, experts.hidden_size, generator=generator).to(device, dtype)
    topk_weights, topk_ids = covering_routing(tokens, num_experts, top_k, generator=generator, device=device)
    say(f"running layer {layer} on {tokens} tokens")
    with torch.inference_mode():
        output = experts(x, topk_weights, topk_ids)
        ran_on = experts.backend
        del experts  # the reference needs the memory
        say(f"layer {layer} in fp64")
        expected = _references(checkpoint, layer, x, topk_weights, topk_ids, input_quant)
    limit = checkpoint.gate(layer).clamp_limit
    hit = set(topk_ids[(topk_ids >= 0) & (topk_ids < num_experts)].tolist())
    return LayerCheck(
        layer=layer,
        backend=ran_on,
        gate=checkpoint.layer_config(layer).kind,
        tokens=tokens,
        num_experts=num_experts,
        experts_unchecked=tuple(expert for expert in range(num_experts) if expert not in hit),
        clamped_share=None if limit is None else expected.clamped_share,
        **_errors(output, expected, dtype, len(hit)),
        input_quant=input_quant,
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


class _Expected(NamedTuple):
    output: Tensor  # fp64
    clamped_share: float
    specification: Tensor | None  # fp64, of ``reference_fp8``


def _references(
    checkpoint: Checkpoint, layer: int, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, input_quant: str | None
) -> _Expected:
    """The layer in fp64, from the checkpoint alone: what ``NVFP4Experts`` made of the config is not looked at."""
    weights = checkpoint.experts(layer).to(x.device)
    options = checkpoint.gate(layer).kwargs()
    options["apply_router_weight_on_input"] = checkpoint.apply_router_weight_on_input(layer)
    exact = reference.moe_with_clamped_share(
        x,
        weights.w13,
        weights.w2,
        topk_weights,
        topk_ids,
        w13_bias=weights.w13_bias,
        w2_bias=weights.w2_bias,
        **options,
    )
    specification = None
    if input_quant is not None:
        w13 = weights.w13
        if not is_gated_pair(w13):  # one scale for gate and up
            w13 = w13._replace(global_scale=w13.global_scale.unsqueeze(1).repeat(1, 2))
        specification = reference_fp8.moe(x, w13, weights.w2, topk_weights, topk_ids, **options)
    return _Expected(exact.output, exact.clamped_share, specification)


def _errors(output: Tensor, expected: _Expected, dtype: torch.dtype, experts_hit: int) -> dict[str, Any]:
    """The fields of ``LayerCheck`` that say how far the output is off, and whether that passes."""
    error, tolerance = relative_error(output, expected.output), TOLERANCE[dtype]
    of_specification, allowed, quantization = None, None, None
    if expected.specification is not None:
        of_specification, allowed = relative_error(output, expected.specification), FP8_TOLERANCE
        quantization = relative_error(expected.specification, expected.output)
        tolerance = fp8_tolerance(expected.clamped_share)
    return {
        "relative_l2": error,
        "tolerance": tolerance,
        "problem": _problem(expected.output, experts_hit, error, tolerance, of_specification, quantization),
        "specification_l2": of_specification,
        "specification_tolerance": allowed,
        "quantization_l2": quantization,
    }


def _problem(
    expected: Tensor, experts_hit: int, error: float, tolerance: float, of_specification: float | None = None,
    quantization: float | None = None,
) -> str | None:  # fmt: skip
    if experts_hit == 0:
        return "no token was routed to an expert, so that nothing was checked"
    if not bool(torch.isfinite(expected).all()):
        return "the reference has NaN or infinities, so that nothing was checked"
    if not bool(expected.count_nonzero()):
        return "the reference is zero everywhere, so that nothing was checked"
    if math.isinf(error):
        return "NaN or infinities in the output"
    if of_specification is not None and not of_specification <= FP8_TOLERANCE:
        return (
            f"a relative error of {of_specification:.2e} against the specification of FP8 activations, where at most "
            f"{FP8_TOLERANCE:g} is right: the kernel is at fault"
        )
    if not error <= tolerance:
        found = f"a relative error of {error:.2e}"
        if quantization is None:
            return found
        return (
            f"{found}, which is FP8's own rounding of this layer: its specification is off by {quantization:.2e}, and "
            f"the kernel within {of_specification:.2e} of that; run it with activations in 16 bits"
        )
    return None
