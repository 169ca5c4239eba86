"""The shards that are written: which tensors each holds, where in the file, and from which work they come.

All of it follows from headers, so that a shard's header is written first and every piece of work writes at its own
place: the bytes do not depend on how many threads there are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch_nvfp4.checkpoint.headers import TensorInfo, tensor_error
from torch_nvfp4.checkpoint.layouts import COMPRESSED_TENSORS, MODELOPT, Spelling, expert_name
from torch_nvfp4.convert.selection import Bias, Group, Selection, StoredWeight
from torch_nvfp4.format import GROUP_SIZE

__all__ = ["LAYOUTS", "Shard", "Work", "plan_shards"]

LAYOUTS: dict[str, Spelling] = {"modelopt": MODELOPT, "compressed-tensors": COMPRESSED_TENSORS}
"""The layouts that can be written, by name."""

_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
}  # fmt: skip

Work = Group | Bias | StoredWeight | TensorInfo
"""To quantize a few matrices, to copy a part of a bias, to turn an FP8 weight into bf16, to copy a tensor."""


class Entry(NamedTuple):
    """A tensor of a shard that is written."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte of the file
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One file. `label` says what it holds; `source_bytes` is what has to be read for it."""

    name: str
    label: str
    work: tuple[Work, ...]
    entries: dict[str, Entry]
    header: bytes
    source_bytes: int

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries.values())

    @staticmethod
    def bytes_of(work: Work) -> int:
        """Bytes of the source's weights that a piece of work reads."""
        return _source_bytes(work)

    @property
    def groups(self) -> list[Group]:
        return [work for work in self.work if isinstance(work, Group)]


def plan_shards(selection: Selection, spelling: Spelling) -> list[Shard]:
    """One shard per layer of experts, then the other tensors as they lie in the shards of the source."""
    planned: list[tuple[str, list[Work]]] = []
    for root, groups in selection.experts.items():
        node = expert_name(groups[0].parts[0].name)
        assert node is not None
        planned.append((f"layer {node.layer}", [*groups, *selection.biases[root]]))
    rest: dict[Path, list[Work]] = {}
    others: list[Work] = [*selection.linears, *selection.dequantized, *selection.copied]
    for work in others:
        rest.setdefault(_file(work), []).append(work)
    planned += [(f"the rest of {file.name}", work) for file, work in sorted(rest.items())]
    names: dict[str, TensorInfo] = {}
    shards = []
    for number, (label, works) in enumerate(planned, 1):
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for work in works:
            for name, dtype, shape in outputs(work, spelling):
                _claim(names, name, work)
                tensors[name] = (dtype, shape)
        file = f"model-{number:05d}-of-{len(planned):05d}.safetensors"
        entries, header = _layout(tensors)
        shards.append(Shard(file, label, tuple(works), entries, header, sum(map(_source_bytes, works))))
    return shards


def outputs(work: Work, spelling: Spelling) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of the tensors that a piece of work writes."""
    if isinstance(work, TensorInfo):
        yield work.name, work.dtype, work.shape
    elif isinstance(work, StoredWeight):
        yield work.data.name, "BF16", work.data.shape
    elif isinstance(work, Bias):
        yield work.name, work.info.dtype, (work.part.rows,)
    else:
        scalar = (1,) if spelling.reciprocal else ()  # compressed-tensors keeps a scalar as [1]
        assert spelling.global_scale is not None
        for part in work.parts:
            yield part.name + spelling.data, "U8", (part.rows, part.cols // 2)
            yield part.name + spelling.scale, "F8_E4M3", (part.rows, part.cols // GROUP_SIZE)
            yield part.name + spelling.global_scale, "F32", scalar


def _claim(names: dict[str, TensorInfo], name: str, work: Work) -> None:
    info = _first(work)
    if name in names:
        raise tensor_error(info.file, info.name, f"one tensor to become {name}", f"{names[name].name} too")
    names[name] = info


def _layout(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Entry], bytes]:
    """Places by size of a value and name, as the safetensors library does, so that every tensor is aligned."""
    placed: dict[str, tuple[int, int]] = {}
    position = 0
    for name in sorted(tensors, key=lambda name: (-_item_bytes(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        size = _item_bytes(dtype)
        for length in shape:
            size *= length
        placed[name] = (position, position + size)
        position += size
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    header |= {
        name: {"dtype": tensors[name][0], "shape": list(tensors[name][1]), "data_offsets": list(place)}
        for name, place in placed.items()
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {name: Entry(*tensors[name], start + begin, end - begin) for name, (begin, end) in placed.items()}
    return entries, struct.pack("<Q", len(text)) + text


def _item_bytes(dtype: str) -> int:
    return _ITEM_BYTES.get(dtype, 1)


def _first(work: Work) -> TensorInfo:
    if isinstance(work, TensorInfo):
        return work
    if isinstance(work, Bias):
        return work.info
    return work.data if isinstance(work, StoredWeight) else work.parts[0].weight.data


def _file(work: Work) -> Path:
    return _first(work).file


def _source_bytes(work: Work) -> int:
    if isinstance(work, TensorInfo):
        return work.nbytes
    if isinstance(work, StoredWeight):
        return work.data.nbytes
    if isinstance(work, Bias):
        return work.part.rows * _item_bytes(work.info.dtype)
    return sum(part.weight.source_bytes(part.rows, part.cols) for part in work.parts)
