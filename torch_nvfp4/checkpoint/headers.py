"""The files of a checkpoint directory: configs, the index, and the headers of the safetensors shards.

Nothing here trusts a file. A path that is not a regular file is refused without waiting for it; what is read is bounded
by a limit and by the file's own size; JSON has to be an object without repeated keys; every header is checked against
the size of its file.

Memory: JSON takes up to 25 times its bytes as Python's objects (of short keys; published headers take 9 times), and
what would take more, mostly brackets, is refused before it is parsed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

from torch_nvfp4.errors import CheckpointError, refusal, shown

__all__ = ["TensorInfo", "Tensors", "collect_tensors", "listing", "load_json", "tensor_error"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# The limit of the safetensors library itself; a larger length means that the file is not a safetensors file.
_MAX_HEADER_BYTES = 100_000_000
# Far above any published config (5 MB) and index (70 MB, of 900 experts in 60 layers).
_MAX_CONFIG_BYTES = 64 * 2**20
_MAX_INDEX_BYTES = 256 * 2**20
_MAX_DIMENSIONS = 8
# Every [ and { of JSON becomes an object of 56 to 232 bytes. Headers have one per 16 bytes or fewer.
_FREE_BRACKETS = 150_000
_BYTES_PER_BRACKET = 12
_DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Stamp(NamedTuple):
    """What tells a shard from another one that takes its place: size, time of change (ns), digest of the header."""

    size: int
    changed: int
    header: bytes


class TensorInfo(NamedTuple):
    """One tensor as the header of its shard declares it; `begin` is where its data begins in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    begin: int = 0
    stamp: Stamp | None = None


class Tensors(NamedTuple):
    """The tensors of a checkpoint by name, and how many more its shards hold that the index does not name."""

    by_name: dict[str, TensorInfo]
    left_out: int


def tensor_error(
    file: Path, tensor: str, expected: str, got: str, advice: str = "", *, kind: type[CheckpointError] = CheckpointError
) -> CheckpointError:
    return kind(refusal(f"{file}: tensor {shown(tensor)}", expected, got, advice))


def collect_tensors(path: Path) -> Tensors:
    """Every tensor that the index names, in the shard that it names; without an index, every tensor of the directory.

    Without an index, shards whose names count them (model-00001-of-00002) must all be there. An index of which no shard
    is there counts for nothing beside model.safetensors.

    The index is the authority: a tensor that a shard holds and the index does not name is not part of the checkpoint,
    and of two shards that hold a name the one that the index names counts.
    """
    single = path / SINGLE_NAME
    if os.path.lexists(path / INDEX_NAME) and not (os.path.lexists(single) and _is_left_over(path / INDEX_NAME)):
        return _indexed_tensors(path, _load_weight_map(path / INDEX_NAME))
    shards = [single] if os.path.lexists(single) else sorted(path.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(
            refusal(
                path,
                f"{INDEX_NAME}, {SINGLE_NAME} or other *.safetensors",
                f"{listing(path)} (pickled checkpoints are not read: convert them to safetensors)",
            )
        )
    _check_complete(path, shards)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(shard).items():
            if name in tensors:
                raise tensor_error(shard, name, "each tensor in one shard", f"it in {tensors[name].file.name} too")
            tensors[name] = info
    return Tensors(tensors, 0)


def _check_complete(path: Path, shards: Iterable[Path]) -> None:
    """Of shards that count themselves (model-00001-of-00002), all must be there: a download may have stopped."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for shard in shards:
        match = re.fullmatch(r"(.*?)(\d+)-of-(\d+)\.safetensors", shard.name, re.DOTALL | re.ASCII)
        if match is not None:
            numbers.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (prefix, last), there in numbers.items():
        if len(there) < int(last):
            number = next(number for number in itertools.count(0 if 0 in there else 1) if number not in there)
            file = path / f"{prefix}{number:0{len(last)}}-of-{last}.safetensors"
            got = f"no such file; {len(there)} of {int(last)} shards are there, and no {INDEX_NAME}"
            raise CheckpointError(refusal(file, "every shard that the names of the others count", got, "download it"))


def _indexed_tensors(path: Path, weight_map: Mapping[str, str]) -> Tensors:
    headers = {shard: read_header(path / shard) for shard in sorted(set(weight_map.values()))}
    tensors: dict[str, TensorInfo] = {}
    for name, shard in weight_map.items():
        info = headers[shard].get(name)
        if info is None:
            other = next((other for other, header in headers.items() if name in header), None)
            got = "no such tensor in any shard" if other is None else f"it in {other}"
            raise tensor_error(path / shard, name, f"in this shard, which {INDEX_NAME} names", got)
        tensors[name] = info
    return Tensors(tensors, sum(map(len, headers.values())) - len(tensors))


def _load_weight_map(index: Path) -> dict[str, str]:
    weight_map = load_json(index, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        got = "no such key" if weight_map is None else shown(weight_map)
        raise CheckpointError(refusal(index, "an object weight_map (tensor -> shard)", got))
    for tensor, shard in weight_map.items():
        if not _is_shard_name(shard):
            raise tensor_error(index, tensor, "the name of a *.safetensors file beside the index", shown(shard))
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.lexists(index.parent / shard)]
    if missing:
        tensors = [tensor for tensor, shard in weight_map.items() if shard == missing[0]]
        raise CheckpointError(
            refusal(
                index.parent / missing[0],
                f"the shard of {len(tensors)} tensors by {INDEX_NAME} (the first is {shown(tensors[0])})",
                f"no such file; {len(missing)} of {len(shards)} shards are missing",
            )
        )
    return weight_map


def _is_left_over(index: Path) -> bool:
    """Whether none of the shards that an index names is there.

    save_pretrained of transformers leaves an index like this where it writes one file in place of shards.
    """
    weight_map = load_json(index, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return False
    shards = {shard for shard in weight_map.values() if _is_shard_name(shard)}
    return bool(shards) and not any(os.path.lexists(index.parent / shard) for shard in shards)


def _is_shard_name(name: object) -> bool:
    """A plain file name: an index must not reach out of its directory."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or "\0" in name:
        return False
    # PureWindowsPath knows /, \\ and drives; a lone surrogate cannot be a file's name.
    return name == PureWindowsPath(name).name and _is_text(name)


def listing(path: Path) -> str:
    """The first names in a directory, for an error."""
    names = sorted(entry.name for entry in path.iterdir())
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "an empty directory"


def open_regular(file: Path, buffering: int = -1) -> BinaryIO:
    """Opens a regular file for reading. CheckpointError for anything else; never waits for a pipe's other end."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(file, flags)
    except FileNotFoundError:
        got = "a symbolic link whose target is missing" if file.is_symlink() else "no such file"
        raise CheckpointError(refusal(file, "a file", got)) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        got = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(refusal(file, "a file that can be read", got)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        got = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise CheckpointError(refusal(file, "a regular file", got))
    return os.fdopen(descriptor, "rb", buffering)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of a safetensors file: 8 bytes of length, JSON, and offsets against the file size."""
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if prefix.startswith(b"version "):
            raise CheckpointError(refusal(file, "a safetensors file", "a Git LFS pointer: run git lfs pull"))
        if len(prefix) < 8:
            raise CheckpointError(refusal(file, "8 bytes of header length", f"a file of {size} bytes: truncated"))
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER_BYTES:
            expected = f"a header of at most {_MAX_HEADER_BYTES} bytes"
            raise CheckpointError(refusal(file, expected, f"{length}: not a safetensors file"))
        if 8 + length > size:
            got = f"{size - 8} bytes after its length: the file is truncated, download it again"
            raise CheckpointError(refusal(file, f"a header of {length} bytes", got))
        content = stream.read(length)
        stamp = Stamp(size, os.fstat(stream.fileno()).st_mtime_ns, _digest(prefix + content))
    header = _parse_json(file, content, "header")
    del content
    _check_metadata(file, header.pop("__metadata__", None))
    tensors = {name: _tensor_info(file, name, entry, 8 + length, stamp) for name, entry in header.items()}
    _check_offsets(file, header, size, 8 + length)
    return tensors


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def open_again(file: Path, stamp: Stamp) -> BinaryIO:
    """Opens a shard whose header was read before, unbuffered. CheckpointError where it is not the same file any more.

    Size, time of change and the bytes of the header must be those of the stamp. The inode may be another one, since
    file systems in user space give a file a new one when they like.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(open_regular(file, buffering=0))
        check_stamp(file, stream, stamp)
        header = stream.read(8)
        if len(header) == 8:
            header += stream.read(min(struct.unpack("<Q", header)[0], _MAX_HEADER_BYTES, stamp.size))
        if _digest(header) != stamp.header:
            raise _changed(file, "another header")
        stack.pop_all()
        return stream


def check_stamp(file: Path, stream: BinaryIO, stamp: Stamp) -> None:
    """Raises CheckpointError where the open file's size or time of change is not that of the stamp."""
    status = os.fstat(stream.fileno())
    if status.st_size != stamp.size:
        raise _changed(file, f"{status.st_size} bytes where {stamp.size} were")
    if status.st_mtime_ns != stamp.changed:
        raise _changed(file, "one that was written since")


def _changed(file: Path, got: str) -> CheckpointError:
    return CheckpointError(
        refusal(file, "the file as it was when it was opened", got, "open the checkpoint again when it is complete")
    )


def _check_metadata(file: Path, metadata: Any) -> None:
    """What the safetensors library demands of it."""
    if metadata is None:
        return
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [metadata]
    wrong = [text for text in texts if not isinstance(text, str) or not _is_text(text)]
    if wrong or not isinstance(metadata, dict):
        raise CheckpointError(refusal(f"{file}: __metadata__", "an object of texts", shown((wrong or [metadata])[0])))


def _is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: a lone surrogate is no character."""
    return not any("\ud800" <= char <= "\udfff" for char in text) if not text.isascii() else True


def _check_offsets(file: Path, header: Mapping[str, Any], size: int, data_start: int) -> None:
    """The tensors must lie one after the other and fill the file, without gaps and without sharing a byte."""
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != position:
            expected = f"data at offset {position}, where the tensor before it ends"
            raise tensor_error(file, name, expected, f"offset {begin}")
        if end > size - data_start:
            expected, got = f"data up to byte {data_start + end} of the file", f"a file of {size} bytes"
            raise tensor_error(file, name, expected, got, "the file is truncated, download it again")
        position = end
    if position != size - data_start:
        raise CheckpointError(refusal(file, f"{position} bytes of tensor data", f"{size - data_start}"))


def _tensor_info(file: Path, name: str, entry: Any, data_start: int, stamp: Stamp) -> TensorInfo:
    if not _is_text(name):
        raise tensor_error(file, name, "a name that UTF-8 can hold", "a lone surrogate in it")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise tensor_error(file, name, "an object with dtype, shape, data_offsets", shown(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise tensor_error(file, name, f"dtype one of {', '.join(_DTYPE_BITS)}", shown(dtype))
    if not _are_sizes(shape):
        raise tensor_error(file, name, "a shape of non-negative integers", shown(shape))
    if len(shape) > _MAX_DIMENSIONS:
        raise tensor_error(file, name, f"a shape of at most {_MAX_DIMENSIONS} dimensions", f"{len(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise tensor_error(file, name, "two data_offsets", shown(offsets))
    nbytes = offsets[1] - offsets[0]
    if nbytes * 8 != math.prod(shape) * _DTYPE_BITS[dtype]:
        raise tensor_error(file, name, f"as many bytes as {dtype} {shape} has", f"data_offsets {offsets}")
    return TensorInfo(name, dtype, tuple(shape), nbytes, file, data_start + offsets[0], stamp)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def load_json(file: Path, limit: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes."""
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise CheckpointError(refusal(file, f"a file of at most {limit} bytes", f"{size} bytes"))
        return _parse_json(file, stream.read(size), "JSON")  # read(limit) would allocate the limit


def _parse_json(file: Path, content: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise tensor_error(file, twice, f"each key of the {what} once", "it twice")
        return result

    brackets = content.count(b"[") + content.count(b"{")
    if brackets > max(_FREE_BRACKETS, len(content) // _BYTES_PER_BRACKET):
        expected = f"at most one [ or {{ per {_BYTES_PER_BRACKET} bytes of the {what}"
        raise CheckpointError(refusal(file, expected, f"{brackets} in {len(content)} bytes"))
    try:
        result = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        got = f"{type(error).__name__}: {shown(str(error))[1:-1]}"
        raise CheckpointError(refusal(file, f"valid JSON in the {what}", got)) from error
    if not isinstance(result, dict):
        raise CheckpointError(refusal(file, f"an object in the {what}", type(result).__name__))
    return result
