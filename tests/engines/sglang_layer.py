"""A layer of NVFP4 experts: random weights, SGLang's FusedMoE filled by its own loader, and the layer in fp64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 6, 64, 96, 3, 9
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
PREFIX = "model.layers.0.mlp.experts"
PROJECTIONS = {"w1": (INTERMEDIATE, HIDDEN), "w3": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE)}


@dataclass
class Matrix:
    """One projection of one expert [N, K], as a checkpoint holds it."""

    codes: Tensor  # uint8 [N, K / 2], low nibble first
    scale: Tensor  # E4M3 [N, K / 16]
    global_scale: float

    def dequantized(self) -> Tensor:
        """[N, K] in fp64."""
        values = E2M1.double()[torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(-2).long()]
        return values * self.scale.double().repeat_interleave(16, dim=-1) * self.global_scale


Experts = dict[tuple[int, str], Matrix]


def random_experts(seed: int = 0, *, gated: bool = True) -> Experts:
    """Every expert has its own global scales for gate and up. Without a gate, up has the place of w1, as in SGLang."""
    generator = torch.Generator().manual_seed(seed)
    experts = {}
    for expert in range(EXPERTS):
        for shard, (n, k) in PROJECTIONS.items():
            if shard == "w3" and not gated:
                continue
            codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
            scale = (torch.rand(n, k // 16, generator=generator) * 2 + 0.25).to(torch.float8_e4m3fn)
            global_scale = {"w1": 0.06, "w3": 0.17, "w2": 0.05}[shard] * (1 + expert / 10)
            experts[expert, shard] = Matrix(codes, scale, torch.tensor(global_scale).item())
    return experts


def random_inputs(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states [M, K], topk_weights and topk_ids [M, top_k] in fp32 and int32."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights = torch.rand(TOKENS, TOP_K, generator=generator) + 0.2
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    return hidden_states, weights, ids.to(torch.int32)


def reference(experts: Experts, hidden_states: Tensor, weights: Tensor, ids: Tensor, *, limit: float | None = None,
              alpha: float | None = None, step: float | None = None, on_input: bool = False,
              activation: str = "silu", situ: tuple[float, float | None] | None = None) -> Tensor:  # fmt: skip
    """The layer in fp64, token by token. ``limit`` clamps before SiLU, ``step`` behind it."""
    gated = (0, "w3") in experts
    rows = []
    for x, token_weights, token_ids in zip(hidden_states.double(), weights.double(), ids.tolist(), strict=True):
        row = torch.zeros(HIDDEN, dtype=torch.float64)
        for weight, expert in zip(token_weights, token_ids, strict=True):
            gate = experts[expert, "w1"].dequantized() @ x * (weight if on_input else 1.0)
            up = experts[expert, "w3"].dequantized() @ x * (weight if on_input else 1.0) if gated else torch.ones(1)
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            if step is not None:
                middle = torch.nn.functional.silu(gate).clamp(max=step) * up.clamp(-step, step)
            elif activation == "relu2":
                middle = torch.where(gate > 0, gate * gate, 0.0)
            elif situ is not None:
                beta, linear_beta = situ
                up = up if linear_beta is None else linear_beta * torch.tanh(up / linear_beta)
                middle = beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up
            elif activation == "gelu":
                middle = torch.nn.functional.gelu(gate) * up
            elif alpha is None:
                middle = torch.nn.functional.silu(gate) * up
            else:
                middle = gate * torch.sigmoid(alpha * gate) * (up + 1)
            row += experts[expert, "w2"].dequantized() @ middle * (1.0 if on_input else weight)
        rows.append(row)
    return torch.stack(rows)


def quant_config(layout: str) -> Any:
    """SGLang's configuration for "modelopt", "mixed", "w4a16" or "w4a4"."""
    if layout == "modelopt":
        from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config

        modelopt = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": []}
        return ModelOptFp4Config.from_config(modelopt)
    if layout == "mixed":
        from sglang.srt.layers.quantization.modelopt_quant import ModelOptMixedPrecisionConfig

        algo = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
        names = [f"{PREFIX}.{e}.{p}_proj" for e in range(EXPERTS) for p in ("gate", "up", "down")]
        return ModelOptMixedPrecisionConfig.from_config({
            "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": [],
            "quantized_layers": dict.fromkeys([PREFIX, *names], algo),
        })  # fmt: skip
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    activations = scheme | {"dynamic": "local"} if layout == "w4a4" else None
    group = {"targets": ["Linear"], "weights": scheme | {"dynamic": False}, "input_activations": activations}
    return CompressedTensorsConfig.from_config({
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": [],
        "config_groups": {"group_0": group},
    })  # fmt: skip


@contextlib.contextmanager
def sglang_process(server: dict[str, Any] | None = None, **parallel: Any) -> Iterator[None]:
    """SGLang's published configuration, with these server arguments and places in the parallel groups."""
    from sglang.srt.runtime_context import get_context, get_parallel

    places = {"tp_rank": 0, "moe_ep_rank": 0, "moe_tp_rank": 0, "tp_group": None} | parallel
    with get_context().override_server_args(**(server or {})), get_parallel().override(**places):
        yield


def make_layer(layout: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """SGLang's FusedMoE, empty."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return FusedMoE(
        num_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, layer_id=0, top_k=TOP_K,
        params_dtype=dtype, quant_config=quant_config(layout), prefix=PREFIX, **config,
    )  # fmt: skip


def load(layer: Any, experts: Experts, layout: str) -> None:
    """Every tensor of a checkpoint through SGLang's loader, then the conversion of the weights."""
    modelopt = layout in ("modelopt", "mixed")
    for (expert, shard), matrix in experts.items():
        scale = torch.tensor(matrix.global_scale)
        tensors = {
            "weight" if modelopt else "weight_packed": matrix.codes,
            "weight_scale": matrix.scale,
            "weight_scale_2" if modelopt else "weight_global_scale": scale if modelopt else 1.0 / scale,
        }
        if modelopt or layout == "w4a4":
            tensors["input_scale" if modelopt else "input_global_scale"] = torch.tensor(0.5)
        for name, tensor in tensors.items():
            full = f"{'w2' if shard == 'w2' else 'w13'}_{name}"
            param = getattr(layer, full)  # SGLang's models call the loader that the parameter names
            param.weight_loader(param, tensor, f"{PREFIX}.{full}", shard_id=shard, expert_id=expert)
    layer.quant_method.process_weights_after_loading(layer)


def run(layer: Any, hidden_states: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The layer's forward, dispatcher and runner included."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    logits = torch.zeros(hidden_states.shape[0], EXPERTS)
    return layer(hidden_states.to(layer.params_dtype), StandardTopKOutput(weights, ids, logits))
