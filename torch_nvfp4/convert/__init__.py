"""Quantizes checkpoints: `torch-nvfp4 quantize` as functions.

`source` reads, `selection` decides what becomes NVFP4, `plan` lays out the files, `values` computes what they hold,
`destination` makes sure that an interrupted run loses nothing, `check` compares the result, and `run` has `Conversion`.
"""

from torch_nvfp4.convert.plan import LAYOUTS
from torch_nvfp4.convert.run import Conversion, LayerError, Progress, open_conversion

__all__ = ["LAYOUTS", "Conversion", "LayerError", "Progress", "open_conversion"]
