"""Whether a model's own experts compute the gate that its config declares."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_nvfp4.checkpoint import LayerConfig
from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.gate import Gate
from torch_nvfp4.quant_config import MoEQuantConfig

__all__ = ["checkpoint_error", "gate_of", "layout_error"]

_POINTS = 257
_RTOL = 1e-5


def checkpoint_error(layer: LayerConfig) -> str | None:
    """Why the experts that a checkpoint has in a layer do not run in transformers' classes here, or None."""
    if layer.gated and not (layer.has_w13_bias or layer.has_w2_bias):
        return None
    got = layer.kind
    return (
        f"expected experts with gate and up and without biases, got {got}; from_pretrained does not take others yet: "
        "NVFP4Experts.from_checkpoint runs the layer"
    )


def layout_error(module: nn.Module) -> str | None:
    """Why a model's experts are not of the kind that ``NVFP4Experts`` computes, or None."""
    if not callable(getattr(module, "_apply_gate", None)):
        return "no _apply_gate, which says which gate they compute"
    wanted = {
        "has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False,
        "has_post_expert_norm": False,
    }  # fmt: skip
    found = [f"{name}={got}" for name, want in wanted.items() if (got := getattr(module, name, want)) is not want]
    return " and ".join(found) or None


def gate_of(module: nn.Module, config: Any, layer: int, where: str) -> MoEQuantConfig:
    """The gate of a layer's experts: what the config declares, if the module computes the same.

    The module is evaluated on values on both sides of the declared limit, and on large ones where none is declared.
    The config is that of the model, whose defaults count (DeepSeek-V4 has a limit of 10 without any key).

    Raises CheckpointError where the two differ: a clamp is neither dropped nor added.
    """
    declared = MoEQuantConfig.from_config(config, layer, source=f"{where}: config")
    limit = declared.gate.clamp_limit
    reach = 100.0 if limit is None else 3.0 * limit
    with torch.device("cpu"), torch.no_grad():
        side = torch.linspace(-reach, reach, _POINTS, dtype=torch.float32)
        small = torch.linspace(-6.0, 6.0, _POINTS, dtype=torch.float32)
        gate = torch.cat([side, side, small, small])
        up = torch.cat([side, side.flip(0), small.flip(0), torch.ones_like(small)])
        got = module._apply_gate(torch.cat([gate, up]).reshape(1, -1)).reshape(-1)  # type: ignore[operator]
        expected = declared.gate(gate, up)
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=_RTOL, atol=_RTOL):
        got_text = f"another one ({_described(got, gate, up)})"
        raise CheckpointError(
            refusal(
                f"{where} ({type(module).__name__})",
                f"the gate that its config declares ({declared.gate})",
                got_text,
                "a clamp is neither dropped nor added; correct config.json where it is wrong",
            )
        )
    if declared.apply_router_weight_on_input:
        got_text = "a model whose router weights scale their input"
        raise CheckpointError(refusal(where, "experts whose outputs are weighted", got_text))
    return declared


def _described(got: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> str:
    """The gate in a word where it is plain silu, gelu or one of them clamped at a usual limit."""
    if got.shape == gate.shape:
        for name in ("silu", "gelu", "gelu_tanh", "relu2"):
            if torch.allclose(got, Gate(name)(gate, up), rtol=_RTOL, atol=_RTOL):  # type: ignore[arg-type]
                return f"{name}, no clamp"
    return f"up to {got.abs().max().item():.4g} for inputs up to {gate.max().item():.4g}"
