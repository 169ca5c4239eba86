"""The files of a checkpoint that is to be quantized: what they are called, whether they changed, and their bytes.

Tensors are read with `pread`, so that several threads share a file, a part of a stack of experts can be read alone, and
a file that becomes shorter meanwhile is an error and not the end of the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nvfp4.checkpoint.headers import INDEX_NAME, TensorInfo, collect_tensors, listing, load_json, tensor_error
from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.model_config import ModelConfig

__all__ = ["DTYPES", "HIGH_PRECISION", "FileState", "Source", "TensorFiles"]

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
}
"""The dtypes of which values are read. Tensors of other dtypes are copied as bytes."""
HIGH_PRECISION = ("BF16", "F16", "F32")

_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


class FileState(NamedTuple):
    """What tells that a file is still the same: written into the journal, compared when a run is resumed."""

    name: str
    size: int
    mtime_ns: int
    sha256: str  # of the header of a shard, of the whole file otherwise


class TensorFiles:
    """Safetensors shards that are open for reading, by any number of threads.

    Attributes:
        tensors: name -> what the header says.
        states: one per shard, by file name.
    """

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._starts: dict[str, int] = {}  # byte of the file where a tensor begins
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        files: dict[Path, set[str]] = {}
        for name, info in tensors.items():
            files.setdefault(info.file, set()).add(name)
        self.states = {file.name: self._read_starts(file, names) for file, names in sorted(files.items())}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, info: TensorInfo, begin: int, nbytes: int) -> Tensor:
        """`nbytes` bytes of a tensor from byte `begin` on: uint8 [nbytes]."""
        buffer = bytearray(nbytes)
        view, position = memoryview(buffer), self._starts[info.name] + begin
        done = 0
        while done < nbytes:
            try:
                count = os.preadv(self._descriptor(info.file), [view[done:]], position + done)
            except OSError as error:  # not to be taken for one of the file that is written
                got = error.strerror or str(error)
                raise tensor_error(info.file, info.name, "a file that can be read", got) from error
            if count == 0:
                raise tensor_error(info.file, info.name, f"{nbytes} bytes", f"{done}: the file has become shorter")
            done += count
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def rows(self, info: TensorInfo, first: int, num: int) -> Tensor:
        """Rows of a tensor [..., rows, cols], all leading dimensions counted as rows: [num, cols] in its own dtype."""
        row_bytes = info.nbytes // max(1, math.prod(info.shape[:-1]))
        values = self.read(info, first * row_bytes, num * row_bytes)
        return values.view(DTYPES[info.dtype]).view(num, info.shape[-1])

    def bytes_of_rows(self, info: TensorInfo, num_rows: int, rows: slice) -> Tensor:
        """Rows of a tensor that has `num_rows` of them: their bytes, uint8 [rows, bytes of a row]."""
        row_bytes = info.nbytes // num_rows
        content = self.read(info, rows.start * row_bytes, (rows.stop - rows.start) * row_bytes)
        return content.view(rows.stop - rows.start, row_bytes)

    def whole(self, info: TensorInfo) -> Tensor:
        return self.read(info, 0, info.nbytes).view(DTYPES[info.dtype]).view(info.shape)

    def changed(self) -> str | None:
        """The name of a shard that is no longer as it was when it was opened, or no longer there."""
        for name, state in self.states.items():
            file = next(info.file for info in self.tensors.values() if info.file.name == name)
            try:
                status = os.stat(file)
            except OSError:
                return name
            if (status.st_size, status.st_mtime_ns) != (state.size, state.mtime_ns):
                return name
        return None

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]

    def _read_starts(self, file: Path, names: set[str]) -> FileState:
        """Where the tensors of a shard begin; its header has been checked by `collect_tensors`."""
        with open(file, "rb") as stream:
            status = os.fstat(stream.fileno())
            prefix = stream.read(8)
            (length,) = struct.unpack("<Q", prefix)
            header = stream.read(length)
        for name, entry in json.loads(header).items():
            if name in names:
                self._starts[name] = 8 + length + entry["data_offsets"][0]
        return FileState(file.name, status.st_size, status.st_mtime_ns, hashlib.sha256(prefix + header).hexdigest())


class Source:
    """A checkpoint directory that is to be quantized.

    Attributes:
        path: the directory.
        config: config.json.
        model: what it means.
        block: rows and columns of an FP8 block.
        files: the shards.
    """

    def __init__(self, path: Path) -> None:
        if not os.path.isdir(path):
            got = "a file" if os.path.exists(path) else "no such path"
            raise CheckpointError(refusal(path, "a checkpoint directory", got))
        self.path = path
        if not os.path.lexists(path / "config.json"):
            raise CheckpointError(refusal(path, "config.json in the directory", listing(path)))
        self.config = load_json(path / "config.json")
        self.model = ModelConfig(path / "config.json", self.config)
        self.block = self._block()
        self.files = TensorFiles(collect_tensors(path).by_name)

    def states(self) -> list[FileState]:
        """Of every file that decides what is written."""
        small = [self.path / name for name in ("config.json", INDEX_NAME)]
        result = list(self.files.states.values())
        for file in small:
            if file.exists():
                status = file.stat()
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                result.append(FileState(file.name, status.st_size, status.st_mtime_ns, digest))
        return result

    def stripped_config(self) -> dict[str, Any]:
        """config.json without what it says about quantization, in any of its sections."""
        return _without(self.config, _QUANTIZATION_KEYS)

    def _block(self) -> tuple[int, int]:
        declared = [
            section[key]["weight_block_size"]
            for section in (self.config, *(value for value in self.config.values() if isinstance(value, dict)))
            for key in _QUANTIZATION_KEYS
            if isinstance(section.get(key), dict) and section[key].get("weight_block_size") is not None
        ]
        block = declared[0] if declared else [128, 128]
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            where = f"{self.path / 'config.json'}: weight_block_size"
            raise CheckpointError(refusal(where, "two positive integers", repr(block)))
        return block[0], block[1]


def _without(section: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in section.items()
        if key not in keys
    }
