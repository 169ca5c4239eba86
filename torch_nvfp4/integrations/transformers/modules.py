"""The modules that take the place of a model's own experts and linears.

Each is a shell that stays in the model: hooks for parallelism hang on it. While transformers loads, a shell has
parameters on the meta device that no checkpoint tensor is loaded into; plans for parallelism shard them, and their
placement then says which part of the weight this rank has. ``pack`` reads that part and drops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from torch_nvfp4.checkpoint import Checkpoint, LayerConfig
from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight
from torch_nvfp4.integrations.transformers.expert_layout import USUAL, ExpertLayout
from torch_nvfp4.nn import NVFP4Experts, NVFP4Linear
from torch_nvfp4.quant_config import MoEQuantConfig

__all__ = ["PackedExperts", "PackedLinear", "Part", "Shell", "expert_parts"]


class Part(NamedTuple):
    """The part of a parameter that this rank has: chunk `rank` of `size` along `dim`; size 1 for all of it.

    With `blocks` 2 it is that chunk of the first half and of the second, as of gate and up behind each other.
    """

    dim: int = 0
    rank: int = 0
    size: int = 1
    blocks: int = 1


WHOLE = Part()


def expert_parts(parts: Mapping[str, Part], layout: ExpertLayout = USUAL) -> dict[str, Any]:
    """The keywords of ``Checkpoint.experts`` for a rank's parts of the parameters of experts, by their names.

    Biases go with their weights: of experts that are split by I, down_proj_bias is added by the first rank alone.

    Raises NotImplementedError for anything but whole experts, or rows of gate and of up with columns of down.
    """
    first, down = (_as_rows(parts[name], layout) for name in (layout.first, "down_proj"))
    _, rank, size, _ = first
    biases = [parts.get(f"{name}_bias", WHOLE) for name in (layout.first, "down_proj")]
    by_expert, by_size = Part(0, rank, size), Part(1, rank, size, layout.blocks)
    if (first, down) == (by_expert, by_expert) and all(bias in (WHOLE, by_expert) for bias in biases):
        return {"ep_rank": rank, "ep_size": size}
    if (first, down) == (by_size, Part(2, rank, size)) and biases[0] in (WHOLE, by_size) and biases[1] == WHOLE:
        return {"tp_rank": rank, "tp_size": size}
    style = "packed_colwise" if layout.blocks == 2 else "colwise"
    expected = f"experts sharded by expert (grouped_gemm) or by intermediate size ({style} and rowwise)"
    got = ", ".join(f"{name} {part}" for name, part in parts.items())
    raise NotImplementedError(refusal("parallel plan", expected, got))


def _as_rows(part: Part, layout: ExpertLayout) -> Part:
    """The part of a weight [E, out, in], whose dimensions the layout may have swapped."""
    return part._replace(dim=3 - part.dim) if layout.transposed and part.dim else part


class Shell(nn.Module):
    """What both have in common: placeholders that no state dict shows, and nothing to initialise."""

    placeholders: tuple[str, ...] = ()
    # Marks what transformers has to leave as it is after loading.
    _is_hf_initialized = True

    def _add_placeholder(self, name: str, *shape: int) -> None:
        placeholder = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), requires_grad=False)
        placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
        self.register_parameter(name, placeholder)

    def _part(self, name: str) -> Part:
        parameter = self._parameters[name]
        if not isinstance(parameter, DTensor):
            return WHOLE
        mesh = parameter.device_mesh
        if mesh.ndim != 1 or len(parameter.placements) != 1:
            expected = "a plan that shards along one dimension of the device mesh"
            raise NotImplementedError(refusal(type(self).__name__, expected, f"{parameter.placements} on {mesh}"))
        placement = parameter.placements[0]
        if isinstance(placement, Replicate):
            return WHOLE
        blocks = int(getattr(placement, "split_factor", 1))
        return Part(int(placement.dim) % parameter.ndim, mesh.get_local_rank(), mesh.size(), blocks)

    def _drop_placeholders(self) -> None:
        for name in self.placeholders:
            self._parameters.pop(name, None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.placeholders:
            destination.pop(prefix + name, None)


class PackedExperts(Shell):
    """The routed experts of a layer in place of a model's ``experts``, called as they are.

    Attributes:
        layer: their layer in the checkpoint.
        num_experts, hidden_dim, intermediate_dim: as transformers names them; plans for expert parallelism set
            num_experts to those of this rank.
        quant_config, layout: the gate and the layout of the module whose place this took.
        packed: ``NVFP4Experts`` once the weights are read.
    """

    def __init__(
        self, layer: int, sizes: LayerConfig, quant_config: MoEQuantConfig, config: Any, backend: str | None,
        layout: ExpertLayout = USUAL, input_quant: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer = layer
        self.num_experts, self.hidden_dim, self.intermediate_dim = sizes[:3]
        self.quant_config = quant_config
        self.config = config  # parallel styles ask it for the experts' implementation
        self.backend = backend
        self.input_quant = input_quant
        self.layout = layout
        self._is_expert_parallel = False
        shapes = layout.packed_shapes(*sizes[:3])
        for name, shape in shapes.items():
            self._add_placeholder(name, *shape)
        self.placeholders = tuple(shapes)
        self.packed: NVFP4Experts | None = None

    @torch.no_grad()
    def pack(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Reads this rank's part of the layer and packs it on the device.

        Raises CheckpointError as ``Checkpoint.experts``, NotImplementedError as ``expert_parts``, and ValueError where
        the layer cannot have its ``input_quant`` on the device.
        """
        part = expert_parts({name: self._part(name) for name in self.placeholders}, self.layout)
        weights = checkpoint.experts(self.layer, progress=None, **part).to(device)
        self._drop_placeholders()
        self.packed = NVFP4Experts.from_weights(
            weights.w13,
            weights.w2,
            w13_bias=weights.w13_bias,
            w2_bias=weights.w2_bias,
            quant_config=self.quant_config,
            backend=self.backend,
            input_quant=self.input_quant,
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [M, K], top_k_index and top_k_weights [M, top_k] -> [M, K]; ids outside [0, E) add nothing."""
        assert self.packed is not None, "the weights are read when transformers has loaded the model"
        output: Tensor = self.packed(hidden_states, top_k_weights, top_k_index)
        return output


class PackedBytes(Tensor):
    """A packed weight for those who ask a linear for its ``weight``: device and size are real, ``data`` is refused.

    PEFT reads and writes ``weight.data`` to merge an adapter, and the bytes mean nothing to it.
    """

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        raise ValueError(
            "expected a linear with a dense weight to merge an adapter into, got a packed NVFP4 weight; keep the "
            "adapter beside it (save_pretrained of the PEFT model), or merge it into the model before it is quantized"
        )


class PackedLinear(Shell, nn.Linear):
    """An NVFP4 linear in place of an ``nn.Linear``; one itself, so that PEFT and tensor parallelism know it.

    Attributes:
        name: of its module in the checkpoint.
        packed: ``NVFP4Linear`` (without the bias, which stays a parameter of its own) once the weight is read.
    """

    placeholders = ("packed_placeholder",)
    _hf_quantized_needs_local_tp = True

    def __init__(self, name: str, in_features: int, out_features: int, bias: bool, dtype: torch.dtype | None = None):
        nn.Module.__init__(self)
        self.name = name
        self.in_features, self.out_features = in_features, out_features  # of all ranks
        self._add_placeholder("packed_placeholder", out_features, in_features // 2)
        empty = torch.empty(out_features, device="meta", dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if bias else None)
        self.packed: NVFP4Linear | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The packed bytes, for their device. They can be neither read as a dense weight nor written."""
        if self.packed is None:
            return self.get_parameter("packed_placeholder")
        return next(self.packed.buffers()).as_subclass(PackedBytes)

    @torch.no_grad()
    def pack(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Reads this rank's part of the weight and packs it on the device.

        Raises CheckpointError as ``Checkpoint.linear``, and for columns that cannot be split in groups of 16.
        """
        dim, rank, size, blocks = self._part("packed_placeholder")
        if blocks != 1:
            expected = "a plan that shards rows or columns in one piece"
            raise NotImplementedError(refusal(self.name, expected, f"rows of {blocks} fused matrices"))
        data, scale, global_scale = checkpoint.linear(self.name)
        if dim == 0:
            rows = -(-self.out_features // size)
            data, scale = (tensor[rank * rows : (rank + 1) * rows] for tensor in (data, scale))
        else:
            if self.in_features % (GROUP_SIZE * size):
                expected = f"in_features to be a multiple of 16 for each of {size} ranks"
                raise CheckpointError(refusal(self.name, expected, f"{self.in_features}"))
            data, scale = (tensor.chunk(size, 1)[rank] for tensor in (data, scale))
        weight = NVFP4Weight(*(tensor.contiguous().to(device) for tensor in (data, scale, global_scale)))
        self._drop_placeholders()
        self.packed = NVFP4Linear.from_weight(weight)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N] in its dtype."""
        assert self.packed is not None, "the weight is read when transformers has loaded the model"
        output: Tensor = self.packed(input)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
