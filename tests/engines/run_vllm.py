"""Loads a model into vLLM's engine and writes what it generates: run_vllm.py SPEC, a file of JSON.

A program of its own, as an engine is set up once per process. The keys of SPEC: ``model``, ``prompts`` (token ids),
``tokens`` (how many to generate), ``limit`` (swiglu_limit, which Qwen3 has no key for), ``options`` of LLM, ``out``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    if spec.get("limit") is not None:
        clamp(spec["limit"])
    llm = LLM(spec["model"], max_model_len=128, max_num_seqs=8, seed=0, enable_prefix_caching=False, **spec["options"])
    sampling = SamplingParams(temperature=0, max_tokens=spec["tokens"], ignore_eos=True, logprobs=1)
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
    results = []
    for answer in llm.generate(inputs, sampling, use_tqdm=False):
        tokens = list(answer.outputs[0].token_ids)
        logprobs = [step[token].logprob for step, token in zip(answer.outputs[0].logprobs, tokens, strict=True)]
        results.append({"tokens": tokens, "logprobs": logprobs})
    Path(spec["out"]).write_text(json.dumps(results))


def clamp(limit: float) -> None:
    """Makes Qwen3's MoE layers ask for a limit, as models with ``swiglu_limit`` do."""
    from vllm.model_executor.models import qwen3_moe

    factory = qwen3_moe.FusedMoEFactory
    qwen3_moe.FusedMoEFactory = lambda *args, **kwargs: factory(*args, swiglu_limit=limit, **kwargs)


if __name__ == "__main__":
    main()
