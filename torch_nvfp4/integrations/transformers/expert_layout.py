"""How a class of transformers holds its experts, and whether a checkpoint's experts are of that kind."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from torch_nvfp4.checkpoint import LayerConfig

__all__ = ["USUAL", "ExpertLayout", "has_fused_experts", "kind_error", "layout_of"]

_FIRST = ("gate_up_proj", "up_proj")  # with and without a gate


class ExpertLayout(NamedTuple):
    """What ``use_experts_implementation`` of transformers says about a class of experts.

    Attributes:
        gated: the first GEMM is gate_up_proj, else up_proj alone.
        interleaved: gate and up of gate_up_proj stand in turns (gpt-oss), else the gate comes first.
        transposed: weights are [E, in, out], else [E, out, in].
        biased: both GEMMs have biases, gate_up_proj_bias (or up_proj_bias) and down_proj_bias, [E, out].
    """

    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False

    @property
    def first(self) -> str:
        """The name of the parameter of the first GEMM."""
        return _FIRST[0] if self.gated else _FIRST[1]

    @property
    def blocks(self) -> int:
        """Into how many matrices behind each other the rows of the first GEMM are split for tensor parallelism."""
        return 2 if self.gated and not self.interleaved else 1

    def sizes(self, module: nn.Module) -> tuple[int, int, int]:
        """(E, K, I) of a module that has this layout."""
        num, hidden, intermediate = module.get_parameter("down_proj").shape
        if self.transposed:
            hidden, intermediate = intermediate, hidden
        return int(num), int(hidden), int(intermediate)

    def packed_shapes(self, num: int, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
        """The module's parameters by name: shapes of weights with two values per byte, and of biases."""
        rows = (2 if self.gated else 1) * intermediate
        shapes: dict[str, tuple[int, ...]] = {}
        for name, out, into in ((self.first, rows, hidden // 2), ("down_proj", hidden, intermediate // 2)):
            shapes[name] = (num, into, out) if self.transposed else (num, out, into)
        if self.biased:
            shapes |= {f"{self.first}_bias": (num, rows), "down_proj_bias": (num, hidden)}
        return shapes


USUAL = ExpertLayout()
"""That of most classes: gate_up_proj [E, 2I, K], gate rows first, and down_proj [E, K, I]."""


def has_fused_experts(module: nn.Module) -> bool:
    """Whether a module has the weights of all its experts in one parameter for each GEMM."""

    def rank(name: str) -> int:
        return len(getattr(getattr(module, name, None), "shape", ()))

    return rank("down_proj") == 3 and any(rank(name) == 3 for name in _FIRST)


def layout_of(module: nn.Module) -> tuple[ExpertLayout, str | None]:
    """(the layout of a model's experts, why ``NVFP4Experts`` does not compute what they do, or None)."""

    def flag(name: str, default: bool) -> bool:
        return bool(getattr(module, name, default))

    layout = ExpertLayout(
        flag("has_gate", True), not flag("is_concatenated", True), flag("is_transposed", False), flag("has_bias", False)
    )
    if not layout.gated:
        layout = layout._replace(interleaved=False)
    computes = "_apply_gate" if layout.gated else "act_fn"
    if not callable(getattr(module, computes, None)):
        return layout, f"no {computes}, which says what they compute between the two GEMMs"
    if flag("has_post_expert_norm", False):
        return layout, "has_post_expert_norm=True"
    return layout, None


def kind_error(layout: ExpertLayout, layer: LayerConfig, module: Any) -> str | None:
    """How the experts of a layer of a checkpoint differ in kind from a model's, as "expected ..., got ...", or None."""
    biases = {name for name, has in (("w13_bias", layer.has_w13_bias), ("w2_bias", layer.has_w2_bias)) if has}
    if layer.gated == layout.gated and (biases == {"w13_bias", "w2_bias"} if layout.biased else not biases):
        return None
    gate = "gate and up" if layout.gated else "up and no gate"
    expected = f"experts with {gate} and {'with' if layout.biased else 'without'} biases, as {type(module).__name__}"
    advice = "load another class of the model, or the layer alone with NVFP4Experts.from_checkpoint"
    return f"expected {expected} has them, got {layer.kind}; {advice}"
