"""A whole run: the layer, the contenders, and their times for each number of tokens."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from datetime import datetime, timezone

import torch

from torch_nvfp4.bench.contenders import CPU_PEERS, CUDA_PEERS, fp8_contender, our_contender
from torch_nvfp4.bench.cpu import Probes, measure_cpu
from torch_nvfp4.bench.cuda import measure_cuda
from torch_nvfp4.bench.host import HostReport, run_host
from torch_nvfp4.bench.layer import DEQUANTIZE, Layer, Shape, cases, check_agreement, dtype_name, fp64_errors
from torch_nvfp4.bench.report import Report, cpu_name

CPU_LEVEL_VARIABLE = "TORCH_NVFP4_CPU_LEVEL"


def run_cpu(
    shape: Shape, tokens: Sequence[int], *, dtype: torch.dtype, clamp_limit: float, peers: Sequence[str],
    seconds: float, skew: float = 0.0, progress: Callable[[str], None] | None = None,
) -> Report:  # fmt: skip
    """The whole CPU run. ``peers`` are keys of ``CPU_PEERS``; ``progress`` is told what begins."""
    tell = progress or (lambda _: None)
    tell("random weights")
    layer = Layer.random(shape, clamp_limit=clamp_limit)
    contenders = [our_contender(layer, dtype)]
    for peer in peers:
        tell(f"weights for {peer}")
        contenders += CPU_PEERS[peer](layer, dtype)
    probes = Probes()
    report = _report("cpu", shape, dtype, clamp_limit, peers, skew)
    with torch.inference_mode():
        tell("do they agree?")
        check_agreement(contenders, next(cases(shape, 2)))
        for count in tokens:
            tell(f"M = {count}")
            report.rows.append(measure_cpu(shape, count, contenders, probes, seconds=seconds, skew=skew))
    return report


def run_cuda(
    shape: Shape, tokens: Sequence[int], *, dtype: torch.dtype, clamp_limit: float, peers: Sequence[str],
    seconds: float, skew: float = 0.0, breakdown: bool = False, input_quant: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:  # fmt: skip
    """The whole run on the current CUDA device. ``peers`` are keys of ``CUDA_PEERS``; ``input_quant="fp8"`` adds ours
    with FP8 activations, and the errors of both."""
    tell = progress or (lambda _: None)
    tell("random weights")
    device = torch.device("cuda", torch.cuda.current_device())
    layer = Layer.random(shape, clamp_limit=clamp_limit, device=device)
    contenders = [our_contender(layer, dtype)]
    if input_quant is not None:
        contenders.append(fp8_contender(layer, dtype))
    ours = contenders.copy()
    for peer in peers:
        tell(f"weights for {peer}")
        contenders += CUDA_PEERS[peer](layer, dtype)
    report = _report("cuda", shape, dtype, clamp_limit, peers, skew)
    report.input_quant = input_quant
    with torch.inference_mode():
        for count in tokens:
            tell(f"M = {count}")
            # A peer picks another kernel for another M.
            case = next(cases(shape, count, device=device))
            check_agreement(contenders, case)
            report.rows.append(
                measure_cuda(shape, count, contenders, device=device, seconds=seconds, skew=skew, breakdown=breakdown)
            )
            if input_quant is not None:
                report.rows[-1].errors = fp64_errors(layer, ours, case)
    return report


def _report(
    device: str, shape: Shape, dtype: torch.dtype, clamp_limit: float, peers: Sequence[str], skew: float
) -> Report:
    of_peers = {
        "flashinfer": "flashinfer-python",
        "ggml": "ggml-python",
        "humming": "humming-kernels",
        "transformers": "transformers",
        "vllm": "vllm",
    }
    packages = ["torch", *(of_peers[peer] for peer in peers if peer in of_peers)]
    return Report(
        device=device,
        machine=torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        threads=torch.get_num_threads(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={package: importlib.metadata.version(package) for package in packages},
        shape=shape._asdict(),
        dtype=dtype_name(dtype),
        clamp_limit=clamp_limit,
        skew=skew,
    )


def host_times(
    device: str, shape: Shape, tokens: Sequence[int], *, dtype: torch.dtype, clamp_limit: float, seconds: float
) -> HostReport:
    """What calls cost the host on ``device``, on which torch's calls run beside ours."""
    report = HostReport(
        device=device,
        machine=torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"torch": importlib.metadata.version("torch")},
        shape={},
        dtype="",
    )
    return run_host(report, shape, tokens, dtype=dtype, clamp_limit=clamp_limit, seconds=seconds)


def default_peers(device: str) -> list[str]:
    """What a run is compared with unless it is told otherwise."""
    if device == "cuda":
        return []
    return [DEQUANTIZE] + ["transformers"] * (importlib.util.find_spec("transformers") is not None)
