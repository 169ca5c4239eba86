"""The generation at the end of ``torch-nvfp4 demo`` where it cannot be made, and where it is wrong."""

import subprocess
import sys

import pytest
import torch
import typer

from torch_nvfp4.cli import demo_generate
from torch_nvfp4.cli.terminal import Terminal

ADVICE = "pip install 'torch-nvfp4[transformers]', and demo does that too"


@pytest.mark.parametrize("module", ["transformers", "accelerate"])
def test_demo_says_what_is_missing(module, tmp_path):
    if module == "accelerate":
        pytest.importorskip("transformers", minversion="5.23")
    code = (
        f"import sys, torch; sys.modules[{module!r}] = None\n"
        "from torch_nvfp4.cli.demo_generate import generate\n"
        f"print(generate({str(tmp_path)!r}, torch.bfloat16, torch.device('cpu'), None))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = run.stdout.splitlines()
    assert module in line
    assert line.endswith(ADVICE)


def test_demo_says_that_the_version_is_another(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    line = demo_generate.generate(tmp_path, torch.bfloat16, torch.device("cpu"), None)
    assert "expected transformers >= 5.23, < 6, got 5.17.0" in line
    assert line.endswith(ADVICE)


def test_demo_fails_when_transformers_is_far_off(capsys):
    generation = demo_generate.Generation("5.24.0", [1, 2], 1.0, 0.17)
    with pytest.raises(typer.Exit) as stopped:
        demo_generate.print_generation(Terminal(), generation)
    assert stopped.value.exit_code == 1
    assert "at most 0.1 nats from transformers' own model in fp32, got 1.70e-01" in capsys.readouterr().err
