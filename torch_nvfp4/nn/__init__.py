"""Modules that hold NVFP4 weights: ``NVFP4Experts`` (one MoE layer's experts) and ``NVFP4Linear``.

``packed_module`` says what both do when they are moved, converted, saved, loaded, copied or pickled.
"""

from torch_nvfp4.nn.experts import NVFP4Experts
from torch_nvfp4.nn.linear import NVFP4Linear

__all__ = ["NVFP4Experts", "NVFP4Linear"]
