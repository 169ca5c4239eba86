"""Times contenders on the CPU beside the machine's own read bandwidth and matmul rate."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from torch_nvfp4.bench.layer import Contender, Shape, cases, cast, dtype_name
from torch_nvfp4.bench.report import Row

_MIB = 2**20
_MAX_ROUNDS = 40


class Probes:
    """The machine's own rates, to be measured beside the contenders: read bandwidth and torch's matmul.

    Which of bf16, fp16 and fp32 torch multiplies fastest depends on the processor's instructions and is found out
    first: without AVX512-BF16 or AMX its bf16 matmul can be ten times slower than fp32.
    """

    def __init__(self, *, read_bytes: int | None = None, matmul_size: tuple[int, int, int] = (512, 4096, 4096)) -> None:
        if read_bytes is None:
            read_bytes = min(max(256 * _MIB, 8 * last_level_cache_bytes()), 2048 * _MIB)
        # Written once, or the pages would all be the kernel's one page of zeros.
        self._buffer = torch.ones(read_bytes // 8, dtype=torch.int64)
        m, n, k = matmul_size
        self._matmul_flop = 2 * m * n * k
        x, weight = torch.randn(m, k), torch.randn(n, k)
        self.matmul_dtype = _fastest_matmul(x[: max(m // 4, 1)], weight)
        self._x, self._weight = x.to(self.matmul_dtype), weight.to(self.matmul_dtype)

    def read_rate(self) -> float:
        """Bytes a second of one pass over the buffer by all threads.

        Of torch's reductions, the maximum of int64 is as fast as a C++ loop of 64-byte loads over two or four streams
        a thread (31.8 GB/s for both, interleaved, on two Zen 4 cores); any() reaches a quarter of that.
        """
        return self._buffer.nbytes / wall_seconds(lambda: self._buffer.max())

    def matmul_rate(self) -> float:
        return self._matmul_flop / wall_seconds(lambda: F.linear(self._x, self._weight))


def _fastest_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    def seconds(dtype: torch.dtype) -> float:
        a, b = x.to(dtype), weight.to(dtype)
        return min(wall_seconds(lambda: F.linear(a, b)) for _ in range(3))  # the first one also sets up

    return min((torch.bfloat16, torch.float16, torch.float32), key=seconds)


def wall_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def last_level_cache_bytes() -> int:
    """Size of one last-level cache, 32 MiB where the system does not say."""
    sizes = []
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
    return max(sizes, default=32 * _MIB)


# Over 60 lines: one loop, in which the order of what is timed is the measurement.
def measure_cpu(
    shape: Shape,
    tokens: int,
    contenders: Sequence[Contender],
    probes: Probes,
    *,
    seconds: float,
    skew: float = 0.0,
    min_rounds: int = 5,
) -> Row:
    """Times ``contenders`` (ours first) for about ``seconds``.

    Ours runs in every round. A peer so slow that it has used up its share of the time sits the other rounds out, once
    it has run twice.
    """
    source = cases(shape, tokens, skew=skew)
    ours, *peers = contenders
    for contender in contenders:
        contender.run(cast(next(source), contender))
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    speedups: dict[str, list[float]] = {peer.name: [] for peer in peers}
    read_rates, matmul_rates, over_read, over_floor, hits, touched = [], [], [], [], [], []
    flop = shape.flop(tokens)
    started = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or (rounds < _MAX_ROUNDS and time.perf_counter() - started < seconds):
        case = next(source)
        inputs = cast(case, ours)
        before = probes.read_rate()
        elapsed = wall_seconds(lambda inputs=inputs: ours.run(inputs))  # type: ignore[misc]
        read_rate = statistics.harmonic_mean((before, probes.read_rate()))
        matmul_rate = probes.matmul_rate()
        bytes_touched = shape.touched_bytes(case.topk_ids)
        times[ours.name].append(elapsed)
        read_rates.append(read_rate)
        matmul_rates.append(matmul_rate)
        over_read.append(elapsed * read_rate / bytes_touched)
        over_floor.append(elapsed / max(bytes_touched / read_rate, flop / matmul_rate))
        hits.append(shape.experts_hit(case.topk_ids))
        touched.append(bytes_touched)
        # A rotation, so that no peer always runs behind the same one.
        for peer in (*peers[rounds % max(len(peers), 1) :], *peers[: rounds % max(len(peers), 1)]):
            if len(times[peer.name]) >= 2 and sum(times[peer.name]) > seconds / len(contenders):
                continue
            inputs = cast(case, peer)
            times[peer.name].append(wall_seconds(lambda inputs=inputs, peer=peer: peer.run(inputs)))  # type: ignore[misc]
            speedups[peer.name].append(times[peer.name][-1] / elapsed)
        rounds += 1
    mean_touched = statistics.mean(touched)
    read_rate, matmul_rate = statistics.median(read_rates), statistics.median(matmul_rates)
    inputs = cast(next(source), ours)
    return Row(
        tokens=tokens,
        experts_hit=statistics.mean(hits),
        touched_bytes=mean_touched,
        flop=flop,
        rounds=rounds,
        read_rate=read_rate,
        matmul_rate=matmul_rate,
        matmul_dtype=dtype_name(probes.matmul_dtype),
        read_seconds=mean_touched / read_rate,
        compute_seconds=flop / matmul_rate,
        seconds={name: statistics.median(values) for name, values in times.items()},
        over_read=statistics.median(over_read),
        over_floor=statistics.median(over_floor),
        speedup={name: statistics.median(values) for name, values in speedups.items()},
        extra_bytes=peak_extra_bytes(lambda: ours.run(inputs)),
    )


def peak_extra_bytes(run: Callable[[], object]) -> int | None:
    """How much this process's resident memory grows at most while ``run`` runs; None where the system does not say.

    It counts every allocation, also those that no torch allocator sees. Pages that earlier calls freed are given back
    first, so that their reuse counts too.
    """
    clear_refs, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def kilobytes(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = kilobytes("VmRSS:")
        clear_refs.write_text("5")  # the peak starts again from here
        run()
        return max(kilobytes("VmHWM:") - before, 0) * 1024
    except (OSError, AttributeError, StopIteration):
        return None
