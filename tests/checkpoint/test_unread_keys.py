"""Keys that are not read and read like a part of the gate: a clamp, an activation, alpha and beta are never dropped."""

from __future__ import annotations

from types import SimpleNamespace as Config
from typing import Any

import pytest

from helpers.checkpoint_files import raises
from torch_nvfp4.gate import Gate
from torch_nvfp4.model_config import ModelConfig
from torch_nvfp4.quant_config import MoEQuantConfig


def gate(config: Any) -> Gate:
    return MoEQuantConfig.from_config(config, 0).gate


class OnTheClass:
    """As transformers' configs: `to_dict` has the instance's values only."""

    swiglu_limit = 7.0

    def to_dict(self) -> dict[str, Any]:
        return {"hidden_act": "silu"}


class Aliased:
    swiglu_limit = None
    attribute_map = {"swiglu_limit": "cap"}  # noqa: RUF012

    def to_dict(self) -> dict[str, Any]:
        return {"cap": 5.0}


class Nested:
    def __init__(self, **sections: Any) -> None:
        vars(self).update(sections)

    def to_dict(self) -> dict[str, Any]:
        return {name: value.to_dict() for name, value in vars(self).items()}


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"block_configs": [{"ffn": {"swiglu_limit": 7.0}}]}, "block_configs[0].ffn.swiglu_limit"),
        ({"blocks": [[{}, {"ffn": {"swiglu_limit": 7.0}}]]}, "blocks[0][1].ffn.swiglu_limit"),
        ({"blocks": ({"swiglu_limits": (0, 7.0)},)}, "blocks[0].swiglu_limits"),
        *(({key: 7.0}, key) for key in ("moe_clamp_limit", "expert_clamp", "silu_limit", "gate_limit", "geglu_limit")),
        *(
            ({key: 7.0}, key)
            for key in ("swigluLimit", "situ_limit", "swiglu-limit", "swiglu_max", "swiglulimit", "GEMM1ClampLimit")
        ),
        ({"ffn_config": {"clamp": 7.0}}, "ffn_config.clamp"),
        ({"talker_config": {"swiglu_limit": 7.0}}, "talker_config.swiglu_limit"),
        (Config(moe=Config(swiglu_limit=7.0)), "moe.swiglu_limit"),
        (Config(layers=[Config(swiglu_limit=7.0)]), "layers[0].swiglu_limit"),
        ({"moe": Nested(expert=OnTheClass())}, "moe.expert.swiglu_limit"),
    ],
)
def test_clamp_that_is_not_understood(config: Any, label: str) -> None:
    with raises(
        f"{label}: expected a limit of the gate", "got", "7.0", "under a key that is not understood", "dropped"
    ):
        gate(config)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (OnTheClass(), 7.0),
        (Nested(text_config=OnTheClass()), 7.0),
        (Config(text_config=Config(swiglu_limit=3.0)), 3.0),
        (Config(thinker_config=Nested(text_config=OnTheClass())), 7.0),
    ],
)
def test_clamp_of_an_object(config: Any, limit: float) -> None:
    assert gate(config) == Gate("silu", limit)


def test_clamp_under_an_alias() -> None:
    assert gate(Aliased()) == Gate("silu", 5.0)


@pytest.mark.parametrize(
    "config",
    [
        {"clip_qkv": 8.0, "n_limited_groups": 4, "max_position_embeddings": 9, "moe_max_capacity": 3},
        {"audio_config": {"gradient_clipping": 1e10, "use_clipped_linears": True}, "topk_limit": 3},
        {"vision_config": {"swiglu_limit": 10.0, "blocks": [{"swiglu_limit": 7.0}]}},  # GLM-5.3-Flash
        {"swiglu_limits_shared": [9.0], "shared_expert_clamp": 7.0, "gate_limit": None, "moe_clamp": [0, None]},
        {"quantization_config": {"act_clip": 3}, "text_config": {"quantization_config": {"act_clip": 3}}},
    ],
)
def test_keys_about_something_else(config: dict[str, Any]) -> None:
    assert gate(config) == Gate()


def test_objects_inside_each_other() -> None:
    config = Config(hidden_act="gelu")
    config.moe = Config(parent=config)
    config.moe.parent = config
    assert gate(config) == Gate("gelu")
    config.text_config = config
    assert gate(config) == Gate("gelu")


SITU = {"hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0}


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"activation": "gelu"}, "activation: expected 'silu', as hidden_act, got 'gelu'"),
        ({"hidden_act": "silu", "moe_hidden_act": "gelu"}, "moe_hidden_act: expected 'silu'"),
        ({"expert_activation": "situ"}, "expert_activation: expected 'silu', as hidden_act, got 'situ'"),
        ({"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "ffn_config.ffn_act_fn: expected 'silu'"),
        ({"language_model": {"hidden_act": "gelu"}}, "language_model.hidden_act: expected 'silu'"),
        ({"block_configs": [{"ffn": {"hidden_act": "gelu"}}]}, "block_configs[0].ffn.hidden_act: expected 'silu'"),
        ({"text_config": {"moe_act_fn": ["silu", "gelu"]}}, "text_config.moe_act_fn: expected 'silu'"),
        ({"gemm1_alpha": 1.702, "gemm1_beta": 1.0}, "gemm1_alpha: expected the gate's 1.0, got 1.702"),
        ({"swiglu_offset": 1.0}, "swiglu_offset: expected the gate's 0.0, got 1.0"),
        ({"moe": {"swiglu_beta": "x"}}, "moe.swiglu_beta: expected the gate's 0.0, got 'x'"),
        (
            {"zero_expert_num": 2, "zero_expert_type": "identity"},
            "zero_expert_num: expected experts with weights alone",
        ),
        ({"moe": Config(activation="gelu")}, "moe.activation: expected 'silu'"),
        ({"moe": {"activation_situ_beta": 4.0}}, "moe.activation_situ_beta: expected the gate's 1.0, got 4.0"),
        ({"situ_linear_beta": 25.0}, "situ_linear_beta: expected the gate's 0.0, got 25.0"),
        (SITU | {"situ_beta": 5.0}, "situ_beta: expected the gate's 4.0, got 5.0"),
        (SITU | {"moe": {"activation_situ_linear_beta": 4.0}}, "_linear_beta: expected the gate's 25.0, got 4.0"),
    ],
)
def test_another_gate_under_a_key_that_is_not_read(config: dict[str, Any], label: str) -> None:
    with raises(label, "under a key that is not read"):
        gate(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"activation": "SwiGLU", "moe_hidden_act": "swish", "act_fn": None}, Gate()),
        ({"hidden_act": "gelu", "activation": "geglu"}, Gate("gelu")),
        (
            {"swiglu_alpha": 1.5, "swiglu_beta": 1.0, "gemm1_alpha": 1.5, "swiglu_offset": 1},
            Gate("silu", None, 1.5, 1.0),
        ),
        (SITU | {"moe": SITU, "shared_expert_situ_beta": 9.0, "situation": 1.0}, Gate("situ", None, 4.0, 25.0)),
        ({"mamba_hidden_act": "gelu", "projector_hidden_act": "gelu", "moe_router_activation_func": "sigmoid"}, Gate()),
        ({"vision_config": {"hidden_act": "gelu"}, "audio_config": {"activation": "gelu"}}, Gate()),
        ({"talker_config": {"text_config": {"hidden_act": "gelu"}}, "backbone_config": {"hidden_act": "relu"}}, Gate()),
        ({"shared_expert_activation": "gelu", "activation_dropout": 0.1, "activation_scheme": "dynamic"}, Gate()),
        (
            {
                "zero_expert_num": 0,
                "zero_expert_type": "identity",
                "lora_alpha": 16,
                "quantization_config": {"act": "x"},
            },
            Gate(),
        ),
    ],
)
def test_keys_that_say_the_same_or_something_else(config: dict[str, Any], expected: Gate) -> None:
    assert gate(config) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"hidden_act": "silu", "text_config": {"hidden_activation": "gelu_pytorch_tanh"}},
            "hidden_act: expected one value, got 'silu' in hidden_act, and 'gelu_pytorch_tanh' in text_config.hid",
        ),
        (
            {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
            "got 'gelu_pytorch_tanh' in hidden_activation",
        ),
        ({"hidden_act": "gelu", "text_config": {"hidden_act": "silu"}}, "got 'gelu' in hidden_act, and 'silu' in text"),
        ({"hidden_act": "swigluoai", "swiglu_limit": 7, "text_config": {"hidden_act": "silu"}}, "got 'swigluoai' in"),
        (
            {"apply_router_weight_on_input": True, "text_config": {"apply_router_weight_on_input": False}},
            "apply_router_weight_on_input: expected one value, got True in apply",
        ),
    ],
)
def test_sections_and_keys_that_disagree(config: dict[str, Any], words: str) -> None:
    with raises(words):
        MoEQuantConfig.from_config(config, 0)


def test_sections_go_before_keys() -> None:
    config = {
        "hidden_act": "gelu_new", "num_experts_per_tok": 1, "n_routed_experts": 2,
        "text_config": {"hidden_activation": "gelu_pytorch_tanh", "moe_top_k": 3, "num_local_experts": 4},
    }  # fmt: skip
    model = ModelConfig("config", config)
    assert (model.hidden_act, model.top_k(0), model.num_experts(0)) == ("gelu_pytorch_tanh", 3, 4)
    assert model.gate(0) == Gate("gelu_tanh")
