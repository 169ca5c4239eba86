"""The experts classes that vLLM's modular MoE kernel calls: one per format of the activations."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

from torch_nvfp4.gate import Gate
from torch_nvfp4.integrations.vllm.platform import batch_invariant, copies_output, device, step_limit
from torch_nvfp4.integrations.vllm.support import device_error, layer_gate, situ_of
from torch_nvfp4.ops.batch_invariance import invariance_keywords, refuse_batch_invariance

__all__ = ["NVFP4BatchedExperts", "NVFP4Experts"]


class _Experts(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """What both formats share.

    Activations stay in 16 bits, so a W4A4 checkpoint runs as W4A16, as it does with Marlin: the quantization config of
    ``oracle`` names no dtype for them, and vLLM's prepare() leaves them as they are.
    """

    def __init__(
        self,
        moe_config: Any,
        quant_config: Any,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        gate = _gate(moe_config, quant_config)
        self._gated, self._gate_kwargs = gate.gated, gate.kwargs()
        self._biased = bool(moe_config.has_bias)
        if self._biased and (self.w1_bias is None or self.w2_bias is None):
            raise RuntimeError("expected the biases of w13 and w2 for a layer whose experts have some, got none")

    @staticmethod
    def _supports_current_device() -> bool:
        return device_error(*device()) is None

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True  # layer_error looks at it as at the activation

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key == kNvfp4Static and activation_key in (None, kNvfp4Dynamic)

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return True  # layer_error looks at it together with the limit

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    def moe_problem_size(self, a1: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor) -> tuple[int, int, int, int, int]:
        """E, M, N, K, top_k; the shapes of packed weights name their layout and not N and K."""
        n = (2 if self._gated else 1) * self.moe_config.intermediate_size_per_partition
        return w1.size(0), a1.size(-2), n, a1.size(-1), topk_ids.size(1)

    def _biases(self) -> tuple[Tensor, ...]:
        """The op's two arguments, none where the experts have no biases: torch takes time for every argument."""
        return (self.w1_bias, self.w2_bias) if self._biased else ()


class _IntoOutput(TopKWeightAndReduceNoOP):  # type: ignore[misc]
    """What vLLM calls after the experts to reduce their output: it runs them then, into the tensor that vLLM returns.

    Args:
        run: runs the layer and writes ``out``, weighted and summed.
    """

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def apply(
        self, output: Tensor | None, fused_expert_output: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> Tensor:  # fmt: skip
        """``output`` [M, K], or ``fused_expert_output`` [M, K] where there is no ``output``, holding the result."""
        fits = (
            output is not None
            and (output.shape, output.dtype) == (fused_expert_output.shape, fused_expert_output.dtype)
            and output.is_contiguous()
        )
        out = output if fits else fused_expert_output
        self._run(out=out)
        result: Tensor = super().apply(output, out, topk_weights, topk_ids, apply_router_weight_on_input)
        return result  # vLLM's own method copies only where out is not output


class NVFP4Experts(_Experts):
    """hidden_states [M, K] and global ids: ``moe`` writes vLLM's buffer, weighted and summed.

    Some versions of vLLM hand ``apply`` a buffer that they copy to the layer's output afterwards. There ``apply`` keeps
    its arguments, and the op runs in the step that would copy, which vLLM takes next. This is done only where nothing
    is exchanged between data-parallel ranks: the steps of those read the buffer, and two micro-batches may take turns.
    """

    def __init__(
        self,
        moe_config: Any,
        quant_config: Any,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        parallel = moe_config.moe_parallel_config
        self._late = copies_output() and parallel.dp_size == 1 and not parallel.use_all2all_kernels
        self._batch_invariant = True if batch_invariant() else None  # None: as set_batch_invariant says
        # By thread, from apply to finalize_weight_and_reduce_impl, so that no tensor is held after the call.
        self._kept: dict[int, Callable[..., None]] = {}

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> Any:
        # Nothing is kept of a call without tokens, which has no apply. Dynamo traces this on CPUs, but not get_ident.
        run = self._kept.pop(threading.get_ident(), None) if self._late else None
        return TopKWeightAndReduceNoOP() if run is None else _IntoOutput(run)

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, global_num_experts: int, local_num_experts: int,
        expert_tokens_meta: Any, activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:  # fmt: skip
        return (0,), (0,), (M, K)

    def apply(
        self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        activation: Any, global_num_experts: int, expert_map: Tensor | None, a1q_scale: Tensor | None,
        a2_scale: Tensor | None, workspace13: Tensor, workspace2: Tensor, expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:  # fmt: skip
        if apply_router_weight_on_input:  # vLLM's prepare() has multiplied the input
            topk_weights = torch.ones_like(topk_weights)
        arguments = (
            hidden_states, w1, self.g1_alphas, w2, self.g2_alphas, topk_weights.to(torch.float32), topk_ids, expert_map,
            *self._biases(),
        )  # fmt: skip
        keywords = self._gate_kwargs | invariance_keywords(self._batch_invariant)
        if not self._late:
            torch.ops.nvfp4.moe.out(*arguments, **keywords, out=output)
            return
        run = functools.partial(torch.ops.nvfp4.moe.out, *arguments, **keywords)
        # What an error between the two calls has left is dropped with the error below.
        if self._kept.pop(threading.get_ident(), None) is not None:
            raise RuntimeError(
                "expected finalize_weight_and_reduce_impl() after apply(), got apply() again: this vLLM does not call "
                "its experts as its version does. Set TORCH_NVFP4_VLLM=off to serve with vLLM's own kernels."
            )
        self._kept[threading.get_ident()] = run


class NVFP4BatchedExperts(_Experts):
    """hidden_states [E, T, K], of which the first ``expert_num_tokens[e]`` rows of expert e hold tokens.

    This is what DeepEP's and NIXL's low-latency dispatch bring, which also weight and sum afterwards.
    """

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.BatchedExperts

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceDelegate()

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, global_num_experts: int, local_num_experts: int,
        expert_tokens_meta: Any, activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:  # fmt: skip
        return (0,), (0,), (local_num_experts, M, K)

    def apply(
        self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        activation: Any, global_num_experts: int, expert_map: Tensor | None, a1q_scale: Tensor | None,
        a2_scale: Tensor | None, workspace13: Tensor, workspace2: Tensor, expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:  # fmt: skip
        counts = None if expert_tokens_meta is None else expert_tokens_meta.expert_num_tokens
        if counts is None:
            raise RuntimeError("expected expert_num_tokens with batched activations, got none")
        refuse_batch_invariance("batched_moe")
        torch.ops.nvfp4.batched_moe.out(
            hidden_states, w1, self.g1_alphas, w2, self.g2_alphas, counts, *self._biases(), **self._gate_kwargs,
            out=output,
        )  # fmt: skip


def _gate(moe_config: Any, quant_config: Any) -> Gate:
    """The layer's gate, of which the quantization config's part goes first, as with vLLM's own experts.

    Raises RuntimeError where the two name different values.
    """
    values = []
    for name in ("clamp_limit", "alpha", "beta"):
        of_layer = getattr(moe_config, "swiglu_limit" if name == "clamp_limit" else f"swiglu_{name}")
        of_quant = getattr(quant_config, f"gemm1_{name}")
        if of_layer is not None and of_quant is not None and of_layer != of_quant:
            raise RuntimeError(f"expected one {name} per layer, got {of_layer:g} (moe) and {of_quant:g} (quantization)")
        values.append(of_layer if of_quant is None else of_quant)
    limit, alpha, beta = values
    return layer_gate(moe_config.activation.name, limit, alpha, beta, step_limit(), situ_of(moe_config))
