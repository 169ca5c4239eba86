"""The offline change of weight layout, and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_nvfp4.format import NVFP4Weight, validate
from torch_nvfp4.ops import _checks
from torch_nvfp4.ops._library import register_fake
from torch_nvfp4.ops.fp8_order import from_fp8_order


def pack(weight: NVFP4Weight, *, gated: bool = False, input_quant: str | None = None) -> Tensor:
    """Codes and block scales in the order in which the kernels of the weight's device read them.

    The result's shape names its layout, so that a tensor packed for another device, for the other ``gated``, or for a K
    that rounds up to another multiple of 64 is an error and never garbage. CPU: [..., N, ceil(K / 64), 36]; CUDA:
    [..., N, R] with R the bytes a row takes once rows and K are padded to 64. With ``gated``, [..., 2, I, ...] in the
    place of N.

    Args:
        weight: NVFP4Weight [N, K] or [E, N, K]; K and N (gated: N / 2) multiples of 16. Its global scale is not packed:
            pass it to the op beside the packed weight.
        gated: rows are gate rows, then up rows, to be interleaved for an op with a gated activation.
        input_quant: "fp8" packs experts for ``moe(..., input_quant="fp8")`` and nothing else, as int8 (CUDA only).

    Returns uint8, 0.5625 byte per value where N and K are multiples of 64. Raises TypeError or ValueError for a weight
    that is not valid NVFP4 (NaN scales included), RuntimeError (expected and got) for sizes that do not fit.

    The op itself, ``torch.ops.nvfp4.pack``, refuses NaN scales on the CPU only: on CUDA it would have to wait for the
    device. The kernels take E4M3's NaN bytes, 0x7F and 0xFF, for the next numbers, 480 and -480.
    """
    check_input_quant(input_quant)
    validate(weight, gated=gated)
    packed = torch.ops.nvfp4.pack(weight.data.contiguous(), weight.scale.view(torch.uint8).contiguous(), gated)
    if input_quant is None:
        return packed
    return torch.ops.nvfp4.order_for_fp8(packed, weight.data.shape[-1] * 2, gated)


def check_input_quant(input_quant: str | None) -> None:
    if input_quant not in (None, "fp8"):
        raise ValueError(f"input_quant: expected None or 'fp8', got {input_quant!r}")


def unpack(packed: Tensor, in_features: int, global_scale: Tensor, *, gated: bool = False) -> NVFP4Weight:
    """The exact inverse of ``pack``: every code and every scale byte comes back.

    Args:
        packed: from ``pack``, on the device it was packed for; int8 from ``pack(..., input_quant="fp8")`` or
            ``order_for_fp8``.
        in_features: K.
        global_scale: of the weight, passed through.
        gated: as it was packed.

    Raises RuntimeError (expected and got) where the shape does not fit.
    """
    if packed.dtype == torch.int8:
        op, name = "unpack", "packed"
        _checks.check_on_cuda(op, packed)
        _checks.check_in_features(op, in_features)
        rows = _checks.check_packed(
            op, name, packed, name, packed, batched=True, gated=gated, k=in_features, dtype=torch.int8
        )
        packed = from_fp8_order(packed, rows, in_features)
    data, scale = torch.ops.nvfp4.unpack(packed, in_features, gated)
    return NVFP4Weight(data, scale.view(torch.float8_e4m3fn), global_scale)


@register_fake("pack")
def _(weight: Tensor, scale: Tensor, gated: bool = False) -> Tensor:
    op = "pack"
    batched = weight.dim() != 2
    _checks.check_tensor(
        op, "weight", weight, "weight", weight, (torch.uint8,), ["E", "N", "K / 2"] if batched else ["N", "K / 2"],
        " or [N, K / 2]" if batched else "",
    )  # fmt: skip
    n, row_bytes = weight.shape[-2:]
    if isinstance(row_bytes, int) and row_bytes >= _checks.INDEX_LIMIT // 2:
        _checks.fail(op, f"weight's last dimension K / 2 must be below 2**30, got {row_bytes}")
    k = 2 * row_bytes
    _checks.check_in_features(op, k)
    _checks.check_out_features(op, n, gated)
    lead = [weight.shape[0]] if batched else []
    _checks.check_tensor(op, "scale", scale, "weight", weight, (torch.float8_e4m3fn, torch.uint8), [*lead, n, k // 16])
    shape = _checks.packed_shape(weight, weight.shape[0] if batched else None, n, k, gated)
    return _checks.new_empty(op, "the packed weight", weight, shape)


@register_fake("unpack")
def _(packed: Tensor, in_features: int, gated: bool = False) -> tuple[Tensor, Tensor]:
    op = "unpack"
    _checks.check_in_features(op, in_features)
    plain_rank = (2 if gated else 1) + (1 if _checks.is_cuda(packed) else 2)
    batched = packed.dim() != plain_rank
    n = _checks.check_packed(
        op, "packed", packed, "packed", packed, batched=batched, gated=gated, k=in_features, may_be_empty=True
    )
    lead = [packed.shape[0]] if batched else []
    return packed.new_empty([*lead, n, in_features // 2]), packed.new_empty([*lead, n, in_features // 16])
