"""What the command line says of checkpoints in the layouts: refusals, sizes that differ, where the weight acts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from torch_nvfp4.backends import MoEBackend, MoEBackendConfig, select_moe_backend
from torch_nvfp4.checkpoint import variants, write_checkpoint
from torch_nvfp4.checkpoint.synthetic import LayoutName
from torch_nvfp4.cli import app

SIZES: dict[str, Any] = {"hidden_size": 64, "num_experts_per_tok": 2, "num_hidden_layers": 2, "swiglu_limit": 2.0}


def make(path: Path, layout: Any) -> Path:
    return write_checkpoint(path, layout=layout, n_routed_experts=(5, 3), moe_intermediate_size=(32, 64), **SIZES)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# What `inspect` and `verify` call the gate of models whose experts are of another kind.
KINDS = {
    "nemotron": "relu2 without a gate",
    "gpt-oss": "silu (alpha 1.702, beta 1), clamp_limit 2, biases",
    "compressed-tensors-mxfp4": "situ (alpha 4, beta 25), no clamp",
}


@pytest.mark.parametrize("layout", get_args(LayoutName))
def test_inspect_and_verify(layout: str, tmp_path: Path) -> None:
    make(tmp_path, layout)
    result = run("inspect", tmp_path, "--device", "cpu")
    kind = KINDS.get(layout, "clamp_limit 2")
    for text in (layout, "3 to 5 experts", "intermediate 32 to 64", f"{kind} (layers 0..1)", "backend on cpu: cpu"):
        assert text in result.stdout
    assert result.exit_code == 0, result.output
    result = run("verify", tmp_path, "--device", "cpu", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert kind in result.stdout


@pytest.mark.parametrize(("leaf", "value"), [(".zero_point", 1.0), (".pre_quant_scale", 0.5)])
def test_inspect_names_what_loading_refuses(leaf: str, value: float, tmp_path: Path) -> None:
    make(tmp_path, "modelopt")
    variants.add_leaves(
        tmp_path, leaf, lambda module, codes: torch.full((len(codes),), value) if ".experts." in module else None
    )
    result = run("inspect", tmp_path, "--device", "cpu", "--json", tmp_path / "facts.json")
    assert result.exit_code == 1, result.output
    assert leaf.removeprefix(".") in result.stdout
    assert "layer 0" in result.stdout
    assert "layer 1" in result.stdout
    refused = json.loads((tmp_path / "facts.json").read_text())["refused"]
    assert [entry["tensor"] for entry in refused] == ["layer 0", "layer 1"]
    assert run("verify", tmp_path, "--device", "cpu").exit_code == 2


@pytest.mark.parametrize(
    ("pattern", "kind"), [("", "biases"), ("up_proj|gate_proj", "w13_bias alone"), ("down_proj", "w2_bias alone")]
)
def test_inspect_and_verify_say_which_biases_there_are(pattern: str, kind: str, tmp_path: Path) -> None:
    make(tmp_path, "modelopt")
    found = re.compile(rf"layers\.1\..*experts\..*({pattern})")
    variants.add_leaves(
        tmp_path, ".bias", lambda module, codes: torch.ones(len(codes)) if found.search(module) else None
    )
    result = run("inspect", tmp_path, "--device", "cpu", "--json", tmp_path / "facts.json")
    assert result.exit_code == 0, result.output
    gates = {"silu, clamp_limit 2": [0], f"silu, clamp_limit 2, {kind}": [1]}
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert {entry["gate"]: entry["layers"] for entry in facts["gates"]} == gates
    assert f"clamp_limit 2, {kind} (layers 1)" in result.stdout
    result = run("verify", tmp_path, "--device", "cpu", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert f"clamp_limit 2, {kind}" in result.stdout


def test_inspect_asks_for_a_backend_that_adds_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that has none must not be promised for gpt-oss, nor one that needs a gate for Nemotron-3."""
    asked = []

    def select(config: MoEBackendConfig, backend: str | None = None) -> MoEBackend:
        asked.append(config)
        return select_moe_backend(config, backend)

    monkeypatch.setattr("torch_nvfp4.cli.inspect.select_moe_backend", select)
    for layout in ("gpt-oss", "nemotron"):
        make(tmp_path / layout, layout)
        assert run("inspect", tmp_path / layout, "--device", "cpu").exit_code == 0
    assert [(config.biases, config.gate.gated) for config in asked] == [(True, True), (False, False)]


def test_inspect_asks_for_a_backend_that_scales_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that cannot put the router's weight on the input must not be promised for Llama 4."""
    make(tmp_path, "modelopt")
    asked = []

    def select(config: MoEBackendConfig, backend: str | None = None) -> MoEBackend:
        asked.append(config)
        return select_moe_backend(config, backend)

    monkeypatch.setattr("torch_nvfp4.cli.inspect.select_moe_backend", select)
    assert run("inspect", tmp_path, "--device", "cpu").exit_code == 0
    variants.change_config(tmp_path, model_type="llama4_text")
    assert run("inspect", tmp_path, "--device", "cpu").exit_code == 0
    assert [config.apply_router_weight_on_input for config in asked] == [False, True]
