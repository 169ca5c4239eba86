"""What `Checkpoint` says and gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torch_nvfp4.checkpoint.contents import Category
from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.format import NVFP4Weight
from torch_nvfp4.gate import Gate

__all__ = ["ExpertWeights", "LayerConfig", "Refusal", "Summary"]


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer (or of one rank's part of it).

    ``w13, w2 = weights`` works where these two are all that there is; with biases it raises, since they would be lost.

    Attributes:
        w13: [E, 2I, K], gate rows first, global_scale [E, 2] (gate, up); without a gate [E, I, K], global_scale [E].
        w2: [E, K, I], global_scale [E].
        w13_bias: fp32 [E, 2I] (gate rows first) or, without a gate, [E, I]; None where there is none.
        w2_bias: fp32 [E, K], None where there is none. Of tensor-parallel ranks only the first has values other than
            zero, since the ranks' results are added.
        gated: whether there is a gate beside up.
    """

    w13: NVFP4Weight
    w2: NVFP4Weight
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    gated: bool = True

    def to(self, device: torch.device | str) -> ExpertWeights:
        """The same experts on a device; the tensors that are there already are taken as they are."""
        w13_bias, w2_bias = (None if bias is None else bias.to(device) for bias in (self.w13_bias, self.w2_bias))
        return ExpertWeights(self.w13.to(device), self.w2.to(device), w13_bias, w2_bias, self.gated)

    def __iter__(self) -> Iterator[NVFP4Weight]:
        biases = [name for name in ("w13_bias", "w2_bias") if getattr(self, name) is not None]
        if biases:
            expected = "to be taken as attributes, with the biases"
            got = f"w13 and w2 alone of experts with {' and '.join(biases)}"
            raise CheckpointError(refusal("ExpertWeights", expected, got))
        return iter((self.w13, self.w2))


class LayerConfig(NamedTuple):
    """What files and config say about the routed experts of one layer.

    top_k: None where it is not declared. gated: whether there is a gate beside up. has_w13_bias, has_w2_bias: whether
    gate and up, and down, have biases.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int | None
    gate: Gate
    apply_router_weight_on_input: bool
    gated: bool = True
    has_w13_bias: bool = False
    has_w2_bias: bool = False

    @property
    def kind(self) -> str:
        """What the experts compute, in words: the gate, and which biases there are."""
        biases = [name for name, has in (("w13_bias", self.has_w13_bias), ("w2_bias", self.has_w2_bias)) if has]
        return f"{self.gate}{', biases' if len(biases) == 2 else ''.join(f', {name} alone' for name in biases)}"


class Refusal(NamedTuple):
    """Something that loading would refuse, and the words in which it would."""

    what: str  # "layer 3", or the name of a linear
    reason: str


@dataclass(frozen=True)
class Summary:
    """What a checkpoint holds, for `torch-nvfp4 inspect`. None: not declared, or no NVFP4 or MXFP4 experts.

    num_experts, top_k and intermediate_size are those of the first layer; expert_counts, top_ks and intermediate_sizes
    have every layer's (top_ks without those of which config.json declares none). left_out is the number of tensors in
    the shards that the index does not name.
    """

    path: Path
    layout: str | None
    model_type: str | None
    quant_method: str | None
    quant_algo: str | None
    shards: int
    nbytes: int
    layers: tuple[int, ...]
    num_experts: int | None
    top_k: int | None
    hidden_size: int | None
    intermediate_size: int | None
    hidden_act: str | None
    clamp_limits: dict[int, float | None]
    categories: tuple[Category, ...]
    expert_counts: dict[int, int]
    top_ks: dict[int, int]
    intermediate_sizes: dict[int, int]
    apply_router_weight_on_input: bool
    refusals: tuple[Refusal, ...]
    left_out: int
