"""The benchmark over several ranks, at toy size with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from torch_nvfp4.testing import TOLERANCE

PACKAGE = Path(__file__).parents[2]


def test_two_ranks(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    options = ["--ranks", "2", "--tiny", "--layers", "2", "--tokens", "1,8", "--seconds", "0.01"]
    command = [sys.executable, "-m", "torch_nvfp4.bench.distributed", *options]
    done = subprocess.run(
        [*command, "--dir", str(tmp_path), "--json", str(tmp_path / "result.json")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    rows = [(row["split"], row["ranks"], row["tokens"]) for row in result["rows"]]
    sent = ("experts, tokens sent", 2, 8)  # one token cannot be spread over two ranks
    assert rows == [("tensor", 2, 1), ("tensor", 2, 8), ("experts", 2, 1), ("experts", 2, 8), sent]
    assert all(row["seconds"] > 0 and row["one"] > 0 for row in result["rows"])
    assert [row["local"] is None for row in result["rows"]] == [False] * 4 + [True]
    against_fp64 = {name: error for name, error in result["errors"].items() if not name.endswith("one")}
    assert set(against_fp64) == {f"{name} 2 against fp64" for name in ("tensor", "experts", "experts, tokens sent")}
    assert 0 < max(against_fp64.values()) < TOLERANCE[torch.bfloat16]
    assert "experts, tokens sent" in done.stdout
    assert not list(tmp_path.glob("*/config.json")), "the checkpoint goes with the run"


def test_words(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch_nvfp4.bench.distributed", "--layers", "0"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip() == "expected --layers to be at least 1, got 0"
