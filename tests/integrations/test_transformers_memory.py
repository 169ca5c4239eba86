"""How much memory loading with transformers takes at most."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.hf_models import write_model
from torch_nvfp4.checkpoint import Checkpoint, write_checkpoint

pytest.importorskip("transformers", minversion="5.23")

PROGRAM = Path(__file__).parents[1] / "helpers" / "hf_memory.py"
PACKAGE = Path(__file__).parents[2]


def test_loading_takes_the_weights_and_a_layer(tmp_path: Path) -> None:
    """At most the bytes of the weights and 1.2 layers; all layers at once would be twice the weights."""
    warm_up = write_model(tmp_path / "warm_up", "modelopt", num_hidden_layers=1) / "packed"
    path = write_checkpoint(
        tmp_path / "many", layout="modelopt", swiglu_limit=None, hidden_size=2048, moe_intermediate_size=1024,
        n_routed_experts=4, num_experts_per_tok=2, num_hidden_layers=12,
    )  # fmt: skip
    tensors = Checkpoint.open(path).tensors.values()
    layer = sum(info.nbytes for info in tensors if info.name.startswith("model.layers.0."))
    total = sum(info.nbytes for info in tensors)
    assert total > 10 * layer
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, str(PROGRAM), str(warm_up), str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout)
    assert 0.9 * total < peak < total + 1.2 * layer, (peak / total, layer / total)
