"""What a layer's model config says about its experts' gate, on the way from the config to the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_nvfp4.checkpoint import ConfigFacts
from torch_nvfp4.errors import CheckpointError
from torch_nvfp4.gate import Activation, Gate, parse_activation

_NESTED_CONFIGS = ("text_config", "language_config", "llm_config")


@dataclass(frozen=True)
class MoEQuantConfig:
    """The gate and the activation scales of one MoE layer, for ``backend.apply``; weights bring their own scales.

    Serving engines name the gate's parameters after the first GEMM, which it follows: ``gemm1_alpha``, ``gemm1_beta``
    and ``gemm1_clamp_limit`` are the ``alpha``, ``beta`` and ``clamp_limit`` of ``gate``.
    """

    gate: Gate = Gate()  # noqa: RUF009 (frozen)
    a13_scale: float | None = None  # input_scale of the first GEMM; only a backend that quantizes activations reads it
    a2_scale: float | None = None  # of the second

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
        | ``swiglu_limits`` (Step-3.5), one a layer        | swiglustep   | 1, 0         | the layer's entry  |
        | none of them                                     | hidden_act's | 1, 0         | None               |

        Args:
            config: a mapping (config.json) or an object with attributes (transformers' PretrainedConfig); its
                ``text_config`` counts.
            layer: which layer; None where all layers have the same gate.
            source: what error messages call the config.

        Raises:
            CheckpointError (a ValueError): a key that reads like a limit of the gate and is not understood, a value
                that is not a limit, an unknown activation, a clamp on an activation that has none, or ``layer=None``
                where layers differ.
        """
        values = _as_mapping(config)
        facts = ConfigFacts(Path(source), values)
        if layer is not None:
            gate = facts.gate(layer)
        else:
            gates = [facts.gate(i) for i in range(facts.num_layers or 1)]
            gate = gates[0]
            other = next((i for i, candidate in enumerate(gates) if candidate != gate), None)
            if other is not None:
                raise CheckpointError(
                    f"{source}: expected the layer, as layers differ in their gate, got layer=None "
                    f"(layer 0 has {gate}, layer {other} {gates[other]})"
                )
        return cls(gate)


def _as_mapping(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if callable(getattr(config, "to_dict", None)):
        return dict(config.to_dict())
    # Class attributes too: a limit must not be missed for standing on the class.
    names = (name for name in dir(config) if not name.startswith("_"))
    values = {name: value for name in names if not callable(value := getattr(config, name))}
    for name in _NESTED_CONFIGS:
        if values.get(name) is not None:
            values[name] = _as_mapping(values[name])
    return values
