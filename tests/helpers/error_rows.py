"""One line per bad input of an op: the words that kernel and fake raise, and the arguments that are changed for it.

To add a row, copy one. The other arguments are those of ``good_arguments`` in tests/ops/test_errors.py: M = 5 tokens,
top_k = 2, E = 3 local experts of 6, K = 80, I = 32, N = 48. The words stand here without the op's name in front;
``{device}``, ``{elsewhere}``, ``{activations}`` and ``{backend}`` are filled in for the backend that is tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Change = Callable[[Any], Any]


class Row(NamedTuple):
    words: str
    changes: dict[str, Any]  # by argument: its new value, or a function of its good value
    backends: tuple[str, ...]

    def expected(self, op: str, backend: str) -> str:
        """The whole message on ``backend``, "cpu" or "cuda"."""
        return f"nvfp4::{op}: " + self.words.format(**WORDS[backend], backend=backend)

    def arguments(self, good: dict[str, Any]) -> dict[str, Any]:
        """``good`` with the row's changes."""
        changed = {name: new(good[name]) if callable(new) else new for name, new in self.changes.items()}
        return {**good, **changed}


WORDS = {
    "cpu": {"device": "cpu", "elsewhere": "meta", "activations": "bfloat16 or float16 or float32"},
    "cuda": {"device": "cuda:0", "elsewhere": "cpu", "activations": "bfloat16 or float16"},
}


def bad(words: str, **changes: Any) -> Row:
    """A row for every backend."""
    return Row(words, changes, ("cpu", "cuda"))


def cpu(words: str, **changes: Any) -> Row:
    """A row about the layout that the CPU packs: [..., N, ceil(K / 64), 36]."""
    return Row(words, changes, ("cpu",))


def cuda(words: str, **changes: Any) -> Row:
    """A row about the layout that CUDA packs: [..., N, R]."""
    return Row(words, changes, ("cuda",))


def dtype(wanted: torch.dtype) -> Change:
    """Zeros of the same shape in another dtype."""
    return lambda good: torch.zeros_like(good, dtype=wanted)


def viewed(wanted: torch.dtype) -> Change:
    """The same bytes as another dtype."""
    return lambda good: good.view(wanted)


def shape(*sizes: int) -> Change:
    """Zeros of another shape."""
    return lambda good: good.new_zeros(sizes)


def elsewhere(good: Tensor) -> Tensor:
    """The same tensor on another device."""
    return good.to("cpu" if good.is_cuda else "meta")


def strided(good: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return good.unsqueeze(-1).repeat(*[1] * good.dim(), 2)[..., 0]


STRIDED = "that is not; call .contiguous() first"
IN_FEATURES = "the weight's input dimension K must be a positive multiple of 16"
OUT_FEATURES = "the weight's output dimension N must be a positive multiple of"
IF_GATED = " for a weight packed with gated=True"
PLAIN_32, PLAIN_64, PLAIN_80, PLAIN_144 = (
    f", as torch_nvfp4.pack(gated=False) gives on {{backend}} for K = {k}" for k in (32, 64, 80, 144)
)
GATED_80, GATED_144 = (f", as torch_nvfp4.pack(gated=True) gives on {{backend}} for K = {k}" for k in (80, 144))
ACTIVATIONS = "expected activation to be one of 0 (silu), 1 (swiglustep), 2 (gelu), 3 (gelu_tanh), 4 (relu2), 5 (situ)"
LIMIT = "expected clamp_limit to be finite and positive (in fp32) or None for no clamp"
NO_CLAMP = ", which has no clamp, got 7; a clamp is never skipped silently: pass None or use silu or swiglustep"
SITU = "expected alpha > 0 and beta >= 0 for activation situ (beta=0: up without a limit)"
SITU_RANGE = "expected alpha and beta from 2**-64 to 2**64, or beta=0, for activation situ"
NO_ALPHA_BETA = "expected alpha=1, beta=0 for activation"
NO_CONSTANTS = ", which takes neither (only silu and situ do)"

# The gate, of every op that has one.
GATE = [
    bad(f"{ACTIVATIONS}, got -1", activation=-1),
    bad(f"{ACTIVATIONS}, got 6", activation=6),
    bad(f"{LIMIT}, got 0", clamp_limit=0.0),
    bad(f"{LIMIT}, got -0", clamp_limit=-0.0),
    bad(f"{LIMIT}, got -1", clamp_limit=-1.0),
    bad(f"{LIMIT}, got nan", clamp_limit=math.nan),
    bad(f"{LIMIT}, got nan", clamp_limit=-math.nan),
    bad(f"{LIMIT}, got inf", clamp_limit=math.inf),
    bad(f"{LIMIT}, got 1e-46", clamp_limit=1e-46),  # 0 in fp32
    bad(f"{LIMIT}, got 7.00649e-46", clamp_limit=2.0**-150),
    bad(f"{LIMIT}, got -inf", clamp_limit=-math.inf),
    bad(f"{LIMIT}, got 1e+39", clamp_limit=1e39),
    bad(f"expected clamp_limit to be None for activation gelu{NO_CLAMP}", activation=2),
    bad(f"expected clamp_limit to be None for activation gelu_tanh{NO_CLAMP}", activation=3),
    bad(f"expected clamp_limit to be None for activation relu2{NO_CLAMP}", activation=4),
    bad("expected alpha and beta to be finite (in fp32), got alpha=nan, beta=0", alpha=math.nan),
    bad("expected alpha and beta to be finite (in fp32), got alpha=-inf, beta=0", alpha=-math.inf),
    bad("expected alpha and beta to be finite (in fp32), got alpha=1, beta=inf", beta=math.inf),
    bad("expected alpha and beta to be finite (in fp32), got alpha=1, beta=1e+300", beta=1e300),
    bad(
        f"{NO_ALPHA_BETA} swiglustep{NO_CONSTANTS}, got alpha=1.702, beta=0", activation=1, clamp_limit=7.0, alpha=1.702
    ),
    bad(f"{NO_ALPHA_BETA} swiglustep{NO_CONSTANTS}, got alpha=1, beta=1", activation=1, clamp_limit=7.0, beta=1.0),
    bad(f"{NO_ALPHA_BETA} relu2{NO_CONSTANTS}, got alpha=1.702, beta=0", activation=4, clamp_limit=None, alpha=1.702),
    bad(f"{NO_ALPHA_BETA} relu2{NO_CONSTANTS}, got alpha=1, beta=1", activation=4, clamp_limit=None, beta=1.0),
    bad(f"expected clamp_limit to be None for activation situ{NO_CLAMP}", activation=5),
    bad(f"{SITU}, got alpha=0, beta=25", activation=5, clamp_limit=None, alpha=0.0, beta=25.0),
    bad(f"{SITU}, got alpha=-4, beta=0", activation=5, clamp_limit=None, alpha=-4.0),
    bad(f"{SITU}, got alpha=4, beta=-25", activation=5, clamp_limit=None, alpha=4.0, beta=-25.0),
    # fp32 has no such beta but 0, which would be no limit; and 1 / 3e38 is subnormal.
    bad(f"{SITU_RANGE}, got alpha=4, beta=1e-46", activation=5, clamp_limit=None, alpha=4.0, beta=1e-46),
    bad(f"{SITU_RANGE}, got alpha=4, beta=3e+38", activation=5, clamp_limit=None, alpha=4.0, beta=3e38),
    bad(f"{SITU_RANGE}, got alpha=1e-46, beta=0", activation=5, clamp_limit=None, alpha=1e-46),
    bad(f"{SITU_RANGE}, got alpha=3e+38, beta=25", activation=5, clamp_limit=None, alpha=3e38, beta=25.0),
    # 3e38 * log2(e) is infinite, and 0 times that NaN.
    bad("expected alpha from -2**64 to 2**64 for activation silu, got alpha=-3e+38, beta=0", activation=0, alpha=-3e38),
]

# The gate of every op whose weight has none; the good arguments are then those of relu2.
WITHOUT_GATE = "for experts without a gate"
PLAIN_GATE = [
    bad(f"{ACTIVATIONS}, got 6", activation=6),
    bad(f"expected activation to be one of silu, gelu, gelu_tanh, relu2 {WITHOUT_GATE}, got swiglustep", activation=1),
    bad(f"expected activation to be one of silu, gelu, gelu_tanh, relu2 {WITHOUT_GATE}, got situ", activation=5),
    bad(f"{LIMIT}, got 0", clamp_limit=0.0),
    *(
        bad(
            f"expected clamp_limit to be None {WITHOUT_GATE}, for which no clamp is defined, got 7; a clamp is never "
            "skipped silently: pass None, or gate and up rows",
            activation=activation,
            clamp_limit=7.0,
        )
        for activation in (0, 2, 4)
    ),
    bad("expected alpha and beta to be finite (in fp32), got alpha=nan, beta=0", alpha=math.nan),
    bad(f"expected alpha=1, beta=0 {WITHOUT_GATE}, got alpha=1.702, beta=0", activation=0, alpha=1.702),
    bad(f"expected alpha=1, beta=0 {WITHOUT_GATE}, got alpha=1, beta=1", activation=4, beta=1.0),
]


def bias_rows(name: str, like: str, *sizes: int) -> list[Row]:
    """The rows of a bias of these sizes."""
    more, got = [size + 1 for size in sizes], list(sizes)
    return [
        bad(f"{name} must be float32, got bfloat16", **{name: dtype(torch.bfloat16)}),
        bad(f"{name} must be on {{device}} like {like}, got {{elsewhere}}", **{name: elsewhere}),
        bad(f"{name} must be contiguous, got a tensor of shape {got} {STRIDED}", **{name: strided}),
        bad(f"{name} must have shape {got}, got {more}", **{name: shape(*more)}),
        bad(f"{name} must have shape {got}, got {got[1:]}", **{name: shape(*got[1:])}),
    ]


MOE = [
    bad("hidden_states must be {activations}, got float64", hidden_states=dtype(torch.float64)),
    bad(f"hidden_states must be contiguous, got a tensor of shape [5, 80] {STRIDED}", hidden_states=strided),
    bad("hidden_states must have shape [M, K], got [80]", hidden_states=shape(80)),
    bad("hidden_states's last dimension must be a positive multiple of 16, got 0", hidden_states=shape(5, 0)),
    bad("hidden_states's last dimension must be a positive multiple of 16, got 88", hidden_states=shape(5, 88)),
    bad("w13 must be uint8, got int8", w13=dtype(torch.int8)),
    bad("w13 must be on {device} like hidden_states, got {elsewhere}", w13=elsewhere),
    cpu(f"w13 must be contiguous, got a tensor of shape [3, 2, 32, 2, 36] {STRIDED}", w13=strided),
    cpu(f"w13 must have shape [E, 2, I, 2, 36]{GATED_80}, got [3, 64, 2, 36]", w13=shape(3, 64, 2, 36)),
    cpu(f"w13 must have shape [E, 2, I, 2, 36]{GATED_80}, got [3, 2, 32, 72]", w13=shape(3, 2, 32, 72)),
    cpu(f"w13 must have shape [E, 2, I, 2, 36]{GATED_80}, got [2, 32, 2, 36]", w13=shape(2, 32, 2, 36)),
    cpu("w13's dimension 2 must be a positive multiple of 16, got 0", w13=shape(3, 2, 0, 2, 36)),
    cpu("w13's dimension 2 must be a positive multiple of 16, got 24", w13=shape(3, 2, 24, 2, 36)),
    cpu(f"w13 must have shape [E, 2, I, 3, 36]{GATED_144}, got [3, 2, 32, 2, 36]", hidden_states=shape(5, 144)),
    cpu("w13 must hold at least one expert, got 0", w13=shape(0, 2, 32, 2, 36)),
    cuda(f"w13 must be contiguous, got a tensor of shape [3, 2, 32, 72] {STRIDED}", w13=strided),
    cuda(f"w13 must have shape [E, 2, I, R]{GATED_80}, got [3, 64, 72]", w13=shape(3, 64, 72)),
    cuda(f"w13 must have shape [E, 2, I, R]{GATED_80}, got [3, 2, 32, 2, 36]", w13=shape(3, 2, 32, 2, 36)),
    cuda(f"w13 must have shape [E, 2, I, R]{GATED_80}, got [2, 32, 72]", w13=shape(2, 32, 72)),
    cuda(f"w13 must have shape [E, 2, I, 108]{GATED_144}, got [3, 2, 32, 72]", hidden_states=shape(5, 144)),
    cuda("w13 must hold at least one expert, got 0", w13=shape(0, 2, 32, 72)),
    bad("w13_global_scale must be float32, got float64", w13_global_scale=dtype(torch.float64)),
    bad("w13_global_scale must be on {device} like hidden_states, got {elsewhere}", w13_global_scale=elsewhere),
    bad(f"w13_global_scale must be contiguous, got a tensor of shape [3, 2] {STRIDED}", w13_global_scale=strided),
    bad("w13_global_scale must have shape [3, 2], got [3]", w13_global_scale=shape(3)),
    bad("w2 must be uint8, got int8", w2=dtype(torch.int8)),
    bad("w2 must be on {device} like hidden_states, got {elsewhere}", w2=elsewhere),
    cpu(f"w2 must be contiguous, got a tensor of shape [3, 80, 1, 36] {STRIDED}", w2=strided),
    cpu(f"w2 must have shape [3, 80, 1, 36]{PLAIN_32}, got [4, 80, 1, 36]", w2=shape(4, 80, 1, 36)),
    cpu(f"w2 must have shape [3, 80, 1, 36]{PLAIN_32}, got [3, 96, 1, 36]", w2=shape(3, 96, 1, 36)),
    cpu(f"w2 must have shape [3, 80, 1, 36]{PLAIN_32}, got [3, 80, 2, 36]", w2=shape(3, 80, 2, 36)),
    cpu(f"w2 must have shape [3, 80, 1, 36]{PLAIN_32}, got [3, 2, 40, 1, 36]", w2=shape(3, 2, 40, 1, 36)),
    cuda(f"w2 must be contiguous, got a tensor of shape [3, 80, 58] {STRIDED}", w2=strided),
    cuda(f"w2 must have shape [3, 80, 58]{PLAIN_32}, got [4, 80, 58]", w2=shape(4, 80, 58)),
    cuda(f"w2 must have shape [3, 80, 58]{PLAIN_32}, got [3, 96, 58]", w2=shape(3, 96, 58)),
    cuda(f"w2 must have shape [3, 80, 58]{PLAIN_32}, got [3, 80, 116]", w2=shape(3, 80, 116)),
    cuda(f"w2 must have shape [3, 80, 58]{PLAIN_32}, got [3, 2, 40, 58]", w2=shape(3, 2, 40, 58)),
    bad("w2_global_scale must be float32, got bfloat16", w2_global_scale=dtype(torch.bfloat16)),
    bad("w2_global_scale must be on {device} like hidden_states, got {elsewhere}", w2_global_scale=elsewhere),
    bad(f"w2_global_scale must be contiguous, got a tensor of shape [3] {STRIDED}", w2_global_scale=strided),
    bad("w2_global_scale must have shape [3], got [3, 2]", w2_global_scale=shape(3, 2)),
    bad("topk_weights must be float32, got bfloat16", topk_weights=dtype(torch.bfloat16)),
    bad("topk_weights must be on {device} like hidden_states, got {elsewhere}", topk_weights=elsewhere),
    bad(f"topk_weights must be contiguous, got a tensor of shape [5, 2] {STRIDED}", topk_weights=strided),
    bad("topk_weights must have shape [5, top_k], got [6, 2]", topk_weights=shape(6, 2)),
    bad("topk_weights must have shape [5, top_k], got [5]", topk_weights=shape(5)),
    bad("topk_ids must be int32 or int64, got int16", topk_ids=dtype(torch.int16)),
    *(
        bad(f"topk_ids must be int32 or int64, got {name}", topk_ids=dtype(getattr(torch, name)))
        for name in ("uint16", "uint32", "uint64", "complex64", "complex128")
    ),
    bad("topk_ids must be on {device} like hidden_states, got {elsewhere}", topk_ids=elsewhere),
    bad(f"topk_ids must be contiguous, got a tensor of shape [5, 2] {STRIDED}", topk_ids=strided),
    bad("topk_ids must have shape [5, 2], got [5, 3]", topk_ids=shape(5, 3)),
    bad("expert_map must be int32, got int64", expert_map=dtype(torch.int64)),
    bad("expert_map must be on {device} like hidden_states, got {elsewhere}", expert_map=elsewhere),
    bad(f"expert_map must be contiguous, got a tensor of shape [6] {STRIDED}", expert_map=strided),
    bad("expert_map must have shape [global_experts], got [2, 3]", expert_map=shape(2, 3)),
    *bias_rows("w13_bias", "hidden_states", 3, 64),
    *bias_rows("w2_bias", "hidden_states", 3, 80),
]

ROUTE = [
    bad("topk_ids must be int32 or int64, got int16", topk_ids=dtype(torch.int16)),
    bad(f"topk_ids must be contiguous, got a tensor of shape [5, 2] {STRIDED}", topk_ids=strided),
    bad("topk_ids must have shape [M, top_k], got [5]", topk_ids=shape(5)),
    bad("expert_map must be int32, got int64", expert_map=dtype(torch.int64)),
    bad("expert_map must be on {device} like topk_ids, got {elsewhere}", expert_map=elsewhere),
    bad(f"expert_map must be contiguous, got a tensor of shape [6] {STRIDED}", expert_map=strided),
    bad("expert_map must have shape [global_experts], got [2, 3]", expert_map=shape(2, 3)),
    bad("num_experts must be positive, got 0", num_experts=0),
    bad("num_experts must be positive, got -1", num_experts=-1),
]

GROUPED_GEMM = [
    bad("x must be {activations}, got float64", x=dtype(torch.float64)),
    bad(f"x must be contiguous, got a tensor of shape [5, 80] {STRIDED}", x=strided),
    bad("x must have shape [rows, K], got [80]", x=shape(80)),
    bad("x's last dimension must be a positive multiple of 16, got 0", x=shape(5, 0)),
    bad("x's last dimension must be a positive multiple of 16, got 88", x=shape(5, 88)),
    bad("weight must be uint8, got int8", weight=dtype(torch.int8)),
    bad("weight must be on {device} like x, got {elsewhere}", weight=elsewhere),
    cpu(f"weight must be contiguous, got a tensor of shape [3, 48, 2, 36] {STRIDED}", weight=strided),
    cpu(f"weight must have shape [E, N, 2, 36]{PLAIN_80}, got [3, 2, 24, 2, 36]", weight=shape(3, 2, 24, 2, 36)),
    cpu(f"weight must have shape [E, N, 2, 36]{PLAIN_80}, got [3, 48, 96]", weight=shape(3, 48, 96)),
    cpu(f"weight must have shape [E, N, 2, 36]{PLAIN_80}, got [48, 2, 36]", weight=shape(48, 2, 36)),
    cpu("weight's dimension 1 must be a positive multiple of 16, got 0", weight=shape(3, 0, 2, 36)),
    cpu("weight's dimension 1 must be a positive multiple of 16, got 24", weight=shape(3, 24, 2, 36)),
    cpu(f"weight must have shape [E, N, 3, 36]{PLAIN_144}, got [3, 48, 2, 36]", x=shape(5, 144)),
    cpu("weight must hold at least one expert, got 0", weight=shape(0, 48, 2, 36)),
    cuda(f"weight must be contiguous, got a tensor of shape [3, 48, 96] {STRIDED}", weight=strided),
    cuda(f"weight must have shape [E, N, R]{PLAIN_80}, got [3, 2, 24, 96]", weight=shape(3, 2, 24, 96)),
    cuda(f"weight must have shape [E, N, R]{PLAIN_80}, got [3, 48, 2, 36]", weight=shape(3, 48, 2, 36)),
    cuda(f"weight must have shape [E, N, R]{PLAIN_80}, got [48, 96]", weight=shape(48, 96)),
    cuda(f"weight must have shape [E, N, 144]{PLAIN_144}, got [3, 48, 96]", x=shape(5, 144)),
    cuda("weight must hold at least one expert, got 0", weight=shape(0, 48, 96)),
    bad("global_scale must be float32, got float64", global_scale=dtype(torch.float64)),
    bad("global_scale must be on {device} like x, got {elsewhere}", global_scale=elsewhere),
    bad(f"global_scale must be contiguous, got a tensor of shape [3] {STRIDED}", global_scale=strided),
    bad("global_scale must have shape [3], got [4]", global_scale=shape(4)),
    bad("order must be int32, got int64", order=dtype(torch.int64)),
    bad("order must be on {device} like x, got {elsewhere}", order=elsewhere),
    bad(f"order must be contiguous, got a tensor of shape [10] {STRIDED}", order=strided),
    bad("order must have shape [slots], got [5, 2]", order=shape(5, 2)),
    bad("offsets must be int32, got int64", offsets=dtype(torch.int64)),
    bad("offsets must be on {device} like x, got {elsewhere}", offsets=elsewhere),
    bad(f"offsets must be contiguous, got a tensor of shape [4] {STRIDED}", offsets=strided),
    bad("offsets must have shape [4], got [3]", offsets=shape(3)),
    bad("topk_weights must be float32, got float16", topk_weights=dtype(torch.float16)),
    bad("topk_weights must be on {device} like x, got {elsewhere}", topk_weights=elsewhere),
    bad(f"topk_weights must be contiguous, got a tensor of shape [5, 2] {STRIDED}", topk_weights=strided),
    bad("topk_weights must have shape [5, top_k], got [6, 2]", topk_weights=shape(6, 2)),
    bad("order must hold as many slots as topk_weights (15), got 10", topk_weights=shape(5, 3)),
    bad("order must hold a multiple of x's rows (5), got 11", topk_weights=None, order=shape(11)),
    bad(f"global_scale must have shape [E], or [E, 2]{IF_GATED}, got []", global_scale=shape()),
    bad(f"global_scale must have shape [E], or [E, 2]{IF_GATED}, got [3, 2, 1]", global_scale=shape(3, 2, 1)),
    cpu(f"weight must have shape [E, 2, I, 2, 36]{GATED_80}, got [3, 48, 2, 36]", global_scale=shape(3, 2)),
    cuda(f"weight must have shape [E, 2, I, R]{GATED_80}, got [3, 48, 96]", global_scale=shape(3, 2)),
    *bias_rows("bias", "x", 3, 48),
]

GROUPED_GEMM_SWIGLU = [
    bad("x must be {activations}, got float64", x=dtype(torch.float64)),
    bad(f"x must be contiguous, got a tensor of shape [5, 80] {STRIDED}", x=strided),
    bad("x must have shape [rows, K], got [80]", x=shape(80)),
    bad("x's last dimension must be a positive multiple of 16, got 0", x=shape(5, 0)),
    bad("x's last dimension must be a positive multiple of 16, got 88", x=shape(5, 88)),
    bad("weight must be uint8, got int8", weight=dtype(torch.int8)),
    bad("weight must be on {device} like x, got {elsewhere}", weight=elsewhere),
    cpu(f"weight must be contiguous, got a tensor of shape [3, 2, 32, 2, 36] {STRIDED}", weight=strided),
    cpu(f"weight must have shape [E, 2, I, 2, 36]{GATED_80}, got [3, 64, 2, 36]", weight=shape(3, 64, 2, 36)),
    cpu(f"weight must have shape [E, 2, I, 2, 36]{GATED_80}, got [3, 2, 32, 72]", weight=shape(3, 2, 32, 72)),
    cpu(f"weight must have shape [E, 2, I, 2, 36]{GATED_80}, got [2, 32, 2, 36]", weight=shape(2, 32, 2, 36)),
    cpu("weight's dimension 2 must be a positive multiple of 16, got 0", weight=shape(3, 2, 0, 2, 36)),
    cpu("weight's dimension 2 must be a positive multiple of 16, got 24", weight=shape(3, 2, 24, 2, 36)),
    cpu(f"weight must have shape [E, 2, I, 3, 36]{GATED_144}, got [3, 2, 32, 2, 36]", x=shape(5, 144)),
    cpu("weight must hold at least one expert, got 0", weight=shape(0, 2, 32, 2, 36)),
    cuda(f"weight must be contiguous, got a tensor of shape [3, 2, 32, 72] {STRIDED}", weight=strided),
    cuda(f"weight must have shape [E, 2, I, R]{GATED_80}, got [3, 64, 72]", weight=shape(3, 64, 72)),
    cuda(f"weight must have shape [E, 2, I, R]{GATED_80}, got [3, 2, 32, 2, 36]", weight=shape(3, 2, 32, 2, 36)),
    cuda(f"weight must have shape [E, 2, I, R]{GATED_80}, got [2, 32, 72]", weight=shape(2, 32, 72)),
    cuda(f"weight must have shape [E, 2, I, 108]{GATED_144}, got [3, 2, 32, 72]", x=shape(5, 144)),
    cuda("weight must hold at least one expert, got 0", weight=shape(0, 2, 32, 72)),
    bad("global_scale must be float32, got float64", global_scale=dtype(torch.float64)),
    bad("global_scale must be on {device} like x, got {elsewhere}", global_scale=elsewhere),
    bad(f"global_scale must be contiguous, got a tensor of shape [3, 2] {STRIDED}", global_scale=strided),
    bad("global_scale must have shape [3, 2], got [4, 2]", global_scale=shape(4, 2)),
    bad("order must be int32, got int64", order=dtype(torch.int64)),
    bad("order must be on {device} like x, got {elsewhere}", order=elsewhere),
    bad(f"order must be contiguous, got a tensor of shape [10] {STRIDED}", order=strided),
    bad("order must have shape [slots], got [5, 2]", order=shape(5, 2)),
    bad("offsets must be int32, got int64", offsets=dtype(torch.int64)),
    bad("offsets must be on {device} like x, got {elsewhere}", offsets=elsewhere),
    bad(f"offsets must be contiguous, got a tensor of shape [4] {STRIDED}", offsets=strided),
    bad("offsets must have shape [4], got [3]", offsets=shape(3)),
    bad("topk_weights must be float32, got float16", topk_weights=dtype(torch.float16)),
    bad("topk_weights must be on {device} like x, got {elsewhere}", topk_weights=elsewhere),
    bad(f"topk_weights must be contiguous, got a tensor of shape [5, 2] {STRIDED}", topk_weights=strided),
    bad("topk_weights must have shape [5, top_k], got [6, 2]", topk_weights=shape(6, 2)),
    bad("order must hold as many slots as topk_weights (15), got 10", topk_weights=shape(5, 3)),
    bad("order must hold a multiple of x's rows (5), got 11", topk_weights=None, order=shape(11)),
    *bias_rows("bias", "x", 3, 64),
]

COMBINE = [
    bad("x must be {activations}, got float64", x=dtype(torch.float64)),
    bad(f"x must be contiguous, got a tensor of shape [10, 48] {STRIDED}", x=strided),
    bad("x must have shape [M * top_k, N], got [48]", x=shape(48)),
    bad("x must have M * top_k = 10 rows, got 5", x=shape(5, 48)),
    bad("topk_weights must be float32, got bfloat16", topk_weights=dtype(torch.bfloat16)),
    bad("topk_weights must be on {device} like x, got {elsewhere}", topk_weights=elsewhere),
    bad(f"topk_weights must be contiguous, got a tensor of shape [5, 2] {STRIDED}", topk_weights=strided),
    bad("topk_weights must have shape [M, top_k], got [5]", topk_weights=shape(5)),
    bad("topk_ids must be int32 or int64, got int16", topk_ids=dtype(torch.int16)),
    bad("topk_ids must be on {device} like x, got {elsewhere}", topk_ids=elsewhere),
    bad(f"topk_ids must be contiguous, got a tensor of shape [5, 2] {STRIDED}", topk_ids=strided),
    bad("topk_ids must have shape [5, 2], got [5, 3]", topk_ids=shape(5, 3)),
    bad("expert_map must be int32, got int64", expert_map=dtype(torch.int64)),
    bad("expert_map must be on {device} like x, got {elsewhere}", expert_map=elsewhere),
    bad(f"expert_map must be contiguous, got a tensor of shape [6] {STRIDED}", expert_map=strided),
    bad("expert_map must have shape [global_experts], got [2, 3]", expert_map=shape(2, 3)),
    bad("num_experts must be positive, got 0", num_experts=0),
    bad("num_experts must be positive, got -1", num_experts=-1),
]

LINEAR = [
    bad("x must be {activations}, got float64", x=dtype(torch.float64)),
    bad(f"x must be contiguous, got a tensor of shape [5, 80] {STRIDED}", x=strided),
    bad("x's last dimension must be a positive multiple of 16, got 0", x=shape(5, 0)),
    bad("x's last dimension must be a positive multiple of 16, got 88", x=shape(5, 88)),
    bad("x must have shape [K], got []", x=shape()),
    bad("weight must be uint8, got int8", weight=dtype(torch.int8)),
    bad("weight must be on {device} like x, got {elsewhere}", weight=elsewhere),
    cpu(f"weight must be contiguous, got a tensor of shape [48, 2, 36] {STRIDED}", weight=strided),
    cpu(f"weight must have shape [N, 2, 36]{PLAIN_80}, got [2, 24, 2, 36]", weight=shape(2, 24, 2, 36)),
    cpu(f"weight must have shape [N, 2, 36]{PLAIN_80}, got [48, 96]", weight=shape(48, 96)),
    cpu(f"weight must have shape [N, 2, 36]{PLAIN_80}, got [2, 36]", weight=shape(2, 36)),
    cpu("weight's dimension 0 must be a positive multiple of 16, got 0", weight=shape(0, 2, 36)),
    cpu("weight's dimension 0 must be a positive multiple of 16, got 24", weight=shape(24, 2, 36)),
    cpu(f"weight must have shape [N, 3, 36]{PLAIN_144}, got [48, 2, 36]", x=shape(5, 144)),
    cuda(f"weight must be contiguous, got a tensor of shape [48, 96] {STRIDED}", weight=strided),
    cuda(f"weight must have shape [N, R]{PLAIN_80}, got [2, 24, 96]", weight=shape(2, 24, 96)),
    cuda(f"weight must have shape [N, R]{PLAIN_80}, got [48, 2, 36]", weight=shape(48, 2, 36)),
    cuda(f"weight must have shape [N, R]{PLAIN_80}, got [96]", weight=shape(96)),
    cuda(f"weight must have shape [N, 144]{PLAIN_144}, got [48, 96]", x=shape(5, 144)),
    bad("global_scale must be float32, got float64", global_scale=dtype(torch.float64)),
    bad("global_scale must be on {device} like x, got {elsewhere}", global_scale=elsewhere),
    bad(f"global_scale must have shape [], or [2]{IF_GATED}, got [1, 2]", global_scale=shape(1, 2)),
    cpu(f"weight must have shape [2, I, 2, 36]{GATED_80}, got [48, 2, 36]", global_scale=shape(2)),
    cuda(f"weight must have shape [2, I, R]{GATED_80}, got [48, 96]", global_scale=shape(2)),
    bad("bias must be bfloat16, got float32", bias=dtype(torch.float32)),
    bad("bias must be on {device} like x, got {elsewhere}", bias=elsewhere),
    bad(f"bias must be contiguous, got a tensor of shape [48] {STRIDED}", bias=strided),
    bad("bias must have shape [48], got [49]", bias=shape(49)),
    bad("bias must have shape [48], got [1, 48]", bias=shape(1, 48)),
]

SWIGLU = [
    bad("gate_up must be {activations}, got float64", gate_up=dtype(torch.float64)),
    bad(f"gate_up must be contiguous, got a tensor of shape [5, 80] {STRIDED}", gate_up=strided),
    bad("gate_up's last dimension must be a positive multiple of 2, got 0", gate_up=shape(5, 0)),
    bad("gate_up's last dimension must be a positive multiple of 2, got 3", gate_up=shape(5, 3)),
    bad("gate_up must have shape [2I], got []", gate_up=shape()),
]

PACK = [
    bad("weight must be uint8, got int8", weight=dtype(torch.int8)),
    bad(f"weight must be contiguous, got a tensor of shape [3, 64, 40] {STRIDED}", weight=strided),
    bad("weight must have shape [E, N, K / 2] or [N, K / 2], got [80]", weight=shape(80)),
    bad("weight must have shape [E, N, K / 2] or [N, K / 2], got [1, 3, 64, 40]", weight=shape(1, 3, 64, 40)),
    bad(f"{IN_FEATURES}, got 0", weight=shape(3, 64, 0)),
    bad(f"{IN_FEATURES}, got 40", weight=shape(3, 64, 20)),
    bad(f"{OUT_FEATURES} 32 (gated=True), got 0", weight=shape(3, 0, 40)),
    bad(f"{OUT_FEATURES} 32 (gated=True), got 16", weight=shape(3, 16, 40)),
    bad(f"{OUT_FEATURES} 32 (gated=True), got 40", weight=shape(3, 40, 40)),
    bad(f"{OUT_FEATURES} 16, got 24", weight=shape(24, 40), gated=False),
    bad("scale must be float8_e4m3fn or uint8, got float32", scale=dtype(torch.float32)),
    *(
        bad(f"scale must be float8_e4m3fn or uint8, got {name}", scale=viewed(getattr(torch, name)))
        for name in ("float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")
    ),
    bad("scale must be on {device} like weight, got {elsewhere}", scale=elsewhere),
    bad(f"scale must be contiguous, got a tensor of shape [3, 64, 5] {STRIDED}", scale=strided),
    bad("scale must have shape [3, 64, 5], got [3, 64, 6]", scale=shape(3, 64, 6)),
    bad("scale must have shape [3, 64, 5], got [64, 5]", scale=shape(64, 5)),
]

UNPACK = [
    bad(f"{IN_FEATURES}, got 0", in_features=0),
    bad(f"{IN_FEATURES}, got -16", in_features=-16),
    bad(f"{IN_FEATURES}, got 72", in_features=72),
    bad("packed must be uint8, got int8", packed=dtype(torch.int8)),
    cpu(f"packed must be contiguous, got a tensor of shape [3, 2, 32, 2, 36] {STRIDED}", packed=strided),
    cpu(f"packed must have shape [E, 2, I, 2, 36]{GATED_80}, got [3]", packed=shape(3)),
    cpu(f"packed must have shape [2, I, 2, 36]{GATED_80}, got [3, 32, 2, 36]", packed=shape(3, 32, 2, 36)),
    cpu(f"packed must have shape [2, I, 2, 36]{GATED_80}, got [2, 32, 3, 37]", packed=shape(2, 32, 3, 37)),
    cpu(f"packed must have shape [E, 2, I, 2, 36]{GATED_80}, got [3, 3, 32, 2, 36]", packed=shape(3, 3, 32, 2, 36)),
    cpu(f"packed must have shape [E, 2, I, 3, 36]{GATED_144}, got [3, 2, 32, 2, 36]", in_features=144),
    cpu(f"packed must have shape [E, N, 2, 36]{PLAIN_80}, got [3, 2, 32, 2, 36]", gated=False),
    cpu("packed's dimension 2 must be a positive multiple of 16, got 0", packed=shape(3, 2, 0, 2, 36)),
    cpu("packed's dimension 2 must be a positive multiple of 16, got 24", packed=shape(3, 2, 24, 2, 36)),
    cuda(f"packed must be contiguous, got a tensor of shape [3, 2, 32, 72] {STRIDED}", packed=strided),
    cuda(f"packed must have shape [E, 2, I, R]{GATED_80}, got [3]", packed=shape(3)),
    cuda(f"packed must have shape [2, I, 72]{GATED_80}, got [3, 32, 72]", packed=shape(3, 32, 72)),
    cuda(f"packed must have shape [2, I, 72]{GATED_80}, got [2, 32, 73]", packed=shape(2, 32, 73)),
    cuda(f"packed must have shape [E, 2, I, 72]{GATED_80}, got [3, 3, 32, 72]", packed=shape(3, 3, 32, 72)),
    cuda(f"packed must have shape [E, 2, I, 108]{GATED_144}, got [3, 2, 32, 72]", in_features=144),
    cuda(f"packed must have shape [E, N, R]{PLAIN_80}, got [3, 2, 32, 72]", gated=False),
]

BATCHED_MOE = [
    bad("hidden_states must be {activations}, got float64", hidden_states=dtype(torch.float64)),
    bad(f"hidden_states must be contiguous, got a tensor of shape [3, 4, 80] {STRIDED}", hidden_states=strided),
    bad("hidden_states must have shape [E, T, K], got [12, 80]", hidden_states=shape(12, 80)),
    bad("hidden_states's last dimension must be a positive multiple of 16, got 0", hidden_states=shape(3, 4, 0)),
    bad("hidden_states's last dimension must be a positive multiple of 16, got 88", hidden_states=shape(3, 4, 88)),
    bad("w13 must be uint8, got int8", w13=dtype(torch.int8)),
    bad("w13 must be on {device} like hidden_states, got {elsewhere}", w13=elsewhere),
    cpu(f"w13 must be contiguous, got a tensor of shape [3, 2, 32, 2, 36] {STRIDED}", w13=strided),
    cpu(f"w13 must have shape [3, 2, I, 2, 36]{GATED_80}, got [4, 2, 32, 2, 36]", w13=shape(4, 2, 32, 2, 36)),
    cpu(f"w13 must have shape [3, 2, I, 2, 36]{GATED_80}, got [3, 64, 2, 36]", w13=shape(3, 64, 2, 36)),
    cpu("w13's dimension 2 must be a positive multiple of 16, got 24", w13=shape(3, 2, 24, 2, 36)),
    cpu(f"w13 must have shape [4, 2, I, 2, 36]{GATED_80}, got [3, 2, 32, 2, 36]", hidden_states=shape(4, 4, 80)),
    cpu(f"w13 must have shape [3, 2, I, 3, 36]{GATED_144}, got [3, 2, 32, 2, 36]", hidden_states=shape(3, 4, 144)),
    cpu("w13 must hold at least one expert, got 0", hidden_states=shape(0, 4, 80), w13=shape(0, 2, 32, 2, 36)),
    cuda(f"w13 must be contiguous, got a tensor of shape [3, 2, 32, 72] {STRIDED}", w13=strided),
    cuda(f"w13 must have shape [3, 2, I, 72]{GATED_80}, got [4, 2, 32, 72]", w13=shape(4, 2, 32, 72)),
    cuda(f"w13 must have shape [3, 2, I, R]{GATED_80}, got [3, 64, 72]", w13=shape(3, 64, 72)),
    cuda(f"w13 must have shape [3, 2, I, 108]{GATED_144}, got [3, 2, 32, 72]", hidden_states=shape(3, 4, 144)),
    cuda("w13 must hold at least one expert, got 0", hidden_states=shape(0, 4, 80), w13=shape(0, 2, 32, 72)),
    bad("w13_global_scale must be float32, got float64", w13_global_scale=dtype(torch.float64)),
    bad("w13_global_scale must be on {device} like hidden_states, got {elsewhere}", w13_global_scale=elsewhere),
    bad("w13_global_scale must have shape [3, 2], got [3]", w13_global_scale=shape(3)),
    bad("w2 must be uint8, got int8", w2=dtype(torch.int8)),
    bad("w2 must be on {device} like hidden_states, got {elsewhere}", w2=elsewhere),
    cpu(f"w2 must have shape [3, 80, 1, 36]{PLAIN_32}, got [4, 80, 1, 36]", w2=shape(4, 80, 1, 36)),
    cuda(f"w2 must have shape [3, 80, 58]{PLAIN_32}, got [4, 80, 58]", w2=shape(4, 80, 58)),
    bad("w2_global_scale must be float32, got float16", w2_global_scale=dtype(torch.float16)),
    bad("w2_global_scale must have shape [3], got [3, 2]", w2_global_scale=shape(3, 2)),
    bad("expert_num_tokens must be int32, got int64", expert_num_tokens=dtype(torch.int64)),
    bad("expert_num_tokens must be on {device} like hidden_states, got {elsewhere}", expert_num_tokens=elsewhere),
    bad(f"expert_num_tokens must be contiguous, got a tensor of shape [3] {STRIDED}", expert_num_tokens=strided),
    bad("expert_num_tokens must have shape [3], got [4]", expert_num_tokens=shape(4)),
    bad("expert_num_tokens must have shape [3], got [3, 1]", expert_num_tokens=shape(3, 1)),
    *bias_rows("w13_bias", "hidden_states", 3, 64),
    *bias_rows("w2_bias", "hidden_states", 3, 80),
]

# Of experts without a gate.
PLAIN_WEIGHTS = [
    bad("w13_global_scale must have shape [3], got [4]", w13_global_scale=shape(4)),
    bad("w13_global_scale must have shape [3], got []", w13_global_scale=shape()),
    cpu(f"w13 must have shape [E, 2, I, 2, 36]{GATED_80}, got [3, 32, 2, 36]", w13_global_scale=shape(3, 2)),
    cuda(f"w13 must have shape [E, 2, I, R]{GATED_80}, got [3, 32, 144]", w13_global_scale=shape(3, 2)),
    cpu("w13's dimension 1 must be a positive multiple of 16, got 24", w13=shape(3, 24, 2, 36)),
    cpu(f"w13 must have shape [E, N, 2, 36]{PLAIN_80}, got [3, 32, 3, 36]", w13=shape(3, 32, 3, 36)),
    cpu("w13_global_scale must have shape [3, 2], got [3]", w13=shape(3, 2, 32, 2, 36)),
    cpu(
        f"w2 must have shape [3, 80, 1, 36]{PLAIN_64}, got [3, 80, 2, 36]",
        w13=shape(3, 64, 2, 36),
        w2=shape(3, 80, 2, 36),
    ),
    cuda("w13_global_scale must have shape [3, 2], got [3]", w13=shape(3, 2, 32, 72)),
    bad("w13_bias must have shape [3, 32], got [3, 64]", w13_bias=shape(3, 64)),
]
PLAIN_MOE = [*PLAIN_WEIGHTS, *bias_rows("w13_bias", "hidden_states", 3, 32), *PLAIN_GATE]
PLAIN_BATCHED = [Row(row.words.replace("[E, ", "[3, "), row.changes, row.backends) for row in PLAIN_MOE]

# Of a buffer for the result of `like`'s shape.
BUFFER = "that is not; take one from torch.empty"


def out_rows(sizes: tuple[int, ...]) -> list[Row]:
    """The rows of an out overload whose result has these sizes."""
    more = [size + 1 for size in sizes]
    return [
        bad("out must be bfloat16, got float16", out=dtype(torch.float16)),
        bad("out must be on {device} like hidden_states, got {elsewhere}", out=elsewhere),
        bad(f"out must be contiguous, got a tensor of shape {list(sizes)} {BUFFER}", out=strided),
        bad(f"out must have shape {list(sizes)}, got {more}", out=shape(*more)),
        bad(f"out must have shape {list(sizes)}, got {list(sizes[1:])}", out=shape(*sizes[1:])),
    ]


def grad_rows(like: str, sizes: tuple[int, ...]) -> list[Row]:
    """The rows of a backward op, whose forward op's result has these sizes."""
    more = [*sizes[:-1], sizes[-1] + 16]
    return [
        bad("grad_output must be bfloat16, got float16", grad_output=dtype(torch.float16)),
        bad(f"grad_output must be on {{device}} like {like}, got {{elsewhere}}", grad_output=elsewhere),
        bad(f"grad_output must be contiguous, got a tensor of shape {list(sizes)} {STRIDED}", grad_output=strided),
        bad(f"grad_output must have shape {list(sizes)}, got {more}", grad_output=shape(*more)),
        bad(f"grad_output must have shape {list(sizes)}, got {list(sizes[1:])}", grad_output=shape(*sizes[1:])),
    ]


NO_WEIGHTS = bad("expected topk_weights where needs_topk_weights is True, got None", topk_weights=None)

LINEAR_BACKWARD = [
    bad("grad_output must be {activations}, got float64", grad_output=dtype(torch.float64)),
    bad(f"grad_output must be contiguous, got a tensor of shape [5, 48] {STRIDED}", grad_output=strided),
    bad("grad_output must have shape [N], got []", grad_output=shape()),
    bad(f"{IN_FEATURES}, got 72", in_features=72),
    bad("grad_output's last dimension must be a positive multiple of 16, got 40", grad_output=shape(5, 40)),
    bad("weight must be on {device} like grad_output, got {elsewhere}", weight=elsewhere),
    cpu(f"weight must have shape [64, 2, 36]{PLAIN_80}, got [48, 2, 36]", grad_output=shape(5, 64)),
    bad("global_scale must be float32, got float64", global_scale=dtype(torch.float64)),
]

ROWS: dict[str, list[Row]] = {
    "moe": [*MOE, *GATE],
    "moe.out": [*MOE, *GATE, *out_rows((5, 80))],
    "batched_moe": [*BATCHED_MOE, *GATE],
    "batched_moe.out": [*BATCHED_MOE, *GATE, *out_rows((3, 4, 80))],
    "route": ROUTE,
    "grouped_gemm": GROUPED_GEMM,
    "grouped_gemm_swiglu": [*GROUPED_GEMM_SWIGLU, *GATE],
    "combine": COMBINE,
    "linear": LINEAR,
    "swiglu": [*SWIGLU, *GATE],
    "pack": PACK,
    "unpack": UNPACK,
    "moe_backward": [*MOE, *GATE, *grad_rows("hidden_states", (5, 80))],
    "grouped_gemm_backward": [*(row for row in GROUPED_GEMM if "bias" not in row.changes), *grad_rows("x", (10, 48))],
    "grouped_gemm_swiglu_backward": [*GROUPED_GEMM_SWIGLU, *GATE, *grad_rows("x", (10, 32))],
    "linear_backward": LINEAR_BACKWARD,
    "swiglu_backward": [*SWIGLU, *GATE, *grad_rows("gate_up", (5, 40))],
}
for _op in ("grouped_gemm_backward", "grouped_gemm_swiglu_backward"):
    ROWS[_op].append(NO_WEIGHTS)

ROWS_WITHOUT_GATE: dict[str, list[Row]] = {
    "moe": PLAIN_MOE,
    "moe.out": PLAIN_MOE,
    "batched_moe": PLAIN_BATCHED,
    "batched_moe.out": PLAIN_BATCHED,
    "grouped_gemm_swiglu": PLAIN_GATE,
    "swiglu": PLAIN_GATE,
}
