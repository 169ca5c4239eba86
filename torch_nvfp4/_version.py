"""The version, in the one place that packaging, ``torch_nvfp4.__version__`` and ``torch-nvfp4 --version`` read."""

__version__ = "0.1.0"
