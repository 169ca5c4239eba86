"""The model behind ``vllm serve``, with and without the plug-in: chat completions are checked and timed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch_nvfp4.bench.layer import BenchError
from torch_nvfp4.bench.process import log_end, process_group
from torch_nvfp4.bench.vllm.client import Answer, Client, question
from torch_nvfp4.bench.vllm.options import EngineOptions
from torch_nvfp4.bench.vllm.report import FIRST_TOKEN, OURS, RATE, THEIRS
from torch_nvfp4.bench.vllm.serve import MODES

__all__ = ["ChatJob", "chat_rows", "check_same", "run_side"]

_SERVER = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")  # the command vllm, where it has no script too
_ENVIRONMENT = {
    "VLLM_CONFIGURE_LOGGING": "1",  # its log says which process runs which experts
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_ON_A_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else each rank asks for a NUMA node
}
# What the plug-in logs in each process that has experts, behind the name that vLLM gives to the process.
_RUN_BY_US = re.compile(r"\((\S+ pid=\d+)\).*Using torch_nvfp4 \S+ for NVFP4 experts")
_NAME = "model"
_EVERY = 10.0  # seconds between lines of progress


@dataclasses.dataclass(frozen=True)
class ChatJob(EngineOptions):
    """What is served, and what one server is asked."""

    requests: tuple[int, ...] = (1, 16)  # at once
    words: int = 512  # of a message
    tokens: int = 128  # of an answer
    repeats: int = 3  # of each number of requests, after one that is not counted
    vocab: int = 32000

    def command(self, port: int) -> list[str]:
        """The server, with the options of ``engine.measure``."""
        given = {
            "port": port,
            "host": "127.0.0.1",
            "served_model_name": _NAME,
            "disable_uvicorn_access_log": True,
            **self.arguments(max(self.requests)),
        }
        return [*_SERVER, self.model, *(flag for name, value in given.items() for flag in _flag(name, value))]


def _flag(name: str, value: Any) -> list[str]:
    """An argument of ``vllm.LLM`` as ``vllm serve`` takes it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]


def run_side(
    job: ChatJob, side: str, directory: Path, *, on_a_cpu: bool, timeout: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Starts a server, asks it everything and ends it; its log stands in ``directory``.

    Returns ``start_seconds``; ``ranks``: the processes whose experts torch_nvfp4 runs; ``same``: of the questions that
    were asked again alone, and of those that were asked at once with others, how many were answered in the same words
    as alone the first time, and how many there were; ``requests``: by their number the lists ``FIRST_TOKEN`` (seconds,
    median over the requests) and ``RATE`` (tokens per second of all requests), with one value per repeat.

    Raises BenchError, with the end of the log, for an answer that is not whole, experts that are not run by what the
    side stands for, and where all this takes longer than ``timeout`` seconds.
    """
    log = directory / f"chat-{MODES[side]}.log"
    progress(f"{side}: starting vllm serve on {job.tensor_parallel_size} rank(s), log {log}")
    begin = time.perf_counter()
    with _serving(job, side, log, on_a_cpu=on_a_cpu, timeout=timeout, progress=progress) as client:
        result: dict[str, Any] = {"start_seconds": time.perf_counter() - begin}
        result["ranks"] = _checked_ranks(log.read_text(errors="replace"), side, job.tensor_parallel_size)
        progress(f"{side}: serving, experts run by torch_nvfp4 on {len(result['ranks'])} rank(s)")
        result |= _ask(client, job, lambda text: progress(f"{side}: {text}"))
    return result


@contextlib.contextmanager
def _serving(
    job: ChatJob, side: str, log: Path, *, on_a_cpu: bool, timeout: float, progress: Callable[[str], None]
) -> Iterator[Client]:
    """A server that is ready, in a process group that is gone afterwards."""
    port = _free_port()
    environment = {**(_ON_A_CPU if on_a_cpu else {}), **os.environ, **_ENVIRONMENT, "TORCH_NVFP4_VLLM": MODES[side]}
    client = Client(port, _NAME, time.monotonic() + timeout)
    with process_group(job.command(port), log=log, environment=environment) as process:
        try:
            _wait(process, client, log, timeout, lambda text: progress(f"{side}: {text}"))
            yield client
        except BenchError as error:
            raise BenchError(f"{side}: {error}. {log_end(log)}") from error


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(
    process: subprocess.Popen[bytes], client: Client, log: Path, timeout: float, tell: Callable[[str], None]
) -> None:
    begin = told = time.monotonic()
    while not client.healthy():
        if process.poll() is not None:
            raise BenchError(f"expected vllm serve to answer, got exit code {process.returncode}")
        now = time.monotonic()
        if now > client.deadline:
            raise BenchError(f"expected vllm serve to answer, got nothing within {timeout:.0f} s")
        if now - told >= _EVERY:
            told = now
            last = log.read_text(errors="replace").splitlines()[-1:]
            tell(f"waiting since {now - begin:.0f} s; its last line: {''.join(last)[:120]!r}")
        time.sleep(0.2)


def _checked_ranks(log: str, side: str, ranks: int) -> list[str]:
    """The processes that say that torch_nvfp4 runs their experts: with the plug-in all, without it none."""
    found = sorted({match[1] for match in map(_RUN_BY_US.search, log.splitlines()) if match is not None})
    if side == OURS and len(found) != ranks:
        raise BenchError(
            f"expected torch_nvfp4's experts on {ranks} rank(s) in the log, got {', '.join(found) or 'none'}"
        )
    if side == THEIRS and found:
        raise BenchError(f"expected vLLM's own experts with TORCH_NVFP4_VLLM=off, got torch_nvfp4's in {found}")
    return found


def _ask(client: Client, job: ChatJob, tell: Callable[[str], None]) -> dict[str, Any]:
    questions = [question(index, job.words, job.tokens, job.vocab) for index in range(max(job.requests))]
    texts = [client.ask(asked, stream=False).text for asked in questions]
    tell(f"{len(questions)} answers, one after the other")
    same = {"alone": [client.ask(questions[0], stream=True).text == texts[0]], "at once": []}
    result: dict[str, Any] = {}
    for count in job.requests:
        rounds = [client.ask_at_once(questions[:count]) for _ in range(job.repeats + 1)]
        for answers in rounds:
            equal = [answer.text == text for answer, text in zip(answers, texts, strict=False)]
            same["alone" if count == 1 else "at once"].extend(equal)
        result[str(count)] = _times(rounds[1:], job.tokens)
        tell(f"{count} at once, {statistics.median(result[str(count)][RATE]):.1f} tokens per second")
    return {"same": {name: [sum(values), len(values)] for name, values in same.items()}, "requests": result}


def _times(rounds: list[list[Answer]], tokens: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {FIRST_TOKEN: [], RATE: []}
    for answers in rounds:
        times[FIRST_TOKEN].append(statistics.median(_first(answer) for answer in answers))
        seconds = max(answer.end for answer in answers) - min(answer.begin for answer in answers)
        times[RATE].append(len(answers) * tokens / seconds)
    return times


def _first(answer: Answer) -> float:
    assert answer.first is not None, "a stream with words has a first one"
    return answer.first - answer.begin


def check_same(sides: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises BenchError where the plug-in answered a question that was asked alone again in other words.

    Beside others a question may have another answer: the batches that it shares are not the same twice.
    """
    equal, count = sides[OURS]["same"]["alone"]
    if equal != count:
        raise BenchError(
            f"{OURS}: expected the same answer to the same question alone, got another one {count - equal} of {count} "
            "times"
        )


def chat_rows(sides: Mapping[str, Mapping[str, Any]], job: ChatJob) -> list[dict[str, Any]]:
    """One row per quantity and number of requests: both sides' medians, and by how much ours is better.

    A side that has not run is None, and so is the ratio.
    """
    rows = []
    for kind in (FIRST_TOKEN, RATE):
        for count in job.requests:
            values = {
                side: statistics.median(sides[side]["requests"][str(count)][kind]) if side in sides else None
                for side in (OURS, THEIRS)
            }
            ours, theirs = values[OURS], values[THEIRS]
            ratio = None
            if ours is not None and theirs is not None:
                ratio = theirs / ours if kind == FIRST_TOKEN else ours / theirs
            rows.append({"kind": kind, "requests": count, **values, "ratio": ratio})
    return rows
