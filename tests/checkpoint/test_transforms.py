"""Online transforms (compressed-tensors' transform_config): refused where they target experts, and nowhere else."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoint_files import CONFIG, raises
from torch_nvfp4.checkpoint import Checkpoint

REGEX = ["re:.*w2$"]


def open_with(path: Path, transforms: Any) -> Checkpoint:
    section = {"quant_method": "compressed-tensors", "transform_config": transforms}
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": section}))
    return Checkpoint.open(path)


def group(*schemes: Any) -> Any:
    return {"config_groups": {"R4": {"type": "hadamard", "apply": list(schemes)}}}


@pytest.mark.parametrize(
    "scheme",
    [
        {"targets": REGEX, "location": "input"},
        {"targets": "re:layers\\..*[.]experts", "location": "output"},
        {"targets": ["Linear"], "location": "input", "ignore": ["re:.*lm_head"]},
        {"targets": ["layers.0.ffn.experts.0.w2"], "location": "input"},
        {"targets": ["layers.0.ffn.experts.3.w3"], "location": "input"},
        {"targets": ["re:.*experts.2.w1"], "location": "input"},
        {"targets": ["DeepseekV4MoE"], "location": "output"},
        {"targets": ["lm_head"] * 1001, "location": "output"},
        {"targets": REGEX, "location": "somewhere"},
        {"targets": ["re:(a+)+$"], "location": "input"},
        {"targets": 3, "location": "input"},
        {"targets": REGEX, "location": "input", "ignore": ["re:(w2|b)"]},
    ],
)
def test_transforms_of_experts(damaged: Path, scheme: Any) -> None:
    checkpoint = open_with(damaged, group({"targets": REGEX, "location": "weight_input"}, scheme))
    words = ("transform_config.config_groups.R4", "expected transforms of experts that are folded into", "got location")
    with raises(damaged, *words, "quantize without online transforms") as caught:
        checkpoint.experts(0)
    assert checkpoint.refusals()[0] == ("layer 0", str(caught.value))


@pytest.mark.parametrize(
    "transforms",
    [
        None,
        {},
        group(),
        group({"targets": ["Linear"], "location": "weight_input"}, {"targets": REGEX, "location": "weight_output"}),
        group({"targets": ["re:.*self_attn$"], "location": "q_attn"}, {"targets": ["Linear"], "location": "k_cache"}),
        group({"targets": ["re:.*o_proj$", "LlamaAttention", "lm_head"], "location": "input"}),
        group({"targets": ["Linear"], "location": "input", "ignore": ["re:.*experts.*"]}),
        group({"targets": ["re:.*down_proj$"], "location": "input"}),
    ],
)
def test_transforms_of_other_modules(damaged: Path, transforms: Any) -> None:
    checkpoint = open_with(damaged, transforms)
    assert checkpoint.refusals() == ()
    checkpoint.experts(0)


@pytest.mark.parametrize("transforms", [3, [1], {"location": "input"}, {"config_groups": {"a": 1}}, group(1)])
def test_transforms_that_are_not_understood(damaged: Path, transforms: Any) -> None:
    with raises("transform_config", "expected config_groups of", "a transform that is not understood is not dropped"):
        open_with(damaged, transforms).experts(0)


def test_patterns_that_take_forever(damaged: Path) -> None:
    targets = ["re:(.*)*x", "re:.*.*.*.*.*.*.*x", "re:.+.+.+x", "re:" + "a?" * 100 + "a" * 100]
    checkpoint = open_with(damaged, group({"targets": targets, "location": "weight_input"}))
    checkpoint.experts(0)
    started = time.perf_counter()
    with raises("targets"):
        open_with(damaged, group({"targets": targets, "location": "input"})).experts(0)
    assert time.perf_counter() - started < 5.0
