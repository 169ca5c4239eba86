"""The MoE layer of DeepSeek-V4-Flash through vLLM's own layer class, with the plug-in and with vLLM's own backend."""

from __future__ import annotations

import importlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4 import reference
from torch_nvfp4.bench.cuda import event_seconds
from torch_nvfp4.bench.layer import BenchError
from torch_nvfp4.bench.vllm.engine import experts_classes
from torch_nvfp4.bench.vllm.report import OURS, THEIRS, table
from torch_nvfp4.bench.vllm.serve import MODES
from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight
from torch_nvfp4.testing import TOLERANCE, random_weight, relative_l2

__all__ = ["LayerSizes", "run_layer"]

_CHECKED = (16, 64)  # tokens that are compared with fp64
_CALLS = 8  # per graph, each with its own tokens and routing
_ROUNDS = 15
# Root mean square of ``random_weight`` over its global scale.
_WEIGHT_RMS = 556.0


@dataclass(frozen=True)
class LayerSizes:
    experts: int = 256
    hidden: int = 4096
    intermediate: int = 2048
    top_k: int = 6
    limit: float = 10.0


_TINY = LayerSizes(experts=8, hidden=512, intermediate=256, top_k=2)  # which the GPU kernels of both sides take


def run_layer(tokens: Sequence[int], tiny: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Checks both sides' layers against fp64 and, on a GPU, times them in turns.

    A CPU has the plug-in's side alone: vLLM has no NVFP4 experts there.

    Raises BenchError where a side's error is above ``TOLERANCE``, or its experts are not what it stands for.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes = _TINY if tiny else LayerSizes()
    generator = torch.Generator(device).manual_seed(0)
    progress("random weights")
    # The gate's values have a standard deviation of 1.5 limits: a quarter of them is clamped.
    gate_scale = 1.5 * sizes.limit / (_WEIGHT_RMS * sizes.hidden**0.5)
    down_scale = 1.0 / (_WEIGHT_RMS * sizes.intermediate**0.5 * sizes.limit)
    shape13 = (sizes.experts, 2 * sizes.intermediate, sizes.hidden)
    w13 = random_weight(shape13, gated=True, global_scale=gate_scale, generator=generator, device=device)
    shape2 = (sizes.experts, sizes.hidden, sizes.intermediate)
    w2 = random_weight(shape2, global_scale=down_scale, generator=generator, device=device)
    result: dict[str, Any] = {"sizes": asdict(sizes), "errors": {}, "experts": {}}
    with _vllm(device) as config, torch.inference_mode():
        sides = (OURS, THEIRS) if device.type == "cuda" else (OURS,)
        layers = {}
        for side in sides:
            progress(f"{side}: weights into its format")
            layers[side] = _Layer(side, sizes, w13, w2, config, device)
            result["experts"][side] = layers[side].experts
        for count in _CHECKED:
            inputs = _inputs(sizes, count, generator)
            progress(f"fp64, {count} tokens")
            expected = _fp64(sizes, w13, w2, *inputs)
            for side, layer in layers.items():
                result["errors"][f"{side}, {count} tokens"] = relative_l2(layer(inputs[0].clone(), inputs[1]), expected)
        for name, error in result["errors"].items():
            print(f"relative error against fp64, {name}: {error:.2e}", flush=True)
        if device.type == "cuda" and tokens:
            # vLLM's workspace grows, and a graph would go on using the one that was there when it was captured.
            for layer in layers.values():
                layer(*_inputs(sizes, max(tokens), generator))
            result["rows"] = [_time(layers, sizes, count, generator, progress) for count in tokens]
            print(table(result["rows"]), flush=True)
    print(f"experts run by {result['experts']}", flush=True)
    if result["errors"] and max(result["errors"].values()) > TOLERANCE[torch.bfloat16]:
        raise BenchError(f"expected errors of at most {TOLERANCE[torch.bfloat16]}, got {result['errors']}")
    return result


@contextmanager
def _vllm(device: torch.device) -> Iterator[Any]:
    """vLLM set up for layers outside a model: its config, one process as all ranks, its workspace, its plug-ins."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.plugins import load_general_plugins
    from vllm.v1.worker.workspace import init_workspace_manager

    os.environ["TORCH_NVFP4_VLLM"] = "auto"  # the plug-in asks again for each layer
    load_general_plugins()
    dtype = torch.get_default_dtype()
    config = VllmConfig()
    with tempfile.NamedTemporaryFile() as meeting, set_current_vllm_config(config):
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, backend)
        initialize_model_parallel(1)
        init_workspace_manager(device)
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield config
        finally:
            torch.set_default_dtype(dtype)
            torch.distributed.destroy_process_group()


class _Layer:
    """One side's layer: vLLM's class, filled with the same weights."""

    def __init__(
        self, side: str, sizes: LayerSizes, w13: NVFP4Weight, w2: NVFP4Weight, config: Any, device: torch.device
    ) -> None:
        from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

        module = importlib.import_module("vllm.model_executor.layers.fused_moe.layer")
        factory = getattr(module, "FusedMoEFactory", None) or module.FusedMoE  # the second name until 0.26
        os.environ["TORCH_NVFP4_VLLM"] = MODES[side]
        self.config = config
        with torch.device(device):
            self.runner = factory(
                num_experts=sizes.experts,
                top_k=sizes.top_k,
                hidden_size=sizes.hidden,
                intermediate_size=sizes.intermediate,
                params_dtype=torch.bfloat16,
                renormalize=True,
                quant_config=ModelOptNvFp4Config(
                    is_checkpoint_nvfp4_serialized=True, exclude_modules=[], group_size=GROUP_SIZE
                ),
                prefix=f"layer.{MODES[side]}",
                swiglu_limit=sizes.limit,
                router_logits_dtype=torch.float32,
            )
        experts = self.runner.routed_experts
        loaded = {
            "w13_weight": w13.data, "w13_weight_scale": w13.scale, "w13_weight_scale_2": w13.global_scale,
            "w2_weight": w2.data, "w2_weight_scale": w2.scale, "w2_weight_scale_2": w2.global_scale,
        }  # fmt: skip
        for name, parameter in list(experts.named_parameters()):
            parameter.requires_grad_(False)
            if name in loaded:
                parameter.data.copy_(loaded[name])
            else:  # the activations' scales, which W4A16 does not use
                parameter.data.fill_(1.0)
        experts.quant_method.process_weights_after_loading(experts)
        self.experts = experts_classes(experts)
        ours = [name.startswith("torch_nvfp4.") for name in self.experts]
        if not ours or any(ours) != (side == OURS):
            raise BenchError(
                f"{side}: expected {'torch_nvfp4' if side == OURS else 'vLLM'}'s experts, got {self.experts}"
            )

    def __call__(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        """[tokens, K] and [tokens, E] -> [tokens, K]; vLLM declares that it may write to the hidden states."""
        from vllm.forward_context import set_forward_context

        with set_forward_context(None, self.config, num_tokens=len(hidden_states)):
            out: Tensor = self.runner(hidden_states, router_logits)
        return out

    def graph(self, cases: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.CUDAGraph:
        for case in cases[:2]:
            self(*case)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for case in cases:
                self(*case)
        return graph


def _inputs(sizes: LayerSizes, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    device = generator.device
    hidden_states = torch.randn(tokens, sizes.hidden, generator=generator, device=device, dtype=torch.float32)
    logits = torch.randn(tokens, sizes.experts, generator=generator, device=device, dtype=torch.float32)
    return hidden_states.to(torch.bfloat16), logits


def _fp64(sizes: LayerSizes, w13: NVFP4Weight, w2: NVFP4Weight, hidden_states: Tensor, logits: Tensor) -> Tensor:
    """The layer in fp64: softmax over all experts, the largest ``top_k`` scaled to a sum of 1."""
    weights, ids = logits.double().softmax(-1).topk(sizes.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    return reference.moe(hidden_states, w13, w2, weights, ids, clamp_limit=sizes.limit)


def _time(
    layers: dict[str, _Layer],
    sizes: LayerSizes,
    tokens: int,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """One row of the table: seconds per call of graphs with several calls, replayed in turns."""
    progress(f"timing {tokens} tokens")
    cases = [_inputs(sizes, tokens, generator) for _ in range(_CALLS)]
    graphs = {side: layer.graph(cases) for side, layer in layers.items()}
    for graph in graphs.values():
        graph.replay()
    seconds: dict[str, list[float]] = {side: [] for side in layers}
    for _ in range(_ROUNDS):
        for side, graph in graphs.items():
            seconds[side].append(event_seconds(graph.replay) / _CALLS)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    each = sorted(their / our for our, their in zip(seconds[OURS], seconds[THEIRS], strict=True))
    return {
        "kind": "layer",
        "size": str(tokens),
        **medians,
        "ratio": statistics.median(each),
        "ratios": [each[0], each[-1]],
    }
