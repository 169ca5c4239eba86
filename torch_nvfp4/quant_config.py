"""What a layer's model config says about its experts' gate, on the way from the config to the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_nvfp4.config_sections import as_mapping
from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.gate import Activation, Gate, parse_activation
from torch_nvfp4.model_config import ModelConfig


@dataclass(frozen=True)
class MoEQuantConfig:
    """The gate and the activation scales of one MoE layer, for ``backend.apply``; weights bring their own scales.

    Serving engines name the gate's parameters after the first GEMM, which it follows: ``gemm1_alpha``, ``gemm1_beta``
    and ``gemm1_clamp_limit`` are the ``alpha``, ``beta`` and ``clamp_limit`` of ``gate``.
    """

    gate: Gate = Gate()  # noqa: RUF009 (frozen)
    a13_scale: float | None = None  # input_scale of the first GEMM; only a backend that quantizes activations reads it
    a2_scale: float | None = None  # of the second
    apply_router_weight_on_input: bool = False  # the router's weight scales an expert's input (Llama 4), not its output

    @property
    def activation(self) -> Activation:
        return self.gate.activation

    @property
    def gemm1_alpha(self) -> float:
        return self.gate.alpha

    @property
    def gemm1_beta(self) -> float:
        return self.gate.beta

    @property
    def gemm1_clamp_limit(self) -> float | None:
        return self.gate.clamp_limit

    @classmethod
    def make(
        cls,
        activation: str | int = "silu",
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> MoEQuantConfig:
        """From the arguments of ``torch_nvfp4.moe``. Raises ValueError as ``Gate``."""
        return cls(Gate(parse_activation(activation), clamp_limit, alpha, beta))

    @classmethod
    def from_config(cls, config: Any, layer: int | None = None, *, source: str | Path = "config") -> MoEQuantConfig:
        """The gate that a model config declares for one layer's routed experts.

        | config                                           | activation   | alpha, beta  | limit              |
        |--------------------------------------------------|--------------|--------------|--------------------|
        | ``swiglu_limit`` (DeepSeek-V4)                   | silu         | 1, 0         | the key's          |
        | ``swiglu_limit`` of gpt-oss, MiniMax-M3          | silu         | 1.702, 1     | the key's          |
        | ``swiglu_limit``, ``swiglu_alpha`` and ``_beta`` | silu         | the keys'    | the key's          |
        | ``swiglu_limits`` (Step-3.5) or                  | swiglustep   | 1, 0         | the layer's entry  |
        | ``expert_swiglu_limit_list`` (Ling), per layer   |              |              |                    |
        | ``hidden_act`` "situ" (Kimi-K3), with            | situ         | the keys', 0 | None               |
        | ``activation_situ_beta``, ``_situ_linear_beta``  |              | for no limit |                    |
        | none of them                                     | hidden_act's | 1, 0         | None               |

        Args:
            config: a mapping (config.json) or an object with attributes (transformers' PretrainedConfig); its
                ``text_config`` counts.
            layer: which layer; None where all layers have the same gate.
            source: what error messages call the config.

        Raises:
            CheckpointError (a ValueError): a key that reads like a limit, an activation or a constant of the gate and
                is not read, keys or sections that disagree over the gate, a value that is not a limit, an unknown
                activation, a clamp on an activation that has none, or ``layer=None`` where layers differ.
        """
        model = ModelConfig(source, as_mapping(config))
        if layer is not None:
            gate = model.gate(layer)
        else:
            gates = {i: model.gate(i) for i in model.layers_with_own_gate()}
            gate = next(iter(gates.values())) if gates else model.gate(0)
            other = next((i for i, candidate in gates.items() if candidate != gate), None)
            if other is not None:
                expected = "the layer, as layers differ in their gate"
                got = f"layer=None (layer 0 has {gate}, layer {other} {gates[other]})"
                raise CheckpointError(refusal(source, expected, got))
        return cls(gate, apply_router_weight_on_input=model.apply_router_weight_on_input)
