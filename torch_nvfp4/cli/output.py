"""Results as JSON: a file is there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch_nvfp4.errors import refusal

_READ_NAMES = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")


class OutputError(RuntimeError):
    """A file or directory that a command was told to write, and cannot."""


def json_text(content: Any) -> str:
    """Valid JSON in ASCII: what JSON has no number for (NaN, infinity) is null, other characters are escapes."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


@contextmanager
def json_writer(file: Path | None, checkpoint: Path | None = None) -> Iterator[Callable[[Any], None]]:
    """A function that writes its argument as JSON to ``file`` (None: nowhere; ``-``: stdout).

    Raises OutputError, also where ``file`` is one of ``checkpoint``'s.
    """
    if file is not None and str(file) == "-":
        yield _write_stdout
        return
    if file is not None and checkpoint is not None:
        _check_apart("--json", file, checkpoint)
    with placed("--json", file) as place:
        yield lambda content: None if place is None else place.write(json_text(content))


def _check_apart(option: str, file: Path, checkpoint: Path) -> None:
    """A result must not replace a file of the checkpoint (under any name: shards may be links), nor be read as one."""
    name, got = f"{option} {file}", None
    with _said_plainly(name):
        target = Path(os.path.realpath(file))
        if target.exists() and any(os.path.samestat(target.stat(), other.stat()) for other in _files(checkpoint)):
            got = "one of its files"
        elif any(_would_be_read(place, checkpoint) for place in (file, target)):
            got = "one that would be read as part of it"
    if got is not None:
        raise OutputError(refusal(name, f"a file that does not belong to the checkpoint {checkpoint}", got))


def _would_be_read(file: Path, checkpoint: Path) -> bool:
    read = file.suffix == ".safetensors" or file.name in _READ_NAMES
    return read and os.path.realpath(file.parent) == os.path.realpath(checkpoint)


def _files(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.exists()]
    except OSError:  # for the reader to say
        return []


def _write_stdout(content: Any) -> None:
    if sys.stdout is not None:
        sys.stdout.write(json_text(content))
        sys.stdout.flush()


class Place:
    """A file that comes to stand under its name whole: it is written as ``scratch``, beside its place, until then."""

    def __init__(self, option: str, file: Path) -> None:
        self._name = f"{option} {file}"
        with _said_plainly(self._name):
            self._target = Path(os.path.realpath(file))  # a link stays one
            if self._target.is_dir():
                raise IsADirectoryError(None, "a directory")
            special = self._target.exists() and not self._target.is_file()  # a device or a pipe
            self.scratch = self._target if special else self._reserve()

    def _reserve(self) -> Path:
        """An empty file beside the target, with the permissions that the target has or would get."""
        scratch = self._target.with_name(f".torch-nvfp4-{secrets.token_hex(8)}{self._target.suffix}")
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        if self._target.exists():
            os.chmod(scratch, self._target.stat().st_mode & 0o7777)
        return scratch

    def write(self, text: str) -> None:
        """``text``, in ASCII, is the whole content."""
        with _said_plainly(self._name):
            self.scratch.write_text(text, encoding="ascii")
        self.commit()

    def commit(self) -> None:
        """What was written to ``scratch`` is the whole content."""
        if self.scratch == self._target:
            return
        with _said_plainly(self._name):
            with self.scratch.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(self.scratch, self._target)

    def discard(self) -> None:
        if self.scratch != self._target:
            with suppress(OSError):
                self.scratch.unlink(missing_ok=True)


@contextmanager
def placed(option: str, file: Path | None) -> Iterator[Place | None]:
    """The place of a file that an option names, tried before anything is measured.

    A run that is stopped leaves under that name what was there before.

    Raises:
        OutputError: a directory that is missing or cannot be written, a full disk.
    """
    place = None if file is None else Place(option, file)
    try:
        yield place
    finally:
        if place is not None:
            place.discard()


@contextmanager
def _said_plainly(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        got = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutputError(f"{name}: expected a file that can be written, got: {got}") from error
