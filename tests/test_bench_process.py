"""Processes of a benchmark: however it ends, none is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torch_nvfp4.bench.process import log_end, process_group, signals_raise

# A process and its child, of which the child, or both, do not care for SIGTERM.
STUBBORN = "trap '' TERM; sleep 60 & echo $!; trap - TERM; {}; wait; sleep 60"


def child_of(log: Path) -> int:
    for _ in range(400):
        if log.is_file() and log.read_text().endswith("\n"):
            return int(log.read_text().split()[0])
        time.sleep(0.02)
    raise TimeoutError


def alive(pid: int) -> bool:
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("leader", ["true", "trap '' TERM", "exit 3"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, OSError])
def test_what_ignores_sigterm_is_killed(tmp_path, leader, error):
    log = tmp_path / "log"
    begin = time.monotonic()
    with (
        contextlib.nullcontext() if error is None else pytest.raises(error),
        process_group(["bash", "-c", STUBBORN.format(leader)], log=log, patience=0.3) as process,
    ):
        child = child_of(log)
        assert alive(child)
        if error is not None:
            raise error
    assert not alive(child)
    assert process.returncode is not None
    assert time.monotonic() - begin < 5


def test_a_process_may_clean_up(tmp_path):
    """Also one whose parent ends at once."""
    done = tmp_path / "done"
    script = f"(trap 'sleep 0.3; touch {done}; exit' TERM; echo $BASHPID; sleep 60 & wait) & wait"
    with process_group(["bash", "-c", script], log=tmp_path / "log", patience=10):
        child_of(tmp_path / "log")
    assert done.is_file()


def test_a_second_interruption_kills_at_once(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from torch_nvfp4.bench.process import process_group, signals_raise
with signals_raise(), process_group(["bash", "-c", {STUBBORN.format("trap '' TERM")!r}], log=Path({str(tmp_path / "log")!r}), patience=60):
    time.sleep(60)
"""  # noqa: E501
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.Popen([sys.executable, "-c", code], env=environment)
    child = child_of(tmp_path / "log")
    time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert run.poll() is None
    assert alive(child)
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == 128 + signal.SIGTERM
    assert not alive(child)


def test_signals_that_are_ignored_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_raise():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            with pytest.raises(SystemExit, match="143"):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert log_end(log) == f"The end of {log}:"
    log.write_bytes(b"\xff first\n" + b"".join(b"line %d\n" % number for number in range(40)))
    shown = log_end(log).splitlines()
    assert (len(shown), shown[1], shown[-1]) == (41, "line 0", "line 39")
