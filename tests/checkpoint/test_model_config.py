"""What a model's config means: gates, limits, sizes, and every value that cannot be what its key says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoint_files import CONFIG, EXPERTS, HIDDEN, INTERMEDIATE, make_tensors, raises, write
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.gate import Gate

SITU = {"swiglu_limit": None, "hidden_act": "situ", "activation_situ_beta": 4}


def activation_of(path: Path, changes: dict[str, Any], layer: int = 0) -> Gate:
    config = {key: value for key, value in (CONFIG | changes).items() if value != "absent"}
    (path / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(path).activation(layer)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("silu", 7.0, 1.0, 0.0)),
        ({"swiglu_limit": None}, ("silu", None, 1.0, 0.0)),
        ({"swiglu_limit": 0}, ("silu", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "hidden_act": "absent"}, ("silu", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "hidden_act": "gelu"}, ("gelu", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "hidden_act": "gelu_pytorch_tanh"}, ("gelu_tanh", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "hidden_act": "relu2"}, ("relu2", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "text_config": {"swiglu_limit": 5, "hidden_act": "silu"}}, ("silu", 5.0, 1.0, 0.0)),
        ({"swiglu_alpha": 1.702, "swiglu_beta": 1.0}, ("silu", 7.0, 1.702, 1.0)),
        ({"hidden_act": "swigluoai", "swiglu_alpha": 1.5}, ("silu", 7.0, 1.5, 1.0)),
        ({"model_type": "gpt_oss"}, ("silu", 7.0, 1.702, 1.0)),
        ({"model_type": "minimax_m3", "swiglu_alpha": 1.702}, ("silu", 7.0, 1.702, 1.0)),
        ({"swiglu_limit": [7.0, 5.0]}, ("silu", 5.0, 1.0, 0.0)),
        ({"swiglu_limit": None, "swiglu_limits": [0, 5, 0]}, ("swiglustep", 5.0, 1.0, 0.0)),
        ({"swiglu_limit": 0, "swiglu_limits": 0}, ("silu", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "swiglu_limits": 7, "expert_swiglu_limit_list": 7}, ("swiglustep", 7.0, 1.0, 0.0)),
        ({"swiglu_limit": None, "swiglu_limits_shared": [9, 9]}, ("silu", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "swiglu_limits": [5, None], "model_type": "step3p5"}, ("silu", None, 1.0, 0.0)),
        ({"model_type": "step3p5", "swiglu_limits": [7, 7], "swiglu_limit": [7, 7]}, ("swiglustep", 7.0, 1.0, 0.0)),
        ({"model_type": "step3p5"}, ("swiglustep", 7.0, 1.0, 0.0)),
        (SITU | {"activation_situ_linear_beta": 25.0}, ("situ", None, 4.0, 25.0)),
        (SITU | {"activation_situ_linear_beta": None}, ("situ", None, 4.0, 0.0)),
        (SITU, ("situ", None, 4.0, 0.0)),
    ],
)  # fmt: skip
def test_activation(damaged: Path, changes: dict[str, Any], expected: tuple[str, float | None, float, float]) -> None:
    assert activation_of(damaged, changes, layer=1) == Gate(*expected)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"swiglu_limit": -1.0}, ("swiglu_limit: expected a positive, finite number", "got -1.0")),
        ({"swiglu_limit": math.nan}, ("swiglu_limit: expected a positive, finite number", "got nan")),
        ({"swiglu_limit": math.inf}, ("swiglu_limit: expected a positive, finite number", "got inf")),
        ({"swiglu_limit": True}, ("swiglu_limit: expected a positive, finite number", "got True")),
        ({"swiglu_limit": "7"}, ("swiglu_limit: expected a positive, finite number", "got '7'")),
        ({"swiglu_limit": {"0": 7.0}}, ("swiglu_limit: expected a positive, finite number", "got {'0': 7.0}")),
        ({"swiglu_limit": [7.0]}, ("swiglu_limit: expected 2 limits, got 1",)),
        ({"swiglu_limit": [7.0, "x"]}, ("swiglu_limit[1]: expected a positive", "got 'x'")),
        ({"swiglu_limits": [7.0, 5.0]}, ("expected swiglu_limit or swiglu_limits, got both: 7.0 and [7.0, 5.0]",)),
        ({"swiglu_limits": 7.0}, ("swiglu_limit or swiglu_limits, got both: 7.0 and 7.0; the clamps of the two",)),
        ({"swiglu_limit": [7, 5], "expert_swiglu_limit_list": [7, 5]}, ("got both: [7.0, 5.0] and", "the clamps")),
        ({"text_config": {"swiglu_limit": 5.0}}, ("swiglu_limit: expected one value, got 7.0 in", "5.0 in text")),
        ({"gemm1_clamp_limit": 7.0}, ("gemm1_clamp_limit: expected", "got 7.0", "never dropped")),
        ({"text_config": {"mlp_clamp": [0, 3]}}, ("text_config.mlp_clamp: expected", "got [0, 3]")),
        ({"talker_config": {"swiglu_limit": 3}}, ("talker_config.swiglu_limit: expected", "got 3")),
        ({"thinker_config": {"swiglu_limit": 3}}, ("swiglu_limit: expected one value, got 7.0 in", "3.0 in thinker")),
        ({"hidden_act": "gelu"}, ("expected hidden_act 'silu' beside a swiglu limit, got 'gelu' with limit 7.0",)),
        ({"hidden_act": "tanh"}, ("hidden_act: expected one of", "got 'tanh'")),
        ({"swiglu_limit": "absent", "model_type": "gpt_oss"}, ("expected swiglu_limit", "gpt_oss clamps", "got no")),
        ({"swiglu_alpha": 1.7}, ("expected swiglu_beta beside swiglu_alpha 1.7, got no such key",)),
        ({"swiglu_alpha": "x"}, ("swiglu_alpha: expected a finite number, got 'x'",)),
        ({"model_type": "step3p5", "swiglu_beta": 1.0}, ("expected no swiglu_alpha, swiglu_beta with Step-3.5's",)),
        ({"swiglu_limit": "absent", "hidden_act": "gelu", "swiglu_beta": 1.0}, ("swiglu_alpha 1.0", "got 'gelu'")),
        (SITU | {"activation_situ_beta": "absent"}, ("activation_situ_beta: expected a positive", "got no such")),
        (SITU | {"activation_situ_beta": 0.0}, ("activation_situ_beta: expected a positive number", "got 0")),
        (SITU | {"activation_situ_beta": 1e-46}, ("activation_situ_beta: expected a positive number", "got 1e-46")),
        (SITU | {"activation_situ_beta": 3e38}, ("activation_situ_beta: expected a positive number", "got 3e+38")),
        (SITU | {"activation_situ_linear_beta": 3e38}, ("activation_situ_linear_beta: expected", "got 3e+38")),
        ({"swiglu_alpha": 3e38, "swiglu_beta": 0}, ("swiglu_alpha: expected a number from -2**64 to", "got 3e+38")),
        (SITU | {"activation_situ_linear_beta": 1e-46}, ("situ_linear_beta: expected a positive", "got 1e-46")),
        (SITU | {"text_config": {"activation_situ_beta": 5}}, ("activation_situ_beta: expected one value, got 4.0",)),
        (SITU | {"activation_situ_linear_beta": -1}, ("activation_situ_linear_beta: expected a positive", "got -1")),
        (SITU | {"swiglu_limit": 7.0}, ("expected hidden_act 'silu' beside a swiglu limit, got 'situ' with",)),
        (SITU | {"swiglu_alpha": 1.5}, ("expected no swiglu_alpha beside hidden_act 'situ', got 1.5",)),
        (SITU | {"hidden_act": "silu"}, ("expected hidden_act 'situ' beside activation_situ_beta 4, got 'silu'",)),
        ({"n_routed_experts": "4"}, ("n_routed_experts: expected a non-negative integer, got '4'",)),
    ],
)  # fmt: skip
def test_activation_that_is_not_understood(damaged: Path, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    with raises(damaged / "config.json", *parts):
        activation_of(damaged, changes)


def test_unclear_limits_raise_when_opened(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {"act_clamp": 7.0}))
    with raises(damaged / "config.json", "act_clamp"):
        Checkpoint.open(damaged)


def test_limits_of_nothing_are_not_refused(damaged: Path) -> None:
    unrelated = {
        "act_clamp": None,
        "mlp_clip": 0,
        "time_step_limit": [0.0, 1.0],
        "quantization_config": {"act_clip": 3},
    }
    assert activation_of(damaged, unrelated).clamp_limit == 7.0


def test_top_k_not_declared(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps({"num_local_experts": EXPERTS}))
    checkpoint = Checkpoint.open(damaged)
    assert (checkpoint.num_experts, checkpoint.hidden_size, checkpoint.intermediate_size) == (4, HIDDEN, INTERMEDIATE)
    with raises(damaged / "config.json", "expected a key num_experts_per_tok", "got none"):
        _ = checkpoint.top_k


@pytest.mark.parametrize("root", ["mtp.0.layers.0.", "model.mtp.", "model.layers.2."])
def test_multi_token_prediction_is_ignored(root: str, tmp_path: Path) -> None:
    tensors, _ = make_tensors()
    for leaf, tensor in (("weight", torch.zeros(4, 8, dtype=torch.int8)), ("scale", torch.zeros(4, 1))):
        tensors[f"{root}ffn.experts.0.w1.{leaf}"] = tensor
    write(tmp_path, tensors, CONFIG | {"num_nextn_predict_layers": 1})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.layers == (0, 1)
    ignored = next(c for c in checkpoint.summary().categories if c.name == "ignored (multi-token prediction)")
    assert (ignored.modules, ignored.tensors, ignored.nbytes) == (1, 2, 48)
