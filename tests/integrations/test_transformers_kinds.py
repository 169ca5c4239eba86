"""How experts of a checkpoint and of a class of transformers differ in kind; this needs no transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torch_nvfp4.checkpoint import Checkpoint, write_checkpoint
from torch_nvfp4.integrations.transformers.expert_layout import ExpertLayout, kind_error, layout_of

PLAIN, UP_ALONE = ExpertLayout(), ExpertLayout(gated=False)
GPT_OSS = ExpertLayout(interleaved=True, transposed=True, biased=True)


class Experts:
    """A class whose name is in the words."""


@pytest.mark.parametrize(
    ("layout", "module", "expected", "got"),
    [
        ("nemotron", UP_ALONE, None, None),
        ("nemotron", PLAIN, "gate and up and without biases", "relu2 without a gate"),
        ("gpt-oss", GPT_OSS, None, None),
        ("gpt-oss", PLAIN, "gate and up and without biases", "silu (alpha 1.702, beta 1), clamp_limit 2, biases"),
        ("compressed-tensors-mxfp4", PLAIN, None, None),
        ("compressed-tensors-mxfp4", UP_ALONE, "up and no gate and without biases", "situ (alpha 4, beta 25), no cla"),
        ("modelopt", PLAIN, None, None),
        ("modelopt", GPT_OSS, "gate and up and with biases", "silu, clamp_limit 2"),
    ],
)
def test_experts_of_another_kind(
    layout: Any, module: ExpertLayout, expected: str | None, got: str | None, tmp_path: Path
) -> None:
    write_checkpoint(
        tmp_path, layout=layout, hidden_size=64, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        num_hidden_layers=2, swiglu_limit=2.0,
    )  # fmt: skip
    reason = kind_error(module, Checkpoint.open(tmp_path).layer_config(1), Experts())
    if expected is None:
        assert reason is None
        return
    assert reason is not None
    assert reason.startswith(f"expected experts with {expected}, as Experts has them, got {got}")
    assert reason.endswith("; load another class of the model, or the layer alone with NVFP4Experts.from_checkpoint")


def test_the_layout_of_a_class() -> None:
    def module(**attributes: Any) -> Any:
        return SimpleNamespace(**attributes)

    def compute(x: Any) -> Any:
        return x

    gpt_oss = {"has_gate": True, "is_concatenated": False, "is_transposed": True, "has_bias": True}
    assert layout_of(module(_apply_gate=compute, **gpt_oss)) == (GPT_OSS, None)
    assert layout_of(module(_apply_gate=compute)) == (PLAIN, None)
    assert layout_of(module(act_fn=compute, has_gate=False)) == (UP_ALONE, None)
    # Llama-4's experts, which are called with a batch per expert, and Muse Spark's.
    words = "no {}, which says what they compute between the two GEMMs"
    assert layout_of(module(act_fn=compute)) == (PLAIN, words.format("_apply_gate"))
    assert layout_of(module(_apply_gate=compute, has_gate=False)) == (UP_ALONE, words.format("act_fn"))
    assert layout_of(module(_apply_gate=compute, has_post_expert_norm=True))[1] == "has_post_expert_norm=True"


def test_sizes_and_shapes() -> None:
    assert GPT_OSS.packed_shapes(4, 64, 32) == {
        "gate_up_proj": (4, 32, 64), "down_proj": (4, 16, 64), "gate_up_proj_bias": (4, 64), "down_proj_bias": (4, 64),
    }  # fmt: skip
    assert UP_ALONE.packed_shapes(4, 64, 32) == {"up_proj": (4, 32, 32), "down_proj": (4, 64, 16)}
    assert PLAIN.packed_shapes(4, 64, 32) == {"gate_up_proj": (4, 64, 32), "down_proj": (4, 64, 16)}
