"""flashinfer's ``trtllm_fp4_block_scale_routed_moe``: TensorRT-LLM's fused MoE for Blackwell data-center GPUs (SM10x).

**Not run by this package's tests**, which have no Blackwell GPU: argument order, weight layout and units follow
flashinfer's documented signature and its own tests (state of August 2026), and a recording stand-in checks what is
passed. Two things differ from this package's kernels:

- Activations are 4-bit too (W4A4): that kernel takes E2M1 weights only with E2M1 activations, so ``hidden_states`` and
  the intermediate are quantized to NVFP4, with ``a13_scale`` and ``a2_scale`` (a checkpoint's input_scale) as their
  global scales, 1 where they are not given. The accuracy contract of the 16-bit kernels does not hold for it.
- Limit and beta are in units of the accumulator, before dequantization: the limit goes in divided by the global scale
  of activations and weights. One limit per expert serves gate and up, so a clamp needs equal global scales for both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_nvfp4.backends.config import MoEBackendConfig, dtype_error, size_error
from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight, validate
from torch_nvfp4.gate import Activation
from torch_nvfp4.ops.batch_invariance import refuse_batch_invariance
from torch_nvfp4.quant_config import MoEQuantConfig

name = "flashinfer_trtllm"
CLAMP_ACTIVATIONS = frozenset({Activation.silu})
INPUT_QUANT = None

_EPILOGUE_TILE_M = 128
_SWIGLU = 3  # flashinfer's ActivationType
_RENORMALIZE = 1  # flashinfer's RoutingMethodType: not used when the routing is given, and what its tests pass then


def supports(config: MoEBackendConfig) -> str | None:
    """Why this backend cannot run ``config``, or None."""
    if config.device_type != "cuda":
        return f"expected a cuda device, got {config.device_type}"
    if config.compute_capability is None or config.compute_capability[0] != 10:
        got = "none" if config.compute_capability is None else "{}.{}".format(*config.compute_capability)
        return f"expected compute capability 10.x (Blackwell data-center), got {got}"
    if not config.libraries.flashinfer:
        return "expected the package flashinfer, got none; pip install flashinfer-python"
    if config.gate.activation is not Activation.silu:
        return f"expected activation silu, got {config.gate.activation.name}"
    if not config.gate.gated:
        return "expected experts with a gate, got some without"
    if config.biases:
        return "expected experts without biases, got some with"
    if config.expert_map:
        return "expected every expert on this device, got an expert_map (flashinfer takes one contiguous range)"
    if config.apply_router_weight_on_input:
        return "expected router weights on the output, got apply_router_weight_on_input"
    if config.gate.clamp_limit is not None and not config.equal_gate_up_scales:
        return "expected equal global scales of gate and up beside a clamp, got different ones"
    return dtype_error(config, torch.bfloat16) or size_error(config, 128)


def prepare(w13: NVFP4Weight, w2: NVFP4Weight) -> dict[str, Tensor]:
    """[E, 2I, K] and [E, K, I], gate rows first -> shuffled codes and block scales in the 128x4 layout."""
    import flashinfer

    tensors = {}
    for key, weight, gated in (("w13", w13, True), ("w2", w2, False)):
        validate(weight, gated=gated)
        scale_bytes = weight.scale.view(torch.uint8)
        codes, scales = [], []
        for expert in range(weight.data.shape[0]):
            rows = (weight.data[expert], scale_bytes[expert])
            if gated:
                # Row order up, gate, up, gate, ...: the kernel's linear half comes before the half with the sigmoid.
                rows = (_interleave_up_gate(rows[0]), _interleave_up_gate(rows[1]))
            codes.append(flashinfer.shuffle_matrix_a(rows[0].contiguous(), _EPILOGUE_TILE_M))
            swizzled = flashinfer.shuffle_matrix_sf_a(rows[1].contiguous(), _EPILOGUE_TILE_M)
            scales.append(swizzled.reshape(rows[1].shape))
        tensors[f"{key}_data"] = torch.stack(codes)
        tensors[f"{key}_scale"] = torch.stack(scales).view(torch.float8_e4m3fn)
        tensors[f"{key}_global_scale"] = weight.global_scale.contiguous()
    return tensors


def restore(tensors: Mapping[str, Tensor], hidden_size: int, intermediate_size: int) -> tuple[NVFP4Weight, NVFP4Weight]:
    """The inverse of ``prepare``."""
    import flashinfer

    weights = []
    for key in ("w13", "w2"):
        data, scale = tensors[f"{key}_data"], tensors[f"{key}_scale"].view(torch.uint8)
        experts, n, groups = scale.shape
        # Within 128 rows and 4 groups, the 128x4 layout stores row % 32, then row / 32, then the group.
        linear = scale.reshape(experts, n // 128, groups // 4, 32, 4, 4).permute(0, 1, 4, 3, 2, 5)
        scale = linear.reshape(experts, n, groups)
        rows = torch.arange(n, device=data.device)
        if key == "w13":
            rows = _interleave_up_gate(rows)
        order = flashinfer.shuffle_matrix_a(rows.unsqueeze(1), _EPILOGUE_TILE_M).squeeze(1)
        inverse = torch.argsort(order)
        scale = scale[:, inverse].view(torch.float8_e4m3fn)
        weights.append(NVFP4Weight(data[:, inverse], scale, tensors[f"{key}_global_scale"]))
    return weights[0], weights[1]


def _interleave_up_gate(rows: Tensor) -> Tensor:
    """Gate rows, then up rows -> up 0, gate 0, up 1, gate 1, ..."""
    gate, up = rows.chunk(2)
    return torch.stack((up, gate), dim=1).flatten(0, 1)


def apply(
    tensors: Mapping[str, Tensor],
    quant: MoEQuantConfig,
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """The layer: hidden_states bf16 [M, K] -> bf16 [M, K]."""
    import flashinfer

    refuse_batch_invariance(f"backend {name}")
    if expert_map is not None or apply_router_weight_on_input:
        raise ValueError(
            f"{name}: expected no expert_map and router weights on the output, got expert_map "
            f"{'set' if expert_map is not None else 'None'}, apply_router_weight_on_input "
            f"{apply_router_weight_on_input}"
        )
    a13 = 1.0 if quant.a13_scale is None else quant.a13_scale
    a2 = 1.0 if quant.a2_scale is None else quant.a2_scale
    gate_scale, up_scale = (tensors["w13_global_scale"] * a13).unbind(1)  # [E] each
    per_expert = torch.ones_like(gate_scale)
    limit = quant.gate.clamp_limit
    to_codes = torch.full((1,), 1 / a13, device=hidden_states.device)
    codes, scales = flashinfer.fp4_quantize(
        hidden_states, to_codes, sf_vec_size=GROUP_SIZE, is_sf_swizzled_layout=False
    )
    experts, _, hidden_groups = tensors["w13_scale"].shape
    outputs = flashinfer.trtllm_fp4_block_scale_routed_moe(
        topk_ids=_routing(topk_ids, topk_weights, experts),
        routing_bias=None,
        hidden_states=codes,
        hidden_states_scale=scales.view(torch.float8_e4m3fn).reshape(-1, hidden_groups),
        gemm1_weights=tensors["w13_data"],
        gemm1_weights_scale=tensors["w13_scale"],
        gemm1_bias=None,
        gemm1_alpha=per_expert * quant.gate.alpha,
        gemm1_beta=quant.gate.beta / up_scale,
        gemm1_clamp_limit=None if limit is None else limit / gate_scale,
        gemm2_weights=tensors["w2_data"],
        gemm2_weights_scale=tensors["w2_scale"],
        gemm2_bias=None,
        output1_scale_scalar=up_scale / a2,
        output1_scale_gate_scalar=gate_scale.contiguous(),
        output2_scale_scalar=tensors["w2_global_scale"] * a2,
        num_experts=experts,
        top_k=topk_ids.shape[1],
        n_group=None,
        topk_group=None,
        intermediate_size=tensors["w2_scale"].shape[2] * GROUP_SIZE,
        local_expert_offset=0,
        local_num_experts=experts,
        routed_scaling_factor=None,
        routing_method_type=_RENORMALIZE,
        do_finalize=True,
        activation_type=_SWIGLU,
    )
    return outputs[0] if isinstance(outputs, (list, tuple)) else outputs


def apply_batched(
    tensors: Mapping[str, Tensor], quant: MoEQuantConfig, hidden_states: Tensor, expert_num_tokens: Tensor
) -> Tensor:
    """Raises NotImplementedError: the kernel routes tokens itself."""
    raise NotImplementedError(
        f"{name}: expected tokens with a routing, got a batch with a count for each expert; ask for another backend"
    )


def _routing(topk_ids: Tensor, topk_weights: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """int32 ids and the weights, where an id without an expert is expert 0 with weight 0."""
    here = (topk_ids >= 0) & (topk_ids < experts)
    return topk_ids.where(here, 0).to(torch.int32), topk_weights.where(here, 0.0)
