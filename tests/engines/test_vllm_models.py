"""Models inside vLLM with torch_nvfp4's kernels, against transformers on dequantized weights in fp32.

A random model's greedy tokens part where two candidates are close, so the log-probability of every token that vLLM
generated is compared, and the token may be short of the best one by no more than twice the tolerance.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from engines import qwen3_moe
from engines.qwen3_moe import Reference

FOLDER = Path(__file__).resolve().parent
TOKENS = 12
TIMEOUT = 240  # seconds, of one engine


class Case(NamedTuple):
    """A checkpoint, how it is loaded, and how far its log-probabilities may be from those of fp32."""

    layout: str
    dtype: str
    tolerance: float
    up_gain: float = 1.0
    limit: float | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)


EAGER = {"enforce_eager": True}
FP32, FP16 = 5e-5, 5e-2
CASES = {
    "ModelOpt, limit, gate and up scales differ, compiled": Case("modelopt", "float16", FP16, 3.7, 0.5),
    "W4A16, limit, gate and up scales differ, eager": Case("w4a16", "float32", FP32, 0.4, 0.5, EAGER),
    "W4A4, compiled": Case("w4a4", "float32", FP32),
    "W4A4, tensor parallel": Case("w4a4", "float32", FP32, 2.0, None, EAGER | {"tensor_parallel_size": 2}),
    # Without a limit: only this process asks for one, and the workers load the model.
    "ModelOpt, expert parallel": Case(
        "modelopt", "float16", FP16, 0.4, None, EAGER | {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    ),
}


def generate(folder: Path, environment: dict[str, str], limit: float | None, options: dict[str, Any]) -> Any:
    """What the engine says, after it ended: its result where there is one, and its output."""
    spec = {"model": str(folder / "quantized"), "prompts": qwen3_moe.prompts(), "tokens": TOKENS, "limit": limit,
            "options": options, "out": str(folder / "result.json")}  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(FOLDER / "run_vllm.py"), str(folder / "spec.json")]
    in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    run = subprocess.run(
        command, env=environment | in_process, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=TIMEOUT,
    )  # fmt: skip
    result = folder / "result.json"
    return run, json.loads(result.read_text()) if result.exists() else None


def command(arguments: list[str]) -> int:
    """The exit code of torch-nvfp4."""
    from typer.testing import CliRunner

    from torch_nvfp4.cli import app

    run = CliRunner().invoke(app, arguments)
    print(run.output)
    return run.exit_code


def differences(reference: Reference, results: list[dict[str, Any]]) -> tuple[float, float]:
    """The largest difference of a log-probability, and the most by which a token is less likely than the best."""
    error = gap = 0.0
    for prompt, result in zip(qwen3_moe.prompts(), results, strict=True):
        expected = reference.log_probabilities(prompt, result["tokens"])
        chosen = expected.gather(1, torch.tensor(result["tokens"]).unsqueeze(1)).squeeze(1)
        error = max(error, float((chosen - torch.tensor(result["logprobs"]).double()).abs().max()))
        gap = max(gap, float((expected.max(1).values - chosen).max()))
    return error, gap


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_log_probabilities(tmp_path: Path, engine_environment: dict[str, str], case: Case) -> None:
    qwen3_moe.write(tmp_path, case.layout, up_gain=case.up_gain, seeded=case.dtype)
    environment = engine_environment | {"TORCH_NVFP4_VLLM": "require"}
    options = {"dtype": case.dtype, **case.options}
    run, results = generate(tmp_path, environment, case.limit, options)
    assert run.returncode == 0, run.stdout[-4000:]
    limit = "no clamp" if case.limit is None else f"clamp_limit {case.limit:g}"
    # The layers of a model are alike, so each process says this once.
    processes = case.options.get("tensor_parallel_size", 1)
    assert run.stdout.count(f"for NVFP4 experts (NVFP4Experts, silu, {limit})") == processes, run.stdout[-4000:]

    reference = Reference(tmp_path, case.limit)
    error, gap = differences(reference, results)
    print(f"largest error of a log-probability {error:.2e}, of a choice {gap:.2e}")
    assert error < case.tolerance
    assert gap < 2 * case.tolerance
    if case.limit is not None:
        assert reference.clamped > 1000
        error, gap = differences(Reference(tmp_path), results)
        assert error > 1.0
        assert gap > 1.0


def test_require_ends_an_engine_that_asks_for_another_backend(
    tmp_path: Path, engine_environment: dict[str, str]
) -> None:
    qwen3_moe.write(tmp_path, "w4a16")
    options = {"dtype": "float32", "moe_backend": "marlin"} | EAGER
    run, results = generate(tmp_path, engine_environment | {"TORCH_NVFP4_VLLM": "require"}, None, options)
    assert run.returncode != 0
    assert results is None
    assert (
        "TORCH_NVFP4_VLLM=require: torch_nvfp4 cannot run these NVFP4 experts: expected --moe-backend auto, got "
        in (run.stdout)
    )


@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"), [("modelopt", "float16", FP16), ("compressed-tensors", "float32", FP32)]
)
def test_what_quantize_writes(
    tmp_path: Path, engine_environment: dict[str, str], layout: str, dtype: str, tolerance: float
) -> None:
    """``torch-nvfp4 quantize``, then vLLM: the log-probabilities are those of the dequantized result in fp32."""
    qwen3_moe.write_unquantized(tmp_path / "made")
    result = tmp_path / "quantized"
    assert command(["quantize", str(tmp_path / "made" / "source"), str(result), "--layout", layout]) == 0
    qwen3_moe.write_dense(tmp_path, result)
    environment = engine_environment | {"TORCH_NVFP4_VLLM": "require"}
    run, results = generate(tmp_path, environment, None, EAGER | {"dtype": dtype})
    assert run.returncode == 0, run.stdout[-4000:]
    assert "for NVFP4 experts (NVFP4Experts, silu, no clamp)" in run.stdout, run.stdout[-4000:]
    error, gap = differences(Reference(tmp_path), results)
    print(f"largest error of a log-probability {error:.2e}, of a choice {gap:.2e}")
    assert error < tolerance
    assert gap < 2 * tolerance
    # Not the model that was quantized: that has other log-probabilities.
    (tmp_path / "dense").rename(tmp_path / "dequantized")
    shutil.copytree(tmp_path / "made" / "source", tmp_path / "dense")
    assert differences(Reference(tmp_path), results)[0] > 4 * tolerance


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(2 * TIMEOUT):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-4000:])


def test_serve(tmp_path: Path, engine_environment: dict[str, str]) -> None:
    """``vllm serve`` finds the plug-in by itself; what it answers to a client of OpenAI's API is the model's."""
    from openai import OpenAI

    qwen3_moe.write(tmp_path, "w4a16", up_gain=2.0)
    port, log = free_port(), tmp_path / "serve.log"
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(tmp_path / "quantized"), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager",
        "--served-model-name", "tiny",
    ]  # fmt: skip
    with log.open("wb") as sink:
        server = subprocess.Popen(
            command, env=engine_environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = client.completions.create(
            model="tiny", prompt=qwen3_moe.prompts(), max_tokens=TOKENS, temperature=0, logprobs=1,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        streamed = client.completions.create(
            model="tiny", prompt=qwen3_moe.prompts()[0], max_tokens=TOKENS, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        text = "".join(part.choices[0].text for part in streamed)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
    results = [
        {"tokens": [qwen3_moe.WORDS[word] for word in choice.logprobs.tokens],
         "logprobs": choice.logprobs.token_logprobs}
        for choice in sorted(answer.choices, key=lambda choice: choice.index)
    ]  # fmt: skip
    assert [len(result["tokens"]) for result in results] == [TOKENS] * len(qwen3_moe.prompts())
    assert text == answer.choices[0].text
    error, gap = differences(Reference(tmp_path), results)
    print(f"largest error of a log-probability {error:.2e}, of a choice {gap:.2e}")
    assert error < FP32
    assert gap < 2 * FP32
    assert "for NVFP4 experts (NVFP4Experts, silu, no clamp)" in log.read_text()
