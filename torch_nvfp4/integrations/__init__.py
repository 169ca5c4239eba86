"""torch_nvfp4 inside the engines that serve models. Nothing here is imported by ``import torch_nvfp4``."""
