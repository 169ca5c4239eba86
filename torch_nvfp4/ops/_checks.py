"""Argument checks of the fakes: the same words, in the same order, as csrc/ops/checks.cpp raises from the kernels.

Shapes may be symbolic; an unbacked size is compared through ``torch._check`` and so becomes a runtime assertion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_nvfp4.format import GROUP_SIZE
from torch_nvfp4.gate import gate_error

INDEX_LIMIT = 2**31
"""Experts, K and N stay below it: kernels count them in int32."""

Dim = int | torch.SymInt | str  # a size, or a letter where any size will do

_ACTIVATIONS = {
    "cuda": (torch.bfloat16, torch.float16),
    "cpu": (torch.bfloat16, torch.float16, torch.float32),
}


def fail(op: str, message: str) -> None:
    raise RuntimeError(f"nvfp4::{op}: {message}")


def is_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def check_on_cuda(op: str, like: Tensor) -> None:
    """Of ops with FP8 activations, and of what is packed for them."""
    if not is_cuda(like):
        fail(op, "expected tensors on a CUDA device, got them on the cpu, which has no kernels for FP8; use moe")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(items: Sequence[Dim]) -> str:
    return "[" + ", ".join(map(str, items)) + "]"


def check_tensor(
    op: str, name: str, tensor: Tensor, like_name: str, like: Tensor, dtypes: Sequence[torch.dtype],
    dims: Sequence[Dim], note: str = "", advice: str = "call .contiguous() first",
) -> None:  # fmt: skip
    """dtype, device (that of ``like``), shape and contiguity; ``note`` follows the expected shape, ``advice`` what is
    not contiguous. Alignment in memory is for the kernels to check."""
    if tensor.dtype not in dtypes:
        fail(op, f"{name} must be {' or '.join(map(_dtype_name, dtypes))}, got {_dtype_name(tensor.dtype)}")
    if tensor.device != like.device:
        fail(op, f"{name} must be on {like.device} like {like_name}, got {tensor.device}")

    def shape_error() -> str:
        return f"nvfp4::{op}: {name} must have shape {_list(dims)}{note}, got {_list(tensor.shape)}"

    if tensor.dim() != len(dims):
        raise RuntimeError(shape_error())
    for size, dim in zip(tensor.shape, dims, strict=True):
        if not isinstance(dim, str):
            torch._check(size == dim, shape_error)
    if not tensor.is_contiguous():
        fail(
            op,
            f"{name} must be contiguous, got a tensor of shape {_list(tensor.shape)} that is not; {advice}",
        )


def check_out(op: str, out: Tensor, like_name: str, like: Tensor) -> None:
    """A buffer for the result, which is as ``like``. That it shares no memory with what the op reads, and where it
    begins, is for the kernels to check."""
    check_tensor(op, "out", out, like_name, like, (like.dtype,), like.shape, advice="take one from torch.empty")


def check_activations(op: str, name: str, tensor: Tensor, dims: Sequence[Dim]) -> None:
    check_tensor(op, name, tensor, name, tensor, _ACTIVATIONS["cuda" if is_cuda(tensor) else "cpu"], dims)


def check_last_dim(op: str, name: str, tensor: Tensor, multiple: int) -> None:
    size = tensor.shape[-1] if tensor.dim() else 0
    if size <= 0 or size % multiple:
        fail(op, f"{name}'s last dimension must be a positive multiple of {multiple}, got {size}")


def _too_many(count: int, limit: int = INDEX_LIMIT) -> bool:
    """A symbolic count passes: asking it would become a guard, and the kernel asks the real one."""
    return isinstance(count, int) and count >= limit


def check_k(op: str, name: str, tensor: Tensor) -> None:
    """The last dimension of activations that a weight is multiplied with."""
    check_last_dim(op, name, tensor, GROUP_SIZE)
    if _too_many(tensor.shape[-1]):
        fail(op, f"{name}'s last dimension must be below 2**31, got {tensor.shape[-1]}")


def check_count(op: str, what: str, count: int, like: Tensor) -> None:
    """A number of slots or rows, for the device of ``like``."""
    bits = 30 if is_cuda(like) else 31
    if _too_many(count, 2**bits):
        fail(op, f"{what} must be below 2**{bits}, got {count}; split the batch")


def new_empty(op: str, what: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty``, with the kernels' words where no memory could ever hold the result."""
    dtype = dtype or like.dtype
    if all(isinstance(size, int) for size in shape) and math.prod(shape) * dtype.itemsize >= 2**63:
        fail(
            op,
            f"expected to allocate 2**63 or more bytes of memory for {what} {_list(shape)} on {like.device}, got none; "
            "use a smaller batch or free memory",
        )
    return like.new_empty(shape, dtype=dtype)


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def _packed_tail(cuda: bool, n: int, k: int) -> list[int]:
    if not cuda:
        return [_round_up(k, 64) // 64, 36]
    return [(_round_up(n, 64) * _round_up(k, 64) // 16 * 9 + n - 1) // n]


def packed_shape(like: Tensor, experts: int | None, n: int, k: int, gated: bool) -> list[int]:
    """The shape of pack()'s result on the device of ``like``."""
    lead = [] if experts is None else [experts]
    rows = [2, n // 2] if gated else [n]
    return [*lead, *rows, *_packed_tail(is_cuda(like), n, k)]


def is_gated(op: str, global_scale: Tensor, batched: bool) -> bool:
    """global_scale's rank says whether the weight was packed with gated=True."""
    plain = 1 if batched else 0
    if global_scale.dim() not in (plain, plain + 1):
        shapes = "[E], or [E, 2]" if batched else "[], or [2]"
        fail(
            op,
            f"global_scale must have shape {shapes} for a weight packed with gated=True, "
            f"got {_list(global_scale.shape)}",
        )
    return global_scale.dim() == plain + 1


def has_gate(w13: Tensor, global_scale: Tensor, like: Tensor) -> bool:
    """Whether w13 of ``moe`` has gate and up rows: as many dimensions as pack(gated=True) gives, or a pair of global
    scales. A w13 that is neither packed so nor so is taken for one that should have a gate."""
    plain_rank = 2 + len(_packed_tail(is_cuda(like), GROUP_SIZE, GROUP_SIZE))
    return w13.dim() != plain_rank or global_scale.dim() == 2


def check_packed(
    op: str, name: str, packed: Tensor, like_name: str, like: Tensor, *, batched: bool, gated: bool,
    experts: int | None = None, n: int | None = None, k: int, may_be_empty: bool = False,
    dtype: torch.dtype = torch.uint8,
) -> int:  # fmt: skip
    """Checks pack()'s result against what is known of its size, and returns its output rows (2I when gated).

    may_be_empty: no experts will do. dtype: int8 where the codes are in the order for FP8.
    """
    halves = 2 if gated else 1
    cuda = is_cuda(like)
    dims: list[Dim] = []
    if batched:
        dims.append("E" if experts is None else experts)
    if gated:
        dims.append(2)
    row_dim = len(dims)
    dims.append(("I" if gated else "N") if n is None else n // halves)
    if n is None and packed.dim() == row_dim + 1 + len(_packed_tail(cuda, GROUP_SIZE, k)):
        rows = packed.shape[row_dim]
        if _too_many(rows, INDEX_LIMIT // halves):
            fail(op, f"{name}'s dimension {row_dim} must be below 2**{30 if gated else 31}, got {rows}")
        n = rows * halves
    if n or not cuda:
        dims.extend(_packed_tail(cuda, n or GROUP_SIZE, k))
    else:
        dims.append("R")
    where = "cuda" if cuda else "cpu"
    note = f", as torch_nvfp4.pack(gated={gated}) gives on {where} for K = {k}"
    check_tensor(op, name, packed, like_name, like, (dtype,), dims, note)
    assert n is not None
    if n <= 0 or n // halves % GROUP_SIZE:
        fail(op, f"{name}'s dimension {row_dim} must be a positive multiple of 16, got {n // halves}")
    if batched and packed.shape[0] == 0 and not may_be_empty:
        fail(op, f"{name} must hold at least one expert, got 0")
    if batched and _too_many(packed.shape[0]):
        fail(op, f"{name} must hold fewer than 2**31 experts, got {packed.shape[0]}")
    return n


def check_weight(
    op: str, name: str, packed: Tensor, global_scale: Tensor, like_name: str, like: Tensor, *, batched: bool,
    gated: bool, experts: int | None = None, n: int | None = None, k: int, dtype: torch.dtype = torch.uint8,
) -> int:  # fmt: skip
    """``check_packed`` and its global scale."""
    n = check_packed(
        op, name, packed, like_name, like, batched=batched, gated=gated, experts=experts, n=n, k=k, dtype=dtype
    )  # fmt: skip
    scale_dims: list[Dim] = [packed.shape[0]] if batched else []
    if gated:
        scale_dims.append(2)
    scale_name = "global_scale" if name == "weight" else f"{name}_global_scale"
    check_tensor(op, scale_name, global_scale, like_name, like, (torch.float32,), scale_dims)
    return n


def check_in_features(op: str, k: int) -> None:
    if k <= 0 or k % GROUP_SIZE:
        fail(op, f"the weight's input dimension K must be a positive multiple of 16, got {k}")
    if _too_many(k):
        fail(op, f"the weight's input dimension K must be below 2**31, got {k}")


def check_out_features(op: str, n: int, gated: bool) -> None:
    multiple = 2 * GROUP_SIZE if gated else GROUP_SIZE
    if n <= 0 or n % multiple:
        which = " (gated=True)" if gated else ""
        fail(op, f"the weight's output dimension N must be a positive multiple of {multiple}{which}, got {n}")
    if _too_many(n):
        fail(op, f"the weight's output dimension N must be below 2**31, got {n}")


def check_num_experts(op: str, num_experts: int) -> None:
    if num_experts <= 0:
        fail(op, f"num_experts must be positive, got {num_experts}")
    if _too_many(num_experts):
        fail(op, f"num_experts must be below 2**31, where offsets take 8 GiB of memory, got {num_experts}")


def check_bias(
    op: str, name: str, bias: Tensor | None, like_name: str, like: Tensor, experts: int, n: int
) -> None:  # fmt: skip
    if bias is not None:
        check_tensor(op, name, bias, like_name, like, (torch.float32,), [experts, n])


def check_gate(
    op: str, activation: int, clamp_limit: float | None, alpha: float, beta: float, gated: bool = True
) -> None:
    message = gate_error(activation, clamp_limit, alpha, beta, gated)
    if message is not None:
        fail(op, message)


def check_routing(
    op: str, topk_ids: Tensor, expert_map: Tensor | None, dims: Sequence[Dim], like_name: str, like: Tensor
) -> None:
    check_tensor(op, "topk_ids", topk_ids, like_name, like, (torch.int32, torch.int64), dims)
    if expert_map is not None:
        check_tensor(op, "expert_map", expert_map, like_name, like, (torch.int32,), ["global_experts"])
    check_count(op, "M * top_k", topk_ids.numel(), topk_ids)


def any_shape(tensor: Tensor, last: str) -> list[Dim]:
    """The dimensions of a tensor of any rank >= 1 whose last dimension is called ``last``."""
    return [*tensor.shape[:-1], last]
