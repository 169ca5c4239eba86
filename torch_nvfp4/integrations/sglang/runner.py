"""The runner that SGLang's MoeRunner calls with what its dispatcher hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore, MoeQuantInfo, MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.moe.utils import RegisteredMoeRunnerBackend
from sglang.srt.runtime_context import get_exec
from torch import Tensor

from torch_nvfp4.integrations.sglang.support import layer_gate
from torch_nvfp4.ops.batch_invariance import invariance_keywords

__all__ = ["NAME", "NVFP4QuantInfo", "NVFP4RunnerCore"]

NAME = "torch_nvfp4"
"""Of the backend, as SGLang registers and prints it."""


@dataclass
class NVFP4QuantInfo(MoeQuantInfo):  # type: ignore[misc]
    """A layer's weights as ``torch.ops.nvfp4.moe`` takes them; the experts of this rank."""

    w13: Tensor  # packed [E, 2I, K], gate rows first, or [E, I, K] without a gate
    w13_global_scale: Tensor  # [E, 2] float32: gate, up; [E] without a gate
    w2: Tensor  # packed [E, K, I]
    w2_global_scale: Tensor  # [E] float32


class NVFP4RunnerCore(DispatchMoeRunnerCore):  # type: ignore[misc]
    """hidden_states [M, K] and ids of this rank's experts, -1 for those of other ranks: one call of the op."""

    def __init__(self, config: MoeRunnerConfig) -> None:
        super().__init__(config)
        self._gate_kwargs = layer_gate(config).kwargs()
        # --enable-deterministic-inference; None: as set_batch_invariant says.
        self._batch_invariant = True if get_exec().deterministic.enable_deterministic_inference else None

    @property
    def runner_backend(self) -> RegisteredMoeRunnerBackend:
        return RegisteredMoeRunnerBackend(NAME)

    def run_from_dispatch(
        self, dispatch_output: Any, quant_info: NVFP4QuantInfo, runner_config: MoeRunnerConfig, hooks: Any = None
    ) -> StandardCombineInput:
        """Raises RuntimeError (expected and got) for formats that no layer should get here with."""
        if hooks is not None:
            raise RuntimeError("torch_nvfp4: expected no LoRA hooks, got some")
        if not dispatch_output.format.is_standard():
            raise RuntimeError(
                f"torch_nvfp4: expected the standard dispatch format, got {dispatch_output.format.value}"
            )
        hidden_states = dispatch_output.hidden_states
        topk_weights, topk_ids = self._routing(dispatch_output.topk_output)
        if dispatch_output.hidden_states_scale is not None:
            raise RuntimeError("torch_nvfp4: expected hidden_states that are not quantized, got some with a scale")
        output = torch.ops.nvfp4.moe(
            hidden_states.contiguous(),
            quant_info.w13,
            quant_info.w13_global_scale,
            quant_info.w2,
            quant_info.w2_global_scale,
            topk_weights,
            topk_ids,
            apply_router_weight_on_input=runner_config.apply_router_weight_on_input,
            **self._gate_kwargs,
            **invariance_keywords(self._batch_invariant),
        )
        return StandardCombineInput(hidden_states=output)

    def _routing(self, topk_output: Any) -> tuple[Tensor, Tensor]:
        """topk_weights [M, top_k] float32 and topk_ids [M, top_k] of this rank's experts."""
        if TopKOutputChecker.format_is_standard(topk_output):
            return topk_output.topk_weights.to(torch.float32).contiguous(), topk_output.topk_ids.contiguous()
        name = type(topk_output).__name__
        if not TopKOutputChecker.format_is_packed(topk_output):
            raise RuntimeError(f"torch_nvfp4: expected topk_weights and topk_ids, got {name}")
        here, everywhere = self.config.num_local_experts, self.config.num_experts
        if here != everywhere:  # SGLang's dispatcher leaves packed ids as they are, global
            raise RuntimeError(
                f"torch_nvfp4: expected topk_weights and topk_ids where a rank has {here} of {everywhere} experts, got "
                f"{name}; set SGLANG_OPT_USE_FUSED_GATE_TOPK=0"
            )
        packed = topk_output.packed_topk_ids  # int32: the id above the bits of a bfloat16, which begins as a float does
        return (packed << 16).view(torch.float32), packed >> 16
