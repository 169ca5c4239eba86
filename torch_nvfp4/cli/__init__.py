"""The command ``torch-nvfp4``: info, inspect, verify, quantize, bench, demo, generate, serve."""

from torch_nvfp4.cli.app import app

__all__ = ["app"]
