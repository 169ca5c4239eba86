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
from helpers.ranks import kill_group

transformers = pytest.importorskip("transformers", minversion="5.23")

from helpers.hf_families import FAMILIES, write_family  # noqa: E402
from torch_nvfp4.integrations.transformers import from_pretrained  # noqa: E402

RANK_PROGRAM = Path(__file__).parents[1] / "helpers" / "run_hf_parallel.py"
PACKAGE = Path(__file__).parents[2]


# (layout or family, mode, (experts, intermediate size) of a rank, packed shapes of q, k, v (rows) and of o (columns))
CASES = (
    ("modelopt", "tp", (8, 32), [(128, 64)] * 4), ("modelopt", "ep", (4, 64), [(128, 64)] * 4),
    ("deepseek", "tp", (8, 32), []), ("deepseek", "ep", (4, 64), []),
    # gpt-oss has a plan for experts by expert alone, with their biases; nemotron has experts without a gate
    # and a linear that is in no plan.
    ("gpt-oss", "ep", (2, 64), []), ("nemotron", "tp", (4, 32), [(32, 32)]), ("nemotron", "ep", (2, 64), [(32, 32)]),
)  # fmt: skip


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    paths = {
        name: (
            write_family(tmp_path / name, name)
            if name in FAMILIES
            else write_model(tmp_path / name, name, num_hidden_layers=2)
        )
        / "packed"
        for name in dict.fromkeys(case[0] for case in CASES)
    }
    output = tmp_path / "result"
    run_ranks(str(output), *(part for layout, mode, _, _ in CASES for part in (mode, str(paths[layout]))))
    results = [torch.load(output.with_suffix(f".{rank}")) for rank in range(2)]
    for index, (layout, mode, experts, linears) in enumerate(CASES):
        model = from_pretrained(paths[layout], dtype=torch.float32)
        with torch.no_grad():
            expected = model(prompt()).logits
        for result in (ranks[index] for ranks in results):
            assert relative(result["logits"], expected) < 1e-5, (layout, mode)
            assert torch.equal(result["tokens"], greedy(model, prompt(), 8)), (layout, mode)
            assert (result["experts"], result["linears"]) == (experts, linears), (layout, mode)
            assert result["saving"].startswith(
                "expected a model on one device, to save it with NVFP4 weights, got one of several ranks"
            )


def run_ranks(*arguments: str) -> None:
    """Two processes of ``run_hf_parallel.py``; both have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, str(RANK_PROGRAM), *arguments]
    ranks = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        errors = ranks.communicate(timeout=300)[1]
    finally:
        kill_group(ranks)
    assert ranks.returncode == 0, errors
