"""A linear layer with an NVFP4 weight as a module."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.format import NVFP4Weight, dequantize, quantize, validate, validate_layout
from torch_nvfp4.nn.packed_module import PackedModule, WeightShape
from torch_nvfp4.ops import linear, pack, unpack

__all__ = ["NVFP4Linear"]


class NVFP4Linear(PackedModule):
    """``x @ W^T + bias`` with an NVFP4 weight and 16-bit activations, as ``torch_nvfp4.linear``.

    Made by ``from_float``, ``from_weight`` or ``from_checkpoint``; the constructor itself makes zero weights (on the
    meta device: none) for ``load_state_dict``. The bias is a parameter that ``.to(dtype)`` converts. Input and
    bias have gradients, the weight is frozen; so is the bias until ``linear.bias.requires_grad_()``.

    Args:
        in_features, out_features: K and N, K a multiple of 16.
        bias: whether there is one, [N] in ``dtype``.
        device, dtype: torch's defaults if None; the dtype is the bias's alone.
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
        """From an NVFP4 weight [N, K] with one global scale, and a bias [N] in any dtype, on the weight's device.

        Raises TypeError or ValueError for a weight that is not valid NVFP4 or a bias that does not fit it.
        """
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
        """Quantizes a dense weight [N, K] (see ``torch_nvfp4.quantize``); the bias [N] stays as it is.

        Raises what ``quantize`` and ``from_weight`` raise.
        """
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
        weight = checkpoint.linear(name).to(device)
        bias = checkpoint.tensor(f"{name}.bias").to(device) if f"{name}.bias" in checkpoint.tensors else None
        return cls.from_weight(weight, bias)

    def unpacked_weight(self) -> NVFP4Weight:
        """The weight in the canonical format, on the module's device."""
        return self._unpack()[""]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype; a bias of another dtype is rounded to it.

        Under ``torch.autocast`` float32 is rounded to its dtype, as in ``nn.Linear``. Raises ValueError for x of
        another K.
        """
        if x.dim() and x.shape[-1] != self.in_features:  # padded to 64 in the packed weight, so not always an error
            got = list(x.shape)
            raise ValueError(f"NVFP4Linear: expected x [..., {self.in_features}] (in_features), got {got}")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.backend == "kernel":
            packed, global_scale = self._buffer("packed"), self._buffer("global_scale")
            return linear(x.contiguous(), packed, global_scale, bias)
        dtype = torch.promote_types(x.dtype, torch.float32)
        dense = dequantize(self._unpack()[""], dtype)
        return nn.functional.linear(x.to(dtype), dense, None if bias is None else bias.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes, bias and backend, for ``print(module)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"backend={self.backend}"
        )

    def _weight_shapes(self) -> dict[str, WeightShape]:
        return {"": WeightShape((self.out_features, self.in_features), ())}

    def _pack(self, weights: dict[str, NVFP4Weight]) -> tuple[str, dict[str, Tensor]]:
        weight = weights[""]
        device = weight.data.device.type
        # The dispatch key has the device's name in capitals.
        if device in ("cpu", "cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(
            "nvfp4::linear", device.upper()
        ):
            return "kernel", {"packed": pack(weight), "global_scale": weight.global_scale}
        validate(weight, gated=False)
        return "reference", {name: part.contiguous() for name, part in weight._asdict().items()}

    def _unpack(self) -> dict[str, NVFP4Weight]:
        if self.backend == "kernel":
            packed, global_scale = self._buffer("packed"), self._buffer("global_scale")
            return {"": unpack(packed, self.in_features, global_scale)}
        return {"": NVFP4Weight(self._buffer("data"), self._buffer("scale"), self._buffer("global_scale"))}
