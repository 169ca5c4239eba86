# Written by .ci/write_op_types.py out of the schemas of the ops.

from typing import Protocol, overload

from torch import Tensor

class BatchedMoeDefault(Protocol):
    def __call__(
        self,
        hidden_states: Tensor,
        w13: Tensor,
        w13_global_scale: Tensor,
        w2: Tensor,
        w2_global_scale: Tensor,
        expert_num_tokens: Tensor,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> Tensor: ...

class BatchedMoeOut(Protocol):
    def __call__(
        self,
        hidden_states: Tensor,
        w13: Tensor,
        w13_global_scale: Tensor,
        w2: Tensor,
        w2_global_scale: Tensor,
        expert_num_tokens: Tensor,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        out: Tensor,
    ) -> None: ...

class BatchedMoe(Protocol):
    @property
    def default(self) -> BatchedMoeDefault: ...
    @property
    def out(self) -> BatchedMoeOut: ...
    @overload
    def __call__(
        self,
        hidden_states: Tensor,
        w13: Tensor,
        w13_global_scale: Tensor,
        w2: Tensor,
        w2_global_scale: Tensor,
        expert_num_tokens: Tensor,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        hidden_states: Tensor,
        w13: Tensor,
        w13_global_scale: Tensor,
        w2: Tensor,
        w2_global_scale: Tensor,
        expert_num_tokens: Tensor,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        out: Tensor,
    ) -> None: ...

class CombineDefault(Protocol):
    def __call__(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        num_experts: int,
    ) -> Tensor: ...

class Combine(CombineDefault, Protocol):
    @property
    def default(self) -> CombineDefault: ...

class GroupedGemmDefault(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        global_scale: Tensor,
        order: Tensor,
        offsets: Tensor,
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        batch_invariant: bool = False,
    ) -> Tensor: ...

class GroupedGemm(GroupedGemmDefault, Protocol):
    @property
    def default(self) -> GroupedGemmDefault: ...

class GroupedGemmBackwardDefault(Protocol):
    def __call__(
        self,
        grad_output: Tensor,
        x: Tensor,
        weight: Tensor,
        global_scale: Tensor,
        order: Tensor,
        offsets: Tensor,
        topk_weights: Tensor | None = None,
        *,
        batch_invariant: bool = False,
        needs_x: bool = True,
        needs_topk_weights: bool = False,
    ) -> tuple[Tensor, Tensor]: ...

class GroupedGemmBackward(GroupedGemmBackwardDefault, Protocol):
    @property
    def default(self) -> GroupedGemmBackwardDefault: ...

class GroupedGemmSwigluDefault(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        global_scale: Tensor,
        order: Tensor,
        offsets: Tensor,
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        batch_invariant: bool = False,
    ) -> Tensor: ...

class GroupedGemmSwiglu(GroupedGemmSwigluDefault, Protocol):
    @property
    def default(self) -> GroupedGemmSwigluDefault: ...

class GroupedGemmSwigluBackwardDefault(Protocol):
    def __call__(
        self,
        grad_output: Tensor,
        x: Tensor,
        weight: Tensor,
        global_scale: Tensor,
        order: Tensor,
        offsets: Tensor,
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        batch_invariant: bool = False,
        needs_x: bool = True,
        needs_topk_weights: bool = False,
    ) -> tuple[Tensor, Tensor]: ...

class GroupedGemmSwigluBackward(GroupedGemmSwigluBackwardDefault, Protocol):
    @property
    def default(self) -> GroupedGemmSwigluBackwardDefault: ...

class LinearDefault(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        global_scale: Tensor,
        bias: Tensor | None = None,
        *,
        batch_invariant: bool = False,
    ) -> Tensor: ...

class Linear(LinearDefault, Protocol):
    @property
    def default(self) -> LinearDefault: ...

class LinearBackwardDefault(Protocol):
    def __call__(
        self,
        grad_output: Tensor,
        weight: Tensor,
        global_scale: Tensor,
        in_features: int,
    ) -> Tensor: ...

class LinearBackward(LinearBackwardDefault, Protocol):
    @property
    def default(self) -> LinearBackwardDefault: ...

class MoeDefault(Protocol):
    def __call__(
        self,
        hidden_states: Tensor,
        w13: Tensor,
        w13_global_scale: Tensor,
        w2: Tensor,
        w2_global_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None = None,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        apply_router_weight_on_input: bool = False,
        batch_invariant: bool = False,
    ) -> Tensor: ...

class MoeOut(Protocol):
    def __call__(
        self,
        hidden_states: Tensor,
        w13: Tensor,
        w13_global_scale: Tensor,
        w2: Tensor,
        w2_global_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None = None,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        apply_router_weight_on_input: bool = False,
        batch_invariant: bool = False,
        out: Tensor,
    ) -> None: ...

class Moe(Protocol):
    @property
    def default(self) -> MoeDefault: ...
    @property
    def out(self) -> MoeOut: ...
    @overload
    def __call__(
        self,
        hidden_states: Tensor,
        w13: Tensor,
        w13_global_scale: Tensor,
        w2: Tensor,
        w2_global_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None = None,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        apply_router_weight_on_input: bool = False,
        batch_invariant: bool = False,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        hidden_states: Tensor,
        w13: Tensor,
        w13_global_scale: Tensor,
        w2: Tensor,
        w2_global_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None = None,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        apply_router_weight_on_input: bool = False,
        batch_invariant: bool = False,
        out: Tensor,
    ) -> None: ...

class MoeBackwardDefault(Protocol):
    def __call__(
        self,
        grad_output: Tensor,
        hidden_states: Tensor,
        w13: Tensor,
        w13_global_scale: Tensor,
        w2: Tensor,
        w2_global_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None = None,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        apply_router_weight_on_input: bool = False,
        batch_invariant: bool = False,
        needs_hidden_states: bool = True,
        needs_topk_weights: bool = True,
    ) -> tuple[Tensor, Tensor]: ...

class MoeBackward(MoeBackwardDefault, Protocol):
    @property
    def default(self) -> MoeBackwardDefault: ...

class MoeFp8Default(Protocol):
    def __call__(
        self,
        hidden_states: Tensor,
        w13: Tensor,
        w13_global_scale: Tensor,
        w2: Tensor,
        w2_global_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None = None,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        apply_router_weight_on_input: bool = False,
    ) -> Tensor: ...

class MoeFp8(MoeFp8Default, Protocol):
    @property
    def default(self) -> MoeFp8Default: ...

class NoGradientDefault(Protocol):
    def __call__(
        self,
        grad_output: Tensor,
        input: Tensor,
        reason: int,
    ) -> Tensor: ...

class NoGradient(NoGradientDefault, Protocol):
    @property
    def default(self) -> NoGradientDefault: ...

class OrderForFp8Default(Protocol):
    def __call__(
        self,
        packed: Tensor,
        in_features: int,
        gated: bool = False,
    ) -> Tensor: ...

class OrderForFp8(OrderForFp8Default, Protocol):
    @property
    def default(self) -> OrderForFp8Default: ...

class PackDefault(Protocol):
    def __call__(
        self,
        weight: Tensor,
        scale: Tensor,
        gated: bool = False,
    ) -> Tensor: ...

class Pack(PackDefault, Protocol):
    @property
    def default(self) -> PackDefault: ...

class RouteDefault(Protocol):
    def __call__(
        self,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        num_experts: int,
    ) -> tuple[Tensor, Tensor]: ...

class Route(RouteDefault, Protocol):
    @property
    def default(self) -> RouteDefault: ...

class SwigluDefault(Protocol):
    def __call__(
        self,
        gate_up: Tensor,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        gated: bool = True,
    ) -> Tensor: ...

class Swiglu(SwigluDefault, Protocol):
    @property
    def default(self) -> SwigluDefault: ...

class SwigluBackwardDefault(Protocol):
    def __call__(
        self,
        grad_output: Tensor,
        gate_up: Tensor,
        *,
        activation: int = 0,
        clamp_limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        gated: bool = True,
    ) -> Tensor: ...

class SwigluBackward(SwigluBackwardDefault, Protocol):
    @property
    def default(self) -> SwigluBackwardDefault: ...

class UnpackDefault(Protocol):
    def __call__(
        self,
        packed: Tensor,
        in_features: int,
        gated: bool = False,
    ) -> tuple[Tensor, Tensor]: ...

class Unpack(UnpackDefault, Protocol):
    @property
    def default(self) -> UnpackDefault: ...

class Namespace(Protocol):
    @property
    def batched_moe(self) -> BatchedMoe: ...
    @property
    def combine(self) -> Combine: ...
    @property
    def grouped_gemm(self) -> GroupedGemm: ...
    @property
    def grouped_gemm_backward(self) -> GroupedGemmBackward: ...
    @property
    def grouped_gemm_swiglu(self) -> GroupedGemmSwiglu: ...
    @property
    def grouped_gemm_swiglu_backward(self) -> GroupedGemmSwigluBackward: ...
    @property
    def linear(self) -> Linear: ...
    @property
    def linear_backward(self) -> LinearBackward: ...
    @property
    def moe(self) -> Moe: ...
    @property
    def moe_backward(self) -> MoeBackward: ...
    @property
    def moe_fp8(self) -> MoeFp8: ...
    @property
    def no_gradient(self) -> NoGradient: ...
    @property
    def order_for_fp8(self) -> OrderForFp8: ...
    @property
    def pack(self) -> Pack: ...
    @property
    def route(self) -> Route: ...
    @property
    def swiglu(self) -> Swiglu: ...
    @property
    def swiglu_backward(self) -> SwigluBackward: ...
    @property
    def unpack(self) -> Unpack: ...

nvfp4: Namespace
