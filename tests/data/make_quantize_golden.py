"""Writes quantize_golden.safetensors: what ModelOpt and compressed-tensors themselves make of a small expert.

In an environment of its own (the file was made with nvidia-modelopt 0.47.0, compressed-tensors 0.20.0 and torch 2.13.0
on a CPU):

    pip install torch==2.13.0 nvidia-modelopt==0.47.0 compressed-tensors==0.20.0 safetensors
    python tests/data/make_quantize_golden.py

`gate`, `up`, `down`: the dense matrices. Gate and up share one global scale, that of their common largest value. Per
matrix and package its own tensors under its own names, and `.dequantized`, what its own code makes of them: ModelOpt in
fp32, compressed-tensors in bf16.
"""

from __future__ import annotations

from pathlib import Path

import compressed_tensors
import modelopt
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import generate_gparam
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import save_file
from torch import Tensor

INTERMEDIATE, HIDDEN = 16, 48


def matrices() -> dict[str, Tensor]:
    """Gate and up of different sizes, a block of zeros, an outlier, and a block far below the others."""
    generator = torch.Generator().manual_seed(11)
    gate = torch.randn(INTERMEDIATE, HIDDEN, generator=generator) * 0.02
    up = torch.randn(INTERMEDIATE, HIDDEN, generator=generator) * 0.3
    down = torch.randn(HIDDEN, INTERMEDIATE, generator=generator) * 0.05
    gate[0, :16] = 0
    up[3, 5] = -7.0
    down[1] *= 1e-6
    return {"gate": gate.bfloat16(), "up": up.bfloat16(), "down": down.bfloat16()}


def by_modelopt(dense: Tensor, global_scale: Tensor) -> dict[str, Tensor]:
    # A copy goes in: ModelOpt takes absolute values in place.
    quantized, scale, scale_2 = NVFP4QTensor.quantize(dense.clone(), 16, weights_scaling_factor_2=global_scale)
    scales = {"scale": scale, "double_scale": scale_2, "block_sizes": {-1: 16}}
    return {
        "weight": quantized._quantized_data,
        "weight_scale": scale,
        "weight_scale_2": scale_2,
        "dequantized": quantized.dequantize(torch.float32, **scales),
    }


def by_compressed_tensors(codes: Tensor, scale: Tensor, amax: Tensor) -> dict[str, Tensor]:
    """ModelOpt's codes and scales as compressed-tensors reads them, with the global scale that it computes itself.

    Its own codes differ from ModelOpt's where a value lies in the middle of two: it divides by a quotient of scales.
    """
    scheme: QuantizationScheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    global_scale = generate_gparam(-amax.reshape(1), amax.reshape(1))
    state = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": global_scale}
    return state | {"dequantized": NVFP4PackedCompressor.decompress(state, scheme)["weight"]}


def check_config() -> None:
    """The config that torch-nvfp4 quantize writes is one to compressed-tensors, and the same as its own preset."""
    from torch_nvfp4.convert.config import quantization_config
    from torch_nvfp4.convert.selection import Selection

    section = quantization_config(
        Selection({}, [], [], [], ["lm_head"], ["model.layers.0.mlp.experts."]), "compressed-tensors"
    )
    parsed = QuantizationConfig.model_validate(section)
    own = preset_name_to_scheme("NVFP4A16", ["Linear"])
    assert parsed.config_groups["group_0"].weights == own.weights, (
        parsed.config_groups["group_0"].weights,
        own.weights,
    )
    assert parsed.format == "nvfp4-pack-quantized", parsed.format


def main() -> None:
    check_config()
    dense = matrices()
    shared = torch.cat((dense["gate"], dense["up"])).abs().amax()
    tensors: dict[str, Tensor] = dict(dense)
    for name, matrix in dense.items():
        amax = (matrix.abs().amax() if name == "down" else shared).float()
        golden = by_modelopt(matrix, amax / (6.0 * 448.0))
        tensors |= {f"modelopt.{name}.{leaf}": tensor for leaf, tensor in golden.items()}
        golden = by_compressed_tensors(golden["weight"], golden["weight_scale"], amax)
        tensors |= {f"compressed-tensors.{name}.{leaf}": tensor for leaf, tensor in golden.items()}
    path = Path(__file__).with_name("quantize_golden.safetensors")
    made_with = (
        f"nvidia-modelopt {modelopt.__version__}, compressed-tensors {compressed_tensors.__version__}, "
        f"torch {torch.__version__}"
    )
    save_file(
        {name: t.detach().clone().contiguous() for name, t in tensors.items()}, path, metadata={"made_with": made_with}
    )
    print(f"{path}: {path.stat().st_size} bytes, {made_with}")


if __name__ == "__main__":
    main()
