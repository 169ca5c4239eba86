"""Checkpoints whose experts transformers' classes do not run here yet; this needs no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torch_nvfp4.checkpoint import Checkpoint, write_checkpoint
from torch_nvfp4.integrations.transformers.gates import checkpoint_error


@pytest.mark.parametrize(
    ("layout", "got"),
    [
        ("nemotron", "relu2 without a gate"),
        ("gpt-oss", "silu (alpha 1.702, beta 1), clamp_limit 2, biases"),
        ("compressed-tensors-mxfp4", None),
        ("modelopt", None),
    ],
)
def test_experts_of_another_kind(layout: Any, got: str | None, tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, layout=layout, hidden_size=64, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        num_hidden_layers=2, swiglu_limit=2.0,
    )  # fmt: skip
    reason = checkpoint_error(Checkpoint.open(tmp_path).layer_config(1))
    if got is None:
        assert reason is None
        return
    assert reason is not None
    assert reason.startswith(f"expected experts with gate and up and without biases, got {got}; from_pretrained does")
    assert reason.endswith("NVFP4Experts.from_checkpoint runs the layer")
