"""A program that was exported before the ops had biases loads, and gives what it gave.

tests/data/make_old_program.py wrote it with the package of then.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import torch_nvfp4
from helpers.levels import LEVELS

DATA = Path(__file__).parent.parent / "tests" / "data"


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return torch.export.load(DATA / "old_program.pt2")


def eager_program() -> Any:
    """The module that was exported, which calls today's ops with the arguments of then."""
    spec = importlib.util.spec_from_file_location("make_old_program", DATA / "make_old_program.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Program(torch.Generator().manual_seed(7))


def test_it_holds_the_arguments_of_then(program: torch.export.ExportedProgram) -> None:
    calls = [node for node in program.graph.nodes if "nvfp4" in str(node.target)]
    assert {node.target.name() for node in calls} == {
        "nvfp4::route", "nvfp4::moe", "nvfp4::moe.out", "nvfp4::batched_moe", "nvfp4::batched_moe.out",
        "nvfp4::grouped_gemm", "nvfp4::grouped_gemm_swiglu", "nvfp4::swiglu",
    }  # fmt: skip
    for node in calls:
        assert not {"w13_bias", "w2_bias", "bias", "gated"} & node.kwargs.keys()
        assert len(node.args) <= {"moe": 8, "batched_moe": 6}.get(node.target._opname, 6)


@pytest.mark.parametrize("level", LEVELS)
def test_it_gives_what_it_gave(
    program: torch.export.ExportedProgram, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what the ops give when called now, and what they gave then, which was stored of the portable level."""
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", level)
    args, _ = program.example_inputs
    results, eager = program.module()(*args), eager_program()(*args)
    stored = load_file(DATA / "old_program.safetensors")
    assert results.keys() == stored.keys() == eager.keys()
    for name, value in results.items():
        assert torch.equal(value, eager[name]), name
        if level == "portable":
            assert torch.equal(value, stored[name]), name
        torch.testing.assert_close(value, stored[name], rtol=2**-7, atol=2**-7)


def test_decomposed(program: torch.export.ExportedProgram) -> None:
    """The table of today takes the calls of then."""
    args, _ = program.example_inputs
    steps = program.run_decompositions(torch_nvfp4.decompositions())
    names = [node.target.name() for node in steps.graph.nodes if "nvfp4" in str(node.target)]
    assert "nvfp4::moe" not in names
    results, stored = steps.module()(*args), load_file(DATA / "old_program.safetensors")
    torch.testing.assert_close(results["moe with all"], stored["moe with all"], rtol=0.05, atol=0.05)
