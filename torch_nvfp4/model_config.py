"""What config.json (or a PretrainedConfig) means for the experts: sizes, top-k, the gate of each layer.

Touches no file. Every value that is read goes through `ModelConfig`, which checks its type and range and names file,
key, expected and got in the error. A key that is not read may hold anything, unless it reads like a part of the gate:
a clamp raises, since a clamp is never dropped; another activation or constant raises where a gate is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from torch_nvfp4.config_sections import TEXT_SECTIONS, Key, keys_of, text_chain
from torch_nvfp4.errors import CheckpointError, refusal, shown
from torch_nvfp4.gate import CONSTANT_MAX, CONSTANT_MIN, Activation, Gate

__all__ = ["MAX_COUNT", "TEXT_SECTIONS", "ModelConfig"]

_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")
_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_INTERMEDIATE_KEYS = ("moe_intermediate_size",)
# Of models whose experts work in a narrower space than the rest (Kimi-K3, Nemotron-3-Super).
_LATENT_KEYS = ("routed_expert_hidden_size", "moe_latent_size")
_HIDDEN_ACT_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function")
_MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers")
# Tensor names carry ids of at most six digits; sizes are those of a matrix that fits into memory.
MAX_COUNT = 1_000_000
_MAX_SIZE = 2**31 - 1
_FLOAT32_MAX = torch.finfo(torch.float32).max
_FLOAT32_TINY = torch.finfo(torch.float32).tiny

# The clamps that are understood: one number or one per layer, and whether it acts after the silu (swiglustep).
_LIMIT_KEYS = {"swiglu_limit": False, "swiglu_limits": True, "expert_swiglu_limit_list": True}
_ACTIVATIONS = {
    "silu": Activation.silu,
    "swish": Activation.silu,
    "swigluoai": Activation.silu,
    "gelu": Activation.gelu,
    "gelu_tanh": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu_new": Activation.gelu_tanh,
    "relu2": Activation.relu2,
    "relu_squared": Activation.relu2,
    "situ": Activation.situ,
}
# What keys that are not read call them besides, with the multiplication.
_GATED = {"swiglu": Activation.silu, "silu_and_mul": Activation.silu, "geglu": Activation.gelu}
_CONSTANTS = ("swiglu_alpha", "swiglu_beta")
# Kimi-K3's: the limits of gate and of up, which Gate has as alpha and beta.
_SITU_CONSTANTS = ("activation_situ_beta", "activation_situ_linear_beta")

_PerLayer = int | tuple[int | None, ...] | None


class ModelConfig:
    """The keys of a model's config that its routed experts need, checked when read.

    The language model's own section (``text_config``, also inside ``thinker_config``) goes before the sections around
    it; over the gate the sections must not disagree.

    Attributes:
        model_type, hidden_act: as the config spells them, None where it does not.
        num_layers: of the model without layers of multi-token prediction, None where it is not declared.
        hidden_size: of the model, None where it is not declared.
        expert_hidden_size: K, that of the routed experts; None where it is not declared.
    """

    def __init__(self, file: str | Path, config: Mapping[str, Any]) -> None:
        self.file = file
        self._sections = text_chain(file, config)
        self._model_types = [
            model_type
            for prefix, section in reversed(self._sections)
            if (model_type := self._as_string(f"{prefix}model_type", section.get("model_type"))) is not None
        ]
        self.model_type = self._model_types[0] if self._model_types else None
        self.num_layers = self._integer(("num_hidden_layers",), MAX_COUNT)
        self.hidden_size = self._integer(("hidden_size",), _MAX_SIZE)
        latent = self._integer(_LATENT_KEYS, _MAX_SIZE)
        self.expert_hidden_size = self.hidden_size if latent is None else latent
        self._top_k = self._integers(_TOP_K_KEYS, MAX_COUNT)
        self._num_experts = self._integers(_NUM_EXPERTS_KEYS, MAX_COUNT)
        self._intermediate_size = self._integers(_INTERMEDIATE_KEYS, _MAX_SIZE)
        self._mtp = bool(self._integer(_MTP_KEYS, MAX_COUNT))
        self._hidden_acts = self._all(_HIDDEN_ACT_KEYS, self._as_string)
        self.hidden_act = next(reversed(self._hidden_acts.values()), None)
        self._unread: list[Key] = []  # what reads like a part of the gate
        self._limits, self._limit_after_silu = self._read_limits()
        self._alpha = self._number("swiglu_alpha")
        self._beta = self._number("swiglu_beta")
        self._situ = tuple(self._number(key) for key in _SITU_CONSTANTS)
        self._weight_on_input = self._read_weight_on_input()

    def num_experts(self, layer: int) -> int | None:
        """Routed experts that the config declares for a layer; None where it does not."""
        return self._of_layer(self._num_experts, layer)

    @property
    def declares_num_experts(self) -> bool:
        """Whether there is a key for the number of experts, be it one number or a list."""
        return self._num_experts is not None

    def intermediate_size(self, layer: int) -> int | None:
        """I of the routed experts of a layer; None where the config does not declare it."""
        return self._of_layer(self._intermediate_size, layer)

    def top_k(self, layer: int) -> int:
        """Experts per token. Raises CheckpointError where the config declares none for the layer, or 0."""
        top_k = self._of_layer(self._top_k, layer)
        label, value = self._find(_TOP_K_KEYS)
        if top_k is None:
            expected = f"a key {' or '.join(_TOP_K_KEYS)}"
            got = "none of them" if value is None else f"{label} {shown(value)}, which has none for layer {layer}"
            raise CheckpointError(refusal(self.file, expected, got))
        if top_k == 0:
            raise CheckpointError(refusal(f"{self.file}: {label}", "at least one expert per token", "0"))
        return top_k

    def declared_top_k(self, layer: int) -> int | None:
        """`top_k`, or None where the config declares none."""
        return self._of_layer(self._top_k, layer)

    @property
    def apply_router_weight_on_input(self) -> bool:
        """Whether an expert's input, and not its output, is scaled with the router's weight (Llama 4)."""
        return self._weight_on_input

    @property
    def interleaves_gate_and_up(self) -> bool:
        """Whether a fused gate_up_proj alternates rows of gate and up (gpt-oss)."""
        return (self.model_type or "").startswith("gpt_oss")

    @property
    def may_lack_a_gate(self) -> bool:
        """Whether experts that have only up and down are meant so: relu2 is the activation that is known without."""
        return _formula(self.hidden_act) is Activation.relu2

    def is_ignored(self, name: str) -> bool:
        """True for tensors of multi-token prediction: `mtp.*`, or those of layers past num_hidden_layers."""
        parts = name.split(".")
        if any(part == "mtp" or part.startswith("mtp_") for part in parts):
            return True
        if not self._mtp or self.num_layers is None:
            return False
        for position in range(len(parts) - 3, -1, -1):
            layer = parts[position + 1]
            if parts[position] == "layers" and layer.isascii() and layer.isdigit() and len(layer) <= 6:
                return int(layer) >= self.num_layers
        return False

    def clamp_limit(self, layer: int) -> float | None:
        """The clamp limit of a layer's routed experts, None for no clamp."""
        if not isinstance(self._limits, list):
            return self._limits
        if not 0 <= layer < len(self._limits):
            raise CheckpointError(
                refusal(self.file, f"a swiglu limit for layer {layer}", f"a list of {len(self._limits)} limits")
            )
        return self._limits[layer]

    def layers_with_own_gate(self) -> range:
        """The layers among which gates may differ: one where the limit is one number."""
        if not isinstance(self._limits, list):
            return range(1)
        return range(len(self._limits) if self.num_layers is None else self.num_layers)

    def gate(self, layer: int) -> Gate:
        """The gate of a layer's routed experts, with its clamp.

        Raises:
            CheckpointError: an activation that is not known, or a clamp or constants that it does not have.
        """
        limit = self.clamp_limit(layer)
        self._agreed("hidden_act", self._hidden_acts, _formula)
        model_type, hidden_act = self.model_type or "", self.hidden_act or "silu"
        activation = _ACTIVATIONS.get(hidden_act)
        if activation is None:
            raise self._refusal("hidden_act", f"one of {sorted(_ACTIVATIONS)}", shown(hidden_act))
        if limit is not None and activation is not Activation.silu:
            raise self._refusal(
                "",
                "hidden_act 'silu' beside a swiglu limit",
                f"{hidden_act!r} with limit {limit}: the clamp of that pair is not defined",
            )
        # gpt-oss and MiniMax-M3 leave to the code what they do not declare: sigmoid(1.702 g) and up + 1.
        gpt_oss = hidden_act == "swigluoai" or model_type.startswith(("gpt_oss", "minimax_m3"))
        if gpt_oss and limit is None and self._find(("swiglu_limit",))[1] is None:
            raise self._refusal(
                "",
                f"swiglu_limit, because the code of {model_type or hidden_act} clamps",
                "no such key",
                "add the model's limit (0 for none) to config.json",
            )
        alpha, beta = self._constants(gpt_oss, hidden_act, activation)
        self._check_unread(hidden_act, alpha, beta)
        # Step-3.5 and Ling, whose keys have one limit per layer, clamp after the silu.
        if limit is not None and (self._limit_after_silu or model_type.startswith("step3")):
            if (alpha, beta) != (1.0, 0.0):
                raise self._refusal("", "no swiglu_alpha, swiglu_beta with Step-3.5's clamp", "both")
            activation = Activation.swiglustep
        return Gate(activation, limit, alpha, beta)

    def check_gate_of_blocks(self) -> None:
        """Refuses blocks of gpt-oss in a model whose config does not say that it has gpt-oss's gate, or another one.

        Their code multiplies with sigmoid(1.702 g) and up + 1 and clamps; a model of another name would be taken for
        plain silu.
        """
        said = self._alpha is not None and self._beta is not None and self._find(("swiglu_limit",))[1] is not None
        if said or self.interleaves_gate_and_up or self.hidden_act == "swigluoai":
            return
        raise self._refusal(
            "",
            "model_type gpt_oss, or swiglu_alpha, swiglu_beta and swiglu_limit, beside gpt-oss's blocks of experts",
            f"model_type {shown(self.model_type)} without all of them",
            "gpt-oss's gate has alpha 1.702, beta 1 and limit 7: say in config.json what the model applies",
        )

    def _check_unread(self, hidden_act: str, alpha: float, beta: float) -> None:
        """Refuses keys that are not read and say something else about the gate than those that are."""
        for key in self._unread:
            if key.about == "experts without weights":
                same = not _says_something(key.value)
                expected, advice = "experts with weights alone", "experts that pass tokens through are not supported"
            elif key.about == "constant":
                constant = alpha if _is_alpha(key.name) else beta
                same = all(entry is None or self._as_float(entry) == constant for entry in _entries(key.value))
                keys = _SITU_CONSTANTS if hidden_act == "situ" else _CONSTANTS
                expected, advice = f"the gate's {constant}", f"say it in {' and '.join(keys)}"
            else:
                names = [entry for entry in _entries(key.value) if isinstance(entry, str)]
                same = all(_formula(name) == _formula(hidden_act) for name in names)
                expected, advice = f"{hidden_act!r}, as hidden_act", "say in hidden_act what the experts apply"
            if not same:
                raise self._refusal(key.label, expected, f"{shown(key.value)} under a key that is not read", advice)

    def _constants(self, gpt_oss: bool, hidden_act: str, activation: Activation) -> tuple[float, float]:
        if activation is Activation.situ:
            return self._situ_constants()
        for key, value in zip(_SITU_CONSTANTS, self._situ, strict=True):
            if value is not None:
                raise self._refusal("", f"hidden_act 'situ' beside {key} {value:g}", repr(hidden_act))
        alpha = self._alpha if self._alpha is not None else (1.702 if gpt_oss else 1.0)
        if abs(alpha) > CONSTANT_MAX:
            raise self._refusal(_CONSTANTS[0], "a number from -2**64 to 2**64", f"{alpha:g}")
        beta = self._beta if self._beta is not None else (1.0 if gpt_oss else 0.0)
        if alpha != 1.0 and self._beta is None and not gpt_oss:
            raise self._refusal("", f"swiglu_beta beside swiglu_alpha {alpha}", "no such key")
        if (alpha, beta) != (1.0, 0.0) and activation is not Activation.silu:
            raise self._refusal(
                "", f"hidden_act 'silu' beside swiglu_alpha {alpha} and swiglu_beta {beta}", repr(hidden_act)
            )
        return alpha, beta

    def _situ_constants(self) -> tuple[float, float]:
        """alpha, and beta with 0 for an up that has no limit."""
        alpha, beta = self._situ
        if alpha is None or not CONSTANT_MIN <= alpha <= CONSTANT_MAX:
            got = "no such key" if alpha is None else f"{alpha:g}"
            raise self._refusal(_SITU_CONSTANTS[0], "a positive number beside hidden_act 'situ' (to 2**64)", got)
        if beta and not CONSTANT_MIN <= beta <= CONSTANT_MAX:
            expected = "a positive number (to 2**64), or null or 0 for no limit"
            raise self._refusal(_SITU_CONSTANTS[1], expected, f"{beta:g}")
        for key, value in zip(_CONSTANTS, (self._alpha, self._beta), strict=True):
            if value is not None:
                raise self._refusal("", f"no {key} beside hidden_act 'situ'", f"{value:g}")
        return alpha, beta or 0.0

    def _refusal(self, key: str, expected: str, got: str, advice: str = "") -> CheckpointError:
        return CheckpointError(refusal(f"{self.file}: {key}" if key else self.file, expected, got, advice))

    def _find(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        """(where it stands, value) of the first of the keys that has a value in the innermost section that has one."""
        for prefix, section in reversed(self._sections):
            for key in keys:
                if section.get(key) is not None:
                    return f"{prefix}{key}", section[key]
        return keys[0], None

    def _all(self, keys: tuple[str, ...], read: Callable[[str, Any], Any]) -> dict[str, Any]:
        """Every value of the keys by where it stands; what `_find` would find is last."""
        return {
            f"{prefix}{key}": read(f"{prefix}{key}", section[key])
            for prefix, section in self._sections
            for key in reversed(keys)
            if section.get(key) is not None
        }

    def _of_layer(self, value: _PerLayer, layer: int) -> int | None:
        if not isinstance(value, tuple):
            return value
        # A list of another length counts layers in a way that is not known; then the tensors alone decide.
        known = len(value) == self.num_layers and 0 <= layer < len(value)
        return value[layer] if known else None

    def _integer(self, keys: tuple[str, ...], largest: int) -> int | None:
        value = self._integers(keys, largest)
        if isinstance(value, tuple):
            raise self._refusal(self._find(keys)[0], "a non-negative integer", shown(list(value)))
        return value

    def _integers(self, keys: tuple[str, ...], largest: int) -> _PerLayer:
        """One number, or a list with one per layer."""
        label, value = self._find(keys)
        if isinstance(value, (list, tuple)):
            return tuple(self._as_integer(f"{label}[{i}]", entry, largest) for i, entry in enumerate(value))
        return self._as_integer(label, value, largest)

    def _as_integer(self, label: str, value: Any, largest: int) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._refusal(label, "a non-negative integer", shown(value))
        if value > largest:
            raise self._refusal(label, f"an integer of at most {largest}", shown(value))
        return value

    def _as_string(self, label: str, value: Any) -> str | None:
        if value is not None and not isinstance(value, str):
            raise self._refusal(label, "a string", shown(value))
        return value

    def _as_float(self, value: Any) -> float | None:
        """The value as a number that fp32 can hold, or None."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if abs(number) <= _FLOAT32_MAX else None  # NaN fails the comparison

    def _number(self, key: str) -> float | None:
        def read(label: str, value: Any) -> float:
            number = self._as_float(value)
            if number is None:
                raise self._refusal(label, "a finite number", shown(value))
            return number

        return self._agreed(key, self._all((key,), read))

    def _agreed(self, key: str, found: Mapping[str, Any], meaning: Callable[[Any], Any] = lambda value: value) -> Any:
        """The value of the innermost section, where all that there are mean the same."""
        values = list(found.values())
        other = next((label for label, value in found.items() if meaning(value) != meaning(values[-1])), None)
        if other is not None:
            label = list(found)[-1]
            got = f"{shown(found[other])} in {other}, and {shown(values[-1])} in {label}"
            raise self._refusal(key, "one value", got, "keep the one that the model applies")
        return values[-1] if values else None

    def _read_limits(self) -> tuple[float | list[float | None] | None, bool]:
        """The limit or the limits, and whether they act after the silu. Refuses keys that read like another limit."""
        for found in keys_of(self._sections):
            if found.about != "limit":
                read = (*_HIDDEN_ACT_KEYS, *_CONSTANTS, *_SITU_CONSTANTS) if found.is_text else ()
                self._unread += [found] if found.about is not None and found.name not in read else []
            elif not (found.is_text and found.name in _LIMIT_KEYS) and _says_something(found.value):
                raise self._refusal(
                    found.label,
                    "a limit of the gate to be swiglu_limit or swiglu_limits of the model or its text_config",
                    f"{shown(found.value)} under a key that is not understood",
                    "a clamp is never dropped",
                )
        limits: dict[str, float | list[float | None]] = {}
        for key in _LIMIT_KEYS:
            declared = self._all((key,), self._limits_of)
            if declared:
                limits[key] = self._agreed(key, {label: 0.0 if v is None else v for label, v in declared.items()})
        if not limits:
            return None, False
        *others, last = limits
        for other in others:
            two_formulas = _LIMIT_KEYS[other] != _LIMIT_KEYS[last] and _says_something(limits[last])
            two_formulas = two_formulas and not (self.model_type or "").startswith("step3")  # one for both
            if limits[other] != limits[last] or two_formulas:
                got = f"both: {shown(limits[other])} and {shown(limits[last])}"
                advice = "the clamps of the two differ (before or after the silu)" if two_formulas else ""
                raise self._refusal("", f"{other} or {last}", got, advice)
        return None if limits[last] == 0.0 else limits[last], _LIMIT_KEYS[last]

    def _limits_of(self, label: str, value: Any) -> float | list[float | None] | None:
        if not isinstance(value, (list, tuple)):
            return self._limit(label, value)
        if self.num_layers is not None and len(value) < self.num_layers:
            raise self._refusal(label, f"{self.num_layers} limits", f"{len(value)}")
        return [self._limit(f"{label}[{layer}]", limit) for layer, limit in enumerate(value)]

    def _limit(self, label: str, value: Any) -> float | None:
        if value is None:
            return None
        number = self._as_float(value)
        # A limit that fp32 rounds to zero would make every product zero.
        if number is None or number < 0 or 0 < number < _FLOAT32_TINY:
            expected = "a positive, finite number, or null or 0 for no clamp (as fp32)"
            raise self._refusal(label, expected, shown(value))
        return number or None

    def _read_weight_on_input(self) -> bool:
        def read(label: str, value: Any) -> bool:
            if not isinstance(value, bool):
                raise self._refusal(label, "true or false", shown(value))
            return value

        key = "apply_router_weight_on_input"
        declared = self._agreed(key, self._all((key,), read))
        return bool(declared) or any(model_type.startswith("llama4") for model_type in self._model_types)


def _says_something(value: Any) -> bool:
    return any(value) if isinstance(value, (list, tuple)) else bool(value)


def _formula(activation: Any) -> Any:
    """What an activation's name stands for; the name where it is not known, or has constants of its own."""
    name = activation.lower() if isinstance(activation, str) else activation
    return name if name == "swigluoai" or not isinstance(name, str) else (_ACTIVATIONS | _GATED).get(name, name)


def _is_alpha(name: str) -> bool:
    """Whether a constant of the gate is the one that the ops call alpha; situ's names have beta for both."""
    return "alpha" in name.lower() or ("situ" in name.lower() and "linear" not in name.lower())


def _entries(value: Any) -> list[Any]:
    """What a key of the gate names: the entries of a list, the name in an object ({"name": "gelu"})."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("name", "type", "fn") if value.get(key) is not None), None)
    return [entry for entry in value if entry is not None] if isinstance(value, (list, tuple)) else [value]
