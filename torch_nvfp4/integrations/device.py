"""Whether torch_nvfp4 takes a layer from an engine on a device: what every plug-in asks. Imports no engine."""

from __future__ import annotations

import torch

from torch_nvfp4.backends import Libraries, MoEBackendConfig, explain_moe_backends
from torch_nvfp4.gate import Gate

__all__ = ["backend_error"]

_OUR_BACKEND = {"cpu": "cpu", "cuda": "marlin"}
_FP4_TENSOR_CORES = (10, 0)


def backend_error(
    engine: str,
    device_type: str,
    capability: tuple[int, int] | None,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype | None,
    gate: Gate,
    libraries: Libraries | None,
    *,
    biases: bool = False,
) -> str | None:
    """Why this package's kernels cannot run a layer, as "expected ..., got ...", or None.

    Args:
        engine: its name, for the words.
        device_type: "cpu", "cuda", or the name of another of the engine's platforms.
        capability: the compute capability of a CUDA device.
        hidden, intermediate: K and I of this rank.
        dtype: of hidden_states; None: one that the backend takes.
        gate: of the layer.
        libraries: None: those of this process.
        biases: whether the experts have some.
    """
    backend = _OUR_BACKEND.get(device_type)
    if backend is None:
        return f"expected a cpu or cuda device, got {device_type}"
    if capability is not None and capability >= _FP4_TENSOR_CORES:
        got = "{}.{}".format(*capability)
        return f"expected a GPU without FP4 tensor cores, for which {engine} has kernels, got compute capability {got}"
    libraries = Libraries.detect() if libraries is None else libraries
    config = MoEBackendConfig(
        device_type, hidden, intermediate, capability, dtype, gate, biases=biases, libraries=libraries
    )
    return explain_moe_backends(config)[backend]
