"""The MLPs of experts whose tokens somebody else has brought together, as DeepEP's low-latency dispatch does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.gate import gate_keywords, parse_activation
from torch_nvfp4.ops import _checks
from torch_nvfp4.ops._library import below_autograd, register_fake
from torch_nvfp4.ops.batch_invariance import refuse_batch_invariance
from torch_nvfp4.ops.optional import optional_arguments


def batched_moe(
    hidden_states: Tensor,
    w13: Tensor,
    w13_global_scale: Tensor,
    w2: Tensor,
    w2_global_scale: Tensor,
    expert_num_tokens: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    *,
    activation: str | int = "silu",
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """For every expert e and t below ``expert_num_tokens[e]``,
    ``w2[e] @ act(w13[e] @ hidden_states[e, t] + w13_bias[e]) + w2_bias[e]``.

    Rows at and behind an expert's count are not read and may hold anything. No router weight acts here: the sum over a
    token's experts is for whoever spread the tokens. The counts stay on the device, and the work is that of the counted
    rows, not of E * T; on CUDA nothing waits for the host, so that a captured call follows the counts of each replay.
    The clamp and the sums are those of ``moe``; ``torch_nvfp4.reference.batched_moe`` is the specification.

    Args:
        hidden_states: [E, T, K] bfloat16 or float16, on the CPU also float32; K a multiple of 16. E experts are here.
        w13, w13_global_scale, w2, w2_global_scale: as in ``moe``.
        expert_num_tokens: [E] int32, how many of its T rows an expert has been given. Counts outside [0, T] are an
            error on the CPU; CUDA, which cannot wait for them, takes negative ones for 0 and larger ones for T.
        w13_bias, w2_bias, activation, clamp_limit, alpha, beta: as in ``moe``.
        out: a buffer for the result (``nvfp4::batched_moe.out``), on which the rules are those of ``moe``. Rows at and
            behind the counts are left as they are.

    Returns [E, T, K] in hidden_states' dtype, ``out`` if that is given, else with zeros at and behind the counts.
    No tensor may change while the op runs: counts that do lead to undefined values, not out of the tensors.

    Nothing has a gradient here: one that is asked for raises NotImplementedError in backward.

    Raises what ``moe`` raises, and NotImplementedError under ``set_batch_invariant(True)``: what is summed by how many
    warps follows from the counts.
    """
    refuse_batch_invariance("batched_moe")
    gate = gate_keywords(parse_activation(activation).value, clamp_limit, alpha, beta)
    arguments: tuple[Any, ...] = (hidden_states, w13, w13_global_scale, w2, w2_global_scale, expert_num_tokens)
    arguments += optional_arguments(w13_bias, w2_bias)
    if out is None:
        floats = (hidden_states, w13_global_scale, w2_global_scale, w13_bias, w2_bias)
        return call_batched_moe(floats, arguments, gate)
    torch.ops.nvfp4.batched_moe.out(*arguments, **gate, out=out)
    return out


call_batched_moe = below_autograd("batched_moe")
"""The op past the autograd kernel where there is nothing to differentiate."""


def _check(
    op: str,
    hidden_states: Tensor,
    w13: Tensor,
    w13_global_scale: Tensor,
    w2: Tensor,
    w2_global_scale: Tensor,
    expert_num_tokens: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    activation: int,
    clamp_limit: float | None,
    alpha: float,
    beta: float,
) -> None:
    like = "hidden_states"
    _checks.check_activations(op, like, hidden_states, ["E", "T", "K"])
    _checks.check_k(op, like, hidden_states)
    experts, rows, k = hidden_states.shape
    gated = _checks.has_gate(w13, w13_global_scale, hidden_states)
    n = _checks.check_weight(
        op, "w13", w13, w13_global_scale, like, hidden_states, batched=True, gated=gated, experts=experts, k=k
    )  # fmt: skip
    features = n // 2 if gated else n
    _checks.check_weight(
        op, "w2", w2, w2_global_scale, like, hidden_states, batched=True, gated=False, experts=experts, n=k, k=features
    )  # fmt: skip
    _checks.check_tensor(op, "expert_num_tokens", expert_num_tokens, like, hidden_states, (torch.int32,), [experts])
    _checks.check_count(op, "E * T", experts * rows, hidden_states)
    _checks.check_bias(op, "w13_bias", w13_bias, like, hidden_states, experts, n)
    _checks.check_bias(op, "w2_bias", w2_bias, like, hidden_states, experts, k)
    _checks.check_gate(op, activation, clamp_limit, alpha, beta, gated)


@register_fake("batched_moe")
def _(
    hidden_states: Tensor,
    w13: Tensor,
    w13_global_scale: Tensor,
    w2: Tensor,
    w2_global_scale: Tensor,
    expert_num_tokens: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    *,
    activation: int = 0,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    _check(
        "batched_moe", hidden_states, w13, w13_global_scale, w2, w2_global_scale, expert_num_tokens, w13_bias,
        w2_bias, activation, clamp_limit, alpha, beta,
    )  # fmt: skip
    return torch.empty_like(hidden_states)


@register_fake("batched_moe.out")
def _(
    hidden_states: Tensor,
    w13: Tensor,
    w13_global_scale: Tensor,
    w2: Tensor,
    w2_global_scale: Tensor,
    expert_num_tokens: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    *,
    activation: int = 0,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor,
) -> None:
    op = "batched_moe.out"
    _check(
        op, hidden_states, w13, w13_global_scale, w2, w2_global_scale, expert_num_tokens, w13_bias, w2_bias,
        activation, clamp_limit, alpha, beta,
    )  # fmt: skip
    _checks.check_out(op, out, "hidden_states", hidden_states)
