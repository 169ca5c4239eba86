"""What torch-nvfp4 quantize prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import dense_checkpoint as source
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.cli import app
from torch_nvfp4.cli.quantize import Meter, duration, progress_text
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.convert import Progress


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return source.write(tmp_path / "source", source.per_expert(source.experts()) | source.others())


def test_a_dry_run_writes_nothing(path: Path, tmp_path: Path) -> None:
    before = source.contents(tmp_path)
    result = run("quantize", path, tmp_path / "result", "--dry-run", "--json", "-")
    assert result.exit_code == 0, result.output
    assert source.contents(tmp_path) == before
    assert not (tmp_path / "result").exists()
    facts = json.loads(result.stdout)
    assert facts["dry_run"] is True
    assert facts["layers"] == ["layer 0", "layer 1"]
    assert facts["quantized_matrices"] == 2 * 4 * 3
    assert facts["copied_tensors"] == len(source.others())
    assert facts["other_files"] == ["tokenizer.json", "assets/chat.jinja"]
    assert facts["free_bytes"] > facts["needed_bytes"] > facts["written_bytes"]
    assert run("quantize", path, tmp_path / "result").exit_code == 0
    shards = sum(file.stat().st_size for file in (tmp_path / "result").glob("*.safetensors"))
    assert shards == facts["written_bytes"]


def test_the_result_passes_inspect_and_verify(path: Path, tmp_path: Path) -> None:
    result = run("quantize", path, tmp_path / "result", "--json", tmp_path / "facts.json")
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert [each["problem"] for each in facts["errors"]] == [None, None]
    assert result.stdout.count(" ok") == 2
    for command in ("inspect", "verify"):
        done = run(command, tmp_path / "result", "--device", "cpu")
        assert done.exit_code == 0, done.output
    summary = Checkpoint.open(tmp_path / "result").summary()
    assert (summary.quant_method, summary.quant_algo) == ("modelopt", "W4A16_NVFP4")


def test_progress() -> None:
    assert progress_text(Progress("quantizing layer 3", 0, 2**32), 5) == "quantizing layer 3: 0 B of 4.00 GiB"
    text = progress_text(Progress("quantizing layer 3", 2**30, 2**32), 2)
    assert text == "quantizing layer 3: 1.00 GiB of 4.00 GiB, 0.54 GB/s, 6 s left"
    assert [duration(seconds) for seconds in (0.4, 59.4, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]


def test_without_a_terminal_a_line_every_half_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Terminal().progress() as steps:
        meter = Meter(Terminal(), steps, 4, lambda: now[0])
        for second in range(1, 100):
            now[0] = float(second)
            meter(Progress(f"quantizing layer {second // 40}", second * 10**9, 200 * 10**9))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "quantizing layer 0: 27.94 GiB of 186.26 GiB, 1.00 GB/s, 2 min 50 s left"
