"""A dense layer with NVFP4 weights and 16-bit activations."""

from __future__ import annotations

from torch import Tensor

from torch_nvfp4.ops import _checks
from torch_nvfp4.ops._library import below_autograd, register_fake
from torch_nvfp4.ops.batch_invariance import invariance_keywords


def linear(
    x: Tensor,
    weight: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    *,
    batch_invariant: bool | None = None,
) -> Tensor:
    """``x @ W^T + bias``, accumulated in fp32 and rounded once.

    Args:
        x: [..., K] bfloat16 or float16, on the CPU also float32; K a multiple of 16.
        weight: ``pack`` of [N, K], gated or not.
        global_scale: float32 [], or [2] (gate, up) for a weight packed with gated=True.
        bias: [N] in x's dtype.
        batch_invariant: a row's bits depend on nothing but the row; None: as ``set_batch_invariant`` says.

    Returns [..., N] in x's dtype, gate columns before up columns. Under ``torch.autocast`` float32 x and bias are
    rounded to its dtype first, as in ``torch.nn.functional.linear``.

    Raises RuntimeError (expected and got). x and bias have gradients (reverse mode, once); another that is asked for
    raises NotImplementedError in backward.
    """
    return _call((x, global_scale, bias), (x, weight, global_scale, bias), invariance_keywords(batch_invariant))


_call = below_autograd("linear")


@register_fake("linear")
def _(
    x: Tensor,
    weight: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    op = "linear"
    _checks.check_activations(op, "x", x, _checks.any_shape(x, "K"))
    _checks.check_k(op, "x", x)
    gated = _checks.is_gated(op, global_scale, batched=False)
    n = _checks.check_weight(op, "weight", weight, global_scale, "x", x, batched=False, gated=gated, k=x.shape[-1])
    _checks.check_count(op, "the number of x's rows", x.numel() // x.shape[-1], x)
    if bias is not None:
        _checks.check_tensor(op, "bias", bias, "x", x, (x.dtype,), [n])
    return _checks.new_empty(op, "out", x, (*x.shape[:-1], n))
