"""The experts of a layer split over the ranks of a DeviceMesh: tensor parallel, expert parallel, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.distributed.collectives import gradients_added, on_every_rank, sent_to_experts, summed
from torch_nvfp4.distributed.slicing import checked_part, expert_range, slice_biases, slice_experts
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.nn.experts import check_leading_dimensions
from torch_nvfp4.quant_config import MoEQuantConfig

__all__ = ["ExpertsPlan", "ParallelExperts", "expert_range", "load_experts", "parallelize_experts", "slice_experts"]

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class ExpertsPlan:
    """How the experts of a layer are split over a mesh.

    Attributes:
        tp: the mesh's dimension (name or index) along which every expert's intermediate size is split, or None.
        ep: the one along which whole experts are split, or None. Their number need not be a multiple of the ranks': the
            first ranks have one more, and ranks behind the last expert have none.
        tokens: "replicated", every rank has the same tokens and the partial results are added (all-reduce); or
            "sharded", every rank along ``ep`` has tokens of its own, as many as it likes, which go to the ranks that
            have their experts and come back (all-to-all). Sharded tokens are counted on the host: no CUDA graph.
        reduce_dtype: in which partial results are added, None for that of hidden_states.
    """

    tp: str | int | None = None
    ep: str | int | None = None
    tokens: str = "replicated"
    reduce_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.tokens not in ("replicated", "sharded"):
            raise ValueError(f"tokens: expected 'replicated' or 'sharded', got {self.tokens!r}")
        if self.tp is None and self.ep is None:
            raise ValueError("expected a dimension of the mesh for tp, ep or both, got None for both")
        if self.tp == self.ep:
            raise ValueError(f"expected two dimensions of the mesh for tp and ep, got {self.tp!r} for both")
        if self.tokens == "sharded" and self.ep is None:
            raise ValueError(
                "tokens 'sharded': expected a dimension of the mesh for ep, whose ranks have them, got None"
            )
        if self.reduce_dtype is not None and not self.reduce_dtype.is_floating_point:
            raise ValueError(f"reduce_dtype: expected a floating point dtype, got {self.reduce_dtype}")


@dataclass(frozen=True)
class _Place:
    """Where a rank stands in a plan."""

    tp_rank: int
    tp_size: int
    ep_rank: int
    ep_size: int

    @classmethod
    def of(cls, mesh: DeviceMesh, plan: ExpertsPlan) -> _Place:
        if not isinstance(mesh, DeviceMesh) or not isinstance(plan, ExpertsPlan):
            got = f"{type(mesh).__name__} and {type(plan).__name__}"
            raise TypeError(f"expected a DeviceMesh (init_device_mesh) and an ExpertsPlan, got {got}")
        if mesh.get_coordinate() is None:
            raise ValueError(f"expected a mesh that this rank is in, got {mesh} on rank {distributed.get_rank()}")
        ranks = []
        for name in (plan.tp, plan.ep):
            dim = None if name is None else mesh_dim(mesh, name)
            ranks += [0, 1] if dim is None else [mesh.get_local_rank(dim), mesh.size(dim)]
        return cls(*ranks)


def mesh_dim(mesh: DeviceMesh, name: str | int) -> int:
    """The index of a dimension; ValueError says which there are."""
    names = mesh.mesh_dim_names or ()
    if isinstance(name, str) and name in names:
        return names.index(name)
    if isinstance(name, int) and 0 <= name < mesh.ndim:
        return name
    there = ", ".join(map(repr, names)) if names else "none with a name"
    raise ValueError(f"expected a dimension of the mesh ({there}, or an index below {mesh.ndim}), got {name!r}")


class _NoExperts(NVFP4Experts):
    """One expert of zeros, which no id means, on a rank without experts.

    So the rank calls the op that the others call: it raises what they raise, and a compiler that traces it finds the
    same collectives in the same order, each behind what it waits for. Its state dict is empty.
    """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        pass


class ParallelExperts(nn.Module):
    """One rank's part of a layer's experts, called as ``NVFP4Experts`` is: its results are those of the whole layer for
    the tokens that the rank has, with replicated tokens the same on every rank.

    Made by ``parallelize_experts`` or ``load_experts``. Every rank of the mesh has to call it, also one without tokens
    or without experts, with the same dtype and top_k. torch.compile(fullgraph=True) traces the form with replicated
    tokens. Its state dict is that of the rank's own part.

    Attributes:
        experts: this rank's ``NVFP4Experts``, None on a rank without.
        expert_range: the global numbers of its experts.
        num_experts, hidden_size, intermediate_size: E, K and I of the whole layer.
    """

    def __init__(
        self,
        experts: NVFP4Experts | None,
        mesh: DeviceMesh,
        plan: ExpertsPlan,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        device: torch.device,
        stand_in: NVFP4Experts | None = None,
    ) -> None:
        super().__init__()
        self.experts = experts
        self._stand_in = stand_in
        self.mesh = mesh
        self.plan = plan
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self._place = place = _Place.of(mesh, plan)
        self.expert_range = expert_range(num_experts, place.ep_rank, place.ep_size)
        # The rank along ep that has an expert; behind the last, for ids of no expert, one that is not there.
        owners = [rank for rank in range(place.ep_size) for _ in expert_range(num_experts, rank, place.ep_size)]
        owner = torch.tensor([*owners, place.ep_size], dtype=torch.int64, device=device)
        self.register_buffer("_owner", owner, persistent=False)
        self._owner: Tensor

    def forward(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """hidden_states [..., K], topk_weights and topk_ids [..., top_k] (global ids) -> [..., K].

        Gradients with respect to hidden_states and topk_weights are those of the whole layer where tokens are
        replicated. NotImplementedError where one is asked for with sharded tokens.

        Raises ValueError or RuntimeError (expected and got) for what ``NVFP4Experts`` refuses. With replicated tokens,
        a rank whose own inputs are right waits for the others then; with sharded ones every rank raises.
        """
        self._check_own_buffers()
        device = hidden_states.device.type
        if hidden_states.dtype == torch.float32 and torch.is_autocast_enabled(device):
            # As the op does; before tokens and sums are exchanged, which then have 16 bits too.
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        if self.plan.tokens == "sharded":
            return self._sharded(hidden_states, topk_weights, topk_ids)
        groups = self._groups("tp", "ep")
        needs_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or topk_weights.requires_grad)
        if needs_grad:
            hidden_states = gradients_added(hidden_states, groups)
            topk_weights = gradients_added(topk_weights, groups)
        output = self.local(hidden_states, topk_weights, topk_ids)
        return summed(output, groups, self.plan.reduce_dtype)

    def _check_own_buffers(self) -> None:
        """Nobody writes ``_owner`` in place but who writes all buffers, as a broadcast of those of another rank."""
        if torch.compiler.is_compiling() or self._owner.is_inference() or self._owner._version == 0:
            return
        raise RuntimeError(
            "expected this rank's own experts, got buffers that were written in place, as DistributedDataParallel "
            "does with those of rank 0: give it the module that parallelize_experts returned, or tell it by "
            "_set_params_and_buffers_to_ignore_for_model(module, names) to ignore the buffers of ParallelExperts"
        )

    def local(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """What this rank's experts add to the result, [M, K]; nothing is exchanged."""
        experts = self._stand_in if self.experts is None else self.experts
        assert experts is not None
        result: Tensor = experts(hidden_states, topk_weights, topk_ids)
        return result

    def _sharded(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (hidden_states.requires_grad or topk_weights.requires_grad):
            raise NotImplementedError(
                "expected no gradient through experts whose tokens are sharded, got one that is wanted: call them "
                "under torch.no_grad(), or use ExpertsPlan(tokens='replicated')"
            )
        problem = None
        if hidden_states.shape[-1] != self.hidden_size:
            expected, got = f"[..., {self.hidden_size}] (hidden_size)", list(hidden_states.shape)
            problem = f"ParallelExperts: expected hidden_states {expected}, got {got}"
        try:
            check_leading_dimensions(hidden_states=hidden_states, topk_weights=topk_weights, topk_ids=topk_ids)
        except ValueError as error:
            problem = str(error)
        x, weights, ids = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (hidden_states, topk_weights, topk_ids))
        (group,) = self._groups("ep")
        output = sent_to_experts(self.local, x, weights, ids, self._owner, group, problem)
        return summed(output, self._groups("tp"), self.plan.reduce_dtype).view(hidden_states.shape)

    def _groups(self, *names: str) -> list[Any]:
        """The process groups of those dimensions of the plan that it names."""
        dims = [getattr(self.plan, name) for name in names]
        return [self.mesh.get_group(mesh_dim(self.mesh, dim)) for dim in dims if dim is not None]

    def extra_repr(self) -> str:
        """Sizes of the layer and the rank's place, for ``print(module)``."""
        place, part = self._place, self.expert_range
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, experts {part.start}..{part.stop - 1} of rank "
            f"{place.ep_rank} of {place.ep_size}, intermediate part {place.tp_rank} of {place.tp_size}, "
            f"tokens={self.plan.tokens}"
        )


def _build(
    mesh: DeviceMesh,
    plan: ExpertsPlan,
    sizes: tuple[int, int, int],
    device: torch.device,
    make: Callable[[range, _Place, Tensor | None], NVFP4Experts],
    config: MoEQuantConfig,
    backend: str | None,
    input_quant: str | None,
) -> ParallelExperts:
    """``make(experts, place, expert_map)`` where the rank has experts; else what the arguments behind it say."""
    place = _Place.of(mesh, plan)
    num_experts, hidden_size, intermediate_size = sizes
    rows = checked_part(intermediate_size, place.tp_rank, place.tp_size)
    part = expert_range(num_experts, place.ep_rank, place.ep_size)
    expert_map = None
    if len(part) < num_experts:
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device="cpu")
        expert_map[part.start : part.stop] = torch.arange(len(part), dtype=torch.int32, device="cpu")
    experts = make(part, place, expert_map) if part else None
    stand_in = None
    if experts is None:
        stand_in = _NoExperts(
            1, hidden_size, len(rows), quant_config=config, expert_map=expert_map, backend=backend,
            input_quant=input_quant, device=device,
        )  # fmt: skip
    return ParallelExperts(
        experts,
        mesh,
        plan,
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        device=device,
        stand_in=stand_in,
    )


@overload
def parallelize_experts(module: NVFP4Experts, mesh: DeviceMesh, plan: ExpertsPlan) -> ParallelExperts: ...
@overload
def parallelize_experts(module: _Module, mesh: DeviceMesh, plan: ExpertsPlan) -> _Module: ...
def parallelize_experts(module: nn.Module, mesh: DeviceMesh, plan: ExpertsPlan) -> nn.Module:
    """Replaces every ``NVFP4Experts`` in ``module`` by this rank's part of it, sliced from the canonical weights and
    then packed: packed bytes cannot be sliced along I.

    Every rank holds the whole layer while its part is cut out, one layer at a time; ``load_experts`` reads the part
    alone. ``DistributedDataParallel(module)`` leaves each rank its own experts; around a module that holds ``module``
    it makes them those of rank 0, which the next forward refuses.

    Args:
        module: changed in place; ``NVFP4Experts`` itself is left as it is.
        mesh: of one dimension, or of two for a plan with tp and ep, or of more, along which all ranks do the same.
        plan: which dimension of the mesh splits what.

    Returns ``module``, or the ``ParallelExperts`` that take the place of ``module`` itself. Raises ValueError for a
    plan that does not fit the mesh or the sizes, for experts that have an expert_map (they are a part already), and for
    a module without experts.
    """
    if isinstance(module, NVFP4Experts):
        return _parallel(module, mesh, plan)
    found = [
        (parent, name, child)
        for parent in module.modules()
        if not isinstance(parent, ParallelExperts)
        for name, child in parent.named_children()
        if isinstance(child, NVFP4Experts)
    ]
    if not found:
        raise ValueError(f"module: expected NVFP4Experts in it, got {type(module).__name__} without")
    for _, _, child in found:  # before the first is replaced
        _check_whole(child)
        checked_part(child.intermediate_size, 0, _Place.of(mesh, plan).tp_size)
    new: dict[int, ParallelExperts] = {}
    for parent, name, child in found:  # a layer may be there twice
        if id(child) not in new:
            new[id(child)] = _parallel(child, mesh, plan)
        setattr(parent, name, new[id(child)])
    _keep_from_ddp(module)
    return module


def _keep_from_ddp(module: nn.Module) -> None:
    """Tells DistributedDataParallel, should ``module`` be wrapped in it, to leave every rank its own experts: it makes
    all buffers those of rank 0."""
    own = {
        f"{name}.{buffer}"
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, ParallelExperts)
        for buffer, _ in child.named_buffers()
    }
    own.update(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(own))


def _check_whole(module: NVFP4Experts) -> None:
    if module.expert_map is not None:
        raise ValueError(
            "expected experts without an expert_map, got one: they are one rank's part already; build the whole layer, "
            "or load the part with torch_nvfp4.distributed.load_experts"
        )
    if module.device.type == "meta":
        raise ValueError("expected experts with weights, got them on the meta device; load_experts reads a rank's part")


def _parallel(module: NVFP4Experts, mesh: DeviceMesh, plan: ExpertsPlan) -> ParallelExperts:
    _check_whole(module)

    def make(part: range, place: _Place, expert_map: Tensor | None) -> NVFP4Experts:
        w13, w2 = slice_experts(*module.unpacked_weights(), part, place.tp_rank, place.tp_size)
        w13_bias, w2_bias = slice_biases(module, part, place.tp_rank, place.tp_size)
        return NVFP4Experts.from_weights(
            w13,
            w2,
            w13_bias=w13_bias,
            w2_bias=w2_bias,
            quant_config=module.quant_config,
            expert_map=expert_map,
            apply_router_weight_on_input=module.apply_router_weight_on_input,
            backend=module.requested_backend,
            input_quant=module.input_quant,
        )

    sizes = (module.num_experts, module.hidden_size, module.intermediate_size)
    config = MoEQuantConfig(
        module.quant_config.gate, apply_router_weight_on_input=module.apply_router_weight_on_input
    )  # fmt: skip
    return _build(mesh, plan, sizes, module.device, make, config, module.requested_backend, module.input_quant)


def load_experts(
    checkpoint: str | Path | Checkpoint,
    layer: int,
    mesh: DeviceMesh,
    plan: ExpertsPlan,
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    input_quant: str | None = None,
) -> ParallelExperts:
    """One layer of a checkpoint, of which each rank reads its own part and nothing else.

    Gate, limit and where the router's weight acts come from the checkpoint's config, as in
    ``NVFP4Experts.from_checkpoint``, whose keywords ``backend`` and ``input_quant`` are. All ranks along tp and ep have
    to call it.

    Raises CheckpointError (a ValueError), also where another rank cannot read its part, and what
    ``parallelize_experts`` raises.
    """
    _Place.of(mesh, plan)  # raises on ranks that take no part
    groups = [mesh.get_group(mesh_dim(mesh, dim)) for dim in (plan.tp, plan.ep) if dim is not None]
    return on_every_rank(
        lambda: _load(checkpoint, layer, mesh, plan, device, backend, input_quant), groups, mesh.device_type
    )


def _load(
    checkpoint: str | Path | Checkpoint,
    layer: int,
    mesh: DeviceMesh,
    plan: ExpertsPlan,
    device: torch.device | str,
    backend: str | None,
    input_quant: str | None,
) -> ParallelExperts:
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    config = source.layer_config(layer)
    quant = MoEQuantConfig(config.gate, apply_router_weight_on_input=config.apply_router_weight_on_input)

    def make(part: range, place: _Place, expert_map: Tensor | None) -> NVFP4Experts:
        weights = source.experts(layer, tp_rank=place.tp_rank, tp_size=place.tp_size, experts=part).to(device)
        return NVFP4Experts.from_weights(
            weights.w13,
            weights.w2,
            w13_bias=weights.w13_bias,
            w2_bias=weights.w2_bias,
            quant_config=quant,
            expert_map=expert_map,
            backend=backend,
            input_quant=input_quant,
        )

    return _build(mesh, plan, config[:3], torch.device(device), make, quant, backend, input_quant)
