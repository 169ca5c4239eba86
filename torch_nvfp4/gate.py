"""The gate of an expert, its activation and its clamp: what the ops, the reference and the decomposition share.

The numbers are part of the op schemas; ``enum class Activation`` in csrc/kernels.h holds the same table, and the
kernels raise the messages of ``gate_error`` word for word.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOAT32_MAX = torch.finfo(torch.float32).max
_FLOAT32_ZERO = 2.0**-150
"""The largest number that fp32 rounds to 0."""

CONSTANT_MIN, CONSTANT_MAX = 2.0**-64, 2.0**64
"""Of alpha and beta where fp32 divides by them or multiplies before an exponential: beyond, it would over- or underflow
for usual values (a beta that rounds to 0 would even take the limit away)."""


class Activation(IntEnum):
    """An activation ``act(gate, up)``, or ``act(up)`` of experts without a gate; ``gated_activation`` and
    ``plain_activation`` have the formulas."""

    silu = 0
    swiglustep = 1
    gelu = 2
    gelu_tanh = 3
    relu2 = 4
    situ = 5

    @property
    def can_clamp(self) -> bool:
        """Whether ``clamp_limit`` is defined for it."""
        return self in (Activation.silu, Activation.swiglustep)

    @property
    def takes_alpha_beta(self) -> bool:
        """Whether ``alpha`` and ``beta`` are defined for it."""
        return self in (Activation.silu, Activation.situ)

    @property
    def works_without_gate(self) -> bool:
        """Whether ``act(up)``, of experts without a gate, is defined for it."""
        return self not in (Activation.swiglustep, Activation.situ)


CLAMP_ACTIVATIONS = frozenset(activation for activation in Activation if activation.can_clamp)
"""The activations that a limit is defined for; a backend that clamps fewer of them says so itself."""


def parse_activation(activation: str | int) -> Activation:
    """The activation of a name (or of a number of the op schemas); ValueError lists what there is."""
    if isinstance(activation, str):
        try:
            return Activation[activation]
        except KeyError:
            names = ", ".join(a.name for a in Activation)
            raise ValueError(f"expected activation to be one of {names}, got {activation!r}") from None
    message = _number_error(activation)
    if message is not None:
        raise ValueError(message)
    return Activation(activation)


def _number_error(activation: int) -> str | None:
    if 0 <= activation < len(Activation):
        return None
    table = ", ".join(f"{a.value} ({a.name})" for a in Activation)
    return f"expected activation to be one of {table}, got {activation}"


def gate_error(activation: int, clamp_limit: float | None, alpha: float, beta: float, gated: bool = True) -> str | None:
    """What is wrong with these parameters of a gate, or None; ``gated=False`` is for experts without one.

    Numbers are formatted as C's ``%g`` (NaN without a sign). Limits are compared after conversion to fp32's range.
    """
    number_error = _number_error(activation)
    if number_error is not None:
        return number_error
    act = Activation(activation)
    # Written so that NaN fails.
    if clamp_limit is not None and not _FLOAT32_ZERO < clamp_limit <= _FLOAT32_MAX:
        return f"expected clamp_limit to be finite and positive (in fp32) or None for no clamp, got {clamp_limit:g}"
    if not gated and not act.works_without_gate:
        names = ", ".join(a.name for a in Activation if a.works_without_gate)
        return f"expected activation to be one of {names} for experts without a gate, got {act.name}"
    if clamp_limit is not None and not gated:
        return (
            "expected clamp_limit to be None for experts without a gate, for which no clamp is defined, "
            f"got {clamp_limit:g}; a clamp is never skipped silently: pass None, or gate and up rows"
        )
    if clamp_limit is not None and not act.can_clamp:
        clampable = " or ".join(a.name for a in Activation if a.can_clamp)
        return (
            f"expected clamp_limit to be None for activation {act.name}, which has no clamp, got {clamp_limit:g}; "
            f"a clamp is never skipped silently: pass None or use {clampable}"
        )
    return _constants_error(act, alpha, beta, gated)


def _constants_error(act: Activation, alpha: float, beta: float, gated: bool) -> str | None:
    got = f"got alpha={alpha:g}, beta={beta:g}"
    if not (abs(alpha) <= _FLOAT32_MAX and abs(beta) <= _FLOAT32_MAX):
        return f"expected alpha and beta to be finite (in fp32), {got}"
    if not gated and (alpha != 1.0 or beta != 0.0):
        return f"expected alpha=1, beta=0 for experts without a gate, {got}"
    if not act.takes_alpha_beta and (alpha != 1.0 or beta != 0.0):
        return f"expected alpha=1, beta=0 for activation {act.name}, which takes neither (only silu and situ do), {got}"
    if act is Activation.situ and not (alpha > 0.0 and beta >= 0.0):
        return f"expected alpha > 0 and beta >= 0 for activation situ (beta=0: up without a limit), {got}"
    if act is Activation.situ and not all(CONSTANT_MIN <= c <= CONSTANT_MAX for c in (alpha, beta or alpha)):
        return f"expected alpha and beta from 2**-64 to 2**64, or beta=0, for activation situ, {got}"
    if abs(alpha) > CONSTANT_MAX:
        return f"expected alpha from -2**64 to 2**64 for activation {act.name}, {got}"
    return None


def check_gate(activation: int, clamp_limit: float | None, alpha: float, beta: float, gated: bool = True) -> None:
    """Raises ValueError with the message of ``gate_error`` if there is one."""
    message = gate_error(activation, clamp_limit, alpha, beta, gated)
    if message is not None:
        raise ValueError(message)


def gate_keywords(activation: int, clamp_limit: float | None, alpha: float, beta: float) -> dict[str, Any]:
    """The gate's keywords of an op, without those that have the schema's default: torch takes 0.3 us for each."""
    keywords: dict[str, Any] = {}
    if activation != 0:
        keywords["activation"] = activation
    if clamp_limit is not None:
        keywords["clamp_limit"] = clamp_limit
    if alpha != 1.0:
        keywords["alpha"] = alpha
    if beta != 0.0:
        keywords["beta"] = beta
    return keywords


@dataclass(frozen=True)
class Gate:
    """Activation, clamp and constants of a gate as one value, from the model's config to the kernel.

    A gate that exists is valid: making one raises ValueError with the message of ``gate_error`` for a limit that is not
    finite and positive, a clamp on an activation that has none, or an unknown activation.

    Attributes:
        activation: also taken by name.
        clamp_limit: finite and positive, or None for no clamp; only silu and swiglustep have one.
        alpha, beta: of silu, ``g * sigmoid(alpha * g) * (u + beta)``, with alpha up to 2^64 of either sign, and of situ
            (see ``gated_activation``), from 2^-64 to 2^64, or beta 0.
        gated: False for experts that have only up rows and no gate (Nemotron-3), whose activation is ``act(up)``.
    """

    activation: Activation = Activation.silu
    clamp_limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    gated: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", parse_activation(self.activation))
        check_gate(self.activation, self.clamp_limit, self.alpha, self.beta, self.gated)

    def kwargs(self) -> dict[str, Any]:
        """The gate's keywords of ``torch.ops.nvfp4.moe``, and of every function that has them.

        Not ``gated``: the ops read it from the shape of w13.
        """
        return {
            "activation": self.activation.value,
            "clamp_limit": self.clamp_limit,
            "alpha": self.alpha,
            "beta": self.beta,
        }

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """``gated_activation`` of gate and up, which have the same shape and dtype; ValueError without a gate."""
        if not self.gated:
            raise ValueError(f"expected a gate with gate and up rows, got {self}; use plain_activation")
        return gated_activation(gate, up, **self.kwargs())

    def __str__(self) -> str:
        constants = "" if (self.alpha, self.beta) == (1.0, 0.0) else f" (alpha {self.alpha:g}, beta {self.beta:g})"
        if not self.gated:
            return f"{self.activation.name} without a gate"
        limit = "no clamp" if self.clamp_limit is None else f"clamp_limit {self.clamp_limit:g}"
        return f"{self.activation.name}{constants}, {limit}"


def gated_activation(
    gate: Tensor,
    up: Tensor,
    activation: int,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """``act(gate, up)`` in the dtype of its inputs, without rounding in between; NaN passes through every clamp.

    Each act(gate) has its limit at infinities: 0 for silu, swiglustep and gelu at minus infinity, not NaN.

    With L = clamp_limit (None: no clamp):

    - silu: ``g' = min(gate, L)``, ``u' = max(min(up, L), -L)``, ``g' * sigmoid(alpha * g') * (u' + beta)``
      (DeepSeek-V4: alpha 1, beta 0, L 10; gpt-oss and MiniMax-M3: 1.702, 1, 7)
    - swiglustep: ``min(silu(gate), L) * clamp(up, -L, L)`` (Step-3.5)
    - gelu (erf), gelu_tanh, relu2 (``relu(gate)^2``): ``act(gate) * up``, no clamp
    - situ: ``alpha * tanh(gate / alpha) * sigmoid(gate) * beta * tanh(up / beta)``, with beta 0
      ``alpha * tanh(gate / alpha) * sigmoid(gate) * up``, no clamp: the tanh are its limits (Kimi-K3, whose config has
      alpha as ``activation_situ_beta``, 4, and beta as ``activation_situ_linear_beta``, 25 or none)

    Raises ValueError (see ``gate_error``).
    """
    check_gate(activation, clamp_limit, alpha, beta)
    act = Activation(activation)
    if clamp_limit is not None:
        up = up.clamp(min=-clamp_limit, max=clamp_limit)
    if act is Activation.silu:
        if clamp_limit is not None:
            gate = gate.clamp(max=clamp_limit)
        return _share_of(gate, torch.sigmoid(alpha * gate)) * (up + beta)
    if act is Activation.swiglustep:
        activated = _share_of(gate, torch.sigmoid(gate))
        return (activated if clamp_limit is None else activated.clamp(max=clamp_limit)) * up
    if act is Activation.situ:
        up = beta * torch.tanh(up / beta) if beta != 0.0 else up
        return alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * up
    if act is Activation.relu2:
        gate = torch.relu(gate)
        return gate * (gate * up)  # overflows where the product does: the square alone may before
    return plain_activation(gate, act) * up


def _share_of(x: Tensor, share: Tensor) -> Tensor:
    """``x * share``, 0 where ``share`` is 0, also where x is infinite: there it tends to 0 faster than x grows."""
    return torch.where(share == 0, 0.0, x) * share


def plain_activation(x: Tensor, activation: int) -> Tensor:
    """``act(x)`` of experts without a gate, in x's dtype: silu, gelu (erf), gelu_tanh, or relu2, ``relu(x)^2``.

    Raises ValueError (see ``gate_error``).
    """
    check_gate(activation, None, 1.0, 0.0, gated=False)
    act = Activation(activation)
    if act is Activation.silu:
        return _share_of(x, torch.sigmoid(x))
    if act is Activation.relu2:
        return torch.relu(x).square()
    # Clamped for minus infinity, of which torch makes NaN.
    x = x.clamp(min=torch.finfo(x.dtype).min)
    return F.gelu(x, approximate="tanh" if act is Activation.gelu_tanh else "none")


def activate(
    x: Tensor,
    activation: int,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    *,
    gated: bool = True,
) -> Tensor:
    """``gated_activation`` of the halves of x [..., 2I], gate columns first -> [..., I], or, with ``gated=False``,
    ``plain_activation`` of x."""
    check_gate(activation, clamp_limit, alpha, beta, gated)
    if not gated:
        return plain_activation(x, activation)
    gate, up = x.chunk(2, dim=-1)
    return gated_activation(gate, up, activation, clamp_limit, alpha, beta)
