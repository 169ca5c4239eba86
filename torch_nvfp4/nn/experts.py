"""The routed experts of one MoE layer as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.backends import (
    MoEBackendConfig,
    check_input_quant_of_layer,
    moe_backend,
    select_moe_backend,
)
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.format import NVFP4Weight, has_gate_rows, has_values, is_gated_pair, quantize, validate_layout
from torch_nvfp4.gate import Gate, parse_activation
from torch_nvfp4.nn.packed_module import PackedModule, WeightShape
from torch_nvfp4.quant_config import MoEQuantConfig

__all__ = ["NVFP4Experts"]

_BIASES = ("w13_bias", "w2_bias")


class NVFP4Experts(PackedModule):
    """The routed experts of one MoE layer, as ``torch_nvfp4.moe``: ``experts(hidden_states, topk_weights, topk_ids)``.

    Made by ``from_float``, ``from_weights`` or ``from_checkpoint``; the constructor itself makes zero weights (on the
    meta device: none) for ``load_state_dict``. Traceable by torch.compile(fullgraph=True, dynamic=True) and
    torch.export. hidden_states and topk_weights have gradients; weights and biases are frozen.

    Args:
        num_experts, hidden_size, intermediate_size: E, K, I, of this rank.
        activation, clamp_limit, alpha, beta: the gate, as in ``torch_nvfp4.moe``.
        gated: False for experts that have up rows and no gate (w13 is [E, I, K]).
        gate: the gate as one value, instead of these five.
        quant_config: the gate and the activation scales, instead of the five and of ``gate``.
        biases: whether the experts have biases, w13_bias [E, 2I] (or [E, I]) and w2_bias [E, K]; they stay float32.
        expert_map: int32 [global experts], local expert or -1; then topk_ids are global.
        apply_router_weight_on_input: as in ``torch_nvfp4.moe``; also where ``quant_config`` says so.
        backend: a name of ``torch_nvfp4.backends``, or None for the first that can run the layer
            (TORCH_NVFP4_BACKEND overrides None). It holds for every device that the module is moved to.
        input_quant: "fp8" runs the layer as ``torch_nvfp4.moe_fp8``, whose activations are in FP8: faster for thousands
            of tokens and less exact, on GPUs of compute capability 9.0 alone, without gradients and batch invariance.
            None, the default, is 16 bits. It holds for every device that the module is moved to; on the meta device it
            waits for a real one.
        device: torch's default device if None.

    Raises ValueError for a clamp that the activation or the backend cannot apply (it is never skipped), for a gate that
    is given twice, for an ``expert_map`` of another dtype or rank, and for an ``input_quant`` that the layer or its
    device cannot have: it is never left out either, here and in ``.to()``.
    """

    # A pickle from before there was a choice has None.
    input_quant: str | None = None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str | int = "silu",
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        gated: bool = True,
        gate: Gate | None = None,
        quant_config: MoEQuantConfig | None = None,
        biases: bool = False,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        backend: str | None = None,
        input_quant: str | None = None,
        device: torch.device | str | None = None,
        _weights: dict[str, NVFP4Weight] | None = None,
        _biases: dict[str, Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        parameters = Gate(parse_activation(activation), clamp_limit, alpha, beta, gated)
        self.quant_config = _one_gate(parameters, gate, quant_config)
        self.apply_router_weight_on_input = (
            apply_router_weight_on_input or self.quant_config.apply_router_weight_on_input
        )
        self.requested_backend = backend
        self.input_quant = input_quant
        if _weights is None:
            _weights = {prefix: shape.zeros(device) for prefix, shape in self._weight_shapes().items()}
        if expert_map is not None:
            if expert_map.dim() != 1 or expert_map.dtype != torch.int32:
                raise ValueError(
                    "expert_map: expected int32 of shape [global experts], "
                    f"got {expert_map.dtype} of shape {list(expert_map.shape)}"
                )
            expert_map = expert_map.to(_weights["w2_"].data.device)
        # In the state dict, as the weights beside it are those of the experts that it names.
        self.register_buffer("expert_map", expert_map)
        self.expert_map: Tensor | None
        rows = (intermediate_size * (2 if self.quant_config.gate.gated else 1), hidden_size)
        for name, size in zip(_BIASES, rows, strict=True):
            bias = None if _biases is None else _biases[name]
            if biases:
                bias = torch.zeros(num_experts, size, dtype=torch.float32, device=_weights["w2_"].data.device)
            self.register_buffer(name, bias)
        self.w13_bias: Tensor | None
        self.w2_bias: Tensor | None
        self._exact_names = tuple(name for name in _BIASES if self._buffers[name] is not None)
        self._place(_weights)

    @classmethod
    def from_weights(
        cls,
        w13: NVFP4Weight,
        w2: NVFP4Weight,
        *,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        activation: str | int = "silu",
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        gate: Gate | None = None,
        quant_config: MoEQuantConfig | None = None,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        backend: str | None = None,
        input_quant: str | None = None,
    ) -> NVFP4Experts:
        """From NVFP4 weights, on their device.

        Args:
            w13: [E, 2I, K], gate rows first; its global scale is [E, 2] (gate, up), or [E] for both alike. Of experts
                without a gate [E, I, K], global scale [E]: the sizes say which, and the activation is then that of up.
            w2: [E, K, I], global scale [E].
            w13_bias: [E, 2I], gate rows first, or [E, I], in any floating point dtype; None: no bias.
            w2_bias: [E, K]; None: no bias. Where I is split over ranks, whose results are added, one rank alone has it.

        The other keywords are the constructor's. Raises TypeError or ValueError for weights that are not valid NVFP4 or
        do not fit together or to the gate, and what the constructor raises.
        """
        experts, rows, k, gated = _sizes(w13, w2)
        gate, quant_config = _of_kind(gated, gate, quant_config)
        biases = {
            "w13_bias": _checked_bias("w13_bias", w13_bias, (experts, rows), w13.data.device),
            "w2_bias": _checked_bias("w2_bias", w2_bias, (experts, k), w13.data.device),
        }
        if gated and not is_gated_pair(w13):
            w13 = w13._replace(global_scale=w13.global_scale.unsqueeze(1).repeat(1, 2))
        return cls(
            experts,
            k,
            rows // 2 if gated else rows,
            activation=activation,
            clamp_limit=clamp_limit,
            alpha=alpha,
            beta=beta,
            gated=gated or gate is not None or quant_config is not None,
            gate=gate,
            quant_config=quant_config,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            backend=backend,
            input_quant=input_quant,
            _weights={"w13_": w13, "w2_": w2},
            _biases=biases,
        )

    @classmethod
    def from_float(
        cls,
        w13: Tensor,
        w2: Tensor,
        *,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        activation: str | int = "silu",
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        gate: Gate | None = None,
        quant_config: MoEQuantConfig | None = None,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        backend: str | None = None,
        input_quant: str | None = None,
    ) -> NVFP4Experts:
        """Quantizes dense weights (see ``torch_nvfp4.quantize``), on their device.

        Args:
            w13: [E, 2I, K] in any floating point dtype, gate rows first; gate and up get global scales of their own. Or
                [E, I, K], of experts without a gate.
            w2: [E, K, I].

        The keywords are those of ``from_weights``. Raises what ``quantize`` and ``from_weights`` raise.
        """
        gated = w13.dim() != 3 or w2.dim() != 3 or w13.shape[1] != w2.shape[2]
        return cls.from_weights(
            quantize(w13, gated=gated),
            quantize(w2),
            w13_bias=w13_bias,
            w2_bias=w2_bias,
            activation=activation,
            clamp_limit=clamp_limit,
            alpha=alpha,
            beta=beta,
            gate=gate,
            quant_config=quant_config,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            backend=backend,
            input_quant=input_quant,
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path | Checkpoint,
        layer: int,
        *,
        device: torch.device | str = "cpu",
        tp_rank: int = 0,
        tp_size: int = 1,
        ep_rank: int = 0,
        ep_size: int = 1,
        backend: str | None = None,
        input_quant: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> NVFP4Experts:
        """One layer of a checkpoint directory; gate, limit and where the router's weight acts come from its config.

        With tp_size > 1 this rank has I / tp_size of every expert and its results are partial sums: add those of all
        ranks (all-reduce). With ep_size > 1 it has E / ep_size whole experts, topk_ids stay global, and the results are
        partial sums too. The other arguments are those of ``Checkpoint.experts``, ``backend`` and ``input_quant``.

        Raises CheckpointError (a ValueError), and what the constructor raises.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint.open(checkpoint)
        on_input = checkpoint.apply_router_weight_on_input(layer)
        quant_config = MoEQuantConfig(checkpoint.gate(layer), apply_router_weight_on_input=on_input)
        weights = checkpoint.experts(
            layer, tp_rank=tp_rank, tp_size=tp_size, ep_rank=ep_rank, ep_size=ep_size, progress=progress
        )
        weights = weights.to(device)
        expert_map = checkpoint.expert_map(ep_rank, ep_size, layer=layer) if ep_size > 1 else None
        return cls.from_weights(
            weights.w13,
            weights.w2,
            w13_bias=weights.w13_bias,
            w2_bias=weights.w2_bias,
            quant_config=quant_config,
            expert_map=expert_map,
            backend=backend,
            input_quant=input_quant,
        )

    @property
    def clamp_limit(self) -> float | None:
        """The limit that the kernel applies to gate and up, None for no clamp."""
        return self.quant_config.gate.clamp_limit

    def __setattr__(self, name: str, value: Any) -> None:
        # forward and the backend know which biases there are; one that came later would be left out without a word.
        if name in _BIASES and (value is None) != (self._buffers.get(name) is None):
            expected, got = ("none", "a bias") if value is not None else ("a bias", "none")
            raise ValueError(
                f"{name}: expected {expected}, as the layer was made, got {got}; make it anew with from_weights"
            )
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle from before experts could have biases names none.
        state["_buffers"] = dict.fromkeys(_BIASES) | state["_buffers"]
        super().__setstate__(state)

    def unpacked_weights(self) -> tuple[NVFP4Weight, NVFP4Weight]:
        """(w13, w2) in the canonical format, on the module's device."""
        weights = self._unpack()
        return weights["w13_"], weights["w2_"]

    def forward(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """hidden_states [..., K], topk_weights and topk_ids [..., top_k] -> [..., K] in hidden_states' dtype.

        topk_weights of another floating point dtype are taken as float32. Under ``torch.autocast`` hidden_states in
        float32 are rounded to its dtype, as in ``nn.Linear``.

        Raises ValueError for hidden_states of another K, and where leading dimensions differ: a token would get another
        one's routing. A matrix beside a batch of sequences holds the tokens in the same order.
        """
        if hidden_states.dim() and hidden_states.shape[-1] != self.hidden_size:
            expected, got = f"[..., {self.hidden_size}] (hidden_size)", list(hidden_states.shape)
            raise ValueError(f"NVFP4Experts: expected hidden_states {expected}, got {got}")
        check_leading_dimensions(hidden_states=hidden_states, topk_weights=topk_weights, topk_ids=topk_ids)
        # Past nn.Module.__getattr__, which takes as long as the rest of this.
        buffers: Mapping[str, Any] = self._buffers
        output = moe_backend(self.backend).apply(
            {name: buffers[name] for name in self._packed_names + self._exact_names},
            self.quant_config,
            _as_matrix(hidden_states),
            _as_matrix(topk_weights if topk_weights.dtype == torch.float32 else topk_weights.float()),
            _as_matrix(topk_ids),
            buffers["expert_map"],
            self.apply_router_weight_on_input,
        )
        return output if hidden_states.dim() == 2 else output.reshape(hidden_states.shape)

    def extra_repr(self) -> str:
        """Sizes, gate and backend, for ``print(module)``."""
        gate = self.quant_config.gate
        parts = [
            f"num_experts={self.num_experts}",
            f"hidden_size={self.hidden_size}",
            f"intermediate_size={self.intermediate_size}",
            f"activation={gate.activation.name}",
            f"clamp_limit={gate.clamp_limit}",
        ]
        if (gate.alpha, gate.beta) != (1.0, 0.0):
            parts.append(f"alpha={gate.alpha}, beta={gate.beta}")
        if not gate.gated:
            parts.append("gated=False")
        if self._exact_names:
            parts.append("biases=True")
        if self.input_quant is not None:
            parts.append(f"input_quant={self.input_quant}")
        return ", ".join([*parts, f"backend={self.backend}"])

    def _weight_shapes(self) -> dict[str, WeightShape]:
        e, k, i = self.num_experts, self.hidden_size, self.intermediate_size
        gated = self.quant_config.gate.gated
        w13 = WeightShape((e, 2 * i, k), (e, 2)) if gated else WeightShape((e, i, k), (e,))
        return {"w13_": w13, "w2_": WeightShape((e, k, i), (e,))}

    def _pack(self, weights: dict[str, NVFP4Weight]) -> tuple[str, dict[str, Tensor]]:
        w13, w2 = weights["w13_"], weights["w2_"]
        device, scale = w13.data.device, w13.global_scale
        config = MoEBackendConfig.for_device(
            device,
            self.hidden_size,
            self.intermediate_size,
            gate=self.quant_config.gate,
            expert_map=self.expert_map is not None,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            equal_gate_up_scales=scale.dim() == 1 or (has_values(scale) and bool((scale[:, 0] == scale[:, 1]).all())),
            biases=bool(self._exact_names),
            input_quant=self.input_quant,
        )
        if device.type == "meta":
            check_input_quant_of_layer(config)
            chosen = moe_backend("reference")  # its layout is the canonical one; the choice waits for a real device
        else:
            chosen = select_moe_backend(config, self.requested_backend)
        return chosen.name, chosen.prepare(w13, w2)

    def _unpack(self) -> dict[str, NVFP4Weight]:
        buffers = {name: self._buffer(name) for name in self._packed_names}
        w13, w2 = moe_backend(self.backend).restore(buffers, self.hidden_size, self.intermediate_size)
        return {"w13_": w13, "w2_": w2}


def _sizes(w13: NVFP4Weight, w2: NVFP4Weight) -> tuple[int, int, int, bool]:
    """(E, rows of w13, K, whether there are gate rows among them); ValueError where the two do not fit together."""
    gated = w13.data.dim() != 3 or w2.data.dim() != 3 or has_gate_rows(w13, w2)
    validate_layout(w13, gated=gated)
    validate_layout(w2, gated=False)
    if w13.data.dim() != 3 or w2.data.dim() != 3:
        raise ValueError(
            "expected w13 [E, 2I, K] and w2 [E, K, I], "
            f"got data of shapes {list(w13.data.shape)} and {list(w2.data.shape)}"
        )
    experts, rows, k = *w13.data.shape[:2], 2 * w13.data.shape[2]
    expected, got = (experts, k, rows // 2 if gated else rows), (*w2.data.shape[:2], 2 * w2.data.shape[2])
    if got != expected or w2.data.device != w13.data.device:
        raise ValueError(
            f"w2: expected shape {list(expected)} on {w13.data.device} for w13 of shape {[experts, rows, k]}, "
            f"got {list(got)} on {w2.data.device}"
        )
    return experts, rows, k, gated


def _of_kind(
    gated: bool, gate: Gate | None, quant_config: MoEQuantConfig | None
) -> tuple[Gate | None, MoEQuantConfig | None]:
    """The two for weights of this kind: gates are for gate and up rows unless they say otherwise."""
    if not gated:
        gate = None if gate is None else replace(gate, gated=False)
        if quant_config is not None:
            quant_config = replace(quant_config, gate=replace(quant_config.gate, gated=False))
        return gate, quant_config
    for given in (gate, None if quant_config is None else quant_config.gate):
        if given is not None and not given.gated:
            raise ValueError(f"w13: expected up rows alone, [E, I, K], for {given}, got gate and up rows, [E, 2I, K]")
    return gate, quant_config


def _checked_bias(name: str, bias: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """A contiguous float32 copy of its values on ``device``, or None."""
    if bias is None:
        return None
    expected = f"{name}: expected floating point numbers of shape {list(shape)}"
    if not isinstance(bias, Tensor):
        raise TypeError(f"{expected}, got {type(bias).__name__}")
    if tuple(bias.shape) != shape or not bias.is_floating_point():
        raise ValueError(f"{expected}, got {bias.dtype} of {list(bias.shape)}")
    if bias.is_meta and device.type != "meta":
        raise ValueError(f"{expected} with values, for {device}, got a tensor on the meta device")
    return bias.detach().to(device, torch.float32, copy=True).contiguous()


def check_leading_dimensions(**tensors: Tensor) -> None:
    """Tensors of a batch of sequences have the same ones. A matrix holds all tokens in rows, which the ops count."""
    batched = [(name, tensor.shape) for name, tensor in tensors.items() if tensor.dim() > 2]
    if any(shape[:-1] != batched[0][1][:-1] for _, shape in batched):
        got = ", ".join(f"{name} {list(shape)}" for name, shape in batched)
        raise ValueError(f"NVFP4Experts: expected the same dimensions before the last one, got {got}")


def _as_matrix(tensor: Tensor) -> Tensor:
    """Contiguous, leading dimensions as one."""
    if tensor.dim() != 2:
        tensor = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor.unsqueeze(0)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _one_gate(parameters: Gate, gate: Gate | None, quant_config: MoEQuantConfig | None) -> MoEQuantConfig:
    """The one of the three that was given; ValueError where two were."""
    given = {"activation, clamp_limit, alpha, beta, gated": None if parameters == Gate() else parameters}
    given |= {"gate": gate, "quant_config": None if quant_config is None else quant_config.gate}
    several = [f"{name} ({value})" for name, value in given.items() if value is not None]
    if len(several) > 1:
        raise ValueError(
            "expected the gate once, as activation, clamp_limit, alpha, beta and gated, as gate or as quant_config, "
            f"got {' and '.join(several)}"
        )
    return quant_config if quant_config is not None else MoEQuantConfig(parameters if gate is None else gate)
