"""The gated activation with its clamp, on its own."""

from __future__ import annotations

from torch import Tensor

from torch_nvfp4.gate import gate_keywords, parse_activation
from torch_nvfp4.ops import _checks
from torch_nvfp4.ops._library import below_autograd, register_fake


def swiglu(
    gate_up: Tensor,
    activation: str | int = "silu",
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gated: bool = True,
) -> Tensor:
    """``act(gate, up)`` in fp32, rounded once; ``torch_nvfp4.gate.gated_activation`` has the formulas.

    Args:
        gate_up: [..., 2I] bfloat16 or float16, on the CPU also float32; gate columns first.
        activation, clamp_limit, alpha, beta: as in ``moe``.
        gated: False for ``act(up)`` of up [..., I], of experts without a gate.

    Returns [..., I] in gate_up's dtype. Raises RuntimeError (expected and got), ValueError for an unknown activation
    name. gate_up has a gradient (reverse mode, once).
    """
    gate = gate_keywords(parse_activation(activation).value, clamp_limit, alpha, beta)
    if not gated:
        gate["gated"] = False
    return _call((gate_up,), (gate_up,), gate)


_call = below_autograd("swiglu")


@register_fake("swiglu")
def _(
    gate_up: Tensor,
    *,
    activation: int = 0,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gated: bool = True,
) -> Tensor:
    op = "swiglu"
    halves = 2 if gated else 1
    _checks.check_activations(op, "gate_up", gate_up, _checks.any_shape(gate_up, "2I" if gated else "I"))
    _checks.check_last_dim(op, "gate_up", gate_up, halves)
    _checks.check_gate(op, activation, clamp_limit, alpha, beta, gated)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // halves))
