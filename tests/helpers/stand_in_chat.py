"""A server that answers chat completions as ``vllm serve`` does, without a model.

As a program it takes the command line of ``vllm serve``, logs what the plug-in logs on each rank, and starts a process
beside it. ``STAND_IN`` names one of its faults.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

AROUND = 5  # tokens of the chat template
FAULTS = {
    "status": "status 500, and text",
    "html": "no JSON",
    "no usage": "an answer without usage",
    "error": "an error in the place of an answer or in a stream",
    "stopped": "another reason of the end",
    "short": "a word less than the usage says",
    "few tokens": "a token less than asked for",
    "other prompt": "a token more in the prompt",
    "cut": "the connection ends in the middle",
    "no end": "a stream without [DONE], an answer that is empty",
    "slow": "nothing for a second",
    "changing": "another answer every time",
    # of the program
    "dies": "ends at once",
    "hangs": "never answers, nor says that it is ready",
    "one rank": "only the first rank says that the plug-in runs its experts",
    "always": "the ranks say so although the plug-in is off",
}


class Server(ThreadingHTTPServer):
    """``fault``: of ``FAULTS``, or empty. ``delay``: seconds before each token. ``together``: how many questions have
    to be there before one is answered."""

    daemon_threads = True

    def __init__(self, port: int = 0, fault: str = "", delay: float = 0.0, together: int = 1) -> None:
        assert not fault or fault in FAULTS
        super().__init__(("127.0.0.1", port), Handler)
        self.fault, self.delay = fault, delay
        self.barrier = threading.Barrier(together)
        self.bodies: list[dict[str, Any]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: the tests end connections."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        fault = self.server.fault
        self.server.barrier.wait(10)
        if fault == "slow":
            time.sleep(1)
        if fault == "status":
            self.reply(b"the engine is dead", 500)
        elif body["stream"]:
            self.stream(body, fault)
        else:
            self.whole(body, fault)

    def reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def words(self, body: dict[str, Any], fault: str) -> list[str]:
        """Of the answer: the message's own, repeated, so that each question has its own answer."""
        asked = body["messages"][0]["content"].split()
        words = [asked[index % len(asked)] for index in range(body["max_completion_tokens"])]
        if fault == "changing":
            words[-1] = f"changed{len(self.server.bodies)}"
        return words[:-1] if fault == "short" else words

    def usage(self, body: dict[str, Any], fault: str) -> dict[str, int] | None:
        asked = len(body["messages"][0]["content"].split()) + AROUND
        prompt, tokens = asked + (fault == "other prompt"), body["max_completion_tokens"] - (fault == "few tokens")
        return None if fault == "no usage" else {"prompt_tokens": prompt, "completion_tokens": tokens}

    def whole(self, body: dict[str, Any], fault: str) -> None:
        message = {"role": "assistant", "content": " ".join(self.words(body, fault))}
        reason = "stop" if fault == "stopped" else "length"
        answer: dict[str, Any] = {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}
        answer["usage"] = self.usage(body, fault)
        content = json.dumps({"error": {"message": "no"}} if fault == "error" else answer).encode()
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            content = content[:20]
            self.wfile.write(content)
        else:
            self.reply({"html": b"<html>", "no end": b""}.get(fault, content))

    def stream(self, body: dict[str, Any], fault: str) -> None:
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        reason = "stop" if fault == "stopped" else "length"
        words = self.words(body, fault)
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for number, word in enumerate(words):
            time.sleep(self.server.delay)
            if fault == "cut" and number == 1:
                return
            if fault == "error" and number == 1:
                self.event({"error": {"message": "no"}})
            last = number == len(words) - 1
            choice = {"index": 0, "delta": {"content": f" {word}"}, "finish_reason": reason if last else None}
            self.event({"choices": [choice]})
        self.event({"choices": [], "usage": self.usage(body, fault)})
        if fault == "html":
            self.chunk(b"data: <html>\n\n")
        if fault != "no end":
            self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, content: dict[str, Any]) -> None:
        self.chunk(b"data: " + json.dumps(content).encode() + b"\n\n")

    def chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


def main() -> None:
    fault = os.environ.get("STAND_IN", "")
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--tensor-parallel-size", type=int)
    args, others = parser.parse_known_args()
    print("started with", *others, flush=True)
    child = subprocess.Popen(["sleep", "600"])
    print("child", child.pid, flush=True)
    if fault == "dies":
        sys.exit("expected a better model")
    if fault == "hangs":
        time.sleep(600)
    if os.environ["TORCH_NVFP4_VLLM"] != "off" or fault == "always":
        for rank in range(1 if fault == "one rank" else args.tensor_parallel_size):
            for _ in range(2):  # a rank may have more than one kind of experts
                print(
                    f"(Worker_TP{rank} pid={100 + rank}) INFO 11-28 15:58:59 [oracle.py:171] "
                    "Using torch_nvfp4 0.1.0 for NVFP4 experts (NVFP4Experts, silu, no clamp)", flush=True
                )  # fmt: skip
    Server(args.port, fault).serve_forever()


if __name__ == "__main__":
    main()
