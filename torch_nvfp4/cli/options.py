"""Options that several commands take, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from torch_nvfp4.backends import Libraries, input_quant_error

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint directory.", show_default=False)
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:N. Default: cuda where its kernels can run, else cpu.",
        show_default=False,
    ),
]  # fmt: skip
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend", metavar="NAME",
        help="A backend instead of the first that can run the layer; torch-nvfp4 info lists them.",
        show_default=False,
    ),
]  # fmt: skip
InputQuantOption = Annotated[
    str,
    typer.Option(
        "--input-quant", metavar="NAME",
        help="fp8: the activations in FP8, on GPUs of compute capability 9.0. Default: in 16 bits.",
        show_default=False,
    ),
]  # fmt: skip
DtypeOption = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="Of the activations: bf16, fp16, on the CPU also fp32.")
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout.", show_default=False),
]


def parse_device(text: str) -> torch.device:
    """``text``, or, when it is empty, cuda where the CUDA kernels are built and can run, else cpu."""
    if not text:
        usable = torch.cuda.is_available() and Libraries.detect().cuda_ops
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: expected one of {torch.cuda.device_count()} CUDA devices, got {text!r}")
    return device


def parse_input_quant(text: str, device: torch.device) -> str | None:
    """None for no text. Raises ValueError where the device cannot run it: it is never left out."""
    if text not in ("", "fp8"):
        raise ValueError(f"--input-quant: expected fp8, got {text!r}")
    reason = input_quant_error(device, text) if text else None
    if reason is not None:
        raise ValueError(f"--input-quant {text}: {reason}; leave the option out for activations in 16 bits")
    return text or None


def parse_dtype(text: str, device: torch.device) -> torch.dtype:
    dtypes = {name: dtype for name, dtype in _DTYPES.items() if device.type == "cpu" or dtype.itemsize == 2}
    if text not in dtypes:
        raise ValueError(f"--dtype: expected one of {', '.join(dtypes)} on {device.type}, got {text!r}")
    return dtypes[text]
