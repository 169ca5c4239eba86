"""What a backend is asked to run, as plain values, which can be filled in for hardware that is not there."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import torch

from torch_nvfp4.gate import Gate
from torch_nvfp4.ops.pack import check_input_quant


@dataclass(frozen=True)
class Libraries:
    """What is installed."""

    cpu_ops: bool
    cuda_ops: bool
    flashinfer: bool

    @classmethod
    def detect(cls) -> Libraries:
        """This process's libraries. Does not import flashinfer, whose import takes seconds."""
        return cls(
            cpu_ops=torch._C._dispatch_has_kernel_for_dispatch_key("nvfp4::moe", "CPU"),
            cuda_ops=torch._C._dispatch_has_kernel_for_dispatch_key("nvfp4::moe", "CUDA"),
            flashinfer=importlib.util.find_spec("flashinfer") is not None,
        )


@dataclass(frozen=True)
class MoEBackendConfig:
    """One MoE layer and the device that is to run it."""

    device_type: str
    hidden_size: int  # K
    intermediate_size: int  # I, of this rank
    compute_capability: tuple[int, int] | None = None  # CUDA only
    dtype: torch.dtype | None = None  # of hidden_states; None: one that the backend takes
    gate: Gate = Gate()  # noqa: RUF009 (frozen)
    expert_map: bool = False  # ids are global, and only some of the experts are here
    apply_router_weight_on_input: bool = False
    equal_gate_up_scales: bool = True  # global scales of gate and up agree in every expert
    libraries: Libraries = field(default_factory=Libraries.detect)
    biases: bool = False  # of the experts
    input_quant: str | None = None  # "fp8" asks for activations in FP8; no backend has them for a layer that does not

    def __post_init__(self) -> None:
        check_input_quant(self.input_quant)

    @classmethod
    def for_device(
        cls,
        device: torch.device | str,
        hidden_size: int,
        intermediate_size: int,
        *,
        dtype: torch.dtype | None = None,
        gate: Gate | None = None,
        expert_map: bool = False,
        apply_router_weight_on_input: bool = False,
        equal_gate_up_scales: bool = True,
        libraries: Libraries | None = None,
        biases: bool = False,
        input_quant: str | None = None,
    ) -> MoEBackendConfig:
        """For a device that is here, whose type and compute capability it reads; the rest are the fields of the class.

        ``gate`` None is silu without a clamp, ``libraries`` None those of this process. Raises what torch raises for a
        device that is not there, ValueError for an unknown ``input_quant``.
        """
        device = torch.device(device)
        return cls(
            device.type,
            hidden_size,
            intermediate_size,
            torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            dtype,
            Gate() if gate is None else gate,
            expert_map,
            apply_router_weight_on_input,
            equal_gate_up_scales,
            Libraries.detect() if libraries is None else libraries,
            biases,
            input_quant,
        )

    def __str__(self) -> str:
        where = self.device_type
        if self.compute_capability is not None:
            where += f" SM{self.compute_capability[0]}{self.compute_capability[1]}"
        biases = ", biases" if self.biases else ""
        input_quant = "" if self.input_quant is None else f", input_quant {self.input_quant}"
        return f"{where}, K {self.hidden_size}, I {self.intermediate_size}, {self.gate}{biases}{input_quant}"


def size_error(config: MoEBackendConfig, multiple: int) -> str | None:
    """Why a backend cannot run these sizes if it needs K and I to be multiples of ``multiple``, or None."""
    if config.hidden_size % multiple or config.intermediate_size % multiple:
        return f"expected K and I to be multiples of {multiple}, got {config.hidden_size}, {config.intermediate_size}"
    return None


def dtype_error(config: MoEBackendConfig, *dtypes: torch.dtype) -> str | None:
    """Why a backend that takes hidden_states in ``dtypes`` cannot run this layer, or None."""
    if config.dtype is not None and config.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"expected hidden_states in {names}, got {str(config.dtype).removeprefix('torch.')}"
    return None
