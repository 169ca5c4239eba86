"""Runs that are killed: what is there loads whole or not at all, and the next run completes it."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import dense_checkpoint as source
from helpers.command_server import Server
from torch_nvfp4.checkpoint import Checkpoint, CheckpointError

KILLED = -9
LAYERS = 6
# Kills the process before the n-th of the steps by which files come to be. The kernel keeps what a killed process has
# written, so that nothing has to wait for the disk.
KILL_AT = """
import os, signal
steps = 0
def kill_at(function):
    def step(*args, **kwargs):
        global steps
        steps += 1
        if steps == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return step
os.fsync = lambda descriptor: None
for name in ("mkdir", "truncate", "fsync", "replace", "unlink"):
    setattr(os, name, kill_at(getattr(os, name)))
"""


def write_source(path: Path, layers: int) -> Path:
    config = source.CONFIG | {"num_hidden_layers": layers}
    return source.write(path, source.per_expert(source.experts(layers=layers)) | source.others(layers), config)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("kill") / "source", LAYERS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


def whole(server: Server, path: Path, destination: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    code, out, err = server.run("quantize", path, destination, "--threads", 1)
    assert (code, err) == (0, "")
    assert f"quantize done: {destination}" in out
    return source.contents(destination)


def test_killed_at_every_step(server: Server, tmp_path: Path) -> None:
    path = write_source(tmp_path / "source", 1)
    expected = whole(server, path, tmp_path / "whole")
    number, code = 0, KILLED
    while code == KILLED:
        number += 1
        destination = tmp_path / f"{number}"
        before = KILL_AT.format(number=number)
        code, _, err = server.run("quantize", path, destination, "--threads", 2, "--no-verify", before=before)
        if code == KILLED:
            complete_or_refused(destination, expected)
            finish(server, path, destination, expected)
        else:
            assert (code, err) == (0, "")
        assert source.contents(destination) == expected
    assert number > 25


def complete_or_refused(destination: Path, expected: dict[str, bytes]) -> None:
    """With config.json all is there, at most with the journal beside it; without it no reader takes the directory."""
    if (destination / "config.json").exists():
        assert expected.items() <= source.contents(destination).items()
    elif destination.exists():
        with pytest.raises(CheckpointError):
            Checkpoint.open(destination)


def finish(server: Server, path: Path, destination: Path, expected: dict[str, bytes]) -> None:
    """The same command again, unless the run was killed after its last step."""
    if not destination.exists() or source.contents(destination) != expected:
        code, _, err = server.run("quantize", path, destination, "--threads", 1, "--no-verify")
        assert (code, err) == (0, "")


def test_killed_at_random_moments(path: Path, server: Server, tmp_path: Path) -> None:
    expected = whole(server, path, tmp_path / "whole")
    chance, kills = random.Random(7), 0
    for number in range(4):
        destination, code, seconds = tmp_path / f"{number}", KILLED, 0.02
        while code == KILLED:
            child = server.start("quantize", path, destination, "--threads", 2)
            time.sleep(chance.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
                os.kill(child, 9)
            code, _, _ = server.end()
            seconds *= 1.3
            if code == KILLED:
                kills += 1
                complete_or_refused(destination, expected)
                if destination.exists() and source.contents(destination) == expected:
                    break
        assert source.contents(destination) == expected
    assert kills > 10


def test_what_is_done_is_not_done_again(path: Path, server: Server, tmp_path: Path) -> None:
    """Killed when the third shard has its name: the next run writes the others only."""
    destination = tmp_path / "result"
    before = """
import os, signal
replace, count = os.replace, 0
def counted(source, target):
    global count
    replace(source, target)
    count += str(target).endswith(".safetensors")
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = counted
"""
    assert server.run("quantize", path, destination, before=before)[0] == KILLED
    shards = sorted(destination.glob("*.safetensors"))
    assert len(shards) == 3
    times = [(file.stat().st_mtime_ns, file.stat().st_ino) for file in shards]
    code, out, _ = server.run("quantize", path, destination)
    assert code == 0
    assert "3 of 8 shards are there" in out
    assert [(file.stat().st_mtime_ns, file.stat().st_ino) for file in shards] == times
