"""What the command line says of checkpoints in the layouts: refusals, sizes that differ, where the weight acts."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("layout", get_args(LayoutName))
def test_inspect_and_verify(layout: str, tmp_path: Path) -> None:
    make(tmp_path, layout)
    result = run("inspect", tmp_path, "--device", "cpu")
    for text in (layout, "3 to 5 experts", "intermediate 32 to 64"):
        assert text in result.stdout
    assert result.exit_code == 0, result.output
    result = run("verify", tmp_path, "--device", "cpu", "--dtype", "fp32")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("leaf", "value"), [(".zero_point", 1.0), (".pre_quant_scale", 0.5)])
def test_inspect_names_what_loading_refuses(leaf: str, value: float, tmp_path: Path) -> None:
    make(tmp_path, "modelopt")
    variants.add_leaves(
        tmp_path, leaf, lambda module, codes: torch.full((len(codes),), value) if ".experts." in module else None
    )
    result = run("inspect", tmp_path, "--device", "cpu", "--json", tmp_path / "facts.json")
    assert result.exit_code == 1, result.output
    assert f"{leaf}'" in result.stdout
    assert "layer 0" in result.stdout
    assert "layer 1" in result.stdout
    refused = json.loads((tmp_path / "facts.json").read_text())["refused"]
    assert [entry["tensor"] for entry in refused] == ["layer 0", "layer 1"]
    assert run("verify", tmp_path, "--device", "cpu").exit_code == 2


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
