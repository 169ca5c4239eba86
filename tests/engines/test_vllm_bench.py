"""The benchmark of vLLM in the real engine: what it measures is what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from engines import qwen3_moe
from torch_nvfp4.bench.vllm.engine import Job, scored_prompts
from torch_nvfp4.bench.vllm.model import TINY, write_model
from torch_nvfp4.bench.vllm.reference import distance, reference_log_probs

TIMEOUT = 240  # seconds, of one process


def test_the_reference_is_transformers_model_with_dequantized_weights(tmp_path: Path) -> None:
    qwen3_moe.write(tmp_path, "modelopt", up_gain=2.0)
    from transformers import AutoModelForCausalLM

    prompts = qwen3_moe.prompts()
    layer_by_layer = reference_log_probs(tmp_path / "quantized", prompts, device=torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    with torch.inference_mode():
        whole = [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in prompts]
    torch.testing.assert_close(layer_by_layer, torch.cat(whole), rtol=1e-5, atol=2e-5)


def test_scores_of_the_engine_are_those_of_its_model(tmp_path: Path, engine_environment: dict[str, str]) -> None:
    model = write_model(tmp_path / "model", TINY, device=torch.device("cpu"))
    job = Job(
        str(model), decode=(2,), prefill=((1, 32),), scored=(9, 30), repeats=1, vocab=TINY.vocab, max_model_len=512,
        options={"enforce_eager": True},
    )  # fmt: skip
    job.save(tmp_path / "job")
    run = subprocess.run(
        [sys.executable, "-m", "torch_nvfp4.bench.vllm.engine", *(str(tmp_path / f) for f in ("job", "out", "scores"))],
        env=engine_environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_NVFP4_VLLM": "require"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    result = json.loads((tmp_path / "out").read_text())
    assert result["experts"] == ["torch_nvfp4.integrations.vllm.experts.NVFP4Experts"]
    prompts = scored_prompts(job.scored, job.vocab)
    reference = reference_log_probs(model, prompts, device=torch.device("cpu"))
    following = torch.tensor([token for ids in prompts for token in ids[1:]])
    scores = torch.load(tmp_path / "scores")
    # bfloat16 throughout; against the tokens of another position the divergence is above 1.
    assert distance(scores, reference, following).mean_kl < 2e-3
    assert distance(scores.roll(1, 0), reference, following).mean_kl > 1.0


def test_one_layer_in_vllms_own_class(engine_environment: dict[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "torch_nvfp4.bench.vllm", "layer", "--tiny"],
        env=engine_environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    errors = [float(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("relative error")]
    assert len(errors) == 2
    assert max(errors) < 4e-3
    assert "integrations.vllm.experts.NVFP4Experts" in run.stdout


def test_chat_completions_of_a_served_model(tmp_path: Path, engine_environment: dict[str, str]) -> None:
    """``vllm serve`` finds the plug-in by itself on both ranks; the answers are whole, and the same again."""
    run = subprocess.run(
        [sys.executable, "-m", "torch_nvfp4.bench.vllm", "chat", "--tiny", "--tensor-parallel-size", "2",
         "--repeats", "1", "--timeout", str(TIMEOUT), "--options", '{"enforce_eager": true}',
         "--dir", str(tmp_path), "--json", str(tmp_path / "result.json")],
        env=engine_environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT + 60,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    side = result["sides"]["plug-in"]
    assert len(side["ranks"]) == 2
    assert side["same"]["alone"] == [3, 3]
    assert [(row["kind"], row["requests"]) for row in result["rows"]] == [
        ("time to first token", 1), ("time to first token", 4), ("tokens per second", 1), ("tokens per second", 4),
    ]  # fmt: skip
    assert all(row["plug-in"] > 0 and row["vLLM"] is None for row in result["rows"])
    assert "nothing to compare with" in run.stdout
