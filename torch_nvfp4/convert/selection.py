"""Which weights of a checkpoint become NVFP4, which FP8 weights become 16-bit, and which tensors stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch_nvfp4.checkpoint.headers import TensorInfo, tensor_error
from torch_nvfp4.checkpoint.layouts import (
    BIAS_DTYPES,
    BIAS_LEAVES,
    PROJECTIONS,
    ExpertName,
    expert_name,
    kind_of,
    scheme,
    spelling_of,
    split_name,
    stored,
)
from torch_nvfp4.convert.source import DTYPES, HIGH_PRECISION, Source
from torch_nvfp4.errors import CheckpointError, refusal, shown
from torch_nvfp4.format import GROUP_SIZE
from torch_nvfp4.mxfp4 import GROUP_SIZE as MXFP4_GROUP_SIZE

__all__ = ["Bias", "Group", "Part", "Selection", "StoredWeight", "select"]

_WEIGHT_LEAVES = (".weight", "")  # "": experts that transformers holds as parameters
_BLOCK_SCALE_LEAVES = (".weight_scale_inv", ".scale", "_scale_inv")
# What the halves of a fused projection are called when each is a module of its own.
_SPLIT = {"gate_up_proj": ("gate_proj", "up_proj"), "w13": ("w1", "w3")}
# Engines run the matrices of one tuple as one GEMM, with one global scale.
_FUSED = (("gate_proj", "up_proj"), ("w1", "w3"), ("q_proj", "k_proj", "v_proj"))
_QUANTIZED_DTYPES = ("U8", "I8", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I32")


class StoredWeight(NamedTuple):
    """A module's weight [..., rows, cols]; with `scale`, E4M3 values in blocks that have one scale each, or MXFP4."""

    module: str
    data: TensorInfo
    scale: TensorInfo | None
    others: tuple[str, ...]  # more leaves of the module
    is_mxfp4: bool = False
    is_interleaved: bool = False  # rows of gate and up alternate
    bias: TensorInfo | None = None  # of experts; that of another module is copied

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., rows, cols], in values."""
        shape = self.data.shape
        if not self.is_mxfp4:
            return shape
        assert self.scale is not None
        *batch, groups = self.scale.shape
        return (*batch, groups * MXFP4_GROUP_SIZE)

    def source_bytes(self, rows: int, cols: int) -> int:
        """Of so many rows and columns of the weight."""
        values = rows * cols
        return values // 2 if self.is_mxfp4 else values * DTYPES[self.data.dtype].itemsize


class Part(NamedTuple):
    """A matrix that becomes NVFP4: rows of one expert's matrix, or all of a module's."""

    name: str  # of the module that is written
    weight: StoredWeight
    expert: int | None  # which matrix of a stack
    first_row: int
    rows: int
    cols: int
    swapped: bool  # a stack that holds [cols, rows]
    interleaved: bool = False  # every second row from first_row on


class Bias(NamedTuple):
    """The bias of a part of a module of experts."""

    name: str  # of the tensor that is written
    info: TensorInfo  # [rows], of a stack [matrices, rows of each]
    part: Part


class Group(NamedTuple):
    """Matrices that share one global scale."""

    parts: tuple[Part, ...]


class Selection(NamedTuple):
    """What happens to every tensor of a source.

    experts: per layer of routed experts (root of its names -> groups), biases: theirs. linears: other modules that
    become NVFP4. dequantized: FP8 weights that become bf16. copied: tensors that stay.
    """

    experts: dict[str, list[Group]]
    biases: dict[str, list[Bias]]
    linears: list[Group]
    dequantized: list[StoredWeight]
    copied: list[TensorInfo]
    left_modules: list[str]  # unquantized modules with a weight matrix, for the config of the result
    left_experts: list[str]  # roots of layers whose experts stay


def select(source: Source, include: Sequence[str] | None, exclude: Sequence[str]) -> Selection:
    """Sorts the tensors of a source.

    Args:
        include: globs over names of modules ("model.layers.3.*"); None for the routed experts.
        exclude: globs of modules that stay, of those that `include` takes.

    Raises:
        CheckpointError: no routed experts, a glob that matches nothing or a part of a layer's experts, a selected
            weight that cannot be quantized, experts that are not all there.
    """
    weights, copied = _weights(source)
    candidates = {name: weight for name, weight in weights.items() if _is_candidate(source, weight)}
    nodes = {module: name for module in candidates if (name := _expert_node(module, candidates[module])) is not None}
    if not nodes:
        raise CheckpointError(_no_experts(source, weights))
    chosen = _chosen(source, candidates, nodes, include, exclude)
    experts = {}
    roots: dict[str, list[str]] = {}
    for module, name in nodes.items():
        roots.setdefault(name.root, []).append(module)
    left = [module for module in weights if module not in chosen]
    for root, modules in sorted(roots.items(), key=lambda item: (nodes[item[1][0]].layer, item[0])):
        taken = [module for module in modules if module in chosen]
        if not taken:
            continue
        if len(taken) < len(modules):
            got = f"{len(taken)} of {len(modules)} modules, without {shown(sorted(set(modules) - set(taken))[0])}"
            expected = "globs that take all experts of a layer, or none"
            raise CheckpointError(refusal(f"{source.path}: tensors {root}*", expected, got))
        experts[root] = _expert_groups(source, root, [(nodes[module], candidates[module]) for module in modules])
    linears = [module for module in candidates if module in chosen and module not in nodes]
    left_names = [expert_name(module) for module in left]
    return Selection(
        experts,
        {root: _biases(groups) for root, groups in experts.items()},
        _linear_groups(candidates, linears),
        [weights[module] for module in left if weights[module].scale is not None and not weights[module].is_mxfp4],
        copied + [info for module in left for info in _as_they_are(weights[module])],
        [module for module in left if expert_name(module) is None and len(weights[module].data.shape) == 2],
        list(dict.fromkeys(name.root for name in left_names if name is not None)),
    )


def _as_they_are(weight: StoredWeight) -> Iterator[TensorInfo]:
    """The tensors of a weight that stays; none of an FP8 one, which becomes bf16."""
    if weight.scale is None or weight.is_mxfp4:
        yield weight.data
    if weight.is_mxfp4:
        assert weight.scale is not None
        yield weight.scale
    if weight.bias is not None:
        yield weight.bias


def _biases(groups: Iterable[Group]) -> list[Bias]:
    parts = (part for group in groups for part in group.parts)
    return [Bias(f"{part.name}.bias", part.weight.bias, part) for part in parts if part.weight.bias is not None]


def _weights(source: Source) -> tuple[dict[str, StoredWeight], list[TensorInfo]]:
    """The modules with a weight, and the tensors that are neither a weight nor its block scales."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for info in source.files.tensors.values():
        module, leaf = split_name(info.name)
        modules.setdefault(module, {})[leaf] = info
    is_nvfp4 = any(expert_name(module) and scheme(leaves) == "nvfp4" for module, leaves in modules.items())
    weights, copied = {}, []
    for module, leaves in modules.items():
        if scheme(leaves) == "mxfp4":
            weights[module] = _mxfp4_weight(source, module, leaves)
            used = (weights[module].data, weights[module].scale, weights[module].bias)
            copied += [info for info in leaves.values() if info not in used]
            continue
        data = next((leaves[leaf] for leaf in _WEIGHT_LEAVES if leaf in leaves), None)
        scale = None
        if data is not None and data.dtype == "F8_E4M3":
            scale = next((leaves[leaf] for leaf in _BLOCK_SCALE_LEAVES if leaf in leaves), None)
        _check_not_quantized(leaves, data, scale, is_nvfp4)
        bias = None if data is None else _bias_of(module, leaves, len(data.shape) - 1)
        others = [info for info in leaves.values() if info not in (data, scale, bias)]
        copied += others
        if data is not None:
            if scale is not None:
                _check_blocks(source, data, scale)
            leaf_names = tuple(split_name(info.name)[1] for info in others)
            weights[module] = StoredWeight(module, data, scale, leaf_names, bias=bias)
    return weights, copied


def _mxfp4_weight(source: Source, module: str, leaves: dict[str, TensorInfo]) -> StoredWeight:
    name = expert_name(module)
    kind = kind_of(leaves, name is None or name.expert is not None)
    checked = stored(source.path, module, leaves, spelling_of(leaves, "mxfp4"), kind)
    bias = _bias_of(module, leaves, 1 if kind == "matrix" else 2)
    others = tuple(leaf for leaf, info in checked.others if info is not bias)
    interleaved = checked.spelling.is_interleaved
    return StoredWeight(module, checked.data, checked.scale, others, True, interleaved, bias)


def _bias_of(module: str, leaves: dict[str, TensorInfo], rank: int) -> TensorInfo | None:
    """The bias of a module of experts; None where there is none, or something else under its name."""
    name = expert_name(module)
    found = [leaves[leaf] for leaf in BIAS_LEAVES if leaf in leaves]
    if name is None or not name.root.endswith(".experts.") or len(found) != 1:
        return None
    return found[0] if found[0].dtype in BIAS_DTYPES and len(found[0].shape) == rank else None


def _check_not_quantized(
    leaves: dict[str, TensorInfo], data: TensorInfo | None, scale: TensorInfo | None, is_nvfp4: bool
) -> None:
    """`is_nvfp4`: whether the checkpoint has NVFP4 experts, and nobody need quantize it."""
    packed = next(
        (leaves[leaf] for leaf in (".weight_packed", "_packed", "_blocks", ".qweight") if leaf in leaves), data
    )
    if packed is None or scale is not None or packed.dtype in HIGH_PRECISION:
        return
    if packed is not data or packed.dtype in _QUANTIZED_DTYPES:
        scales = [
            f"{leaf.lstrip('._')} {info.dtype} {list(info.shape)}" for leaf, info in leaves.items() if "scale" in leaf
        ]
        expected = "bf16, fp16, fp32, MXFP4, or E4M3 with weight_scale_inv per block"
        got = f"{packed.dtype} with {' and '.join(scales) or 'no scale'}"
        advice = "start from the checkpoint before its quantization"
        if is_nvfp4:
            advice = "its experts are in NVFP4 already, and inspect, verify, generate and serve take it as it is"
        raise tensor_error(packed.file, packed.name, expected, got, advice)


def _check_blocks(source: Source, data: TensorInfo, scale: TensorInfo) -> None:
    (*batch, rows, cols), (block_rows, block_cols) = data.shape if len(data.shape) > 1 else (0, 0), source.block
    expected = (*batch, -(-rows // block_rows), -(-cols // block_cols))
    if scale.shape != expected or len(data.shape) < 2:
        text = f"shape {list(expected)}, one per block {block_rows} x {block_cols} of {list(data.shape)}"
        raise tensor_error(scale.file, scale.name, text, f"{list(scale.shape)}")
    if scale.dtype not in (*HIGH_PRECISION, "F8_E8M0"):
        raise tensor_error(scale.file, scale.name, "dtype F32, BF16, F16 or F8_E8M0", scale.dtype)


def _is_candidate(source: Source, weight: StoredWeight) -> bool:
    """Whether a glob may take the weight: no norm, no embedding, no router, nothing of multi-token prediction."""
    last, data = weight.module.rpartition(".")[2], weight.data
    if source.model.is_ignored(data.name) or (data.dtype not in HIGH_PRECISION and weight.scale is None):
        return False
    if expert_name(weight.module) is not None and ".experts." in f".{weight.module}":
        return len(weight.shape) in (2, 3)
    if weight.is_mxfp4:
        return False
    router = last in ("gate", "router", "wg") or last.endswith("_gate") or ".router." in weight.module
    return len(data.shape) == 2 and not router and "embed" not in last and last not in ("wte", "wpe")


def _expert_node(module: str, weight: StoredWeight) -> ExpertName | None:
    name = expert_name(module)
    if name is None or not name.root.endswith(".experts."):
        return None
    expected = 2 if name.expert is not None else 3
    if len(weight.shape) != expected:
        got = f"{list(weight.data.shape)}"
        raise tensor_error(weight.data.file, weight.data.name, f"a shape of {expected} dimensions", got)
    return name


def _no_experts(source: Source, weights: Iterable[str]) -> str:
    expected = "tensors ...layers.N...experts.M.gate_proj.weight (or w1, w2, w3, or stacks experts.gate_up_proj)"
    near = [name for name in weights if ".experts." in name or ".moe." in name]
    got = f"none; the nearest name is {shown(near[0])}" if near else "no MoE layer"
    return refusal(source.path, expected, got)


def _chosen(
    source: Source,
    candidates: Iterable[str],
    nodes: Iterable[str],
    include: Sequence[str] | None,
    exclude: Sequence[str],
) -> set[str]:
    names = list(candidates)
    for option, globs in (("--include", include or ()), ("--exclude", exclude)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                expected = f"a glob that matches one of {len(names)} modules such as {shown(next(iter(nodes)))}"
                raise CheckpointError(refusal(f"{source.path}: {option}", expected, shown(glob)))
    taken = set(nodes) if include is None else {n for n in names if any(fnmatchcase(n, glob) for glob in include)}
    result = {name for name in taken if not any(fnmatchcase(name, glob) for glob in exclude)}
    if not result:
        raise CheckpointError(refusal(source.path, "globs that leave something to quantize", "none of its modules"))
    return result


def _expert_groups(source: Source, root: str, modules: Iterable[tuple[ExpertName, StoredWeight]]) -> list[Group]:
    """Per expert gate with up, and down; all experts there, all of the same sizes."""
    roles: dict[int, dict[str, Part]] = {}
    stored: dict[str, StoredWeight] = {}
    kinds = set()
    for name, weight in modules:
        kinds.add(name.expert is None)
        stored[PROJECTIONS[name.projection]] = weight
        if weight.others:
            expected = "experts without other leaves than a weight, its scales and a bias"
            got = f"{shown(weight.others[0].lstrip('._'))} too, which nothing would apply"
            raise tensor_error(weight.data.file, weight.data.name, expected, got)
    if len(kinds) > 1:
        raise CheckpointError(refusal(f"{source.path}: tensors {root}*", "single experts or stacks of experts", "both"))
    swapped = kinds == {True} and _are_swapped(stored, source.model.expert_hidden_size)
    for name, weight in modules:
        for expert, role, part in _parts(source, root, name, weight, swapped):
            if role in roles.setdefault(expert, {}):
                raise tensor_error(weight.data.file, weight.data.name, f"one {role} projection", "another one")
            roles[expert][role] = part
    _check_experts(source, root, roles)
    _check_biases(roles)
    groups = []
    for expert in sorted(roles):
        parts = roles[expert]
        first = (parts["gate"], parts["up"]) if "gate" in parts else (parts["up"],)
        groups += [Group(first), Group((parts["down"],))]
    return groups


def _check_biases(roles: dict[int, dict[str, Part]]) -> None:
    """All matrices of the first GEMM have a bias, or none has; those of the second too."""
    for gemm in (("gate", "up"), ("down",)):
        parts = [part for each in roles.values() for role, part in each.items() if role in gemm]
        first = next((part.weight.bias for part in parts if part.weight.bias is not None), None)
        without = next((part for part in parts if part.weight.bias is None), None)
        if first is not None and without is not None:
            expected = f"a bias for {' and '.join(gemm)} of every expert, or for none"
            raise tensor_error(first.file, first.name, expected, f"none for {without.name}")


def _are_swapped(stored: dict[str, StoredWeight], hidden_size: int | None) -> bool:
    """Whether stacks are [E, in, out]: gate_up [E, K, 2I] with down [E, I, K], which the shapes tell.

    Stacks of gate and of up alone fit together in both ways, so that the config's K decides.
    """
    first, down = stored.get("gate_up", stored.get("up")), stored.get("down")
    if first is None or down is None or first.is_mxfp4 or down.is_mxfp4:
        return False
    times = 2 if "gate_up" in stored else 1
    (_, rows, cols), (_, down_rows, down_cols) = first.shape, down.shape
    straight = cols == down_rows and rows == times * down_cols
    swapped = rows == down_cols and cols == times * down_rows
    return swapped and (not straight or rows == hidden_size != cols)


def _parts(
    source: Source, root: str, name: ExpertName, weight: StoredWeight, swapped: bool
) -> Iterator[tuple[int, str, Part]]:
    *batch, rows, cols = weight.shape
    if swapped:
        rows, cols = cols, rows
    if weight.bias is not None and weight.bias.shape != (*batch, rows):
        info = weight.bias
        raise tensor_error(info.file, info.name, f"shape {[*batch, rows]}, one value per row", f"{list(info.shape)}")
    if weight.is_interleaved:
        source.model.check_gate_of_blocks()  # what is written no longer shows that it comes from gpt-oss's blocks
    interleaved = source.model.interleaves_gate_and_up or weight.is_interleaved
    for expert in range(batch[0]) if name.expert is None else (name.expert,):
        index, role = (expert if name.expert is None else None), PROJECTIONS[name.projection]
        if role != "gate_up":
            yield expert, role, _part(f"{root}{expert}.{name.projection}", weight, index, 0, rows, cols, swapped)
            continue
        if rows % 2:
            raise tensor_error(weight.data.file, weight.data.name, "as many gate rows as up rows", f"{rows} rows")
        for half, (part, projection) in enumerate(zip(("gate", "up"), _SPLIT[name.projection], strict=True)):
            first, module = half if interleaved else half * rows // 2, f"{root}{expert}.{projection}"
            result = _part(module, weight, index, first, rows // 2, cols, swapped)
            yield expert, part, result._replace(interleaved=interleaved)


def _part(name: str, weight: StoredWeight, expert: int | None, first: int, rows: int, cols: int, swapped: bool) -> Part:
    if not rows or not cols or cols % GROUP_SIZE:
        expected = f"a positive multiple of {GROUP_SIZE} inputs"
        got = f"{cols} (shape {list(weight.data.shape)})"
        raise tensor_error(weight.data.file, weight.data.name, expected, got, "--exclude leaves it as it is")
    return Part(name, weight, expert, first, rows, cols, swapped)


def _check_experts(source: Source, root: str, roles: dict[int, dict[str, Part]]) -> None:
    layer = next(iter(next(iter(roles.values())).values())).weight.module
    name = expert_name(layer)
    assert name is not None
    declared = source.model.num_experts(name.layer)
    num = declared if declared is not None else max(roles) + 1
    where = f"{source.path}: tensors {root}*"
    wanted: tuple[str, ...] = ("gate", "up", "down")
    if source.model.may_lack_a_gate and not any("gate" in parts for parts in roles.values()):
        wanted = ("up", "down")
    for expert in range(max(num, max(roles) + 1)):
        parts = roles.get(expert, {})
        missing = [role for role in wanted if role not in parts]
        if expert >= num:
            raise CheckpointError(refusal(where, f"experts 0..{num - 1} (from config.json)", f"expert {expert} too"))
        if missing:
            got = f"no {' and no '.join(missing)} projection of expert {expert}"
            text = f"{', '.join(wanted[:-1])} and {wanted[-1]} of experts 0..{num - 1}"
            raise CheckpointError(refusal(where, text, got))
        rows, cols = roles[0]["up"].rows, roles[0]["up"].cols
        for what, size, declared_size in (
            ("hidden size", cols, source.model.expert_hidden_size),
            ("intermediate size", rows, source.model.intermediate_size(name.layer)),
        ):
            if declared_size not in (None, size):
                raise CheckpointError(refusal(where, f"{what} {declared_size} (from config.json)", f"{size}"))
        for role, part in parts.items():
            expected = (cols, rows) if role == "down" else (rows, cols)
            if (part.rows, part.cols) != expected:
                text = f"the {role} projection {list(expected)} for hidden size {cols}, intermediate size {rows}"
                raise tensor_error(part.weight.data.file, part.weight.data.name, text, f"{[part.rows, part.cols]}")


def _linear_groups(weights: dict[str, StoredWeight], modules: Sequence[str]) -> list[Group]:
    """One group per module, or per set of modules that engines fuse."""
    waiting, groups = dict.fromkeys(modules), []
    for module in modules:
        if module not in waiting:
            continue
        parent, _, last = module.rpartition(".")
        family = next((family for family in _FUSED if last in family), (last,))
        names = [f"{parent}.{name}" if parent else name for name in family]
        members = [name for name in names if name in waiting]
        for name in members:
            del waiting[name]
        parts = []
        for name in members:
            rows, cols = weights[name].data.shape
            parts.append(_part(name, weights[name], None, 0, rows, cols, False))
        groups.append(Group(tuple(parts)))
    return groups
