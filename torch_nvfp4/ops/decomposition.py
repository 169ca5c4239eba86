"""The fused ops as their steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from torch_nvfp4.ops.moe import decomposed_moe

__all__ = ["decomposed_batched_moe", "decompositions"]


def decomposed_batched_moe(
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
    """``torch.ops.nvfp4.batched_moe`` as the steps of ``moe``: E * T tokens with one expert each, of weight 1.

    Rows at and behind an expert's count have the id -1, so that the GEMMs neither read nor compute them, and come out
    as zeros; clamp, activation and combine go over all E * T rows. Counts outside [0, T] are taken for 0 and T, as by
    the op on CUDA. Roundings are those of ``decomposed_moe``.
    """
    experts, rows, k = hidden_states.shape
    place = torch.arange(rows, dtype=torch.int32, device=hidden_states.device)
    expert = torch.arange(experts, dtype=torch.int32, device=hidden_states.device).unsqueeze(1)
    ids = torch.where(place < expert_num_tokens.unsqueeze(1), expert, -1).view(experts * rows, 1)
    out = decomposed_moe(
        hidden_states.view(experts * rows, k), w13, w13_global_scale, w2, w2_global_scale,
        torch.ones_like(ids, dtype=torch.float32), ids, None, w13_bias, w2_bias, activation=activation,
        clamp_limit=clamp_limit, alpha=alpha, beta=beta,
    )  # fmt: skip
    return out.view(experts, rows, k)


def decompositions() -> dict[OpOverload, Callable[..., Tensor]]:
    """The table that turns ``moe`` and ``batched_moe`` into ``route``, ``grouped_gemm``, clamp and activation in aten,
    ``grouped_gemm``, ``combine``, for ``make_fx(decomposition_table=...)`` and ``ExportedProgram.run_decompositions``.

    ``moe_fp8`` stays whole: what its steps hand to one another, in FP8 with a scale per row, no op takes or gives.

    Inside torch.compile and AOTInductor use ``torch_nvfp4.inductor_options(decompose_moe=True)``: the compiler's caches
    do not see a decomposition table and would return what was compiled without it.
    """
    return {
        torch.ops.nvfp4.moe.default: decomposed_moe,
        torch.ops.nvfp4.batched_moe.default: decomposed_batched_moe,
    }
