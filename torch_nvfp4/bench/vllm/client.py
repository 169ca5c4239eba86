"""A client of ``/v1/chat/completions`` of a server on this machine: what came, and when; each answer is checked."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch_nvfp4.bench.layer import BenchError
from torch_nvfp4.bench.transformers.tokenizer import chat_tokens, plain_words
from torch_nvfp4.bench.vllm.engine import prompt

__all__ = ["Answer", "Client", "Question", "question"]

_PATH = "/v1/chat/completions"
_SHOWN = 400  # characters of an answer that is not as it should be


@dataclass(frozen=True)
class Question:
    """One message, and the number of tokens of the answer. A word is a token."""

    message: str
    tokens: int

    def body(self, model: str, stream: bool) -> dict[str, Any]:
        """Greedy; the special tokens of an answer stay in its text, so that it has a word for each token."""
        return {
            "model": model,
            "messages": [{"role": "user", "content": self.message}],
            "max_completion_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }


@dataclass(frozen=True)
class Answer:
    """Times are of ``time.perf_counter``, in seconds. first: when the first token came, of a stream alone."""

    text: str
    begin: float
    first: float | None
    end: float


def question(index: int, words: int, tokens: int, vocab: int) -> Question:
    """Words that look random, the same in every process; others for another index."""
    return Question(" ".join(f"w{number}" for number in prompt(index, words, plain_words(vocab))), tokens)


class Client:
    """Asks one server. ``deadline``, of ``time.monotonic``: until when it waits for anything."""

    def __init__(self, port: int, model: str, deadline: float) -> None:
        self.port, self.model, self.deadline = port, model, deadline

    def healthy(self) -> bool:
        """Whether the server says that it is ready."""
        try:
            with self._connect("GET", "/health", None, timeout=5.0) as response:
                return response.status == 200
        except (OSError, http.client.HTTPException):
            return False

    def ask(self, asked: Question, *, stream: bool) -> Answer:
        """Raises BenchError unless a whole answer comes: status, tokens, reason of the end, and words."""
        body = json.dumps(asked.body(self.model, stream))
        begin = time.perf_counter()
        try:
            with self._connect("POST", _PATH, body) as response:
                if response.status != 200:
                    text = response.read().decode(errors="replace")
                    raise BenchError(f"expected status 200 from {_PATH}, got {response.status}: {text[:_SHOWN]}")
                first, lines = _read_stream(response) if stream else (None, [response.read()])
            end = time.perf_counter()
            reply = _joined(lines) if stream else _parsed(lines[0])
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(
                f"expected an answer from {_PATH}, got {type(error).__name__}: {error} "
                f"after {time.perf_counter() - begin:.1f} s"
            ) from error
        return Answer(_checked(reply, asked), begin, first, end)

    def ask_at_once(self, questions: Sequence[Question]) -> list[Answer]:
        """Streams all answers at the same time, a thread per question.

        The threads are daemons: an interruption of this one does not wait for the server.
        """
        answers: list[Answer | BenchError | None] = [None] * len(questions)
        barrier = threading.Barrier(len(questions))

        def run(number: int, asked: Question) -> None:
            try:
                barrier.wait()
                answers[number] = self.ask(asked, stream=True)
            except BenchError as error:
                answers[number] = error

        threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(questions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole = []
        for answer in answers:
            if answer is None:
                raise BenchError("expected an answer for each question, got none for one (see the traceback above)")
            if isinstance(answer, BenchError):
                raise answer
            whole.append(answer)
        return whole

    def _connect(
        self, method: str, path: str, body: str | None, timeout: float = float("inf")
    ) -> http.client.HTTPResponse:
        left = min(timeout, self.deadline - time.monotonic())
        if left <= 0:
            raise TimeoutError("no time is left")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=left)
        connection.request(method, path, body, {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()


def _read_stream(response: http.client.HTTPResponse) -> tuple[float | None, list[bytes]]:
    """When the first text came, and all events. What follows is parsed later, for the client to take no time."""
    first, lines = None, []
    for line in response:
        if not line.startswith(b"data:"):
            continue
        lines.append(line[len(b"data:") :].strip())
        if first is None and lines[-1] != b"[DONE]" and _text(_parsed(lines[-1])):
            first = time.perf_counter()
    return first, lines


def _joined(lines: Sequence[bytes]) -> dict[str, Any]:
    """The answer that the events of a stream make, as it would have come in one piece."""
    if not lines or lines[-1] != b"[DONE]":
        raise BenchError(f"expected a stream that ends with [DONE], got {len(lines)} events without it")
    events = [_parsed(line) for line in lines[:-1]]
    reasons = [choice.get("finish_reason") for event in events for choice in event.get("choices") or ()]
    message = {"content": "".join(map(_text, events))}
    return {
        "choices": [{"message": message, "finish_reason": next(filter(None, reversed(reasons)), None)}],
        "usage": next(filter(None, (event.get("usage") for event in reversed(events))), None),
    }


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(raw)
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or reply.get("error"):
        raise BenchError(f"expected an object of the protocol, got {raw.decode(errors='replace')[:_SHOWN]!r}")
    return reply


def _text(event: dict[str, Any]) -> str:
    deltas = (choice.get("delta") or {} for choice in event.get("choices") or ())
    return "".join(delta.get("content") or "" for delta in deltas)


def _checked(reply: dict[str, Any], asked: Question) -> str:
    """The words of a whole answer, with one space between them."""
    try:
        (choice,) = reply["choices"]
        words = (choice["message"]["content"] or "").split()
        got = {
            "finish_reason": choice["finish_reason"],
            "prompt_tokens": reply["usage"]["prompt_tokens"],
            "completion_tokens": reply["usage"]["completion_tokens"],
            "words": len(words),
        }
    except (KeyError, TypeError, ValueError) as error:
        shown = json.dumps(reply)[:_SHOWN]
        raise BenchError(f"expected one choice with text, reason and usage, got {shown}") from error
    expected = {
        "finish_reason": "length",
        "prompt_tokens": chat_tokens(asked.message),
        "completion_tokens": asked.tokens,
        "words": asked.tokens,
    }
    if got != expected:
        raise BenchError(f"expected a whole answer ({_listed(expected)}), got {_listed(got)}")
    return " ".join(words)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
