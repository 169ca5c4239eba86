"""Processes that a benchmark starts, of which none outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

__all__ = ["log_end", "process_group", "signals_raise"]

_KILLED = 5.0  # seconds within which a process is gone after SIGKILL, at a driver's call or a reaper's
_SHOWN = 40  # lines of the log of a process that failed


@contextlib.contextmanager
def process_group(
    command: Sequence[str], *, log: Path | None, environment: Mapping[str, str] | None = None, patience: float = 30.0
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command in a process group of its own, of which nothing is left after the block.

    However the block ends, processes that are still there get SIGTERM, and SIGKILL after ``patience`` seconds, or at
    once where something interrupts the waiting. A worker on a GPU that went on would keep its memory.

    Args:
        log: the file that takes what the processes write; None: it goes where this process' output goes.
        environment: None: that of this process.
    """
    sink = None if log is None else log.open("wb")
    with contextlib.nullcontext() if sink is None else sink:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=sink,
            stderr=None if sink is None else subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        _end(process, patience)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    try:
        _signal(process, signal.SIGTERM)
        # Not only for the leader: what the others hold outside of themselves, such as shared memory, they remove.
        _wait(process, patience)
    finally:
        _signal(process, signal.SIGKILL)
        _wait(process, _KILLED)
        process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the group is empty, or the time is over."""
    end = time.monotonic() + seconds
    while _signal(process, 0) and time.monotonic() < end:
        process.poll()  # a leader that has ended is one of the group until then
        time.sleep(0.02)


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    """Whether the group has a process that could take the signal."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise SystemExit in the block, as Ctrl-C raises KeyboardInterrupt.

    Python ends at both without a ``finally``: processes and files in shared memory would stay. A signal that is ignored
    (SIGHUP under nohup) or that somebody else handles is left as it is.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    taken = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def log_end(log: Path) -> str:
    """The last lines of a log, under its name."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join([f"The end of {log}:", *lines[-_SHOWN:]])
