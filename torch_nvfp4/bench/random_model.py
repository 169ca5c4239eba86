"""Random tensors for models that benchmarks load: scaled so that a deep model still answers to its input."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.format import E4M3_MAX, GROUP_SIZE

__all__ = [
    "BRANCH", "FP8_BLOCK", "LOGITS", "ROUTER_LOGITS", "fp8", "normal", "ones", "projections", "removed_on_failure",
    "write_once",
]  # fmt: skip

# Where block scales lie, and the root mean squares that follow for values of random codes and random scales.
_SCALES = (60.0, 260.0)
_CODE_RMS, _SCALE_RMS = 2.93, 170.0

# Standard deviations of logits: of the router, so that the last expert of a token weighs some percent and another in
# its place changes little; of the vocabulary, so that a token is neither certain nor as likely as all others.
ROUTER_LOGITS, LOGITS = 4.0, 2.2
# What attention and experts add to the residual stream, over the square root of the number of layers. With 24 layers
# that all add as much as they read, bf16 alone leaves nothing of the fp32 model's tokens (KL 1.1 for transformers in
# bf16 at 512 wide); with this, 0.04.
BRANCH = 0.5

FP8_BLOCK = 128
"""Side of an FP8 block."""


def projections(
    experts: int, rows: int, columns: int, module: str, generator: torch.Generator, gain: float
) -> Iterator[tuple[str, Tensor]]:
    """One NVFP4 matrix [rows, columns] per expert, made at once: all codes, block scales in ``_SCALES``.

    Args:
        module: the name of an expert's module, with {} for the expert.
        gain: by how much a matrix enlarges an input.
    """
    device = generator.device
    codes = torch.randint(
        0, 256, (experts, rows, columns // 2), dtype=torch.uint8, generator=generator, device=device
    ).cpu()
    low, high = _SCALES
    scales = torch.rand(experts, rows, columns // GROUP_SIZE, generator=generator, device=device)
    scales = scales.mul_(high - low).add_(low).to(torch.float8_e4m3fn).cpu()
    global_scale = torch.tensor(gain / (math.sqrt(columns) * _CODE_RMS * _SCALE_RMS))
    for expert in range(experts):
        name = module.format(expert)
        yield f"{name}.weight", codes[expert]
        yield f"{name}.weight_scale", scales[expert]
        yield f"{name}.weight_scale_2", global_scale.clone()
        yield f"{name}.input_scale", torch.ones(())


def fp8(
    module: str, rows: int, columns: int, generator: torch.Generator, gain: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """An FP8 matrix in blocks of 128 x 128 with power-of-two (E8M0) scales, as DeepSeek-V4 has beside its experts."""
    device = generator.device
    grid = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    dense = torch.zeros(grid[0] * FP8_BLOCK, grid[1] * FP8_BLOCK, device=device)
    dense[:rows, :columns] = torch.randn(rows, columns, generator=generator, device=device) * (gain * columns**-0.5)
    blocks = dense.reshape(grid[0], FP8_BLOCK, grid[1], FP8_BLOCK)
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3)) / E4M3_MAX)))
    codes = (blocks / scale[:, None, :, None]).reshape(dense.shape)[:rows, :columns].contiguous()
    yield f"{module}.weight", codes.to(torch.float8_e4m3fn).cpu()
    yield f"{module}.scale", scale.cpu().to(torch.float8_e8m0fnu)


def normal(generator: torch.Generator, *shape: int, std: float) -> Tensor:
    """bf16 on the CPU, made on the generator's device."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.mul_(std).to(torch.bfloat16).cpu()


def ones(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def write_once(path: Path, content: Mapping[str, Any], write: Callable[[], None]) -> Path:
    """Calls ``write``, unless ``path`` already holds what it wrote for the same ``content``, whole."""
    complete = path / "complete.json"
    text = repr(sorted(content.items()))
    if complete.is_file() and complete.read_text() == text:
        return path
    path.mkdir(parents=True, exist_ok=True)
    complete.unlink(missing_ok=True)
    write()
    complete.write_text(text)
    return path


@contextlib.contextmanager
def removed_on_failure(directory: Path | None, *patterns: str) -> Iterator[None]:
    """Removes what stands in a directory under these names (glob patterns) where the block raises or is interrupted.

    What a benchmark writes into shared memory takes memory until it is removed. After a success it is left for another
    run of the same sizes.

    Args:
        directory: None: nothing is removed; of a directory that the user has named nobody knows what else it holds.
    """
    try:
        yield
    except BaseException:
        if directory is not None:
            for path in [path for pattern in patterns for path in directory.glob(pattern)]:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        raise
