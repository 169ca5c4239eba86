"""SGLang's classes for NVFP4 experts, with torch_nvfp4's weights and runner in the place of SGLang's."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
from sglang.srt.layers.moe.utils import RegisteredMoeRunnerBackend
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW4A16Nvfp4MoE
from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod, deinterleave_w13

from torch_nvfp4.integrations.sglang.runner import NAME, NVFP4QuantInfo
from torch_nvfp4.integrations.sglang.weights import PACKED, pack_layer

__all__ = ["CompressedTensorsNVFP4", "ModelOptNVFP4"]

BACKEND = RegisteredMoeRunnerBackend(NAME)


def _quant_info(layer: torch.nn.Module) -> NVFP4QuantInfo:
    return NVFP4QuantInfo(*(getattr(layer, name) for name in PACKED))


def _output_factor(layer: Any) -> float:
    """What the runner owes the output, which SGLang has not multiplied into the router's weights."""
    if layer.should_fuse_routed_scaling_factor_in_topk:
        return 1.0
    factor = layer.moe_runner_config.routed_scaling_factor
    return 1.0 if factor is None else float(factor)


class ModelOptNVFP4(ModelOptNvFp4FusedMoEMethod):  # type: ignore[misc]
    """ModelOpt's checkpoints (mixed precision and DeepSeek-V4's config too): ``weight_scale_2`` per projection.

    No object is made of this class: ``hooks`` turns one of SGLang's class into it when the layer is known. SGLang's
    loader wants "ModelOpt" in the name. Activations stay in 16 bits, so input scales are not used.
    """

    load_up_proj_weight_first = False

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        self.moe_runner_config = moe_runner_config
        self._moe_runner_backend = BACKEND
        self.runner = MoeRunner(BACKEND, moe_runner_config)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, PACKED[0]):
            return
        if getattr(layer, "inference_moe_w13_interleaved", False):
            layer.w13_weight.data = deinterleave_w13(layer.w13_weight.data)
            layer.w13_weight_scale.data = deinterleave_w13(layer.w13_weight_scale.data)
        scale_2 = (layer.w13_weight_scale_2, layer.w2_weight_scale_2)
        gated = layer.moe_runner_config.is_gated
        pack_layer(layer, ("w13_weight", "w2_weight"), scale_2, _output_factor(layer), gated=gated)

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return self.runner.run(dispatch_output, _quant_info(layer))


class CompressedTensorsNVFP4(CompressedTensorsW4A16Nvfp4MoE):  # type: ignore[misc]
    """compressed-tensors' checkpoints, W4A16 and W4A4: ``weight_global_scale``, a divisor, per projection."""

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        self.moe_runner_config = moe_runner_config
        self.runner = MoeRunner(BACKEND, moe_runner_config)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, PACKED[0]):
            return
        scale_2 = (1.0 / layer.w13_weight_global_scale.detach(), 1.0 / layer.w2_weight_global_scale.detach())
        gated = layer.moe_runner_config.is_gated
        pack_layer(layer, ("w13_weight_packed", "w2_weight_packed"), scale_2, _output_factor(layer), gated=gated)

    def apply_weights(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return self.runner.run(dispatch_output, _quant_info(layer))
