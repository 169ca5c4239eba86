"""vLLM's quantization methods for NVFP4 experts, as far as they touch the plug-in: parameters, conversion, kernel.

Their names are those of vLLM's, by which the plug-in knows them. ``tests/engines`` runs the real ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from helpers.expert_kinds import Experts
from helpers.vllm_layers import EXPERTS, HIDDEN, INTERMEDIATE, Plugin


class _Method:
    """Of ModelOpt and compressed-tensors, whose parameters have other names and whose global scales are divisors."""

    packed, global_scale, divides = "weight", "weight_scale_2", False

    def __init__(self, plugin: Plugin, moe: SimpleNamespace) -> None:
        self.plugin, self.moe = plugin, moe
        self.backend, self.experts_cls = plugin.user.select_nvfp4_moe_backend(moe, "static", None)

    def create_weights(
        self, layer: torch.nn.Module, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        shards = 2 if self.moe.is_act_and_mul else 1
        rows = shards * intermediate_size_per_partition
        for prefix, n, k in (("w13", rows, hidden_size), ("w2", hidden_size, intermediate_size_per_partition)):
            columns = [shards] if prefix == "w13" else []
            for name, shape, dtype in (
                (self.packed, [n, k // 2], torch.uint8), ("weight_scale", [n, k // 16], torch.float8_e4m3fn),
                (self.global_scale, columns, torch.float32), ("input_scale", columns, torch.float32),
            ):  # fmt: skip
                made = torch.nn.Parameter(torch.zeros(num_experts, *shape, dtype=dtype), requires_grad=False)
                made.weight_loader = extra_weight_attrs["weight_loader"]  # type: ignore[attr-defined]
                layer.register_parameter(f"{prefix}_{name}", made)

    def process_weights_after_loading(self, layer: Any) -> None:
        def value(name: str) -> Tensor:
            scale: Tensor = getattr(layer, f"{name}_{self.global_scale}").data
            scale = scale[:, 0].contiguous() if name == "w13" else scale
            return 1.0 / scale if self.divides else scale

        user = self.plugin.user
        w13, s13, g13, _, w2, s2, g2, _ = user.convert_to_nvfp4_moe_kernel_format(
            nvfp4_backend=self.backend, layer=layer, w13=getattr(layer, f"w13_{self.packed}"),
            w13_scale=layer.w13_weight_scale, w13_scale_2=value("w13"), a13_scale=layer.w13_input_scale,
            w2=getattr(layer, f"w2_{self.packed}"), w2_scale=layer.w2_weight_scale, w2_scale_2=value("w2"),
            a2_scale=layer.w2_input_scale, is_act_and_mul=self.moe.is_act_and_mul,
        )  # fmt: skip
        self.weights = w13, w2
        given = {"swiglu_limit": self.moe.swiglu_limit, "swiglu_alpha": self.moe.swiglu_alpha,
                 "swiglu_beta": self.moe.swiglu_beta, "layer": layer}  # fmt: skip
        known = inspect.signature(user.make_nvfp4_moe_quant_config).parameters
        quant = user.make_nvfp4_moe_quant_config(
            backend=self.backend, w13_scale=s13, w2_scale=s2, w13_scale_2=g13, w2_scale_2=g2, a13_scale=None,
            a2_scale=None, **{name: value for name, value in given.items() if name in known},
        )  # fmt: skip
        batched = self.moe.moe_parallel_config.use_batched_activation_format
        self.experts = self.experts_cls(
            self.moe, quant, **({"max_num_tokens": 8, "num_dispatchers": 1} if batched else {})
        )


class ModelOptNvFp4FusedMoE(_Method):
    pass


class CompressedTensorsW4A4Nvfp4MoEMethod(_Method):
    packed, global_scale, divides = "weight_packed", "weight_global_scale", True


METHODS: dict[str, Callable[..., Any]] = {
    "modelopt": ModelOptNvFp4FusedMoE, "compressed-tensors": CompressedTensorsW4A4Nvfp4MoEMethod,
}  # fmt: skip


class Layer(torch.nn.Module):
    """RoutedExperts with the parameters of a method, not loaded."""

    def __init__(self, method: Any, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.moe_config = method.moe
        method.create_weights(
            layer=self, num_experts=EXPERTS, hidden_size=hidden, intermediate_size_per_partition=INTERMEDIATE,
            params_dtype=torch.bfloat16, weight_loader=print,
        )  # fmt: skip


def tensors_of(experts: Experts, method: Any, *, interleaved: bool = False) -> dict[str, Tensor]:
    """What a checkpoint has for a layer, under the names of the method's parameters."""
    found: dict[str, Tensor] = {}
    for prefix, weight, bias in (("w13", experts.w13, experts.w13_bias), ("w2", experts.w2, experts.w2_bias)):
        scale = weight.global_scale
        if prefix == "w13" and not experts.kind.gated:
            scale = scale[:, None]
        found |= {
            f"{prefix}_{method.packed}": weight.data, f"{prefix}_weight_scale": weight.scale.view(torch.uint8),
            f"{prefix}_{method.global_scale}": 1.0 / scale if method.divides else scale,
        }  # fmt: skip
        if bias is not None:
            found[f"{prefix}_bias"] = bias
    if interleaved:
        for name in [name for name in found if name.startswith("w13") and name != f"w13_{method.global_scale}"]:
            found[name] = torch.stack(found[name].chunk(2, dim=1), dim=2).flatten(1, 2)
    return found


def load(layer: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """The model's loader."""
    for name, tensor in tensors.items():
        into = getattr(layer, name).data
        (into.view(torch.uint8) if into.dtype == torch.float8_e4m3fn else into).copy_(tensor)
