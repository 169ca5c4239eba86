"""One command for all runs over several GPUs: its steps, what it keeps of them, and the README's rows."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from torch_nvfp4.bench import distributed, gpus
from torch_nvfp4.bench.vllm import __main__ as vllm
from torch_nvfp4.bench.vllm.report import FIRST_TOKEN, OURS, RATE, THEIRS

ROOT = Path(__file__).parents[1]


def commands_of(*arguments, gpus_there=4):
    return gpus.commands(gpus._parser().parse_args(arguments), gpus_there)


def test_the_commands_of_all_steps_name_the_gpus():
    steps = commands_of("--vllm", "--attention-backend TRITON_ATTN --memory 0.5", "--distributed", "--layers 43")
    assert [shlex.join(command[2:]) for command in steps.values()] == [
        "torch_nvfp4.bench.distributed --ranks 4 --layers 43",
        "torch_nvfp4.bench.vllm serve --pairs 1 --tensor-parallel-size 4 --attention-backend TRITON_ATTN --memory 0.5",
        "torch_nvfp4.bench.vllm chat --tensor-parallel-size 4 --attention-backend TRITON_ATTN --memory 0.5",
    ]
    for step, command in steps.items():  # and each takes them
        parser = distributed._parser() if step == "distributed" else vllm._parser()
        assert parser.parse_args([*command[3:], "--json", "file"]).json == Path("file")
    (chat,) = commands_of("--only", "chat", "--tiny", gpus_there=8).values()
    assert shlex.join(chat[2:]) == "torch_nvfp4.bench.vllm chat --tensor-parallel-size 8 --tiny"


def writer(content, then=""):
    """A step that writes ``content`` to the file behind --json."""
    return [sys.executable, "-c", f"import sys, time; open(sys.argv[2], 'w').write({content!r}); {then}"]


def test_a_step_that_fails_or_hangs_leaves_the_others(tmp_path, capsys):
    file = tmp_path / "all.json"
    steps = {
        "whole": writer('{"rows": [1]}'),
        "fails": writer('{"rows": [2]}', "sys.exit(3)"),
        "hangs": writer('{"cut', "time.sleep(60)"),
        "silent": [sys.executable, "-c", ""],
        "last": writer("{}"),
    }
    result = gpus.run_steps(steps, 2.0, file)
    assert json.loads(file.read_text()) == result
    assert result["results"] == {"whole": {"rows": [1]}, "fails": {"rows": [2]}, "last": {}}
    assert result["errors"] == {
        "fails": "expected exit code 0, got 3",
        "hangs": "expected an end within 2 s, got none",
        "silent": "expected a result, got none",
    }
    assert list(result["seconds"]) == list(result["commands"]) == list(steps)
    assert 2.0 <= result["seconds"]["hangs"] < 20.0
    assert "== hangs: expected an end within 2 s, got none" in capsys.readouterr().err


def test_the_rows_worked_out_by_hand():
    def split(name, ranks, tokens, seconds, one, local):
        return asdict(distributed.Row(name, ranks, 1, tokens, seconds, one, local))

    splits = [
        split("tensor", 2, 1, 2e-5, 1e-5, 1.5e-5), split("tensor", 2, 8192, 2e-3, 3e-3, 1.9e-3),
        split("experts x tensor 2", 8, 1, 1e-5, 1e-5, 2e-5), split("experts, tokens sent", 4, 8192, 2e-3, 5e-3, None),
        split("a new one", 16, 1, 1e-5, 4e-5, None),
    ]  # fmt: skip
    serve = [
        {"kind": "decode", "size": "16", OURS: 0.004, THEIRS: 0.005, "ratio": 1.25},
        {"kind": "prefill", "size": "4 x 2048", OURS: 0.1, THEIRS: 0.2, "ratio": 2.0},
    ]
    chat = [
        {"kind": FIRST_TOKEN, "requests": 1, OURS: 0.0123, THEIRS: 0.0246, "ratio": 2.0},
        {"kind": RATE, "requests": 16, OURS: 1234.5, THEIRS: None, "ratio": None},
    ]
    job = {"tensor_parallel_size": 4}
    results = {
        "distributed": {"rows": splits}, "serve": {"rows": serve, "job": job}, "chat": {"rows": chat, "job": job}
    }  # fmt: skip
    assert list(gpus.readme_rows(results)) == [
        "| speed over one GPU (share of communication) | M = 1 | M = 8192 |",
        "|---|---|---|",
        "| tensor parallel over two | 0.50x (25 %) | 1.50x (5 %) |",
        "| experts split over four pairs, each tensor parallel over its pair | 1.00x (0 %) | - |",
        "| experts split over four, tokens sent | - | 2.50x |",
        "| a new one over 16 | 4.00x | - |",
        "",
        "| tensor parallel 4, tokens per second | decode 16 | prefill 4 x 2048 |",
        "|---|---|---|",
        "| with the plug-in | 4000 | 81920 |",
        "| vLLM alone | 3200 | 40960 |",
        "| faster | 1.25x | 2.00x |",
        "",
        "| chat completions, tensor parallel 4 | time to first token, 1 at once | tokens per second, 16 at once |",
        "|---|---|---|",
        "| with the plug-in | 12.3 ms | 1234 |",
        "| vLLM alone | 24.6 ms | - |",
        "| faster | 2.00x | - |",
        "",
    ]
    assert list(gpus.readme_rows({"serve": {"pairs": []}})) == []  # ended before a pair counted


def test_without_a_gpu_or_with_an_unknown_step(monkeypatch, capsys):
    monkeypatch.setattr(gpus.torch.cuda, "device_count", lambda: 0)
    assert gpus.main([]) == 1
    assert capsys.readouterr().err.startswith("error: expected a GPU, got none; ")
    with pytest.raises(SystemExit, match="2"):
        gpus.main(["--only", "chat,bench"])
    assert "argument --only: expected some of distributed,serve,chat, got 'bench'" in capsys.readouterr().err


def test_an_interruption_ends_the_step(tmp_path):
    code = f"""
import sys
from torch_nvfp4.bench import distributed, gpus
from torch_nvfp4.bench.vllm import __main__ as vllm
gpus.commands = lambda *_: {{"step": ["bash", "-c", "echo $$ > {tmp_path}/step; sleep 60"]}}
sys.exit(gpus.main(["--gpus", "1"]))
"""
    run = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    pid = tmp_path / "step"
    for _ in range(600):
        if pid.is_file() and pid.read_text().strip():
            break
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.killpg(int(pid.read_text()), 0)
