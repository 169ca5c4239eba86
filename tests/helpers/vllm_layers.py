"""Layers of the plug-in inside a stand-in for vLLM (``fake_vllm``), called as vLLM's kernel calls its experts."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from helpers.fake_vllm import ORACLE, USER, moe_config
from torch_nvfp4.integrations.vllm import versions

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 64, 32, 2


class Plugin:
    """The plug-in, installed into a stand-in."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self.oracle, self.user = modules[ORACLE], modules[USER]
        self.mode = "auto"
        self.module = importlib.import_module("torch_nvfp4.integrations.vllm.oracle")
        self.module.install(lambda: self.mode)


def select(plugin: Plugin, **changes: Any) -> Any:
    """vLLM's choice for a layer, and the class of its experts."""
    weight_key, activation_key = changes.pop("weight_key", "static"), changes.pop("activation_key", None)
    return plugin.user.select_nvfp4_moe_backend(moe_config(**changes), weight_key, activation_key=activation_key)


def vllm_layer(
    layer: Any, layout: str, config: SimpleNamespace | None = None
) -> tuple[SimpleNamespace, dict[str, Tensor]]:
    """What a layer of vLLM holds after loading, and what its quantization method hands to the conversion."""
    w13, w2 = layer
    held = SimpleNamespace(moe_config=moe_config() if config is None else config)
    if layout == "modelopt":
        held.w13_weight_scale_2, held.w2_weight_scale_2 = w13.global_scale, w2.global_scale
        gate, down = w13.global_scale[:, 0], w2.global_scale
    else:
        held.w13_weight_global_scale, held.w2_weight_global_scale = 1.0 / w13.global_scale, 1.0 / w2.global_scale
        gate, down = 1.0 / held.w13_weight_global_scale[:, 0].contiguous(), 1.0 / held.w2_weight_global_scale
    handed = {"w13": w13.data, "w13_scale": w13.scale, "w13_scale_2": gate, "a13_scale": torch.ones(EXPERTS),
              "w2": w2.data, "w2_scale": w2.scale, "w2_scale_2": down, "a2_scale": torch.ones(EXPERTS)}  # fmt: skip
    return held, handed


def build(plugin: Plugin, layer: Any, layout: str, config: SimpleNamespace) -> tuple[Any, Tensor, Tensor]:
    """The experts that vLLM makes of a layer, and the two weights it calls them with."""
    backend = plugin.module.Backend.TORCH_NVFP4
    batched_format = config.moe_parallel_config.use_batched_activation_format
    cls = plugin.module.NVFP4BatchedExperts if batched_format else plugin.module.NVFP4Experts
    held, handed = vllm_layer(layer, layout, config)
    w13, w13_scale, w13_scale_2, a13_scale, w2, w2_scale, w2_scale_2, a2_scale = (
        plugin.user.convert_to_nvfp4_moe_kernel_format(
            nvfp4_backend=backend, layer=held, is_act_and_mul=True, **handed
        )
    )  # fmt: skip
    assert a13_scale is None
    assert a2_scale is None
    assert {len(tensor) for tensor in (w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2)} == {EXPERTS}
    quant = plugin.user.make_nvfp4_moe_quant_config(
        backend=backend, w13_scale=w13_scale, w2_scale=w2_scale, w13_scale_2=w13_scale_2, w2_scale_2=w2_scale_2,
        a13_scale=None, a2_scale=None, swiglu_limit=config.swiglu_limit,
    )  # fmt: skip
    batched = {"max_num_tokens": 8, "num_dispatchers": 1} if batched_format else {}
    return cls(config, quant, **batched), w13, w2


def apply(
    experts: Any, output: Tensor, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor,
    activation: Any = None, expert_map: Any = None, on_input: bool = False, meta: Any = None,
) -> None:  # fmt: skip
    """As vLLM's kernel calls them: into a buffer of its own up to 0.26, into ``output`` later; then what reduces."""
    buffer = call(experts, output, x, w13, w2, weights, ids, activation, expert_map, on_input, meta)
    if meta is None:  # else the reduction is left to whoever exchanges tokens
        reduce = experts.finalize_weight_and_reduce_impl()
        keywords = {"topk_weights": weights, "topk_ids": ids, "apply_router_weight_on_input": on_input}
        assert reduce.apply(output=output, fused_expert_output=buffer, **keywords) is output


def call(
    experts: Any, output: Tensor, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor,
    activation: Any = None, expert_map: Any = None, on_input: bool = False, meta: Any = None,
) -> Tensor:  # fmt: skip
    """The first half of ``apply``: the call of the experts, and the buffer that it was given."""
    own_buffer = meta is None and versions.release(sys.modules["vllm"].__version__) <= (0, 26)
    buffer = torch.full_like(output, torch.nan) if own_buffer else output
    empty = x.new_empty(0)
    experts.apply(
        buffer, x, w13, w2, weights, ids, activation, EXPERTS, expert_map, None, None, empty, empty, meta, on_input
    )
    return buffer


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
