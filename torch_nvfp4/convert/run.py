"""Quantizes a checkpoint: plan, write, compare, and give it its configs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.checkpoint.headers import INDEX_NAME
from torch_nvfp4.convert.check import Difference, open_shard, worst_of_group
from torch_nvfp4.convert.config import hf_quant_config, quantization_config
from torch_nvfp4.convert.destination import Destination, free_bytes, journal_of, other_files
from torch_nvfp4.convert.plan import LAYOUTS, Shard, Work, plan_shards
from torch_nvfp4.convert.selection import select
from torch_nvfp4.convert.source import Source
from torch_nvfp4.convert.values import written
from torch_nvfp4.errors import CheckpointError, refusal

__all__ = ["Conversion", "LayerError", "Progress", "open_conversion"]

_T = TypeVar("_T")
_R = TypeVar("_R")
# Room for the index, the configs and the journal.
_SMALL_FILES = 1 << 20


class Progress(NamedTuple):
    """Where a run stands: what is being done, and bytes of the source that are done, of all."""

    step: str
    done: int
    total: int


@dataclass(frozen=True)
class LayerError:
    """How far the matrices of a shard are from the source.

    Attributes:
        label: what the shard holds.
        matrices: how many were compared.
        relative_l2: of the matrix that is furthest from its source.
        worst: the name of that module.
        problem: why it cannot be what quantizing gives, or None.
    """

    label: str
    matrices: int
    relative_l2: float
    worst: str
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)


def open_conversion(
    source: str | Path,
    destination: str | Path,
    *,
    layout: str = "modelopt",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Conversion:
    """Reads the headers of a checkpoint, and checks that it can be quantized into a directory; writes nothing.

    Args:
        source: a checkpoint of safetensors in bf16, fp16, fp32, FP8 (E4M3 with a scale per block) or MXFP4, whose
            experts keep their values exactly.
        destination: a new or empty directory, or that of an interrupted run with the same arguments.
        layout: "modelopt" or "compressed-tensors".
        include: globs over names of modules; None or none for the routed experts.
        exclude: globs of modules that stay as they are.

    Raises:
        CheckpointError: a source without MoE layers, with missing or damaged tensors or with sizes that NVFP4 does not
            have; a destination that holds something else, or a run with other arguments or from another source.
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    return Conversion(Path(source), Path(destination), layout, include or None, tuple(exclude))


class Conversion:
    """A checkpoint and the plan to quantize it.

    Attributes:
        shards: what is written, in this order.
        done: names of shards that an interrupted run has written.
        resumed: whether there was one.
        files: (name, bytes) of the other files that are copied.
        needed: bytes of disk that are still to be written.
        free: bytes of disk that are free.
    """

    def __init__(
        self, source: Path, path: Path, layout: str, include: Sequence[str] | None, exclude: Sequence[str]
    ) -> None:
        self._target = Destination(path)
        self._target.check(source)
        self._source = Source(source)
        self.layout, self._spelling = layout, LAYOUTS[layout]
        self.selection = select(self._source, include, exclude)
        self.shards = plan_shards(self.selection, self._spelling)
        self._journal = journal_of(self._source, layout, include, exclude)
        self.resumed = self._target.check_journal(self._journal)
        self.done = {shard.name for shard in self.shards if self.resumed and self._target.has(shard)}
        self.files = list(other_files(source))
        open_shards = sum(shard.nbytes for shard in self.shards if shard.name not in self.done)
        self.needed = open_shards + sum(size for _, size in self.files) + _SMALL_FILES
        self.free = free_bytes(path)

    @property
    def source_bytes(self) -> int:
        """Bytes of tensors that the whole source has."""
        return sum(shard.source_bytes for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of the shards that are written."""
        return sum(shard.nbytes for shard in self.shards)

    def check_disk(self) -> None:
        """Raises CheckpointError where the disk has not enough room."""
        if self.needed > self.free:
            got = f"{self.free:,} bytes"
            raise CheckpointError(refusal(self._target.path, f"{self.needed:,} bytes of free disk", got))

    def write(self, threads: int = 1, tell: Callable[[Progress], None] | None = None) -> None:
        """Writes the shards that are not there yet. The bytes do not depend on `threads`.

        Raises CheckpointError for a value that is not finite, and where the source changes meanwhile. What has been
        written stays, and the next run goes on from there.
        """
        self.check_disk()
        self._target.open(self._journal)
        self.done = {shard.name for shard in self.shards if self._target.has(shard)}
        waiting = [shard for shard in self.shards if shard.name not in self.done]
        total, done = sum(shard.source_bytes for shard in waiting), 0
        with _workers(threads) as run:
            for shard in waiting:
                for part in self._write_shard(shard, run):
                    if tell is not None:
                        tell(Progress(f"quantizing {shard.label}", done + part, total))
                done += shard.source_bytes
                self.done.add(shard.name)

    def compare(self, threads: int = 1, tell: Callable[[Progress], None] | None = None) -> list[LayerError]:
        """Reads every quantized matrix back from the disk and compares it with the source."""
        shards = [shard for shard in self.shards if shard.groups]
        total, done = sum(_group_bytes(shard) for shard in shards), 0
        result = []
        with _workers(threads) as run:
            for shard in shards:
                if tell is not None:
                    tell(Progress(f"comparing {shard.label}", done, total))
                result.append(self._compare_shard(shard, run))
                done += _group_bytes(shard)
        return result

    def finish(self) -> None:
        """The other files, the index and the configs, config.json last; then the reader opens the result.

        Raises CheckpointError where it would not load it; then there is no config.json, and the journal stays.
        """
        path = self._target.path
        for name, _ in self.files:
            self._target.copy(self._source.path / name, name)
        weight_map = {name: shard.name for shard in self.shards for name in shard.entries}
        size = sum(entry.nbytes for shard in self.shards for entry in shard.entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        self._target.write_json(INDEX_NAME, index)
        if self.layout == "modelopt":
            self._target.write_json("hf_quant_config.json", hf_quant_config(self.selection))
        section = quantization_config(self.selection, self.layout)
        self._target.write_json("config.json", self._source.stripped_config() | {"quantization_config": section})
        try:
            checkpoint = Checkpoint.open(path)
            activations = _unknown_activations(checkpoint)
            refusals = [each.reason for each in checkpoint.refusals() if each.reason not in activations]
            if refusals:
                raise CheckpointError(refusal(path, "layers that can be loaded", refusals[0]))
        except CheckpointError:
            self._target.withdraw("config.json")
            raise
        self._target.finish()

    def close(self) -> None:
        """Gives up the lock on the destination and the source's files."""
        self._target.close()
        self._source.files.close()

    def _write_shard(self, shard: Shard, run: _Run) -> Iterator[int]:
        """Yields how many bytes of the source are done."""
        done = 0
        descriptor = self._target.create(shard.name)
        try:
            os.truncate(descriptor, shard.nbytes)
            _write_at(descriptor, shard.header, 0)
            for nbytes in run(lambda work: self._do(descriptor, shard, work), shard.work):
                done += nbytes
                yield done
            changed = self._source.files.changed()
            if changed is not None:
                where = self._source.path / changed
                raise CheckpointError(refusal(where, "a file that does not change meanwhile", "another size or time"))
            self._target.publish(descriptor, shard.name)
        except OSError as error:
            self._target.discard(shard.name)
            where, got = self._target.path / shard.name, error.strerror or str(error)
            advice = "the same command goes on from here"
            raise CheckpointError(refusal(where, f"to write {shard.nbytes:,} bytes", got, advice)) from error
        except BaseException:
            self._target.discard(shard.name)
            raise
        finally:
            os.close(descriptor)

    def _do(self, descriptor: int, shard: Shard, work: Work) -> int:
        """Writes what a piece of work gives; the bytes of the source that it took."""
        for name, begin, values in written(self._source, work, self._spelling):
            content = values.reshape(-1).view(torch.uint8).numpy()
            _write_at(descriptor, content.data, shard.entries[name].begin + begin)
        return shard.bytes_of(work)

    def _compare_shard(self, shard: Shard, run: _Run) -> LayerError:
        worst = Difference("", -1.0, 0.0)
        with open_shard(self._target.path, shard) as files:
            compare = lambda group: worst_of_group(self._source, files, group, self._spelling)  # noqa: E731
            for difference in run(compare, shard.groups):
                worst = max(worst, difference, key=lambda each: (*each.key, each.module))
        problem = None
        if worst.excess > 0 and worst.is_mxfp4:
            problem = f"{worst.module} has not the values of the source, which is MXFP4 and converts exactly"
        elif worst.excess > 0:
            problem = f"a value of {worst.module} is {worst.excess:.2g} steps too far from the source"
        matrices = sum(len(group.parts) for group in shard.groups)
        return LayerError(shard.label, matrices, worst.relative_l2, worst.module, problem)


def _unknown_activations(checkpoint: Checkpoint) -> set[str]:
    """Why gates cannot be read: it is the source's config that says so, and no fault of the weights."""
    reasons = set()
    for layer in checkpoint.layers:
        try:
            checkpoint.gate(layer)
        except CheckpointError as error:
            reasons.add(str(error))
    return reasons


class _Run:
    """Applies a function to items on several threads, and hands out what is done as it is done."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self._pool, self._most = pool, 2 * threads

    def __call__(self, function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        waiting: set[Future[_R]] = set()
        try:
            for item in items:
                waiting.add(self._pool.submit(function, item))
                if len(waiting) >= self._most:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            # Nobody writes into a file that is closed next.
            for future in waiting:
                future.cancel()
            wait(waiting)


@contextmanager
def _workers(threads: int) -> Iterator[_Run]:
    """Threads that compute with one core each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield _Run(pool, threads)
    finally:
        torch.set_num_threads(before)


def _write_at(descriptor: int, content: bytes | memoryview, position: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def _group_bytes(shard: Shard) -> int:
    return sum(shard.bytes_of(group) for group in shard.groups)
