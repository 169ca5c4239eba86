"""The former place of `write_checkpoint`."""

from torch_nvfp4.checkpoint.synthetic import LayoutName as Layout
from torch_nvfp4.checkpoint.synthetic import write_checkpoint

__all__ = ["Layout", "write_checkpoint"]
