"""The directory that is written: its journal, whole files only, and the rest of the files of the source.

A file has its final name only when all of it is on the disk. The journal is the first file, config.json the last one:
without it no reader takes the directory for a checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch_nvfp4._version import __version__
from torch_nvfp4.checkpoint.headers import INDEX_NAME, listing, load_json
from torch_nvfp4.convert.plan import Shard
from torch_nvfp4.convert.source import Source
from torch_nvfp4.errors import CheckpointError, refusal, shown

__all__ = ["JOURNAL", "Destination", "free_bytes", "other_files"]

JOURNAL = "quantize.journal.json"
PARTIAL = ".partial"
_WRITTEN_ELSEWHERE = ("config.json", "hf_quant_config.json", INDEX_NAME)
_WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5",
    ".msgpack", ".onnx",
)  # fmt: skip
_NO_FOLDERS = (".git", ".cache", "__pycache__")


class Destination:
    """The directory, locked against a second run, from `open` on to `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def check(self, source: Path) -> None:
        """Raises CheckpointError for a place that cannot be written to without harm; changes nothing."""
        own, other = self.path.resolve(), source.resolve()
        if own == other or other in own.parents or own in other.parents:
            got = "the source itself" if own == other else f"one inside the other (source {other})"
            raise CheckpointError(refusal(self.path, "a directory beside the source", got))
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            got = "a symbolic link whose target is missing" if self.path.is_symlink() else "a file"
            raise CheckpointError(refusal(self.path, "a new or empty directory", got))
        self._check_entries()

    def _check_entries(self) -> None:
        found = {entry.name for entry in self.path.iterdir()} - {JOURNAL + PARTIAL}
        if found and JOURNAL not in found:
            got = listing(self.path)
            raise CheckpointError(refusal(self.path, "a new or empty directory, or an interrupted run's", got))

    def check_journal(self, journal: dict[str, Any]) -> bool:
        """Whether a run with this journal was interrupted here. Raises CheckpointError where another one was."""
        file = self.path / JOURNAL
        if not os.path.lexists(file):
            return False
        before = load_json(file)
        advice = f"delete {self.path} to begin again"
        for key, expected in journal.items():
            if key == "files" or before.get(key) == expected:
                continue
            text = f"{key} {shown(before.get(key))}, with which the run began"
            raise CheckpointError(refusal(file, text, shown(expected), advice))
        old = {entry[0]: entry[1:] for entry in before.get("files", [])}
        new = {entry[0]: entry[1:] for entry in journal["files"]}
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                what = ("size", "time of change", "header")
                got = "no such file now" if name not in new else "a file that was not there"
                if name in old and name in new:
                    changed = [word for word, a, b in zip(what, old[name], new[name], strict=True) if a != b]
                    got = f"another {' and '.join(changed)}"
                raise CheckpointError(refusal(file, f"the source's {name} as it was when the run began", got, advice))
        return True

    def open(self, journal: dict[str, Any]) -> None:
        """Makes the directory and its journal."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise CheckpointError(refusal(self.path, "one run at a time", "another process that writes here")) from None
        self._check_entries()  # again: another process may have been faster and be done by now
        if not self.check_journal(journal):
            self.write_json(JOURNAL, journal)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def has(self, shard: Shard) -> bool:
        """Whether the shard is there. It has its name only since it is whole; header and size are looked at anyway."""
        file = self.path / shard.name
        if not file.is_file() or file.stat().st_size != shard.nbytes:
            return False
        with open(file, "rb") as stream:
            return stream.read(len(shard.header)) == shard.header

    def create(self, name: str) -> int:
        """A descriptor of an empty file that `publish` will give the name."""
        return os.open(self.path / (name + PARTIAL), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def publish(self, descriptor: int, name: str) -> None:
        """All of the file is on the disk, then it has its name, then the name is on the disk."""
        os.fsync(descriptor)
        os.replace(self.path / (name + PARTIAL), self.path / name)
        self._sync(self.path / name)

    def discard(self, name: str) -> None:
        (self.path / (name + PARTIAL)).unlink(missing_ok=True)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self._write(name, (json.dumps(content, indent=2) + "\n").encode())

    def copy(self, source: Path, name: str) -> None:
        """A file of the source that is not read here."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        descriptor = self.create(name)
        with os.fdopen(descriptor, "wb") as stream, open(source, "rb") as original:
            shutil.copyfileobj(original, stream)
            stream.flush()
            self.publish(descriptor, name)

    def withdraw(self, name: str) -> None:
        """Takes a file back that was published."""
        (self.path / name).unlink()
        self._sync(self.path / name)

    def finish(self) -> None:
        """Removes the journal: the checkpoint is complete."""
        self.withdraw(JOURNAL)

    def _write(self, name: str, content: bytes) -> None:
        descriptor = self.create(name)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            self.publish(descriptor, name)

    def _sync(self, file: Path) -> None:
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def journal_of(source: Source, layout: str, include: Sequence[str] | None, exclude: Sequence[str]) -> dict[str, Any]:
    """What has to be the same for a run to go on."""
    return {
        "torch_nvfp4": __version__,
        "layout": layout,
        "include": None if include is None else list(include),
        "exclude": list(exclude),
        "files": [list(state) for state in source.states()],
    }


def other_files(source: Path) -> Iterator[tuple[str, int]]:
    """(name, size) of the files that go along: tokenizer, code, licence; no weights and no configs of quantization."""
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if name not in _NO_FOLDERS)
        for file in sorted(files):
            path = Path(folder, file)
            name = path.relative_to(source).as_posix()
            if name not in _WRITTEN_ELSEWHERE and not name.endswith(_WEIGHT_SUFFIXES) and path.is_file():
                yield name, path.stat().st_size


def free_bytes(path: Path) -> int:
    """Of the disk on which a directory is or would be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
