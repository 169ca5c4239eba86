"""The experts of a layer as headers describe them: which rows of which modules each projection is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, overload

from torch_nvfp4.checkpoint.headers import TensorInfo, tensor_error
from torch_nvfp4.checkpoint.layouts import BIAS_DTYPES, BIAS_LEAVES, Matrix, Stored, Unsupported
from torch_nvfp4.checkpoint.leftovers import Leftover
from torch_nvfp4.errors import shown

__all__ = ["Expert", "LayerExperts", "StackedExperts", "check_biases", "check_size", "expert_of"]


class Expert(NamedTuple):
    """The matrices of an expert: gate and up [I, K], down [K, I]. gate is None for experts without one."""

    gate: Matrix | None
    up: Matrix
    down: Matrix

    @property
    def first(self) -> tuple[Matrix, ...]:
        """What the first GEMM has: gate and up, or up alone."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return (*self.first, self.down)


class StackedExperts(Sequence[Expert]):
    """The experts of stacks, made when asked for: a sparse file of a few bytes can declare very many."""

    def __init__(self, modules: Mapping[str, Stored], ids: range, interleaved: bool) -> None:
        self._modules, self._ids, self._interleaved = modules, ids, interleaved

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Expert: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Expert]: ...
    def __getitem__(self, index: int | slice) -> Expert | Sequence[Expert]:
        if isinstance(index, slice):
            return StackedExperts(self._modules, self._ids[index], self._interleaved)
        return expert_of(self._modules, self._ids[index], self._interleaved)


class LayerExperts(NamedTuple):
    """The routed experts of one layer, checked: gate and up [I, K], down [K, I] each.

    has_w13_bias, has_w2_bias: whether gate and up, and down, have biases. leftovers: the tensors among them that
    belong to none of their modules, for which loading refuses the layer.
    """

    experts: Sequence[Expert]
    hidden_size: int
    intermediate_size: int
    has_w13_bias: bool = False
    has_w2_bias: bool = False
    leftovers: tuple[Leftover, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether there is a gate beside up."""
        return self.experts[0].gate is not None

    @property
    def are_blocks_of_gpt_oss(self) -> bool:
        """Whether they are stored as no model but gpt-oss stores them, whatever config.json calls it."""
        return self.experts[0].up.stored.spelling.is_interleaved

    def kinds(self, experts: Sequence[Expert] | None = None) -> Sequence[Expert]:
        """Of the experts (None: of all), those whose modules differ: one of a stack, in which all share them."""
        experts = self.experts if experts is None else experts
        return experts[:1] if isinstance(experts, StackedExperts) else experts


def expert_of(modules: Mapping[str, Stored], index: int, interleaved: bool) -> Expert:
    """The expert at an index of modules by role (gate, up, down; gate_up for both)."""
    down = Matrix(modules["down"], index, 0, modules["down"].rows, 0)
    if "gate_up" not in modules:
        first = {role: Matrix(modules[role], index, 0, modules[role].rows, 0) for role in modules if role != "down"}
        return Expert(first.get("gate"), first["up"], down)
    both = modules["gate_up"]
    if both.rows % 2:
        raise tensor_error(both.data.file, both.data.name, "as many gate rows as up rows", f"{both.rows} rows")
    half = both.rows // 2
    up_row = 1 if interleaved else half
    return Expert(Matrix(both, index, 0, half, 0, interleaved), Matrix(both, index, up_row, half, 1, interleaved), down)


def check_size(matrix: Matrix, rows: int, cols: int, k: int, i: int) -> None:
    """Raises CheckpointError where a matrix has other sizes than these, which follow from K and I."""
    module = matrix.stored
    if (matrix.rows, module.cols) == (rows, cols):
        return
    if matrix.rows != module.rows:
        rows *= 2
    expected: list[int] = [rows, cols // 2]
    if len(module.data.shape) == 4:
        expected = [module.num, rows, cols // module.spelling.group_size, module.data.shape[3]]
    elif module.kind == "stack":
        expected = [module.num, *(expected[::-1] if module.swapped else expected)]
    elif module.kind == "rows":
        expected = [module.num * rows, cols // 2]
    info, text = module.data, f"shape {expected} for hidden size {k}, intermediate size {i}"
    raise tensor_error(info.file, info.name, text, f"{list(info.shape)}")


def check_biases(modules: Iterable[Stored]) -> bool:
    """Whether modules of experts have biases. Raises Unsupported where only some have, or one has another shape."""
    with_bias: TensorInfo | None = None
    without: Stored | None = None
    for module in modules:
        info = module.bias
        if info is None:
            without = module
            continue
        with_bias = info
        second = next((other for leaf, other in module.others if leaf in BIAS_LEAVES and other is not info), None)
        if second is not None:
            raise tensor_error(info.file, info.name, "one bias", f"{shown(second.name)} too", kind=Unsupported)
        expected = (module.num, module.rows) if module.kind == "stack" else (module.rows,)
        if module.kind == "rows" or info.shape != expected:
            text = f"shape {list(expected)}, one value per row" if module.kind != "rows" else "no bias of stacked rows"
            raise tensor_error(info.file, info.name, text, f"{list(info.shape)}", kind=Unsupported)
        if info.dtype not in BIAS_DTYPES:
            expected_dtypes = f"dtype {' or '.join(BIAS_DTYPES)}"
            raise tensor_error(info.file, info.name, expected_dtypes, info.dtype, kind=Unsupported)
    if with_bias is not None and without is not None:
        text = "biases for all projections of the first GEMM of all experts, and for all of the second, or none"
        raise tensor_error(with_bias.file, with_bias.name, text, f"none for {without.name}", kind=Unsupported)
    return with_bias is not None
