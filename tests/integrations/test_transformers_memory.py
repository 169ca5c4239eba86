"""How much memory loading with transformers takes at most."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.fp64_loop import raw_tensors
from helpers.hf_models import write_model
from torch_nvfp4.checkpoint import Checkpoint, write_checkpoint
from torch_nvfp4.checkpoint.writer import write_shards

pytest.importorskip("transformers", minversion="5.23")

PROGRAM = Path(__file__).parents[1] / "helpers" / "hf_memory.py"
PACKAGE = Path(__file__).parents[2]
LAYERS = 12


def write_layers(path: Path, one: Path) -> Path:
    """A checkpoint of one layer as one of `LAYERS` layers with the same weights."""
    path.mkdir()
    tensors = raw_tensors(one)
    halves = []
    for half in (range(LAYERS // 2), range(LAYERS // 2, LAYERS)):
        names = {name.replace("layers.0.", f"layers.{layer}."): name for layer in half for name in tensors}
        halves.append({new: tensors[name].clone() for new, name in names.items() if "layers." in new or half[0]})
    write_shards(path, [(f"model-{i + 1:05}-of-00002.safetensors", part) for i, part in enumerate(halves)])
    config = json.loads((one / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    return path


def test_loading_takes_the_weights_and_a_layer(tmp_path: Path) -> None:
    """At most the bytes of the weights and 1.2 layers; all layers at once would be twice the weights."""
    warm_up = write_model(tmp_path / "warm_up", "modelopt", num_hidden_layers=1) / "packed"
    one = write_checkpoint(
        tmp_path / "one", layout="modelopt", swiglu_limit=None, hidden_size=2048, moe_intermediate_size=1024,
        n_routed_experts=4, num_experts_per_tok=2, num_hidden_layers=1,
    )  # fmt: skip
    path = write_layers(tmp_path / "many", one)
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
