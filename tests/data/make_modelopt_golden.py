"""Writes modelopt_nvfp4.safetensors, NVFP4 matrices quantized by nvidia-modelopt itself, for tests/test_format.py.

In an environment of its own (the file was made with nvidia-modelopt 0.47.0 and torch 2.13.0 on a CPU):

    pip install torch==2.13.0 nvidia-modelopt==0.47.0 huggingface_hub requests safetensors
    python tests/data/make_modelopt_golden.py

Per case: <case>.dense, .data, .scale, .global_scale as ModelOpt returns them, .dequantized as it dequantizes them to
fp32, and .given_global_scale where the case does not let ModelOpt take it from amax.
"""

from __future__ import annotations

from pathlib import Path

import modelopt
import torch
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import save_file
from torch import Tensor

BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def cases() -> dict[str, tuple[Tensor, Tensor | None]]:
    """Name -> (dense [N, K], global scale or None)."""
    generator = torch.Generator().manual_seed(0)

    def normal(n: int, k: int) -> Tensor:
        return torch.randn(n, k, generator=generator)

    outliers = normal(16, 64) * 0.01
    outliers[torch.rand(16, 64, generator=generator) < 0.02] *= 300

    # Block scale 1 and global scale 1 make every bound of e2m1 rounding an exact tie; then its two neighbours.
    tie_values = [sign * bound for bound in BOUNDS for sign in (1.0, -1.0)]
    ties = torch.tensor([6.0, -6.0, *tie_values])
    after = torch.nextafter(ties, torch.full_like(ties, torch.inf))
    before = torch.nextafter(ties, torch.full_like(ties, -torch.inf))
    after[0], before[1] = 6.0, -6.0
    e2m1_ties = torch.stack((ties, after, before))

    # Block amaxima at and around the midpoints of E4M3 block scales.
    steps = torch.arange(0x01, 0x7E, 3, dtype=torch.uint8)
    low, high = (b.view(torch.float8_e4m3fn).float() for b in (steps, steps + 1))
    middle = (low + high) / 2
    amax = torch.cat((middle, torch.nextafter(middle, low), torch.nextafter(middle, high)))
    e4m3_ties = normal(len(amax), 16).clamp(-1, 1) * amax.unsqueeze(1)
    e4m3_ties[:, 5] = 6 * amax

    tiny_blocks = normal(8, 64)
    tiny_blocks[:, :16] *= 1e-6
    tiny_blocks[:, 16:32] *= 1e-3
    tiny_blocks[0, :16] *= 1e-32

    zero_blocks = normal(8, 64)
    zero_blocks[2:5, 16:48] = 0.0
    zero_blocks[6] = 0.0
    zero_blocks[7, :16] = -0.0

    one = torch.tensor(1.0)
    return {
        "normal_float32": (normal(16, 128) * 0.02, None),
        "normal_bfloat16": ((normal(8, 128) * 0.02).bfloat16(), None),
        "normal_float16": ((normal(4, 128) * 0.02).half(), None),
        "heavy_tailed": (normal(16, 64) ** 5, None),
        "outliers": (outliers, None),
        "e2m1_ties": (e2m1_ties, one),
        "e4m3_ties": (e4m3_ties, one),
        "tiny_blocks": (tiny_blocks, None),
        "zero_blocks": (zero_blocks, None),
        "one_value": (torch.nn.functional.one_hot(torch.tensor([3]), 16).float() * -0.7, None),
        "power_of_two_scale": (normal(16, 64) * 0.02, torch.tensor(2.0**-15)),
        "saturated_scale": (normal(8, 64), torch.tensor(2.0**-13)),
    }


def main() -> None:
    tensors: dict[str, Tensor] = {}
    for name, (dense, given) in cases().items():
        # A copy goes in: ModelOpt takes absolute values in place.
        quantized, scale, global_scale = NVFP4QTensor.quantize(dense.clone(), 16, weights_scaling_factor_2=given)
        tensors[f"{name}.dense"] = dense
        tensors[f"{name}.data"] = quantized._quantized_data
        tensors[f"{name}.scale"] = scale
        tensors[f"{name}.global_scale"] = global_scale
        if given is not None:
            tensors[f"{name}.given_global_scale"] = given
        scales = {"scale": scale, "double_scale": global_scale, "block_sizes": {-1: 16}}
        dequantized = quantized.dequantize(torch.float32, **scales)
        tensors[f"{name}.dequantized"] = dequantized
        for dtype in (torch.bfloat16, torch.float16):
            # So the file need not hold the 16-bit ones.
            assert torch.equal(quantized.dequantize(dtype, **scales), dequantized.to(dtype))
    path = Path(__file__).with_name("modelopt_nvfp4.safetensors")
    # One key, since the order of several would vary from run to run.
    metadata = {"made_with": f"nvidia-modelopt {modelopt.__version__}, torch {torch.__version__}"}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    print(f"{path}: {path.stat().st_size} bytes, {metadata}")


if __name__ == "__main__":
    main()
