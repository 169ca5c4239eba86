"""The cases of this folder on two and on four processes, started once for each: torch takes longest to import."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.ranks import run_ranks

MODULES = sorted(Path(__file__).parent.glob("cases_*.py"))


def check_ranks(ranks: int, device: str, folder: Path) -> None:
    ran, failed = run_ranks(MODULES, ranks, device, folder)
    assert not failed, "\n".join(failed)
    assert len(ran) > 20, ran


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_gloo(ranks: int, tmp_path: Path) -> None:
    check_ranks(ranks, "cpu", tmp_path)


@pytest.mark.gpu
def test_ranks_with_nccl(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs two GPUs, got {count}")
    check_ranks(4 if count >= 4 else 2, "cuda", tmp_path)
