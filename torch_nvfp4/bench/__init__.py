"""Times the MoE layer against its floor and against other implementations, interleaved in one run.

A shared machine drifts by tens of percent within minutes. So every round of a measurement runs each contender once,
with that round's own routing, between two probes of the machine's speed; the table shows medians over the rounds, and
its ratios are medians of the ratios within a round.

On the CPU the floor of a layer call is the larger of two times: the bytes of the experts hit over the read bandwidth,
and the operations over the rate of torch's fastest matmul (bf16, fp16 or fp32), both measured in the same rounds. On
CUDA a contender is one graph of several calls with different routings, and the bandwidth and the rate of bf16 matmuls
are constants of the card.
"""

from torch_nvfp4.bench.contenders import (
    CPU_PEERS,
    CUDA_PEERS,
    compiled_contenders,
    dequantize_contender,
    dequantize_then_matmul,
    flashinfer_contender,
    fp8_contender,
    humming_contenders,
    our_contender,
    transformers_contenders,
    vllm_contender,
)
from torch_nvfp4.bench.cpu import Probes, measure_cpu, peak_extra_bytes, wall_seconds
from torch_nvfp4.bench.cuda import event_seconds, measure_cuda
from torch_nvfp4.bench.host import HOST_SHAPE, HostReport, HostRow, measure_host
from torch_nvfp4.bench.layer import (
    COMPILED,
    DEQUANTIZE,
    FP8,
    GGML,
    OURS,
    SHAPES,
    BenchError,
    Case,
    Contender,
    Layer,
    Shape,
    cases,
    check_agreement,
    dtype_name,
    fp64_errors,
    parse_shape,
    parse_tokens,
)
from torch_nvfp4.bench.report import Report, Row, caption, cpu_name, plot, title
from torch_nvfp4.bench.run import CPU_LEVEL_VARIABLE, default_peers, host_times, run_cpu, run_cuda

__all__ = [
    "COMPILED",
    "CPU_LEVEL_VARIABLE",
    "CPU_PEERS",
    "CUDA_PEERS",
    "DEQUANTIZE",
    "FP8",
    "GGML",
    "HOST_SHAPE",
    "OURS",
    "SHAPES",
    "BenchError",
    "Case",
    "Contender",
    "HostReport",
    "HostRow",
    "Layer",
    "Probes",
    "Report",
    "Row",
    "Shape",
    "caption",
    "cases",
    "check_agreement",
    "compiled_contenders",
    "cpu_name",
    "default_peers",
    "dequantize_contender",
    "dequantize_then_matmul",
    "dtype_name",
    "event_seconds",
    "flashinfer_contender",
    "fp8_contender",
    "fp64_errors",
    "host_times",
    "humming_contenders",
    "measure_cpu",
    "measure_cuda",
    "measure_host",
    "our_contender",
    "parse_shape",
    "parse_tokens",
    "peak_extra_bytes",
    "plot",
    "run_cpu",
    "run_cuda",
    "title",
    "transformers_contenders",
    "vllm_contender",
    "wall_seconds",
]
