"""Whether a model's own experts compute the gate that its config declares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.gate import Gate, plain_activation
from torch_nvfp4.integrations.transformers.expert_layout import USUAL, ExpertLayout
from torch_nvfp4.quant_config import MoEQuantConfig

__all__ = ["gate_of"]

_POINTS = 257
_RTOL = 1e-5


def gate_of(module: nn.Module, config: Any, layer: int, where: str, layout: ExpertLayout = USUAL) -> MoEQuantConfig:
    """The gate of a layer's experts: what the config declares, if the module computes the same.

    The module is evaluated on values on both sides of the declared limit, and on large ones where none is declared.
    The config is that of the model, whose defaults count (DeepSeek-V4 has a limit of 10 without any key).

    Raises CheckpointError where the two differ: a clamp is neither dropped nor added.
    """
    declared = MoEQuantConfig.from_config(config, layer, source=f"{where}: config")
    if not layout.gated:
        declared = replace(declared, gate=replace(declared.gate, gated=False))
    limit = declared.gate.clamp_limit
    reach = 100.0 if limit is None else 3.0 * limit
    with torch.device("cpu"), torch.no_grad():
        side = torch.linspace(-reach, reach, _POINTS, dtype=torch.float32)
        small = torch.linspace(-6.0, 6.0, _POINTS, dtype=torch.float32)
        gate = torch.cat([side, side, small, small])
        up = torch.cat([side, side.flip(0), small.flip(0), torch.ones_like(small)])
        got = _computed(module, layout, gate, up)
        expected = declared.gate(gate, up) if layout.gated else plain_activation(up, declared.activation)
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


def _computed(module: Any, layout: ExpertLayout, gate: Tensor, up: Tensor) -> Tensor:
    """What the module's own code makes of one row of pre-activations [I] of gate and up."""
    if not layout.gated:
        result: Tensor = module.act_fn(up)
    elif layout.interleaved:
        result = module._apply_gate(torch.stack([gate, up], -1).reshape(1, -1))
    else:
        result = module._apply_gate(torch.cat([gate, up]).reshape(1, -1))
    return result.reshape(-1)


def _described(got: Tensor, gate: Tensor, up: Tensor) -> str:
    """The gate in a word where it is plain silu, gelu or one of them clamped at a usual limit."""
    if got.shape == gate.shape:
        for name in ("silu", "gelu", "gelu_tanh", "relu2"):
            if torch.allclose(got, Gate(name)(gate, up), rtol=_RTOL, atol=_RTOL):  # type: ignore[arg-type]
                return f"{name}, no clamp"
    return f"up to {got.abs().max().item():.4g} for inputs up to {gate.max().item():.4g}"
