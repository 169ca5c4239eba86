"""What is wrong with the plug-in stops SGLang, although SGLang logs what a plug-in raises and goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
# How it is broken: (the fault, TORCH_NVFP4_SGLANG, what SGLang ends with).
FAULTS = {
    "another version": ("version", "auto", "does not know this SGLang (0.9.0): expected sglang 0.5.23, got 0.9.0"),
    "another signature": (
        "signature",
        "auto",
        "MoeRunner.run: expected (self, dispatch_output, quant_info, lora_info)",
    ),
    "a broken library": ("library", "auto", "is installed as a plug-in of SGLang but cannot be loaded"),
    "a mode that is none": ("", "yes", "TORCH_NVFP4_SGLANG: expected auto, require or off, got 'yes'"),
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the metadata of an installed torch_nvfp4: the entry point as in pyproject.toml."""
    metadata = tmp_path / "torch_nvfp4_test-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-nvfp4-test\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\nunder_test = torch_nvfp4_sglang:register\n")
    return tmp_path


def start(site: Path, layout: str, fault: str, mode: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(FOLDER.parents[1]), str(FOLDER.parent)])
    environment = os.environ | {"PYTHONPATH": path, "TORCH_NVFP4_SGLANG": mode, "SGLANG_PLUGINS": "under_test"}
    command = [sys.executable, str(FOLDER / "run_sglang.py"), layout, *([fault] if fault else [])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_sglangs_loader_finds_the_plugin(site: Path) -> None:
    ended = start(site, "modelopt", "", "require")
    assert ended.returncode == 0, ended.stderr
    assert "backend torch_nvfp4" in ended.stdout


@pytest.mark.parametrize("layout", ["modelopt", "w4a16"])
@pytest.mark.parametrize("case", FAULTS)
def test_the_first_layer_raises(site: Path, layout: str, case: str) -> None:
    fault, mode, message = FAULTS[case]
    ended = start(site, layout, fault, mode)
    assert ended.returncode != 0
    assert "SGLang goes on" in ended.stdout, "the loader is expected to log and go on"
    assert "backend" not in ended.stdout
    assert message in ended.stderr.splitlines()[-1]


def test_without_a_class_that_could_raise_the_process_ends(site: Path) -> None:
    ended = start(site, "modelopt", "classes", "auto")
    assert ended.returncode != 0
    assert "SGLang goes on" not in ended.stdout
    assert "SGLang has no class that torch_nvfp4 knows" in ended.stderr


def test_off_is_not_stopped_by_anything(site: Path) -> None:
    ended = start(site, "modelopt", "library", "off")
    assert "SGLang goes on" in ended.stdout
    assert "Current platform does not support NVFP4" in ended.stderr
