"""Runs that are killed: what is there loads whole or not at all, and the next run completes it."""

from __future__ import annotations

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
# Kills the process at the n-th of the steps by which files come to be, before or after it is done.
KILL_AT = """
import os, signal
steps = 0
def kill_at(function):
    def step(*args, **kwargs):
        global steps
        steps += 1
        if steps == {number} and not {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if steps == {number} and {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return step
for name in ("mkdir", "truncate", "fsync", "replace", "unlink"):
    setattr(os, name, kill_at(getattr(os, name)))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = source.CONFIG | {"num_hidden_layers": LAYERS}
    dense = source.per_expert(source.experts(layers=LAYERS))
    return source.write(tmp_path_factory.mktemp("kill") / "source", dense | source.others(LAYERS), config)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def expected(path: Path, server: Server) -> dict[str, bytes]:
    code, out, err = server.run("quantize", path, path.parent / "whole", "--threads", 1)
    assert (code, err) == (0, "")
    assert f"quantize done: {path.parent / 'whole'}" in out.replace("\n", "")
    return source.contents(path.parent / "whole")


def test_killed_at_every_step(path: Path, server: Server, expected: dict[str, bytes], tmp_path: Path) -> None:
    number, killed, codes = 0, 0, [KILLED]
    while KILLED in codes:
        number, codes = number + 1, []
        for after in (False, True):
            destination = tmp_path / f"{number}-{after}"
            before = KILL_AT.format(number=number, after=after)
            code, _, err = server.run("quantize", path, destination, "--threads", 2, "--no-verify", before=before)
            codes.append(code)
            if code == KILLED:
                killed += 1
                complete_or_refused(destination, expected)
                finish(server, path, destination, expected)
            else:
                assert (code, err) == (0, "")
            assert source.contents(destination) == expected
    assert killed > 60


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


def test_killed_at_random_moments(path: Path, server: Server, expected: dict[str, bytes], tmp_path: Path) -> None:
    chance, kills = random.Random(7), 0
    for number in range(4):
        destination, code, seconds = tmp_path / f"{number}", KILLED, 0.02
        while code == KILLED:
            child = server.start("quantize", path, destination, "--threads", 2)
            time.sleep(chance.uniform(0, seconds))
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
