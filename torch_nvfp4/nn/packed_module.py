"""The base of modules that hold packed NVFP4 weights and behave like any module all the same.

- ``.to(device)``, ``.cuda()``, ``.cpu()`` unpack on the old device, pack on the new one and choose the backend again.
- ``.to(dtype)``, ``.half()``, ``.bfloat16()``, ``.float()`` leave codes and scales alone.
- ``state_dict()`` holds the canonical weights under ModelOpt's leaf names (``weight``, ``weight_scale``,
  ``weight_scale_2``), independent of device and backend; so does a pickle. Both cost one unpacked copy.
  ``torch.func.functional_call`` takes the packed buffers instead, ``dict(module.named_buffers())``.
- ``torch.distributed.checkpoint`` and ``fully_shard`` leave the packed buffers whole on every rank.
  ``DistributedDataParallel`` sends all buffers before each forward unless it is told ``broadcast_buffers=False``.
- On the meta device there are only shapes: materialise with ``to_empty(device=...)`` and ``load_state_dict``, or with
  ``load_state_dict`` alone, which then takes the device of the state dict.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight

__all__ = ["LEAVES", "PackedModule", "WeightShape"]

_Self = TypeVar("_Self", bound="PackedModule")


class WeightShape(NamedTuple):
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
        """A valid weight of this shape whose values are all zero."""
        return NVFP4Weight(*(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in self.leaves().values()))


LEAVES = tuple(WeightShape((16, 16), ()).leaves())
"""Names of a weight's leaves in a state dict."""


class PackedModule(nn.Module):
    """NVFP4 weights in non-persistent buffers whose layout belongs to one device and one way to run them.

    What moves (to a device, a state dict, a pickle) is always the canonical weights. A subclass says which weights it
    has, how they are packed for their device, and how to get them back.
    """

    backend: str
    # Ordinary buffers that keep their dtype, float32. Here, so that a pickle from before there were any has none.
    _exact_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._packed_names: tuple[str, ...] = ()

    def _weight_shapes(self) -> dict[str, WeightShape]:
        """The canonical weights by the prefix that their leaves have in a state dict."""
        raise NotImplementedError

    def _pack(self, weights: dict[str, NVFP4Weight]) -> tuple[str, dict[str, Tensor]]:
        """(the backend for the weights' device, the buffers that it reads), without a change to the module."""
        raise NotImplementedError

    def _unpack(self) -> dict[str, NVFP4Weight]:
        raise NotImplementedError

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint.state_dict, which looks for what a state dict names among the attributes:
        the attribute that has this one. Leaves have no tensors before a state dict is made."""
        return dict.fromkeys(vars(self._leaves), "_leaves")

    @property
    def _leaves(self) -> SimpleNamespace:
        """The leaves of a state dict by name, without values."""
        return SimpleNamespace(**{prefix + leaf: None for prefix in self._weight_shapes() for leaf in LEAVES})

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
            weights = {prefix: weight.to(new_device) for prefix, weight in weights.items()}
        if moves:
            self._place(weights)
        packed = {name: self._buffer(name) for name in self._packed_names}
        exact = {name: self._buffer(name) for name in self._exact_names}
        if not moves:
            packed = {name: _apply_unless_converting(fn, buffer) for name, buffer in packed.items()}
            exact = {name: _apply_unless_converting(fn, buffer) for name, buffer in exact.items()}
        elif device.type == "meta":
            exact = {name: torch.zeros_like(buffer, device=new_device) for name, buffer in exact.items()}
        else:
            exact = {name: buffer.to(new_device) for name, buffer in exact.items()}
        packed |= exact
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
            for leaf, part in zip(LEAVES, weight, strict=True):
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
        for name in self._exact_names:  # assigned as they are, whatever their dtype and strides
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and not given.is_floating_point():
                error_msgs.append(f"{prefix + name}: expected floating point numbers, got {given.dtype}")
            self._buffers[name] = self._buffer(name).to(torch.float32).contiguous()
        shapes = self._weight_shapes()
        own = {prefix + weight_prefix + leaf for weight_prefix in shapes for leaf in LEAVES}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]
        missing = sorted(key for key in own if key not in state_dict)
        missing_keys.extend(missing)
        loaded = self._read_weights(state_dict, prefix, assign, error_msgs)
        if not loaded or (len(loaded) < len(shapes) and self.device.type == "meta"):
            return  # the missing keys are reported, and beside a meta weight there is nothing to place
        if len(loaded) < len(shapes):
            device = next(iter(loaded.values())).data.device
            kept = self._unpack()
            loaded = {key: loaded.get(key, kept[key].to(device)) for key in shapes}
        try:
            self._place(loaded, in_place=not assign)
        except (ValueError, NotImplementedError) as error:
            error_msgs.append(f"{prefix or type(self).__name__}: {error}")

    def _read_weights(
        self, state_dict: Mapping[str, Any], prefix: str, assign: bool, error_msgs: list[str]
    ) -> dict[str, NVFP4Weight]:
        """The weights of which the state dict has every leaf, on the device they are to be packed for.

        What is wrong with the others is added to ``error_msgs``; where no leaf of a weight is there, nothing is.
        """
        loaded: dict[str, NVFP4Weight] = {}
        for weight_prefix, shape in self._weight_shapes().items():
            keys = [prefix + weight_prefix + leaf for leaf in LEAVES]
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
        return loaded

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


def _apply_unless_converting(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    """``fn(buffer)``, or ``buffer`` where fn converts dtype or layout, which means nothing for packed bytes and scales.

    fn sees a flat view: a packed tensor of rank 4 or 5 would be taken for an image in channels_last.
    """
    flat = buffer.view(-1)
    result = fn(flat)
    return buffer if result is flat or result.dtype != buffer.dtype else result.view(buffer.shape)


def _leaf_error(key: str, part: Any, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    if not isinstance(part, Tensor):
        return f"{key}: expected a tensor, got {type(part).__name__}"
    if part.shape != shape or part.dtype != dtype:
        return f"{key}: expected shape {list(shape)} of {dtype}, got {list(part.shape)} of {part.dtype}"
    return None
