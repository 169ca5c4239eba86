"""Tensor and expert parallelism of transformers with NVFP4 weights: two processes with gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hf_models import greedy, prompt, relative, write_model

transformers = pytest.importorskip("transformers")

from torch_nvfp4.integrations.transformers import from_pretrained  # noqa: E402

RANK_PROGRAM = Path(__file__).parents[1] / "helpers" / "run_hf_parallel.py"
PACKAGE = Path(__file__).parents[2]


@pytest.mark.parametrize(("layout", "mode", "experts", "linears"), [
    ("modelopt", "tp", (8, 32), [(128, 64), (128, 64), (128, 64), (128, 64)]),  # q, k, v by rows and o by columns
    ("modelopt", "ep", (4, 64), [(128, 64), (128, 64), (128, 64), (128, 64)]),
    ("deepseek", "tp", (8, 32), []), ("deepseek", "ep", (4, 64), []),
])  # fmt: skip
def test_two_ranks_compute_what_one_does(
    layout: str, mode: str, experts: tuple[int, int], linears: list[tuple[int, int]], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model", layout, num_hidden_layers=2) / "packed"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / "result"
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        command = [sys.executable, str(RANK_PROGRAM), str(path), mode, str(output)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    result = torch.load(output)
    model = from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(prompt()).logits
    assert relative(result["logits"], expected) < 1e-5
    assert torch.equal(result["tokens"], greedy(model, prompt(), 8))
    assert result["experts"] == experts
    assert result["linears"] == linears
    for rank in range(2):
        text = output.with_suffix(f".{rank}").read_text()
        assert text.startswith("expected a model on one device, to save it with NVFP4 weights, got one of several ranks")
