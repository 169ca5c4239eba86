"""Which tensors are NVFP4 or MXFP4 experts, NVFP4 linears or something else. Reads no tensor data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch_nvfp4.checkpoint.experts import (
    Expert,
    LayerExperts,
    StackedExperts,
    check_biases,
    check_size,
    expert_of,
)
from torch_nvfp4.checkpoint.headers import TensorInfo, tensor_error
from torch_nvfp4.checkpoint.layouts import (
    CATEGORY_OF_SCHEME,
    EXPERTS_OF_SCHEME,
    MXFP4_SPELLINGS,
    PROJECTIONS,
    SPELLINGS,
    ExpertName,
    Layout,
    Matrix,
    Stored,
    Unsupported,
    codes_of,
    expert_name,
    layout_of,
    scheme,
    spelling_of,
    split_name,
    stored,
    with_num,
)
from torch_nvfp4.checkpoint.leftovers import leftovers
from torch_nvfp4.errors import CheckpointError, refusal, shown
from torch_nvfp4.model_config import MAX_COUNT, ModelConfig

__all__ = ["Category", "Contents", "Expert", "LayerExperts", "id_spans"]

_KV_SCALES = "KV cache scales"
_IGNORED = "ignored (multi-token prediction)"
_CATEGORIES = (*EXPERTS_OF_SCHEME.values(), *CATEGORY_OF_SCHEME.values(), _KV_SCALES, _IGNORED)
_KV_CACHE_LEAVES = {".k_scale", ".v_scale"}
_SCALE_LEAVES = {leaf for spelling in SPELLINGS for leaf in (spelling.scale, spelling.global_scale)}
_GLOBAL_SCALE_LEAVES = {spelling.global_scale for spelling in SPELLINGS}
_SCALE_LEAVES |= {spelling.scale for spelling in MXFP4_SPELLINGS}
_ROLES = (("gate", "w1 or gate_proj"), ("up", "w3 or up_proj"), ("down", "w2 or down_proj"))


@dataclass(frozen=True)
class Category:
    """Tensors that are stored in the same way. `example` is the first tensor of the category."""

    name: str
    modules: int
    tensors: int
    nbytes: int
    example: str


class _Module(NamedTuple):
    name: str
    leaves: Mapping[str, TensorInfo]
    scheme: str


@dataclass
class _Node:
    """The modules under one `...layers.N...experts.`: expert id (None: all of them) -> gate, up, down or gate_up."""

    root: str
    layer: int
    slots: dict[int | None, dict[str, _Module]] = field(default_factory=dict)

    def modules(self) -> Iterable[_Module]:
        return (module for slot in self.slots.values() for module in slot.values())

    def scheme(self) -> str:
        """What its modules are: a damaged one of MXFP4 without its scales looks like one of NVFP4."""
        modules = list(self.modules())
        if any(module.leaves.keys() & _GLOBAL_SCALE_LEAVES for module in modules):
            return "nvfp4"
        return "mxfp4" if any(module.scheme == "mxfp4" for module in modules) else "nvfp4"


class Contents:
    """What the headers of a checkpoint say it holds.

    Attributes:
        layers: the layers whose experts can be loaded, as far as headers can tell.
        refused: the layers with NVFP4 or MXFP4 experts that cannot be loaded, and why.
        linears: the NVFP4 modules that are not routed experts.
        layout: the name of the layout of the first layer (or linear); None where nothing is NVFP4 or MXFP4.

    Raises CheckpointError for a damaged quantized module, and for a checkpoint of which no layer could be loaded.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> None:
        self.path = path
        self.layers: dict[int, LayerExperts] = {}
        self.refused: dict[int, CheckpointError] = {}
        self.linears: dict[str, Stored] = {}
        self.layout: str | None = None
        self._config = config
        self._counts: dict[str, tuple[set[str], list[TensorInfo]]] = {}
        self._nodes: dict[str, _Node] = {}
        self._outside: list[TensorInfo] = []  # of no node of experts and no linear
        self._sort(tensors)
        self._find_layers()
        self._find_leftovers()
        self._check_across_layers()

    def categories(self) -> tuple[Category, ...]:
        return tuple(
            Category(name, len(modules), len(tensors), sum(info.nbytes for info in tensors), tensors[0].name)
            for name, (modules, tensors) in sorted(self._counts.items(), key=lambda item: _CATEGORIES.index(item[0]))
        )

    def matrix(self, name: str) -> Matrix | None:
        """The NVFP4 module of that name, a linear or one projection of one expert; None for a stack of experts."""
        linear = self.linears.get(name)
        if linear is not None:
            return Matrix(linear, 0, 0, linear.rows, 0)
        parts = expert_name(name)
        layer = self.layers.get(parts.layer) if parts is not None else None
        matrices = (m for expert in layer.kinds() for m in expert.matrices) if layer is not None else iter(())
        return next((m for m in matrices if m.stored.name == name and m.is_whole), None)

    def _sort(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Modules into nodes of experts, linears and the rest."""
        modules: dict[str, dict[str, TensorInfo]] = {}
        for info in tensors.values():
            module, leaf = split_name(info.name)
            if self._config.is_ignored(info.name):
                self._count(_IGNORED, module, [info])
                self._outside.append(info)
            elif leaf in _KV_CACHE_LEAVES:
                self._count(_KV_SCALES, module, [info])
                self._outside.append(info)
            else:
                modules.setdefault(module, {})[leaf] = info
        for module, leaves in modules.items():
            kind, codes, name = scheme(leaves), codes_of(leaves), expert_name(module)
            if name is not None and codes is None and leaves.keys() & _SCALE_LEAVES:
                kind = "nvfp4"  # scales whose codes are missing
            # A dense matrix under a module called moe is no stack.
            dense = name is not None and name.expert is None and not name.root.endswith(".experts.")
            if name is None or (dense and codes is not None and len(codes.shape) != 3):
                self._count(CATEGORY_OF_SCHEME[kind], module, leaves.values())
                if kind == "nvfp4":
                    self.linears[module] = stored(self.path, module, leaves, spelling_of(leaves), "matrix")
                else:
                    self._outside += leaves.values()
                continue
            self._count(EXPERTS_OF_SCHEME.get(kind, CATEGORY_OF_SCHEME[kind]), module, leaves.values())
            self._add(name, _Module(module, leaves, kind))

    def _add(self, name: ExpertName, module: _Module) -> None:
        node = self._nodes.setdefault(name.root, _Node(name.root, name.layer))
        slot, role = node.slots.setdefault(name.expert, {}), PROJECTIONS[name.projection]
        if role in slot:
            info = next(iter(module.leaves.values()))
            raise tensor_error(info.file, info.name, f"one {role} projection", f"{shown(slot[role].name)} too")
        slot[role] = module

    def _count(self, category: str, module: str, infos: Iterable[TensorInfo]) -> None:
        modules, tensors = self._counts.setdefault(category, (set(), []))
        modules.add(module)
        tensors += infos

    def _find_layers(self) -> None:
        nodes: dict[int, _Node] = {}
        layouts: dict[int, Layout] = {}
        quantized = [
            node for node in self._nodes.values() if any(each.scheme in EXPERTS_OF_SCHEME for each in node.modules())
        ]
        # Beside NVFP4 experts, MXFP4 ones of the same layer are those of a draft or of another part of the model.
        for node in sorted(quantized, key=lambda node: node.scheme() == "mxfp4"):
            kind = node.scheme()
            first = next(module for module in node.modules() if module.scheme == kind)
            other = nodes.setdefault(node.layer, node)
            if other is not node:
                if other.scheme() != kind:
                    continue
                info = next(iter(first.leaves.values()))
                expected = f"the {kind.upper()} experts of layer {node.layer} under {shown(other.root)}"
                raise tensor_error(info.file, info.name, expected, f"{shown(node.root)} too")
            try:
                name = expert_name(first.name)
                assert name is not None
                layouts[node.layer] = layout_of(name, first.leaves, kind)
                self.layers[node.layer] = self._layer(node, layouts[node.layer])
            except Unsupported as error:
                self.refused[node.layer] = error
        if not self.layers and self.refused:
            raise self.refused[min(self.refused)]
        self.layers = dict(sorted(self.layers.items()))
        if self.layers:
            self.layout = layouts[next(iter(self.layers))].name
        elif self.linears:
            spelling = next(iter(self.linears.values())).spelling
            self.layout = "compressed-tensors" if spelling.reciprocal else "modelopt"

    def _find_leftovers(self) -> None:
        """Gives tensors inside loadable experts and linears that no module has to these, which refuse them."""
        layers = {node.root: node.layer for node in self._nodes.values() if node.layer in self.layers}
        # A further NVFP4 projection counts as a linear.
        inside = [info for module in self.linears.values() for info in (module.data, module.scale)]
        for root, found in leftovers(layers, [*self._outside, *inside]).items():
            self.layers[layers[root]] = self.layers[layers[root]]._replace(leftovers=tuple(found))
        for root, found in leftovers((f"{name}." for name in self.linears), self._outside).items():
            # A scale of the KV cache beside a linear's leaves is not the linear's.
            others = [(leaf, info) for leaf, info in found if f".{leaf}" not in _KV_CACHE_LEAVES]
            linear = self.linears[root[:-1]]
            self.linears[root[:-1]] = linear._replace(others=(*linear.others, *others))

    def _layer(self, node: _Node, layout: Layout) -> LayerExperts:
        if len({expert is None for expert in node.slots}) > 1:
            got = f"tensors of single experts under {shown(node.root)} beside stacks of all experts"
            raise CheckpointError(refusal(self.path, f"one layout for the experts of layer {node.layer}", got))
        self._check_one_format(node, layout)
        spelled = {
            role: module.name.rpartition(".")[2] for slot in node.slots.values() for role, module in slot.items()
        }
        if "gate" not in spelled and "gate_up" not in spelled and not self._config.may_lack_a_gate:
            where = f"{self.path}: tensors {node.root}{'0.' if layout.kind == 'matrix' else ''}*"
            got = f"{sorted(spelled.values())} only, and config.json has {self._config.hidden_act or 'no activation'}"
            advice = "experts without a gate are known of relu2 alone"
            raise Unsupported(refusal(where, "a gate projection (w1 or gate_proj)", got, advice))
        experts: Sequence[Expert]
        if layout.kind == "matrix":
            experts = self._separate_experts(node, layout, spelled)
        else:
            experts = self._stacked_experts(node, layout, spelled)
        return self._checked(node.layer, experts)

    def _check_one_format(self, node: _Node, layout: Layout) -> None:
        """Raises Unsupported for a module in another format. A damaged one in this format is refused by `stored`."""
        format, dtypes = ("MXFP4", ("U8", "I8")) if layout.spelling.is_mxfp4 else ("NVFP4", ("U8",))
        for module in node.modules():
            codes = codes_of(module.leaves)
            if module.scheme in EXPERTS_OF_SCHEME:
                same = module.scheme != "mxfp4" or format == "MXFP4"
            else:
                same = codes is None or codes.dtype in dtypes
            if not same:
                assert codes is not None
                expected = f"{format} like other projections of the experts of layer {node.layer}"
                got = f"{codes.dtype} ({CATEGORY_OF_SCHEME[module.scheme]})"
                advice = "one layer's experts in several formats are not supported; quantize all of them to NVFP4"
                raise tensor_error(codes.file, codes.name, expected, got, advice, kind=Unsupported)

    def _separate_experts(self, node: _Node, layout: Layout, spelled: Mapping[str, str]) -> list[Expert]:
        ids = sorted(expert for expert in node.slots if expert is not None)
        self._check_count(node, ids)
        experts = []
        for expert in ids:
            modules: dict[str, Stored] = {}
            for role in _roles(self.path, node, spelled):
                module = f"{node.root}{expert}.{spelled[role]}"
                leaves = node.slots[expert][role].leaves if role in node.slots[expert] else {}
                spelling = layout.spelling
                if leaves and not spelling.is_mxfp4:
                    spelling = spelling_of(leaves)
                modules[role] = stored(self.path, module, leaves, spelling, "matrix", gate_up=role == "gate_up")
            experts.append(expert_of(modules, 0, self._config.interleaves_gate_and_up))
        return experts

    def _stacked_experts(self, node: _Node, layout: Layout, spelled: Mapping[str, str]) -> StackedExperts:
        modules: dict[str, Stored] = {}
        for role in _roles(self.path, node, spelled):
            module = node.slots[None][role]
            modules[role] = stored(
                self.path, module.name, module.leaves, layout.spelling, layout.kind, gate_up=role == "gate_up"
            )
        if layout.kind == "rows":
            modules = self._split_rows(modules)
        num = modules["down"].num
        for role, content in modules.items():
            if content.num != num:
                info = content.data
                expected = f"as many experts as {shown(modules['down'].data.name)} has, {num}"
                raise tensor_error(info.file, info.name, expected, f"{content.num} ({role})")
        if num > MAX_COUNT:
            info = modules["down"].data
            raise tensor_error(info.file, info.name, f"at most {MAX_COUNT} experts in a layer", f"{num}")
        self._check_count(node, range(num))
        interleaved = self._config.interleaves_gate_and_up or layout.spelling.is_interleaved
        return StackedExperts(modules, range(num), interleaved)

    def _split_rows(self, modules: Mapping[str, Stored]) -> dict[str, Stored]:
        """[E * rows, cols] of all projections: down has I columns, so gate_up has 2I rows per expert, and K columns."""
        down = modules["down"]
        result = {}
        for role, module in modules.items():
            rows = next(iter(modules.values())).cols if role == "down" else down.cols * (2 if role == "gate_up" else 1)
            if module.rows % rows:
                info = module.data
                expected = f"rows of whole experts, a multiple of {rows}"
                raise tensor_error(info.file, info.name, expected, f"{module.rows}")
            result[role] = with_num(module, module.rows // rows, role == "gate_up")
        return result

    def _check_count(self, node: _Node, ids: Sequence[int]) -> None:
        declared = self._config.num_experts(node.layer)
        num = declared if declared is not None else ids[-1] + 1
        if ids == range(num):
            return
        source = "config.json" if declared is not None else "the largest id"
        missing, extra, following = [], [i for i in ids if i >= num], 0
        for i in ids:
            if following < min(i, num):
                missing.append((following, min(i, num) - 1))
            following = i + 1
        if following < num:
            missing.append((following, num - 1))
        if not missing and not extra:
            return
        got = [f"no expert {_spans(missing)}"] * bool(missing) + [f"also expert {id_spans(extra)}"] * bool(extra)
        where = f"{self.path}: tensors {node.root}{'*' if None in node.slots else 'M.*'}"
        expected = f"experts 0..{num - 1}" if num else "no experts"
        raise CheckpointError(refusal(where, f"{expected} in layer {node.layer} (from {source})", " and ".join(got)))

    def _checked(self, layer: int, experts: Sequence[Expert]) -> LayerExperts:
        """The experts with the sizes that all of them have, those of the config where it declares any."""
        up, config = experts[0].up, self._config
        k = config.expert_hidden_size if config.expert_hidden_size is not None else up.stored.cols
        declared = config.intermediate_size(layer)
        i = declared if declared is not None else up.rows
        content = LayerExperts(experts, k, i)
        for expert in content.kinds():
            for matrix in expert.first:
                check_size(matrix, i, k, k, i)
            check_size(expert.down, k, i, k, i)
        kinds = content.kinds()
        return content._replace(
            has_w13_bias=check_biases(matrix.stored for expert in kinds for matrix in expert.first),
            has_w2_bias=check_biases(expert.down.stored for expert in kinds),
        )

    def _check_across_layers(self) -> None:
        """One hidden size; numbers of experts may differ where the config says so."""
        first = next(iter(self.layers.values()), None)
        for layer, content in self.layers.items():
            assert first is not None
            if content.hidden_size != first.hidden_size:
                info = content.experts[0].up.stored.data
                expected = f"hidden size {first.hidden_size}, as in layer {next(iter(self.layers))}"
                raise tensor_error(info.file, info.name, expected, f"{content.hidden_size}")
            if len(content.experts) != len(first.experts) and not self._config.declares_num_experts:
                where, expected = f"{self.path}: layer {layer}", f"{len(first.experts)} experts"
                advice = "where layers differ, config.json has to say so (num_experts, a list with one per layer)"
                raise CheckpointError(refusal(where, expected, f"{len(content.experts)}", advice))


def _roles(path: Path, node: _Node, spelled: Mapping[str, str]) -> tuple[str, ...]:
    """The projections that the experts of a node consist of; a missing one is a damaged checkpoint."""
    if "gate_up" in spelled and spelled.keys() & {"gate", "up"}:
        got = f"{sorted(spelled.values())}"
        raise CheckpointError(refusal(f"{path}: tensors {node.root}*", "gate and up in one projection or in two", got))
    gateless = "gate" not in spelled and "gate_up" not in spelled  # which the config has to allow
    for role, names in _ROLES:
        if role not in spelled and not (role in ("gate", "up") and "gate_up" in spelled):
            if role == "gate" and gateless:
                continue
            where, got = f"{path}: tensors {node.root}*", f"{sorted(spelled.values())} only"
            raise CheckpointError(refusal(where, f"a {role} projection ({names})", got))
    if "gate_up" in spelled:
        return "gate_up", "down"
    return ("up", "down") if gateless else ("gate", "up", "down")


def id_spans(ids: Iterable[int]) -> str:
    """0..3, 7 for (0, 1, 2, 3, 7)."""
    runs: list[tuple[int, int]] = []
    for value in ids:
        if runs and value == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return _spans(runs)


def _spans(runs: list[tuple[int, int]]) -> str:
    more = f" and {len(runs) - 8} more spans" if len(runs) > 8 else ""
    return (", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs[:8]) or "none") + more
