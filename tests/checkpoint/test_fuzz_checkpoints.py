"""A short run of the reader's fuzzer; `make fuzz-checkpoints` runs it for longer."""

import os
from pathlib import Path
from typing import Any

import pytest

import fuzz_checkpoints
from torch_nvfp4.checkpoint import Checkpoint, CheckpointError, headers


def test_short_run() -> None:
    result = fuzz_checkpoints.fuzz(cases=100_000, seed=os.getpid(), seconds=3.0)
    assert result["cases"] > 50
    assert result["outcomes"]["values: equal"] > 10
    assert result["outcomes"]["open: refused"] > 10


def test_case_is_the_same_again(tmp_path: Path) -> None:
    bases = fuzz_checkpoints.make_bases(tmp_path)
    for number in range(20):
        one, other = (fuzz_checkpoints.make_case(bases, 7, number) for _ in range(2))
        assert one[0] == other[0]
        content = [{k: v for k, v in files.items() if isinstance(v, bytes)} for _, files in (one, other)]
        assert content[0] == content[1]


def raise_after(error: Exception, nbytes: int = 0) -> Any:
    def fault(path: Path) -> None:
        bytearray(nbytes)
        raise error

    return fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (raise_after(KeyError("x")), "KeyError"),
        (raise_after(CheckpointError("two words")), "without 'expected'"),
        (raise_after(CheckpointError("expected this, got that"), 30_000_000), "bytes of Python objects for files of"),
    ],
)
def test_faults_are_found(fault: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "open", staticmethod(fault))
    with pytest.raises(AssertionError, match=f"seed 0, case 0 .*{message}"):
        fuzz_checkpoints.fuzz(cases=1, seed=0)


def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that is not the authority: the stale copies of an overlay are read."""
    indexed = headers._indexed_tensors

    def stale(path: Path, weight_map: Any) -> Any:
        tensors, left_out = indexed(path, weight_map)
        base = headers.read_header(path / "a.safetensors")
        return headers.Tensors({name: base.get(name, info) for name, info in tensors.items()}, left_out)

    monkeypatch.setattr(headers, "_indexed_tensors", stale)
    with pytest.raises(AssertionError, match="values of expert 1 of layer 0"):
        fuzz_checkpoints.fuzz(cases=2000, seed=0)


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_checkpoints, "SECONDS_PER_LINE", 0.0)
    lines: list[str] = []
    fuzz_checkpoints.fuzz(cases=3, seed=1, first=20, tell=lines.append)
    assert [line.partition(" in ")[0] for line in lines] == ["0 of 3 cases", "1 of 3 cases", "2 of 3 cases"]
