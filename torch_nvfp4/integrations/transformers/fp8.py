"""FP8 weights beside NVFP4 ones: dequantized when a model is loaded, and quantized again when it is saved."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.errors import CheckpointError, refusal

__all__ = ["FP8Weight", "fp8_weights"]

_DTYPES = ("F8_E4M3", "F8_E5M2")
_SCALES = (".weight_scale_inv", ".scale", ".weight_scale")


class FP8Weight(NamedTuple):
    """An FP8 weight of a checkpoint: the names of its codes [N, K] and of its scales, and the block of one scale."""

    name: str
    scale: str
    block: tuple[int, int]

    def read(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(codes [N, K], scales [N, K] in fp32) on a device."""
        codes = checkpoint.tensor(self.name).to(device)
        return codes, self._expanded(checkpoint.tensor(self.scale).float().to(device), codes.shape)

    def dequantized(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """[N, K] in a dtype on a device, where it is computed: code * scale, rounded once."""
        codes, scale = self.read(checkpoint, device)
        return (codes.float() * scale).to(dtype)

    def quantized_again(self, checkpoint: Checkpoint, weight: Tensor) -> Tensor:
        """The checkpoint's codes, if ``weight`` still is what they dequantize to in its dtype.

        Raises ValueError for a weight that was changed, for which nobody has chosen scales.
        """
        if not torch.equal(self.dequantized(checkpoint, weight.dtype), weight.detach().cpu()):
            raise ValueError(
                f"{self.name}: expected the weight as it was loaded, to be written in FP8 again, got other values; "
                "keep changes in an adapter, or save the model without quantization"
            )
        return checkpoint.tensor(self.name)

    def _expanded(self, scale: Tensor, shape: torch.Size) -> Tensor:
        """One scale per value. The last block of a row or column may be a part of one."""
        if scale.numel() == 1:
            return scale.reshape(1, 1).expand(shape)
        if scale.numel() == shape[0] and scale.shape in ((shape[0],), (shape[0], 1)):
            return scale.reshape(-1, 1).expand(shape)
        rows, columns = self.block
        grid = (-(-shape[0] // rows), -(-shape[1] // columns))
        if tuple(scale.shape) != grid:
            expected = f"shape {list(grid)} for blocks of {rows} x {columns}, or one scale (per row)"
            raise CheckpointError(refusal(self.scale, expected, f"{list(scale.shape)}"))
        rows_of_each = scale.repeat_interleave(rows, 0)[: shape[0]]
        return rows_of_each.repeat_interleave(columns, 1)[:, : shape[1]]


def fp8_weights(checkpoint: Checkpoint) -> dict[str, FP8Weight]:
    """The FP8 weights of a checkpoint by the name of their codes, as its headers show them.

    Raises CheckpointError for an FP8 weight without a scale.
    """
    block = checkpoint.quant_config.get("weight_block_size") or (128, 128)
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        where = checkpoint.path / "config.json"
        raise CheckpointError(refusal(where, "weight_block_size to be two positive integers", f"{block!r:.80}"))
    found = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype not in _DTYPES or not name.endswith(".weight") or len(info.shape) != 2:
            continue
        module = name.removesuffix(".weight")
        scale = next((module + leaf for leaf in _SCALES if module + leaf in checkpoint.tensors), None)
        if scale is None:
            raise CheckpointError(refusal(f"{info.file}: tensor {name}", "a scale beside FP8 codes", "none"))
        found[name] = FP8Weight(name, scale, (int(block[0]), int(block[1])))
    return found
