"""From the tensor names of a published checkpoint, NVFP4 or MXFP4, to canonical NVFP4 weights.

What is quantized, and how, is decided from the safetensors headers (which leaves exist, with which dtype and shape);
`ignore` globs and `quant_method` in the configs are only reported. `layouts.LAYOUTS` is the table of the layouts that
are read; `headers` trusts no file, `contents` sorts the tensors, `weights` copies, `records` has what comes out, and
`reader` has `Checkpoint`.
`write_checkpoint` writes small checkpoints in each of these layouts.
"""

from torch_nvfp4.checkpoint.contents import Category
from torch_nvfp4.checkpoint.headers import TensorInfo
from torch_nvfp4.checkpoint.reader import Checkpoint, open_checkpoint
from torch_nvfp4.checkpoint.records import ExpertWeights, LayerConfig, Refusal, Summary
from torch_nvfp4.checkpoint.synthetic import write_checkpoint
from torch_nvfp4.errors import CheckpointError
from torch_nvfp4.gate import Gate

GateActivation = Gate
"""The former name."""

__all__ = [
    "Category",
    "Checkpoint",
    "CheckpointError",
    "ExpertWeights",
    "GateActivation",
    "LayerConfig",
    "Refusal",
    "Summary",
    "TensorInfo",
    "open_checkpoint",
    "write_checkpoint",
]
