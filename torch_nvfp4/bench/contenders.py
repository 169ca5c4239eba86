"""This package and its peers, each as a ``Contender``. Peers are imported when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_nvfp4 import ops
from torch_nvfp4.bench.cpu_engines import ggml_contender, kt_contender
from torch_nvfp4.bench.layer import (
    COMPILED,
    DEQUANTIZE,
    FP8,
    FP8_AGREEMENT,
    GGML,
    OURS,
    BenchError,
    Case,
    Contender,
    Layer,
    cases,
    cast,
    dtype_name,
)
from torch_nvfp4.format import NVFP4Weight, dequantize, has_gate_rows
from torch_nvfp4.gate import activate, parse_activation
from torch_nvfp4.nn import NVFP4Experts


def dequantize_then_matmul(
    case: Case, w13: NVFP4Weight, w2: NVFP4Weight, *, activation: str | int = "silu", clamp_limit: float | None,
    alpha: float = 1.0, beta: float = 0.0, apply_router_weight_on_input: bool = False,
    w13_bias: Tensor | None = None, w2_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The layer in plain torch: each expert that was hit is dequantized to the dtype of the input, then multiplied."""
    x, topk_weights, topk_ids = case
    act = parse_activation(activation)
    out = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        if not 0 <= expert < w13.data.shape[0]:
            continue
        token, slot = torch.where(topk_ids == expert)
        router = topk_weights[token, slot, None].to(x.dtype)
        rows = x[token] * router if apply_router_weight_on_input else x[token]
        first, second = (None if bias is None else bias[expert].to(x.dtype) for bias in (w13_bias, w2_bias))
        hidden = F.linear(rows, _dequantize_expert(w13, expert, x.dtype), first)
        hidden = activate(hidden, act, clamp_limit, alpha, beta, gated=has_gate_rows(w13, w2))
        hidden = F.linear(hidden, _dequantize_expert(w2, expert, x.dtype), second)
        out.index_add_(0, token, hidden if apply_router_weight_on_input else hidden * router)
    return out


def _dequantize_expert(weight: NVFP4Weight, expert: int, dtype: torch.dtype) -> Tensor:
    return dequantize(NVFP4Weight(*(part[expert] for part in weight)), dtype)


def our_contender(layer: Layer, dtype: torch.dtype) -> Contender:
    p13, p2 = ops.pack(layer.w13, gated=True), ops.pack(layer.w2)
    g13, g2, limit = layer.w13.global_scale, layer.w2.global_scale, layer.clamp_limit

    def run(case: Case) -> Tensor:
        return ops.moe(
            case.hidden_states, p13, g13, p2, g2, case.topk_weights, case.topk_ids, activation="silu", clamp_limit=limit
        )

    return Contender(OURS, run, dtype)


def fp8_contender(layer: Layer, dtype: torch.dtype) -> Contender:
    """Ours with ``input_quant="fp8"``. Raises what ``pack`` and the op raise where there is no such kernel."""
    p13, p2 = ops.pack(layer.w13, gated=True, input_quant="fp8"), ops.pack(layer.w2, input_quant="fp8")
    g13, g2, limit = layer.w13.global_scale, layer.w2.global_scale, layer.clamp_limit

    def run(case: Case) -> Tensor:
        return ops.moe(
            case.hidden_states, p13, g13, p2, g2, case.topk_weights, case.topk_ids, clamp_limit=limit, input_quant="fp8"
        )

    return Contender(FP8, run, dtype, agreement=FP8_AGREEMENT)


class _Steps(torch.nn.Module):
    """The steps of ``experts`` around a gate that is written in aten, as in DeepSeek-V4's modelling code."""

    w13: Tensor
    w13_global_scale: Tensor
    w2: Tensor
    w2_global_scale: Tensor

    def __init__(self, experts: NVFP4Experts, limit: float) -> None:
        super().__init__()
        for name, buffer in experts.named_buffers():
            self.register_buffer(name, buffer)
        self.num_experts, self.limit = experts.num_experts, limit

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        order, offsets = ops.route(topk_ids, None, self.num_experts)
        gate_up = ops.grouped_gemm(x, self.w13, self.w13_global_scale, order, offsets)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = F.silu(gate.clamp(max=self.limit)) * up.clamp(min=-self.limit, max=self.limit)
        expert_out = ops.grouped_gemm(hidden, self.w2, self.w2_global_scale, order, offsets)
        return ops.combine(expert_out, topk_weights, topk_ids, None, self.num_experts)


def compiled_contenders(layer: Layer, dtype: torch.dtype) -> list[Contender]:
    """An eager gate that the compiler fuses, ``moe`` decomposed with its gate left to Inductor, the eager gate itself.

    Compiled here, for any number of tokens. All of them share one copy of the packed weights.
    """
    # The compiler takes seconds to import.
    from torch._dynamo.decorators import mark_unbacked

    from torch_nvfp4.compiler import inductor_options

    device = layer.w2.data.device
    backend = "cpu" if device.type == "cpu" else "marlin"  # the packed layout that the steps take
    moe = NVFP4Experts.from_weights(layer.w13, layer.w2, clamp_limit=layer.clamp_limit, backend=backend)
    steps = _Steps(moe, layer.clamp_limit)
    fused = torch.compile(steps, fullgraph=True, options=inductor_options())
    options = inductor_options(fuse_gates=False, decompose_moe=True)
    decomposed = torch.compile(moe, fullgraph=True, options=options)

    def contender(name: str, experts: Callable[..., Tensor]) -> Contender:
        return Contender(name, lambda case: experts(*case), dtype)

    runs: tuple[Callable[..., Tensor], ...] = (fused, decomposed, steps)
    contenders = [contender(name, run) for name, run in zip(COMPILED, runs, strict=True)]
    # What is compiled in inference mode answers only there, which is where contenders are timed.
    with torch.inference_mode():
        case = cast(next(cases(layer.shape, 8, device=device)), contenders[0])
        for tensor in case:
            mark_unbacked(tensor, 0)
        for compiled in contenders[:2]:
            compiled.run(case)
    return contenders


def dequantize_contender(layer: Layer, dtype: torch.dtype) -> Contender:
    def run(case: Case) -> Tensor:
        return dequantize_then_matmul(case, layer.w13, layer.w2, clamp_limit=layer.clamp_limit)

    return Contender(DEQUANTIZE, run, dtype)


def transformers_contenders(layer: Layer) -> list[Contender]:
    """DeepSeek-V4's experts of transformers with weights dequantized beforehand: eager and grouped_mm, bf16 and fp16.

    Not batched_mm: it copies the weights of every slot before it multiplies.

    Raises BenchError when transformers is not there, or has no DeepSeek-V4.
    """
    try:
        from transformers import DeepseekV4Config
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
    except ImportError as error:
        raise BenchError(
            f"expected a transformers that has DeepSeek-V4 (>= 5.9), got: {error}; pip install 'torch-nvfp4[bench]'"
        ) from error
    contenders = []
    for dtype in (torch.bfloat16, torch.float16):
        gate_up, down = _dequantize_experts(layer.w13, dtype), _dequantize_experts(layer.w2, dtype)
        for implementation in ("eager", "grouped_mm"):
            config = DeepseekV4Config(
                n_routed_experts=layer.shape.experts,
                hidden_size=layer.shape.hidden,
                moe_intermediate_size=layer.shape.intermediate,
                num_experts_per_tok=layer.shape.top_k,
                swiglu_limit=layer.clamp_limit,
                experts_implementation=implementation,  # type: ignore[call-arg, unused-ignore]
            )
            with torch.device("meta"):
                module = DeepseekV4Experts(config)
            module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
            module.down_proj = torch.nn.Parameter(down, requires_grad=False)
            name = f"{implementation} {dtype_name(dtype)}"
            contenders.append(Contender(name, _call_experts(module), dtype, weights_dtype=dtype))
    return contenders


def _call_experts(module: Any) -> Callable[[Case], Tensor]:
    # transformers' own router hands its weights over in the dtype of the hidden states.
    return lambda case: module(case.hidden_states, case.topk_ids, case.topk_weights)


def _dequantize_experts(weight: NVFP4Weight, dtype: torch.dtype) -> Tensor:
    # An expert at a time: the fp32 intermediate of all of them would be twice the result.
    *_, n, half_k = weight.data.shape
    out = torch.empty(weight.data.shape[0], n, 2 * half_k, dtype=dtype, device=weight.data.device)
    for expert in range(out.shape[0]):
        out[expert] = _dequantize_expert(weight, expert, dtype)
    return out


def _marlin_workspace(marlin: ModuleType) -> Callable[[torch.device], Tensor]:
    """What makes the workspace that ``fused_marlin_moe`` makes for itself when it is given none."""
    if hasattr(marlin, "get_marlin_workspace"):  # since vLLM 0.31
        return marlin.get_marlin_workspace
    make, blocks_per_multiprocessor = marlin.marlin_make_workspace_new, 4
    return lambda device: make(device, blocks_per_multiprocessor)


def vllm_contender(layer: Layer, dtype: torch.dtype) -> Contender:
    """vLLM's Marlin MoE as its experts call it: its own weight preparation, clamped SiLU and sum over a token's slots.

    Raises BenchError when vLLM is not there or lacks one of these.
    """
    layers = "vllm.model_executor.layers"
    try:
        marlin = importlib.import_module(f"{layers}.fused_moe.experts.marlin_moe")
        fp4 = importlib.import_module(f"{layers}.quantization.utils.marlin_utils_fp4")
        quant_type = importlib.import_module("vllm.scalar_type").scalar_types.float4_e2m1f.id
        silu_and_mul_with_clamp = torch.ops._C.silu_and_mul_with_clamp
        make_workspace = _marlin_workspace(marlin)
    except (ImportError, AttributeError) as error:
        raise BenchError(
            f"--peer vllm: expected vLLM (0.24 to 0.33) with its Marlin NVFP4 MoE, got: {error}"
        ) from error
    shape = layer.shape
    described = SimpleNamespace(
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        intermediate_size_per_partition=shape.intermediate,
        params_dtype=dtype,
    )
    # Its global scale is one per expert; Layer.random gives gate and up the same one.
    w13, s13, g13, w2, s2, g2 = fp4.prepare_nvfp4_moe_layer_for_marlin(
        described, layer.w13.data, layer.w13.scale, layer.w13.global_scale[:, 0].contiguous(), layer.w2.data,
        layer.w2.scale, layer.w2.global_scale, is_act_and_mul=True,
    )  # fmt: skip

    # The locks of its GEMMs, zero again after each of them. A call that is given none makes and clears its own.
    workspace = make_workspace(w13.device)

    def activation(_: object, out: Tensor, gate_up: Tensor, **__: object) -> None:
        silu_and_mul_with_clamp(out, gate_up, layer.clamp_limit)

    def moe_sum(rows: Tensor, out: Tensor, *_: object) -> Tensor:
        marlin.ops.moe_sum(rows, out)
        return out

    def run(case: Case) -> Tensor:
        return marlin.fused_marlin_moe(
            case.hidden_states, w13, w2, None, None, s13, s2, case.topk_weights, case.topk_ids,
            quant_type_id=quant_type, global_scale1=g13, global_scale2=g2, activation_func=activation,
            moe_sum=moe_sum, workspace=workspace,
        )  # fmt: skip

    return Contender("vllm", run, dtype, ids_dtype=torch.int32)


# Over 60 lines: one engine's kernels are set up, tuned and called, with nothing that another contender would share.
def humming_contenders(layer: Layer, dtype: torch.dtype) -> list[Contender]:
    """Humming's GEMMs, which read and write rows by index or take them sorted by expert, with its tuning tables.

    Each kind is the faster one somewhere. Humming has the activation, but neither routing nor weighted sum: ``route``
    and ``combine`` of this package stand around it.

    Raises BenchError when Humming is not there.
    """
    try:
        humming_ops = importlib.import_module("humming.ops")
        humming_layer = importlib.import_module("humming.layer").HummingLayer
        heuristics = importlib.import_module("humming.tune").get_heuristics_config
        align = importlib.import_module("torch_nvfp4.bench.align").align
    except ImportError as error:
        raise BenchError(
            f"--peer humming: expected the packages humming-kernels (0.1.19) and triton, got: {error}"
        ) from error
    shape, limit = layer.shape, layer.clamp_limit

    def load(weight: NVFP4Weight, global_scale: Tensor) -> Any:
        experts, n, half_k = weight.data.shape
        module = humming_layer(
            shape_n=n, shape_k=2 * half_k, num_experts=experts, torch_dtype=dtype,
            weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
        ).to(weight.data.device)  # fmt: skip
        module.load_from_tensors(
            {"weight": weight.data, "weight_scale": weight.scale, "weight_scale_2": global_scale.contiguous()}
        )
        module.transform()
        return module

    def tuned(module: Any, gemm_type: str) -> tuple[Callable[..., Tensor], Callable[[int], int]]:
        """The GEMM, and how many rows its tile has for a number of slots."""
        tuning = heuristics(layer_config=module.humming_config, gemm_type=gemm_type, device=layer.w2.data.device)
        gemm = partial(module, compute_config={"gemm_type": gemm_type}, tuning_config=tuning)
        return gemm, lambda slots: next(c["block_shape"][0] for above, to, c in tuning if above < slots <= to)

    up, down = load(layer.w13, layer.w13.global_scale[:, 0]), load(layer.w2, layer.w2.global_scale)
    (indexed_up, up_tile), (indexed_down, down_tile) = tuned(up, "indexed"), tuned(down, "indexed")
    (grouped_up, _), (grouped_down, _) = tuned(up, "grouped_contiguous"), tuned(down, "grouped_contiguous")
    clamped_silu = f"(fminf(a, {limit}f) / (1.0f + __expf(-fminf(a, {limit}f)))) * fmaxf(fminf(b, {limit}f), -{limit}f)"

    def gate(gate_up: Tensor) -> Tensor:
        return humming_ops.process_input(gate_up, activation_type="binary_split", activation_impl=clamped_silu)[0]

    def indexed(case: Case) -> Tensor:
        x, topk_weights, topk_ids = case
        order, offsets = ops.route(topk_ids, None, shape.experts)
        tiles = up_tile(len(order)), down_tile(len(order))
        aligned = {tile: align(order, offsets, tile) for tile in set(tiles)}
        gate_up = indexed_up(x, top_k=shape.top_k, **aligned[tiles[0]])
        by_slot = indexed_down(gate(gate_up), **aligned[tiles[1]])
        return ops.combine(by_slot, topk_weights, topk_ids, None, shape.experts)

    def grouped(case: Case) -> Tensor:
        x, topk_weights, topk_ids = case
        order, offsets = ops.route(topk_ids, None, shape.experts)
        gate_up = grouped_up(x.index_select(0, order // shape.top_k), expert_layout=offsets)
        by_expert = grouped_down(gate(gate_up), expert_layout=offsets)
        by_slot = torch.empty_like(by_expert).index_copy_(0, order.long(), by_expert)
        return ops.combine(by_slot, topk_weights, topk_ids, None, shape.experts)

    return [Contender("humming indexed", indexed, dtype), Contender("humming grouped", grouped, dtype)]


_Tile = tuple[int, int, int]
# Tiles of slots, and (rows, k, CTAs per SM) of a GEMM's tile: those among which FlashInfer 0.7.2 tunes.
_FLASHINFER_SLOTS = (16, 32, 64, 128)
_FLASHINFER_TILES = (
    (128, 128, 2), (256, 64, 2), (256, 128, 1), (128, 64, 2), (128, 64, 4), (128, 256, 2), (256, 64, 1), (256, 128, 2),
    (256, 256, 1),
)  # fmt: skip


def flashinfer_contender(layer: Layer, dtype: torch.dtype) -> Contender:
    """FlashInfer's cuTile MoE with NVFP4 weights and bf16 activations, tuned for each number of tokens.

    Raises BenchError when FlashInfer or cuTile's compiler is not there.
    """
    if dtype != torch.bfloat16:
        raise BenchError(f"--peer flashinfer: expected --dtype bf16, its only activations, got {dtype_name(dtype)}")
    try:
        fp4 = importlib.import_module("flashinfer.fused_moe.cutile.fp4")
        swiglu = importlib.import_module("flashinfer.fused_moe.api").SwiGLU(limit=layer.clamp_limit)
    except ImportError as error:
        raise BenchError(
            f"--peer flashinfer: expected the packages flashinfer-python (0.7.2) and cuda-tile[tileiras], got: {error}"
        ) from error
    shape, device = layer.shape, layer.w2.data.device
    # On SM90 it takes the checkpoint's own layout. Layer.random gives gate and up the same global scale.
    weights = (
        layer.w13.data.flatten(1, -2), layer.w13.scale.flatten(1, -2), layer.w13.global_scale[:, 0].contiguous(),
        layer.w2.data, layer.w2.scale, layer.w2.global_scale,
    )  # fmt: skip
    tuned: dict[int, Callable[[Case], Tensor]] = {}

    def candidate(workspace: Any, slots: int, tiles: Sequence[_Tile]) -> Callable[[Case], Tensor]:
        first, second = (fp4.GemmConfig(*tile) for tile in tiles)

        def run(case: Case) -> Tensor:
            return fp4.run_moe(
                case.hidden_states, case.topk_ids, case.topk_weights, *weights, torch.empty_like(case.hidden_states),
                workspace, activation=swiglu, activation_fp4=False, num_sms=0, block_size=slots, gemm1_config=first,
                gemm2_config=second,
            )  # fmt: skip

        return run

    def tune(case: Case) -> Callable[[Case], Tensor]:
        workspace = fp4.allocate_workspace(
            num_tokens=len(case.topk_ids), hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_experts=shape.experts, top_k=shape.top_k, is_gated=True, block_sizes=_FLASHINFER_SLOTS,
            activation_fp4=False, device=device,
        )  # fmt: skip
        few = len(case.topk_ids) * shape.top_k <= 8 * shape.experts
        slots = _FLASHINFER_SLOTS[:2] if few else _FLASHINFER_SLOTS[1:]
        return min((_fastest(partial(candidate, workspace, of), case) for of in slots), key=lambda timed: timed[0])[1]

    def run(case: Case) -> Tensor:
        tokens = len(case.topk_ids)
        if tokens not in tuned:
            tuned[tokens] = tune(case)
        return tuned[tokens](case)

    return Contender("flashinfer", run, dtype, ids_dtype=torch.int32)


def _fastest(
    make: Callable[[Sequence[_Tile]], Callable[[Case], Tensor]], case: Case
) -> tuple[float, Callable[[Case], Tensor]]:
    """With the first GEMM's tile chosen before the second's, as FlashInfer tunes them."""
    tiles = [_FLASHINFER_TILES[0]] * 2
    best: tuple[float, Callable[[Case], Tensor]]
    for gemm in range(2):
        timed = []
        for tile in _FLASHINFER_TILES:
            run = make([tile if i == gemm else tiles[i] for i in range(2)])
            timed.append((_time_once(run, case), tile, run))
        milliseconds, tiles[gemm], run = min(timed, key=lambda t: t[0])
        best = milliseconds, run
    return best


def _time_once(run: Callable[[Case], Tensor], case: Case) -> float:
    """Milliseconds of a call; infinite where the compiler refuses the tile."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    try:
        run(case)
        begin.record()
        for _ in range(3):
            run(case)
        end.record()
        end.synchronize()
    except (RuntimeError, ValueError):
        return float("inf")
    return begin.elapsed_time(end) / 3


CPU_PEERS: dict[str, Callable[[Layer, torch.dtype], list[Contender]]] = {
    DEQUANTIZE: lambda layer, dtype: [dequantize_contender(layer, dtype)],
    "transformers": lambda layer, dtype: transformers_contenders(layer),
    "compiled": compiled_contenders,
    GGML: lambda layer, dtype: [ggml_contender(layer)],
    "kt": lambda layer, dtype: [kt_contender(layer)],
}
CUDA_PEERS: dict[str, Callable[[Layer, torch.dtype], list[Contender]]] = {
    "vllm": lambda layer, dtype: [vllm_contender(layer, dtype)],
    "humming": humming_contenders,
    "flashinfer": lambda layer, dtype: [flashinfer_contender(layer, dtype)],
    "compiled": compiled_contenders,
}
