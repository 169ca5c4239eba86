"""Modules that hold NVFP4 weights: ``NVFP4Experts`` (one MoE layer's experts) and ``NVFP4Linear``.

Both keep their weights packed for the device and backend that run them, and behave like any module all the same:

- ``.to(device)``, ``.cuda()``, ``.cpu()`` unpack on the old device, pack on the new one and choose the backend again.
- ``.to(dtype)``, ``.half()``, ``.bfloat16()``, ``.float()`` leave codes and scales alone.
- ``state_dict()`` holds the canonical weights under ModelOpt's leaf names (``weight``, ``weight_scale``,
  ``weight_scale_2``), independent of device and backend; so does a pickle. Both cost one unpacked copy.
  ``torch.func.functional_call`` takes the packed buffers instead, ``dict(module.named_buffers())``.
- On the meta device there are only shapes: materialise with ``to_empty(device=...)`` and ``load_state_dict``, or with
  ``load_state_dict`` alone, which then takes the device of the state dict.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from torch_nvfp4.backends import MoEBackendConfig, moe_backend, select_moe_backend
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight, dequantize, is_gated_pair, quantize, validate, validate_layout
from torch_nvfp4.ops import pack, unpack
from torch_nvfp4.quant_config import MoEQuantConfig

__all__ = ["NVFP4Experts", "NVFP4Linear"]

_Self = TypeVar("_Self", bound="_PackedModule")


class _Shape(NamedTuple):
    """Dense shape of a canonical weight, and of its global scale."""

    dense: tuple[int, ...]  # [..., N, K]
    global_scale: tuple[int, ...]

    def leaves(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype by the name that the leaf has in a state dict, in the order of NVFP4Weight."""
        *rows, k = self.dense
        return {
            "weight": ((*rows, k // 2), torch.uint8),
            "weight_scale": ((*rows, k // GROUP_SIZE), torch.float8_e4m3fn),
            "weight_scale_2": (self.global_scale, torch.float32),
        }

    def zeros(self, device: torch.device | str | None) -> NVFP4Weight:
        return NVFP4Weight(*(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in self.leaves().values()))


class _PackedModule(nn.Module):
    """NVFP4 weights in non-persistent buffers whose layout belongs to one device and one way to run them.

    What moves (to a device, a state dict, a pickle) is always the canonical weights. A subclass says which weights it
    has, how they are packed for their device, and how to get them back.
    """

    backend: str

    def __init__(self) -> None:
        super().__init__()
        self._packed_names: tuple[str, ...] = ()

    def _weight_shapes(self) -> dict[str, _Shape]:
        """The canonical weights by the prefix that their leaves have in a state dict."""
        raise NotImplementedError

    def _pack(self, weights: dict[str, NVFP4Weight]) -> tuple[str, dict[str, Tensor]]:
        """(the backend for the weights' device, the buffers that it reads), without a change to the module."""
        raise NotImplementedError

    def _unpack(self) -> dict[str, NVFP4Weight]:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._buffer(self._packed_names[0]).device

    def _buffer(self, name: str) -> Tensor:
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer

    def _place(self, weights: dict[str, NVFP4Weight], *, in_place: bool = False) -> None:
        """Packs ``weights`` for the device they are on and makes them the module's.

        ``in_place`` copies into the present buffers where they fit, so that whoever holds one (a captured CUDA graph)
        sees the new values.
        """
        backend, buffers = self._pack(weights)
        old = {name: self._buffer(name) for name in self._packed_names}
        for name in old:
            delattr(self, name)
        for name, new in buffers.items():
            if in_place and backend == self.backend and old[name].shape == new.shape:
                new = old[name].copy_(new)
            self.register_buffer(name, new, persistent=False)
        self._packed_names = tuple(buffers)
        self.backend = backend

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        # torch applies fn (a conversion of dtype, device, memory format, ...) to each buffer by itself; fn's effect on
        # an empty tensor says where it leads.
        device = self.device
        new_device = fn(torch.empty(0, dtype=torch.uint8, device=device)).device
        moves = new_device != device
        weights = self._unpack() if moves else {}
        if moves and device.type == "meta":
            # to_empty: zeros, since a byte left in memory may be a NaN scale.
            weights = {prefix: shape.zeros(new_device) for prefix, shape in self._weight_shapes().items()}
        elif moves:
            weights = {
                prefix: NVFP4Weight(*(part.to(new_device) for part in weight)) for prefix, weight in weights.items()
            }
        if moves:
            self._place(weights)
        packed = {name: self._buffer(name) for name in self._packed_names}
        if not moves:
            packed = {name: _apply_unless_converting(fn, buffer) for name, buffer in packed.items()}
        for name in packed:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(packed)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for weight_prefix, weight in self._unpack().items():
            for leaf, part in zip(_LEAVES, weight, strict=True):
                destination[prefix + weight_prefix + leaf] = part

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Onto the meta device torch would load nothing, with a warning; here loading materialises.
        assign = bool(local_metadata.get("assign_to_params_buffers")) or self.device.type == "meta"
        super()._load_from_state_dict(
            state_dict,
            prefix,
            {**local_metadata, "assign_to_params_buffers": assign},
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        shapes = self._weight_shapes()
        own = {prefix + weight_prefix + leaf for weight_prefix in shapes for leaf in _LEAVES}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]
        missing = sorted(key for key in own if key not in state_dict)
        missing_keys.extend(missing)
        loaded: dict[str, NVFP4Weight] = {}
        for weight_prefix, shape in shapes.items():
            keys = [prefix + weight_prefix + leaf for leaf in _LEAVES]
            present = [key for key in keys if key in state_dict]
            if present and len(present) < len(keys):
                error_msgs.append(f"expected {', '.join(keys)} together, got only {', '.join(present)}")
            if len(present) < len(keys):
                continue
            parts = [state_dict[key] for key in keys]
            errors = [
                error
                for key, part, (expected, dtype) in zip(keys, parts, shape.leaves().values(), strict=True)
                if (error := _leaf_error(key, part, expected, dtype)) is not None
            ]
            error_msgs.extend(errors)
            if not errors:
                device = parts[0].device if assign else self.device
                loaded[weight_prefix] = NVFP4Weight(*(part.detach().to(device) for part in parts))
        if not loaded or (len(loaded) < len(shapes) and self.device.type == "meta"):
            return  # the missing keys are reported, and beside a meta weight there is nothing to place
        if len(loaded) < len(shapes):
            device = next(iter(loaded.values())).data.device
            kept = self._unpack()
            loaded = {key: loaded.get(key, NVFP4Weight(*(part.to(device) for part in kept[key]))) for key in shapes}
        try:
            self._place(loaded, in_place=not assign)
        except (ValueError, NotImplementedError) as error:
            error_msgs.append(f"{prefix or type(self).__name__}: {error}")

    def __getstate__(self) -> dict[str, Any]:
        # Canonical: a pickle may be loaded where the packed layout is another one.
        state = self.__dict__.copy()
        state["_buffers"] = {name: buf for name, buf in self._buffers.items() if name not in self._packed_names}
        state["_packed_names"] = ()
        # Scales as bytes: torch 2.13 writes float8 storages into a plain pickle that it cannot read.
        state["_weights"] = {
            prefix: (weight.data, weight.scale.view(torch.uint8), weight.global_scale)
            for prefix, weight in self._unpack().items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        weights = state.pop("_weights")
        super().__setstate__(state)
        self._place(
            {
                prefix: NVFP4Weight(data, scale.view(torch.float8_e4m3fn), global_scale)
                for prefix, (data, scale, global_scale) in weights.items()
            }
        )

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        # On the same device: the packed buffers are copied as they are.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


_LEAVES = tuple(_Shape((16, 16), ()).leaves())


def _apply_unless_converting(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    """``fn(buffer)``, or ``buffer`` where fn converts dtype or layout, which means nothing for packed bytes and scales.

    fn sees a flat view: a packed tensor of rank 4 or 5 would be taken for an image in channels_last.
    """
    flat = buffer.view(-1)
    result = fn(flat)
    return buffer if result is flat or result.dtype != buffer.dtype else result.view(buffer.shape)


def _as_matrix(tensor: Tensor) -> Tensor:
    """Contiguous, leading dimensions as one."""
    return (tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])).contiguous()


def _leaf_error(key: str, part: Any, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    if not isinstance(part, Tensor):
        return f"{key}: expected a tensor, got {type(part).__name__}"
    if part.shape != shape or part.dtype != dtype:
        return f"{key}: expected shape {list(shape)} of {dtype}, got {list(part.shape)} of {part.dtype}"
    return None


class NVFP4Experts(_PackedModule):
    """The routed experts of one MoE layer, as ``torch_nvfp4.moe``: ``experts(hidden_states, topk_weights, topk_ids)``.

    Made by ``from_float``, ``from_weights`` or ``from_checkpoint``; the constructor itself makes zero weights (on the
    meta device: none) for ``load_state_dict``. Traceable by torch.compile(fullgraph=True, dynamic=True) and
    torch.export. No gradient.

    Args:
        num_experts, hidden_size, intermediate_size: E, K, I, of this rank.
        activation, clamp_limit, alpha, beta: the gate, as in ``torch_nvfp4.moe``.
        quant_config: the gate as a MoEQuantConfig, instead of these four.
        expert_map: int32 [global experts], local expert or -1; then topk_ids are global.
        apply_router_weight_on_input: as in ``torch_nvfp4.moe``.
        backend: a name of ``torch_nvfp4.backends``, or None for the first that can run the layer
            (TORCH_NVFP4_BACKEND overrides None). It holds for every device that the module is moved to.
        device: torch's default device if None.

    Raises ValueError for a clamp that the activation or the backend cannot apply: it is never skipped.
    """

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
        quant_config: MoEQuantConfig | None = None,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        _weights: dict[str, NVFP4Weight] | None = None,
    ) -> None:
        super().__init__()
        given = MoEQuantConfig.make(activation, clamp_limit, alpha, beta)
        if quant_config is not None and given != MoEQuantConfig():
            raise ValueError(f"expected the gate's parameters or quant_config, got both: {given} and {quant_config}")
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.quant_config = given if quant_config is None else quant_config
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.requested_backend = backend
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
        self._place(_weights)

    @classmethod
    def from_weights(cls, w13: NVFP4Weight, w2: NVFP4Weight, **kwargs: Any) -> NVFP4Experts:
        """From [E, 2I, K] (gate rows first) and [E, K, I], on their device.

        w13's global scale is [E, 2] (gate, up), or [E] for both alike. ``kwargs`` are the constructor's keywords.

        Raises ValueError or TypeError for weights that are not valid NVFP4 or do not fit together.
        """
        validate_layout(w13, gated=True)
        validate_layout(w2, gated=False)
        if w13.data.dim() != 3 or w2.data.dim() != 3:
            raise ValueError(
                "expected w13 [E, 2I, K] and w2 [E, K, I], "
                f"got data of shapes {list(w13.data.shape)} and {list(w2.data.shape)}"
            )
        experts, two_i, k = *w13.data.shape[:2], 2 * w13.data.shape[2]
        expected, got = (experts, k, two_i // 2), (*w2.data.shape[:2], 2 * w2.data.shape[2])
        if got != expected or w2.data.device != w13.data.device:
            raise ValueError(
                f"w2: expected shape {list(expected)} on {w13.data.device} for w13 of shape {[experts, two_i, k]}, "
                f"got {list(got)} on {w2.data.device}"
            )
        if not is_gated_pair(w13):
            w13 = w13._replace(global_scale=w13.global_scale.unsqueeze(1).repeat(1, 2))
        return cls(experts, k, two_i // 2, _weights={"w13_": w13, "w2_": w2}, **kwargs)

    @classmethod
    def from_float(cls, w13: Tensor, w2: Tensor, **kwargs: Any) -> NVFP4Experts:
        """Quantizes dense [E, 2I, K] (gate rows first) and [E, K, I]. ``kwargs`` are the constructor's keywords."""
        return cls.from_weights(quantize(w13, gated=True), quantize(w2), **kwargs)

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
        progress: Callable[[int, int], None] | None = None,
    ) -> NVFP4Experts:
        """One layer of a checkpoint directory; gate and clamp limit come from its config.

        With tp_size > 1 this rank has I / tp_size of every expert and its results are partial sums: add those of all
        ranks (all-reduce). With ep_size > 1 it has E / ep_size whole experts, topk_ids stay global, and the results are
        partial sums too. The other arguments are those of ``Checkpoint.experts``, and ``backend``.

        Raises CheckpointError (a ValueError).
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint.open(checkpoint)
        quant_config = MoEQuantConfig(checkpoint.gate(layer))
        weights = checkpoint.experts(
            layer, tp_rank=tp_rank, tp_size=tp_size, ep_rank=ep_rank, ep_size=ep_size, progress=progress
        )
        w13, w2 = (NVFP4Weight(*(part.to(device) for part in weight)) for weight in weights)
        expert_map = checkpoint.expert_map(ep_rank, ep_size) if ep_size > 1 else None
        return cls.from_weights(w13, w2, quant_config=quant_config, expert_map=expert_map, backend=backend)

    @property
    def clamp_limit(self) -> float | None:
        """The limit that the kernel applies to gate and up, None for no clamp."""
        return self.quant_config.gate.clamp_limit

    def unpacked_weights(self) -> tuple[NVFP4Weight, NVFP4Weight]:
        """(w13, w2) in the canonical format, on the module's device."""
        weights = self._unpack()
        return weights["w13_"], weights["w2_"]

    def forward(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """hidden_states [..., K], topk_weights and topk_ids [..., top_k] -> [..., K] in hidden_states' dtype.

        topk_weights of another floating point dtype are taken as float32.
        """
        output = moe_backend(self.backend).apply(
            {name: self._buffer(name) for name in self._packed_names},
            self.quant_config,
            _as_matrix(hidden_states),
            _as_matrix(topk_weights if topk_weights.dtype == torch.float32 else topk_weights.float()),
            _as_matrix(topk_ids),
            self.expert_map,
            self.apply_router_weight_on_input,
        )
        return output if hidden_states.dim() == 2 else output.reshape(hidden_states.shape)

    def extra_repr(self) -> str:
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
        return ", ".join([*parts, f"backend={self.backend}"])

    def _weight_shapes(self) -> dict[str, _Shape]:
        e, k, i = self.num_experts, self.hidden_size, self.intermediate_size
        return {"w13_": _Shape((e, 2 * i, k), (e, 2)), "w2_": _Shape((e, k, i), (e,))}

    def _pack(self, weights: dict[str, NVFP4Weight]) -> tuple[str, dict[str, Tensor]]:
        w13, w2 = weights["w13_"], weights["w2_"]
        device, scale = w13.data.device, w13.global_scale
        if device.type == "meta":
            chosen = moe_backend("reference")  # its layout is the canonical one; the choice waits for a real device
        else:
            config = MoEBackendConfig.for_device(
                device,
                self.hidden_size,
                self.intermediate_size,
                gate=self.quant_config.gate,
                expert_map=self.expert_map is not None,
                apply_router_weight_on_input=self.apply_router_weight_on_input,
                equal_gate_up_scales=bool((scale[:, 0] == scale[:, 1]).all()),
            )
            chosen = select_moe_backend(config, self.requested_backend)
        return chosen.name, chosen.prepare(w13, w2)

    def _unpack(self) -> dict[str, NVFP4Weight]:
        buffers = {name: self._buffer(name) for name in self._packed_names}
        w13, w2 = moe_backend(self.backend).restore(buffers, self.hidden_size, self.intermediate_size)
        return {"w13_": w13, "w2_": w2}


class NVFP4Linear(_PackedModule):
    """``x @ W^T + bias`` with an NVFP4 weight and 16-bit activations, as ``torch_nvfp4.linear``.

    Made by ``from_float``, ``from_weight`` or ``from_checkpoint``; the constructor itself makes zero weights (on the
    meta device: none) for ``load_state_dict``. The bias is a parameter that ``.to(dtype)`` converts. No gradient.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        _weight: NVFP4Weight | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        weight = self._weight_shapes()[""].zeros(device) if _weight is None else _weight
        self.bias: nn.Parameter | None = None
        if bias:
            zeros = torch.zeros(out_features, device=weight.data.device, dtype=dtype)
            self.bias = nn.Parameter(zeros, requires_grad=False)
        self._place({"": weight})

    @classmethod
    def from_weight(cls, weight: NVFP4Weight, bias: Tensor | None = None) -> NVFP4Linear:
        """From an NVFP4 weight [N, K] with one global scale, and a bias [N], on the weight's device."""
        validate_layout(weight, gated=False)
        if weight.data.dim() != 2:
            raise ValueError(f"expected a weight [N, K], got data of shape {list(weight.data.shape)}")
        n, k = weight.data.shape[0], 2 * weight.data.shape[1]
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"bias: expected shape [{n}], got {list(bias.shape)}")
        linear = cls(k, n, bias is not None, dtype=None if bias is None else bias.dtype, _weight=weight)
        if linear.bias is not None and bias is not None:
            with torch.no_grad():
                linear.bias.copy_(bias)
        return linear

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None = None) -> NVFP4Linear:
        """Quantizes a dense weight [N, K]; the bias [N] stays as it is."""
        return cls.from_weight(quantize(weight), bias)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path | Checkpoint, name: str, *, device: torch.device | str = "cpu"
    ) -> NVFP4Linear:
        """The NVFP4 module ``name`` of a checkpoint directory, with its bias if it has one.

        Raises CheckpointError (a ValueError).
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint.open(checkpoint)
        weight = NVFP4Weight(*(part.to(device) for part in checkpoint.linear(name)))
        bias = checkpoint.tensor(f"{name}.bias").to(device) if f"{name}.bias" in checkpoint.tensors else None
        return cls.from_weight(weight, bias)

    def unpacked_weight(self) -> NVFP4Weight:
        """The weight in the canonical format, on the module's device."""
        return self._unpack()[""]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype; a bias of another dtype is rounded to it."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.backend == "kernel":
            packed, global_scale = self._buffer("packed"), self._buffer("global_scale")
            return torch.ops.nvfp4.linear(x.contiguous(), packed, global_scale, bias)
        dtype = torch.promote_types(x.dtype, torch.float32)
        dense = dequantize(self._unpack()[""], dtype)
        return nn.functional.linear(x.to(dtype), dense, None if bias is None else bias.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"backend={self.backend}"
        )

    def _weight_shapes(self) -> dict[str, _Shape]:
        return {"": _Shape((self.out_features, self.in_features), ())}

    def _pack(self, weights: dict[str, NVFP4Weight]) -> tuple[str, dict[str, Tensor]]:
        weight = weights[""]
        device = weight.data.device.type
        # The dispatch key has the device's name in capitals.
        if device in ("cpu", "cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(
            "nvfp4::linear", device.upper()
        ):
            return "kernel", {"packed": pack(weight), "global_scale": weight.global_scale}
        (validate_layout if device == "meta" else validate)(weight, gated=False)
        return "reference", {name: part.contiguous() for name, part in weight._asdict().items()}

    def _unpack(self) -> dict[str, NVFP4Weight]:
        if self.backend == "kernel":
            packed, global_scale = self._buffer("packed"), self._buffer("global_scale")
            return {"": unpack(packed, self.in_features, global_scale)}
        return {"": NVFP4Weight(self._buffer("data"), self._buffer("scale"), self._buffer("global_scale"))}
