"""Whether ops promise that a row's bits depend on nothing but the row, for calls that do not say so themselves."""

from __future__ import annotations

import os

ENVIRONMENT_VARIABLE = "TORCH_NVFP4_BATCH_INVARIANT"


def _from_environment() -> bool:
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected 0 or 1, got {value!r}")
    return value == "1"


_enabled = _from_environment()


def set_batch_invariant(enabled: bool) -> None:
    """What ``batch_invariant=None`` means from now on, in every thread, for the functions and modules of this package.

    With it a token's row of ``moe``, ``grouped_gemm``, ``grouped_gemm_swiglu`` and ``linear`` has the same bits
    whatever other rows the batch has, and wherever in the batch it stands; on a CPU without AVX-512 it always has. On
    CUDA that costs time with few tokens, because kernels may no longer share out a sum among as many warps as are free.
    TORCH_NVFP4_BATCH_INVARIANT=1 in the environment turns it on at import. Compiled code keeps what held when it was
    traced, or is traced anew.
    """
    global _enabled
    _enabled = bool(enabled)


def is_batch_invariant() -> bool:
    """What ``batch_invariant=None`` means now."""
    return _enabled


def invariance_keywords(batch_invariant: bool | None) -> dict[str, bool]:
    """The keyword of an op, without it where it has the schema's default."""
    return {"batch_invariant": True} if (_enabled if batch_invariant is None else batch_invariant) else {}


def refuse_batch_invariance(what: str) -> None:
    """Raises NotImplementedError under ``set_batch_invariant(True)``, for ``what`` cannot keep that promise."""
    if _enabled:
        raise NotImplementedError(
            f"{what}: expected set_batch_invariant(False), got True; a row's bits depend on the batch here. "
            "Use torch_nvfp4.moe, or turn batch invariance off."
        )
