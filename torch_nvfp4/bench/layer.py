"""The layer that is timed, its inputs, and what a contender is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_nvfp4 import reference
from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight
from torch_nvfp4.testing import random_routing, random_weight, relative_l2

# The agreement that contenders must show before they are timed: they round differently (bf16 gate and up
# projections, bf16 sums), but a skipped clamp or a wrong expert is an error of order 1.
_AGREEMENT = 3e-2
# Of FP8 activations. Random layers, most of whose pre-activations are clamped, have errors of up to 0.094.
FP8_AGREEMENT = 0.15
_MOST_COMPARED = 256  # tokens: fp64 takes its time

OURS = "torch_nvfp4"
FP8 = "fp8"  # ours, with activations in FP8
DEQUANTIZE = "dequantize"
GGML = "ggml"
# What stands between the two GEMMs: their epilogue, a kernel of Inductor's, aten ops.
COMPILED = ("gate fused", "gate Inductor", "gate eager")


class BenchError(RuntimeError):
    """A request that this machine or its installed packages cannot serve."""


class Shape(NamedTuple):
    """Size of a routed MoE layer."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """NVFP4 bytes of one expert: codes and block scales of gate, up and down, and their global scales."""
        values = 3 * self.hidden * self.intermediate
        return values // 2 + values // GROUP_SIZE + 3 * 4

    def flop(self, tokens: int) -> int:
        """Operations of one call: a multiplication and an addition per weight and slot."""
        return 2 * tokens * self.top_k * 3 * self.hidden * self.intermediate

    def experts_hit(self, topk_ids: Tensor) -> int:
        local = topk_ids[(topk_ids >= 0) & (topk_ids < self.experts)]
        return int(local.unique().numel())

    def touched_bytes(self, topk_ids: Tensor) -> int:
        """Bytes of the weights that a call has to read: every expert hit, once."""
        return self.experts_hit(topk_ids) * self.expert_bytes


SHAPES = {
    "cpu": Shape(16, 4096, 2048, 6),
    "dsv4-flash": Shape(256, 4096, 2048, 6),
    "dsv4-flash-tp4": Shape(256, 4096, 512, 6),
    "qwen3-30b": Shape(128, 2048, 768, 8),
    "deepseek-r1": Shape(256, 7168, 2048, 8),
    "qwen3.6": Shape(256, 2048, 512, 8),
    "gemma-4": Shape(128, 2816, 704, 8),
    "kimi-k3-tp8": Shape(896, 3584, 384, 16),
}


def parse_shape(text: str) -> Shape:
    """A name of ``SHAPES``, or E,K,I,TOPK. Raises ValueError (expected and got)."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        shape = Shape(*(int(part) for part in text.split(",")))
    except (ValueError, TypeError):
        raise ValueError(f"expected E,K,I,TOPK or one of {', '.join(SHAPES)}, got {text!r}") from None
    if min(shape) < 1 or shape.hidden % GROUP_SIZE or shape.intermediate % GROUP_SIZE:
        raise ValueError(f"expected positive sizes with K and I multiples of {GROUP_SIZE}, got {text!r}")
    if shape.top_k > shape.experts:
        raise ValueError(f"expected TOPK <= E, got {text!r}")
    return shape


def parse_tokens(text: str) -> tuple[int, ...]:
    """Positive integers between commas. Raises ValueError (expected and got)."""
    try:
        tokens = tuple(int(part) for part in text.split(","))
    except ValueError:
        tokens = ()
    if not tokens or min(tokens) < 1:
        raise ValueError(f"expected positive integers between commas, got {text!r}")
    return tokens


class Case(NamedTuple):
    """The input of one call."""

    hidden_states: Tensor  # [M, K]
    topk_weights: Tensor  # [M, top_k]
    topk_ids: Tensor  # int64 [M, top_k]


@dataclass(frozen=True)
class Contender:
    """One implementation of the layer, and the dtypes in which it takes hidden_states, topk_weights and topk_ids."""

    name: str
    run: Callable[[Case], Tensor]
    dtype: torch.dtype
    weights_dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int64
    agreement: float = _AGREEMENT  # relative L2 error against the first contender


@dataclass(frozen=True)
class Layer:
    """Random NVFP4 experts."""

    shape: Shape
    w13: NVFP4Weight
    w2: NVFP4Weight
    clamp_limit: float

    @classmethod
    def random(cls, shape: Shape, *, clamp_limit: float, device: torch.device | str = "cpu", seed: int = 0) -> Layer:
        generator = torch.Generator(device).manual_seed(seed)
        experts, k, i, _ = shape
        # One global scale per expert for gate and up together: some peers cannot take two.
        w13 = random_weight((experts, 2 * i, k), generator=generator, device=device)
        w13 = w13._replace(global_scale=w13.global_scale[:, None].repeat(1, 2))
        w2 = random_weight((experts, k, i), generator=generator, device=device)
        return cls(shape, w13, w2, clamp_limit)


def cases(shape: Shape, tokens: int, *, skew: float = 0.0, device: torch.device | str = "cpu") -> Iterator[Case]:
    """Inputs for call after call, each with other values and another routing: fp32, the same for the same arguments.

    Experts are equally popular, or with ``skew`` their popularity is log-normal with this sigma, drawn anew for every
    call as if it were another layer.
    """
    generator = torch.Generator().manual_seed(1000 + tokens)
    while True:
        if skew > 0:
            topk_weights, topk_ids = _skewed_routing(shape, tokens, skew, generator)
        else:
            topk_weights, topk_ids = random_routing(tokens, shape.experts, shape.top_k, generator=generator)
        hidden_states = torch.randn(tokens, shape.hidden, generator=generator)
        yield Case(hidden_states.to(device), topk_weights.to(device), topk_ids.to(device))


def _skewed_routing(shape: Shape, tokens: int, sigma: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(topk_weights that sum to 1 per token, int64 topk_ids), both [tokens, top_k].

    A token draws its experts one after another without replacement, each in proportion to its popularity: those with
    the largest sums of log-popularity and Gumbel noise.
    """
    log_popularity = sigma * torch.randn(shape.experts, generator=generator)
    exponential = torch.empty(tokens, shape.experts).exponential_(generator=generator)
    topk_ids = (log_popularity - exponential.log()).topk(shape.top_k, dim=-1).indices
    topk_weights = torch.rand(tokens, shape.top_k, generator=generator)
    return topk_weights / topk_weights.sum(-1, keepdim=True), topk_ids


def cast(case: Case, contender: Contender) -> Case:
    return Case(
        case.hidden_states.to(contender.dtype),
        case.topk_weights.to(contender.weights_dtype),
        case.topk_ids.to(contender.ids_dtype),
    )


def check_agreement(contenders: Sequence[Contender], case: Case) -> None:
    """Raises BenchError unless every contender computes what the first one does."""
    expected = contenders[0].run(cast(case, contenders[0]))
    for contender in contenders[1:]:
        error = relative_l2(contender.run(cast(case, contender)), expected)
        if not error <= contender.agreement:
            raise BenchError(
                f"expected {contender.name} to agree with {contenders[0].name} to a relative L2 error of "
                f"{contender.agreement:g}, got {error:g}: not the same function, so not timed"
            )


def fp64_errors(layer: Layer, contenders: Sequence[Contender], case: Case) -> dict[str, float]:
    """Relative L2 error of each contender's call against fp64 of the same weights, over its first 256 tokens."""
    errors: dict[str, float] = {}
    exact: dict[torch.dtype, Tensor] = {}
    for contender in contenders:
        given = cast(case, contender)
        x, topk_weights, topk_ids = (part[:_MOST_COMPARED] for part in given)
        if x.dtype not in exact:
            weights = (layer.w13, layer.w2)
            exact[x.dtype] = reference.moe(x, *weights, topk_weights, topk_ids, clamp_limit=layer.clamp_limit)
        errors[contender.name] = relative_l2(contender.run(given)[:_MOST_COMPARED], exact[x.dtype])
    return errors


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
