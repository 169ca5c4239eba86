"""From the tensor names of a published checkpoint to canonical NVFP4 weights.

What is quantized, and how, is decided from the safetensors headers (which leaves exist, with which dtype and shape);
`ignore` globs and `quant_method` in the configs are only reported. Three layouts are read:

- `deepseek`: experts `layers.N.ffn.experts.M.{w1,w3,w2}` (gate, up, down) with the leaves `weight`, `weight_scale` and
  `weight_scale_2`;
- `modelopt`: the same leaves under `*layers.N.*experts.M.{gate_proj,up_proj,down_proj}` (or w1, w3, w2);
- `compressed-tensors` (`nvfp4-pack-quantized`): `weight_packed`, `weight_scale` and `weight_global_scale`, which is
  1 / `weight_scale_2`, under the same modules.

`input_scale` and `input_global_scale` may be there and are not used: activations stay 16-bit.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torch_nvfp4.errors import CheckpointError
from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight, reciprocal_global_scale
from torch_nvfp4.gate import Activation, Gate

__all__ = [
    "Category",
    "Checkpoint",
    "CheckpointError",
    "ExpertWeights",
    "GateActivation",
    "Summary",
    "TensorInfo",
    "open_checkpoint",
]

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
# The limit of the safetensors library itself; a larger length means that the file is not a safetensors file.
_MAX_HEADER_BYTES = 100_000_000
_DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_EXPERT = re.compile(
    r"(?P<root>(?:.*\.)?layers\.(?P<layer>[0-9]{1,6})\.(?:.*\.)?experts\.)(?P<expert>[0-9]{1,6})\.(?P<projection>\w+)"
)
_LAYER = re.compile(r"(?:.*\.)?layers\.([0-9]{1,6})\.")
_PROJECTIONS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_FUSED_EXPERTS = re.compile(r".*experts\.(gate_up_proj|down_proj)_(weight_scale|scales|blocks)(_2)?")
_KV_CACHE_LEAVES = {"k_scale", "v_scale"}


class TensorInfo(NamedTuple):
    """One tensor as the header of its shard declares it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path


class ExpertWeights(NamedTuple):
    """The experts of one layer (or of one rank's part of it).

    w13: [E, 2I, K], gate rows first, global_scale [E, 2] (gate, up). w2: [E, K, I], global_scale [E].
    """

    w13: NVFP4Weight
    w2: NVFP4Weight


GateActivation = Gate
"""The former name."""


@dataclass(frozen=True)
class Category:
    """Tensors that are stored in the same way. `example` is the first module (or tensor) of the category."""

    name: str
    modules: int
    tensors: int
    nbytes: int
    example: str


@dataclass(frozen=True)
class Summary:
    """What a checkpoint holds, for `torch-nvfp4 inspect`. None: not declared, or no NVFP4 experts."""

    path: Path
    layout: str | None
    model_type: str | None
    quant_method: str | None
    quant_algo: str | None
    shards: int
    nbytes: int
    layers: tuple[int, ...]
    num_experts: int | None
    top_k: int | None
    hidden_size: int | None
    intermediate_size: int | None
    hidden_act: str | None
    clamp_limits: dict[int, float | None]
    categories: tuple[Category, ...]


class _Leaves(NamedTuple):
    data: str
    scale: str
    global_scale: str
    input_scale: str
    reciprocal: bool  # the stored global scale is one over ModelOpt's


_MODELOPT = _Leaves("weight", "weight_scale", "weight_scale_2", "input_scale", reciprocal=False)
_COMPRESSED_TENSORS = _Leaves(
    "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", reciprocal=True
)


class _Linear(NamedTuple):
    """An NVFP4 module whose leaves were checked: data [rows, cols / 2], scale [rows, cols / 16]."""

    name: str
    rows: int
    cols: int
    data: TensorInfo
    scale: TensorInfo
    global_scale: TensorInfo
    reciprocal: bool
    other_leaves: frozenset[str]


class _Expert(NamedTuple):
    gate: _Linear
    up: _Linear
    down: _Linear


def open_checkpoint(path: str | Path) -> Checkpoint:
    """`Checkpoint.open`."""
    return Checkpoint.open(path)


class Checkpoint:
    """A checkpoint directory whose configs and headers were read and checked. Tensor data is read when asked for.

    Attributes:
        path: the directory.
        config: config.json.
        quant_config: the quantization section of config.json, else of hf_quant_config.json, else empty.
        tensors: every tensor by name.
        layout: "deepseek", "modelopt", "compressed-tensors", or None when nothing is NVFP4.
        layers: the layers whose experts are NVFP4, ascending.
        linears: the NVFP4 modules that are not routed experts.
    """

    def __init__(self, path: Path, config: dict[str, Any], quant_config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.quant_config = quant_config
        self.tensors = _collect_tensors(path)
        self._facts = ConfigFacts(path / "config.json", config)
        self._categories: dict[str, tuple[set[str], list[TensorInfo]]] = {}
        self._experts: dict[int, list[_Expert]] = {}
        self._linears: dict[str, _Linear] = {}
        self.layout: str | None = None
        self._classify()
        self._check_expert_shapes()
        self.layers = tuple(sorted(self._experts))
        self.linears = tuple(self._linears)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads config.json, hf_quant_config.json, the index and every shard's header; no tensor data.

        Without model.safetensors.index.json, model.safetensors is read, else every *.safetensors of the directory.

        Raises:
            CheckpointError: missing directory, config, index entry or shard; invalid JSON; a truncated file; a tensor
                that two shards hold; an NVFP4 module with a missing leaf, a wrong dtype or shape; missing expert ids;
                MXFP4 or fused experts; a clamp limit in the config whose form is not understood.
        """
        path = Path(path)
        if not path.is_dir():
            got = "a file" if path.exists() else "no such path"
            raise CheckpointError(f"{path}: expected a checkpoint directory, got {got}")
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: expected config.json in the directory, got {_listing(path)}")
        config = _load_json(path / "config.json")
        hf_quant_config = path / "hf_quant_config.json"
        separate = _load_json(hf_quant_config).get("quantization") if hf_quant_config.is_file() else None
        quant_config = config.get("quantization_config") or _text_config(config).get("quantization_config") or separate
        return cls(path, config, quant_config if isinstance(quant_config, dict) else {})

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer (all ranks). Raises CheckpointError when no layer has NVFP4 experts."""
        return len(self._experts[self._first_layer()])

    @property
    def hidden_size(self) -> int:
        """K of the experts. Raises CheckpointError when no layer has NVFP4 experts."""
        return self._experts[self._first_layer()][0].gate.cols

    @property
    def intermediate_size(self) -> int:
        """I of the experts. Raises CheckpointError when no layer has NVFP4 experts."""
        return self._experts[self._first_layer()][0].gate.rows

    @property
    def top_k(self) -> int:
        """Experts per token. Raises CheckpointError when config.json does not declare it."""
        if self._facts.top_k is None:
            expected = " or ".join(_TOP_K_KEYS)
            raise CheckpointError(f"{self.path / 'config.json'}: expected a key {expected}, got none of them")
        return self._facts.top_k

    @property
    def hidden_act(self) -> str | None:
        """The activation's name as config.json spells it."""
        return self._facts.hidden_act

    def clamp_limit(self, layer: int) -> float | None:
        """The SwiGLU clamp limit of a layer's routed experts, None for no clamp."""
        return self._facts.clamp_limit(layer)

    def gate(self, layer: int) -> Gate:
        """The gate that the config declares for a layer's routed experts, with its clamp limit.

        Raises:
            CheckpointError: an activation that is not known, or a clamp on an activation that has none: a clamp is
                never dropped.
        """
        return self._facts.gate(layer)

    def activation(self, layer: int) -> Gate:
        """The former name of `gate`."""
        return self.gate(layer)

    def experts(
        self,
        layer: int,
        *,
        tp_rank: int = 0,
        tp_size: int = 1,
        ep_rank: int = 0,
        ep_size: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> ExpertWeights:
        """Reads the experts of one layer, or one rank's part; no byte of another layer is read.

        Args:
            layer: one of `layers`.
            tp_rank, tp_size: slice I: rows of gate and up, columns of down. I / tp_size must be a multiple of 16.
            ep_rank, ep_size: slice the experts. ep_size must divide their number.
            progress: called with (experts read, experts to read) after each expert.

        Returns:
            w13 [E / ep_size, 2I / tp_size, K] with global_scale [E / ep_size, 2] (gate, up), gate rows first, and
            w2 [E / ep_size, K, I / tp_size] with global_scale [E / ep_size].

        Raises:
            CheckpointError: a layer without NVFP4 experts, a slice that does not fit, a NaN scale, a global scale that
                is not finite, an expert leaf (bias, pre_quant_scale) that `moe` could not apply.
        """
        if layer not in self._experts:
            raise CheckpointError(
                f"{self.path}: expected a layer with NVFP4 experts ({_ids(self.layers)}), got {layer}"
            )
        rows = self._rank_part("tp", tp_rank, tp_size, "intermediate size", self.intermediate_size, GROUP_SIZE)
        experts = self._experts[layer][self._rank_part("ep", ep_rank, ep_size, "number of experts", self.num_experts)]
        for expert in experts:
            for linear in expert:
                _refuse_leaves(linear, linear.other_leaves)
        num, i, k = len(experts), rows.stop - rows.start, self.hidden_size
        w13 = NVFP4Weight(_bytes(num, 2, i, k // 2), _bytes(num, 2, i, k // GROUP_SIZE), torch.empty(num, 2))
        w2 = NVFP4Weight(_bytes(num, k, i // 2), _bytes(num, k, i // GROUP_SIZE), torch.empty(num))
        every_k = slice(0, k)
        with _Shards() as shards:
            for index, expert in enumerate(experts):
                _copy_linear(shards, expert.gate, rows, every_k, *(part[index, 0] for part in w13))
                _copy_linear(shards, expert.up, rows, every_k, *(part[index, 1] for part in w13))
                _copy_linear(shards, expert.down, every_k, rows, *(part[index] for part in w2))
                if progress is not None:
                    progress(index + 1, num)
        return ExpertWeights(
            NVFP4Weight(w13.data.flatten(1, 2), w13.scale.flatten(1, 2).view(torch.float8_e4m3fn), w13.global_scale),
            NVFP4Weight(w2.data, w2.scale.view(torch.float8_e4m3fn), w2.global_scale),
        )

    def expert_map(self, ep_rank: int = 0, ep_size: int = 1) -> Tensor:
        """int32 [num_experts]: a global expert's index in `experts(ep_rank=..., ep_size=...)`, or -1 elsewhere."""
        local = self._rank_part("ep", ep_rank, ep_size, "number of experts", self.num_experts)
        expert_map = torch.full((self.num_experts,), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(local.stop - local.start, dtype=torch.int32)
        return expert_map

    def linear(self, name: str) -> NVFP4Weight:
        """Reads one NVFP4 module, a dense linear of `linears` or a single expert's projection.

        Returns:
            data [N, K/2], scale [N, K/16], global_scale 0-d. A bias is not part of it: `tensor(name + ".bias")`.

        Raises:
            CheckpointError: no such NVFP4 module, a NaN scale, a global scale that is not finite, or a leaf (for
                instance pre_quant_scale) that would change the result.
        """
        linear = self._linears.get(name) or self._expert_linear(name)
        if linear is None:
            raise CheckpointError(f"{self.path}: expected the name of an NVFP4 module, got {name!r}")
        _refuse_leaves(linear, linear.other_leaves - {"bias"})
        rows, cols = linear.rows, linear.cols
        weight = NVFP4Weight(_bytes(rows, cols // 2), _bytes(rows, cols // GROUP_SIZE), torch.empty(()))
        with _Shards() as shards:
            _copy_linear(shards, linear, slice(0, rows), slice(0, cols), *weight)
        return NVFP4Weight(weight.data, weight.scale.view(torch.float8_e4m3fn), weight.global_scale)

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor as it is stored. Raises CheckpointError when there is none of that name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: expected the name of one of {len(self.tensors)} tensors, got {name!r}")
        with _Shards() as shards:
            return shards.tensor(self.tensors[name]).clone()

    def summary(self) -> Summary:
        """What is quantized how, with counts and bytes. Reads nothing."""
        categories = tuple(
            Category(name, len(modules), len(tensors), sum(info.nbytes for info in tensors), tensors[0].name)
            for name, (modules, tensors) in sorted(
                self._categories.items(), key=lambda item: _CATEGORIES.index(item[0])
            )
        )
        has_experts = bool(self.layers)
        return Summary(
            path=self.path,
            layout=self.layout,
            model_type=self._facts.model_type,
            quant_method=self.quant_config.get("quant_method"),
            quant_algo=self.quant_config.get("moe_quant_algo") or self.quant_config.get("quant_algo"),
            shards=len({info.file for info in self.tensors.values()}),
            nbytes=sum(info.nbytes for info in self.tensors.values()),
            layers=self.layers,
            num_experts=self.num_experts if has_experts else None,
            top_k=self._facts.top_k,
            hidden_size=self.hidden_size if has_experts else None,
            intermediate_size=self.intermediate_size if has_experts else None,
            hidden_act=self.hidden_act,
            clamp_limits={layer: self.clamp_limit(layer) for layer in self.layers},
            categories=categories,
        )

    def _first_layer(self) -> int:
        if not self.layers:
            raise CheckpointError(f"{self.path}: expected a checkpoint with NVFP4 experts, got none in its headers")
        return self.layers[0]

    def _expert_linear(self, name: str) -> _Linear | None:
        match = _EXPERT.fullmatch(name)
        if match is None:
            return None
        layer = self._experts.get(int(match["layer"]), [])
        return next((linear for expert in layer for linear in expert if linear.name == name), None)

    def _rank_part(self, kind: str, rank: int, size: int, what: str, total: int, multiple: int = 1) -> slice:
        if size < 1 or not 0 <= rank < size:
            raise CheckpointError(
                f"{self.path}: expected {kind}_size >= 1 and 0 <= {kind}_rank < {kind}_size, got {kind}_rank {rank}, "
                f"{kind}_size {size}"
            )
        if total % (size * multiple):
            unit = f"multiples of {multiple} (the group of an NVFP4 scale)" if multiple > 1 else "whole experts"
            raise CheckpointError(
                f"{self.path}: expected a {kind}_size that splits the {what} {total} into {unit}, got {kind}_size "
                f"{size}: {total / size:g} each"
            )
        part = total // size
        return slice(rank * part, (rank + 1) * part)

    def _classify(self) -> None:
        modules: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            module, _, leaf = name.rpartition(".")
            if self._facts.is_ignored(name):
                self._count(_IGNORED, module, info)
            elif _FUSED_EXPERTS.fullmatch(name):
                raise _error(
                    info.file,
                    name,
                    "one tensor per expert (experts.M.gate_proj.weight, ...)",
                    "fused, quantized experts",
                )
            elif leaf in _KV_CACHE_LEAVES:
                self._count(_KV_SCALES, module, info)
            else:
                modules.setdefault(module, {})[leaf] = info

        experts: dict[int, dict[int, dict[str, tuple[str, str]]]] = {}  # layer, expert, gate/up/down -> module, scheme
        roots: dict[int, str] = {}
        for module, leaves in modules.items():
            scheme = _scheme(leaves)
            match = _EXPERT.fullmatch(module)
            if match is not None and match["projection"] in _PROJECTIONS:
                if scheme == "mxfp4":
                    info = leaves.get("weight") or leaves["weight_packed"]
                    raise _error(
                        info.file,
                        info.name,
                        "NVFP4 experts (U8 codes, F8_E4M3 scales per 16, F32 global scale)",
                        f"{info.dtype} codes with E8M0 scales: the MXFP4 original, not its NVFP4 conversion",
                        "download the -NVFP4 checkpoint",
                    )
                layer, projection = int(match["layer"]), _PROJECTIONS[match["projection"]]
                root = match["root"]
                info = next(iter(leaves.values()))
                if roots.setdefault(layer, root) != root:
                    raise _error(
                        info.file, info.name, f"the experts of layer {layer} under {roots[layer]!r}", f"{root!r} too"
                    )
                slot = experts.setdefault(layer, {}).setdefault(int(match["expert"]), {})
                if projection in slot:
                    raise _error(info.file, info.name, f"one {projection} projection", f"{slot[projection][0]!r} too")
                slot[projection] = (module, scheme)
                name = _EXPERTS if scheme == "nvfp4" else _CATEGORY_OF_SCHEME[scheme]
            else:
                name = _CATEGORY_OF_SCHEME[scheme]
                if scheme == "nvfp4":
                    self._linears[module] = _nvfp4_linear(self.path, module, leaves)
            for info in leaves.values():
                self._count(name, module, info)

        for layer, slots in sorted(experts.items()):
            if any(scheme == "nvfp4" for slot in slots.values() for _, scheme in slot.values()):
                self._experts[layer] = self._collect_experts(layer, roots[layer], slots, modules)
        self.layout = self._find_layout(modules, roots)

    def _find_layout(self, modules: Mapping[str, Mapping[str, TensorInfo]], roots: Mapping[int, str]) -> str | None:
        names = [expert.gate.name for experts in self._experts.values() for expert in experts[:1]] or list(
            self._linears
        )
        if not names:
            return None
        if _COMPRESSED_TENSORS.data in modules[names[0]]:
            return "compressed-tensors"
        native = any(re.fullmatch(r"layers\.\d+\.ffn\.experts\.", roots[layer]) for layer in self._experts)
        return "deepseek" if native else "modelopt"

    def _collect_experts(
        self,
        layer: int,
        root: str,
        slots: Mapping[int, Mapping[str, tuple[str, str]]],
        modules: Mapping[str, Mapping[str, TensorInfo]],
    ) -> list[_Expert]:
        num = self._facts.num_experts if self._facts.num_experts is not None else max(slots) + 1
        declared = "config.json" if self._facts.num_experts is not None else "the largest id"
        missing, extra = sorted(set(range(num)) - slots.keys()), sorted(slots.keys() - set(range(num)))
        if missing or extra:
            got = [f"no expert {_ids(missing)}"] * bool(missing) + [f"also expert {_ids(extra)}"] * bool(extra)
            raise CheckpointError(
                f"{self.path}: tensors {root}M.*: expected experts 0..{num - 1} in layer {layer} (from {declared}), "
                f"got {' and '.join(got)}"
            )
        # A missing module has the spelling that the other experts of the layer use.
        spelling = {
            projection: module.rpartition(".")[2] for slot in slots.values() for projection, (module, _) in slot.items()
        }
        experts = []
        for expert in range(num):
            linears = []
            for projection, names in (
                ("gate", "w1 or gate_proj"),
                ("up", "w3 or up_proj"),
                ("down", "w2 or down_proj"),
            ):
                if projection not in spelling:
                    raise CheckpointError(
                        f"{self.path}: tensors {root}{expert}.*: expected a {projection} projection ({names}), got "
                        f"{sorted(spelling.values())} only: experts without a gate are not supported"
                    )
                module = f"{root}{expert}.{spelling[projection]}"
                linears.append(_nvfp4_linear(self.path, module, modules.get(module, {})))
            experts.append(_Expert(*linears))
        return experts

    def _check_expert_shapes(self) -> None:
        first = next((experts[0] for _, experts in sorted(self._experts.items())), None)
        if first is None:
            return
        k = self._facts.hidden_size if self._facts.hidden_size is not None else first.gate.cols
        i = self._facts.intermediate_size if self._facts.intermediate_size is not None else first.gate.rows
        num = len(next(iter(self._experts.values())))
        for layer, experts in self._experts.items():
            if len(experts) != num:
                raise CheckpointError(f"{self.path}: layer {layer}: expected {num} experts, got {len(experts)}")
            for expert in experts:
                for linear, rows, cols in ((expert.gate, i, k), (expert.up, i, k), (expert.down, k, i)):
                    if (linear.rows, linear.cols) != (rows, cols):
                        raise _error(
                            linear.data.file,
                            linear.data.name,
                            f"shape [{rows}, {cols // 2}] for hidden size {k}, intermediate size {i}",
                            f"{list(linear.data.shape)}",
                        )

    def _count(self, category: str, module: str, info: TensorInfo) -> None:
        modules, tensors = self._categories.setdefault(category, (set(), []))
        modules.add(module)
        tensors.append(info)


_EXPERTS = "NVFP4 experts"
_KV_SCALES = "KV cache scales"
_IGNORED = "ignored (multi-token prediction)"
_CATEGORY_OF_SCHEME = {
    "nvfp4": "NVFP4 linears",
    "mxfp4": "MXFP4",
    "fp8-block": "FP8 in blocks",
    "fp8": "FP8",
    "other": "other quantized",
    "unquantized": "unquantized",
}
_CATEGORIES = (_EXPERTS, *_CATEGORY_OF_SCHEME.values(), _KV_SCALES, _IGNORED)


def _scheme(leaves: Mapping[str, TensorInfo]) -> str:
    """How a module is stored, by its leaves. A damaged NVFP4 module is still "nvfp4": `_nvfp4_linear` then says why."""
    weight, packed = leaves.get("weight"), leaves.get("weight_packed")
    codes = packed or weight
    scale = leaves.get("weight_scale") or leaves.get("scale")
    if "weight_scale_2" in leaves or "weight_global_scale" in leaves:
        return "nvfp4"
    if codes is not None and codes.dtype in ("U8", "I8") and scale is not None and scale.dtype in ("U8", "F8_E8M0"):
        return "mxfp4"
    if packed is not None:
        return "nvfp4" if packed.dtype == "U8" else "other"
    if weight is None:
        return "unquantized"
    if weight.dtype == "U8":
        return "nvfp4" if leaves.keys() & {"weight_scale", "input_scale"} else "other"
    if weight.dtype in ("F8_E4M3", "F8_E5M2"):
        if "scale" in leaves or "weight_scale_inv" in leaves:
            return "fp8-block"
        return "fp8-block" if scale is not None and len(scale.shape) == 2 and min(scale.shape) > 1 else "fp8"
    return "other" if scale is not None or weight.dtype == "I8" else "unquantized"


def _nvfp4_linear(path: Path, module: str, leaves: Mapping[str, TensorInfo]) -> _Linear:
    """Checks the leaves of an NVFP4 module: all there, with the right dtypes and with shapes that fit each other."""
    layout = _COMPRESSED_TENSORS if leaves.keys() & {"weight_packed", "weight_global_scale"} else _MODELOPT
    for leaf in (layout.data, layout.scale, layout.global_scale):
        if leaf not in leaves:
            raise CheckpointError(
                f"{next(iter(leaves.values())).file if leaves else path}: tensor {f'{module}.{leaf}'!r}: expected in a "
                f"shard, got no such tensor ({module} has {sorted(leaves) or 'no leaves'})"
            )
    data, scale, global_scale = leaves[layout.data], leaves[layout.scale], leaves[layout.global_scale]
    for info, dtype in ((data, "U8"), (scale, "F8_E4M3"), (global_scale, "F32")):
        if info.dtype != dtype:
            raise _error(info.file, info.name, f"dtype {dtype}", f"{info.dtype}")
    if len(data.shape) != 2 or 0 in data.shape or data.shape[1] % (GROUP_SIZE // 2):
        raise _error(data.file, data.name, "shape [out, in / 2] with in a multiple of 16", f"{list(data.shape)}")
    rows, cols = data.shape[0], data.shape[1] * 2
    if scale.shape != (rows, cols // GROUP_SIZE):
        raise _error(
            scale.file, scale.name, f"shape [{rows}, {cols // GROUP_SIZE}] (out, in / 16)", f"{list(scale.shape)}"
        )
    if global_scale.shape not in ((), (1,)):
        raise _error(global_scale.file, global_scale.name, "shape [] or [1]", f"{list(global_scale.shape)}")
    other_leaves = frozenset(leaves) - set(layout[:4])
    return _Linear(module, rows, cols, data, scale, global_scale, layout.reciprocal, other_leaves)


def _refuse_leaves(linear: _Linear, leaves: Iterable[str]) -> None:
    for leaf in sorted(leaves):
        name = f"{linear.name}.{leaf}"
        raise _error(
            linear.data.file, name, "only codes, scales and input scales", f"a leaf {leaf!r} that nothing would apply"
        )


class _Shards:
    """The shards opened during one read, memory-mapped: only what is copied out of a tensor is read."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._handles: dict[Path, Any] = {}

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.clear()
        self._stack.close()

    def tensor(self, info: TensorInfo) -> Tensor:
        try:
            if info.file not in self._handles:
                self._handles[info.file] = self._stack.enter_context(safe_open(info.file, framework="pt", device="cpu"))
            tensor: Tensor = self._handles[info.file].get_tensor(info.name)
        except (OSError, SafetensorError) as error:
            raise _error(info.file, info.name, "the file as it was when it was opened", str(error)) from error
        if (tuple(tensor.shape), tensor.nbytes) != (info.shape, info.nbytes):
            expected = f"{info.dtype} {list(info.shape)} as when it was opened"
            raise _error(info.file, info.name, expected, f"{tensor.dtype} {list(tensor.shape)}")
        return tensor


def _copy_linear(
    shards: _Shards, linear: _Linear, rows: slice, cols: slice, data: Tensor, scale: Tensor, global_scale: Tensor
) -> None:
    """Copies rows and cols (in values; a multiple of 16 at both ends) into data, scale (both uint8), global_scale."""
    groups = slice(cols.start // GROUP_SIZE, cols.stop // GROUP_SIZE)
    data.copy_(shards.tensor(linear.data)[rows, cols.start // 2 : cols.stop // 2])
    scale.copy_(shards.tensor(linear.scale).view(torch.uint8)[rows, groups])
    nan = (scale & 0x7F) == 0x7F
    if nan.any():
        row, group = nan.nonzero()[0].tolist()
        raise _error(
            linear.scale.file,
            linear.scale.name,
            "finite F8_E4M3 scales",
            f"NaN ({scale[row, group].item():#04x}) at row {rows.start + row}, group {groups.start + group}",
        )
    stored = shards.tensor(linear.global_scale).reshape(())
    if not torch.isfinite(stored):
        raise _error(linear.global_scale.file, linear.global_scale.name, "a finite global scale", f"{stored.item()}")
    if linear.reciprocal:
        try:
            stored = reciprocal_global_scale(stored)
        except ValueError as error:
            expected = "a global scale with a finite reciprocal"
            raise _error(linear.global_scale.file, linear.global_scale.name, expected, f"{stored.item()}") from error
    global_scale.copy_(stored)


def _bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk")
_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_HIDDEN_ACT_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function")
# A key of config.json with a word of each reads like a clamp of the gate.
_GATE_WORDS = {"swiglu", "glu", "act", "activation", "mlp", "ffn", "gemm1"}
_LIMIT_WORDS = {"limit", "limits", "clamp", "clip"}
# Limits of the shared experts, which are dense linears here.
_SHARED_LIMIT_KEYS = ("swiglu_limit_shared", "swiglu_limits_shared")
_ACTIVATIONS = {
    "silu": Activation.silu,
    "swish": Activation.silu,
    "swigluoai": Activation.silu,
    "gelu": Activation.gelu,
    "gelu_tanh": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu_new": Activation.gelu_tanh,
    "relu2": Activation.relu2,
    "relu_squared": Activation.relu2,
}


class ConfigFacts:
    """The keys of config.json (or of its text_config) that the experts need, checked when read."""

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        self._file = file
        self._config = config
        self._text = _text_config(config)
        self.model_type: str | None = self._text.get("model_type") or config.get("model_type")
        self.top_k = self._integer(*_TOP_K_KEYS)
        self.num_experts = self._integer(*_NUM_EXPERTS_KEYS)
        self.hidden_size = self._integer("hidden_size")
        self.intermediate_size = self._integer("moe_intermediate_size")
        self.num_layers = self._integer("num_hidden_layers")
        self._has_mtp = bool(self._integer("num_nextn_predict_layers", "num_mtp_modules"))
        self.hidden_act: str | None = self._get(*_HIDDEN_ACT_KEYS)
        self._limits = self._read_limits()
        self._alpha = self._number("swiglu_alpha")
        self._beta = self._number("swiglu_beta")

    def is_ignored(self, name: str) -> bool:
        """True for the layers of multi-token prediction: `mtp.*`, or as layers past num_hidden_layers."""
        if any(part == "mtp" or part.startswith("mtp_") for part in name.split(".")):
            return True
        match = _LAYER.match(name) if self._has_mtp and self.num_layers is not None else None
        return match is not None and int(match[1]) >= (self.num_layers or 0)

    def clamp_limit(self, layer: int) -> float | None:
        if not isinstance(self._limits, list):
            return self._limits
        if not 0 <= layer < len(self._limits):
            raise CheckpointError(
                f"{self._file}: expected a swiglu limit for layer {layer}, got a list of {len(self._limits)} limits"
            )
        return self._limits[layer]

    def gate(self, layer: int) -> Gate:
        limit = self.clamp_limit(layer)
        model_type = self.model_type or ""
        hidden_act = self.hidden_act or "silu"
        activation = _ACTIVATIONS.get(hidden_act)
        if activation is None:
            raise CheckpointError(
                f"{self._file}: hidden_act: expected one of {sorted(_ACTIVATIONS)}, got {hidden_act!r}"
            )
        if limit is not None and activation is not Activation.silu:
            raise CheckpointError(
                f"{self._file}: expected hidden_act 'silu' beside a swiglu limit, got {hidden_act!r} with limit "
                f"{limit}: the clamp of that pair is not defined"
            )
        # gpt-oss and MiniMax-M3 leave to the code what they do not declare: sigmoid(1.702 g) and up + 1.
        gpt_oss = hidden_act == "swigluoai" or model_type.startswith(("gpt_oss", "minimax_m3"))
        if gpt_oss and limit is None and self._get("swiglu_limit") is None:
            raise CheckpointError(
                f"{self._file}: expected swiglu_limit, because the code of {model_type or hidden_act} clamps, got no "
                "such key; add the model's limit (0 for none) to config.json"
            )
        alpha = self._alpha if self._alpha is not None else (1.702 if gpt_oss else 1.0)
        beta = self._beta if self._beta is not None else (1.0 if gpt_oss else 0.0)
        if alpha != 1.0 and self._beta is None and not gpt_oss:
            raise CheckpointError(f"{self._file}: expected swiglu_beta beside swiglu_alpha {alpha}, got no such key")
        if (alpha, beta) != (1.0, 0.0) and activation is not Activation.silu:
            raise CheckpointError(
                f"{self._file}: expected hidden_act 'silu' beside swiglu_alpha {alpha} and swiglu_beta {beta}, got "
                f"{hidden_act!r}"
            )
        # Step-3.5, whose key is the plural, clamps after the silu.
        if limit is not None and (self._get("swiglu_limits") is not None or model_type.startswith("step3")):
            if (alpha, beta) != (1.0, 0.0):
                raise CheckpointError(
                    f"{self._file}: expected no swiglu_alpha, swiglu_beta with Step-3.5's clamp, got both"
                )
            activation = Activation.swiglustep
        return Gate(activation, limit, alpha, beta)

    def _get(self, *keys: str) -> Any:
        """The first of the keys that has a value. text_config goes first; over the gate the two must not disagree."""
        for key in keys:
            inner, outer = self._text.get(key), self._config.get(key)
            if key.startswith("swiglu") and inner is not None and outer is not None and inner != outer:
                raise CheckpointError(
                    f"{self._file}: {key}: expected one value, got {outer!r}, and {inner!r} in text_config"
                )
            if inner is not None or outer is not None:
                return inner if inner is not None else outer
        return None

    def _integer(self, *keys: str) -> int | None:
        value = self._get(*keys)
        # Some models have one value per layer; then the headers alone decide.
        if value is None or isinstance(value, list):
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{self._file}: {keys[0]}: expected a non-negative integer, got {value!r}")
        return value

    def _number(self, key: str) -> float | None:
        value = self._get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{self._file}: {key}: expected a finite number, got {value!r}")
        return float(value)

    def _read_limits(self) -> float | list[float | None] | None:
        """swiglu_limit or swiglu_limits, and a refusal of any other key that reads like a limit of the gate."""
        for section, content in _sections("", self._config):
            for key, value in content.items():
                read = content is self._config or content is self._text
                words = set(key.lower().split("_"))
                if not words & _GATE_WORDS or not words & _LIMIT_WORDS or key in _SHARED_LIMIT_KEYS:
                    continue
                if read and key in ("swiglu_limit", "swiglu_limits"):
                    continue
                if any(value if isinstance(value, list) else [value]):
                    raise CheckpointError(
                        f"{self._file}: {section}{key}: expected a limit of the gate to be swiglu_limit or "
                        f"swiglu_limits of the model or its text_config, got {value!r} under a key that is not "
                        "understood; a clamp is never dropped"
                    )
        single, plural = self._get("swiglu_limit"), self._get("swiglu_limits")
        if single is not None and plural is not None and single != plural:
            raise CheckpointError(
                f"{self._file}: expected swiglu_limit or swiglu_limits, got both: {single!r} and {plural!r}"
            )
        value = plural if plural is not None else single
        key = "swiglu_limits" if plural is not None else "swiglu_limit"
        if not isinstance(value, list):
            return self._limit(key, value)
        if self.num_layers is not None and len(value) < self.num_layers:
            raise CheckpointError(f"{self._file}: {key}: expected {self.num_layers} limits, got {len(value)}")
        return [self._limit(f"{key}[{layer}]", limit) for layer, limit in enumerate(value)]

    def _limit(self, key: str, value: Any) -> float | None:
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise CheckpointError(
                f"{self._file}: {key}: expected a positive, finite number, or null or 0 for no clamp, got {value!r}"
            )
        return float(value) if value else None


def _sections(prefix: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """config and the objects inside it that are about the model, each with its path ("text_config.")."""
    yield prefix, config
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config":
            yield from _sections(f"{prefix}{key}.", value)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("text_config", "language_config", "llm_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    return {}


def _collect_tensors(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the shards that the index names, else of model.safetensors, else of every *.safetensors."""
    weight_map: dict[str, str] = {}
    if (path / _INDEX_NAME).is_file():
        weight_map = _load_weight_map(path / _INDEX_NAME)
        shards = [path / name for name in sorted(set(weight_map.values()))]
    elif (path / _SINGLE_NAME).is_file():
        shards = [path / _SINGLE_NAME]
    else:
        shards = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if not shards:
        raise CheckpointError(
            f"{path}: expected {_INDEX_NAME}, {_SINGLE_NAME} or other *.safetensors, got {_listing(path)} (pickled "
            "checkpoints are not read: convert them to safetensors)"
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in _read_header(shard).items():
            if name in tensors:
                raise _error(shard, name, "each tensor in one shard", f"it in {tensors[name].file.name} too")
            tensors[name] = info
    for name, shard_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard_name:
            got = f"it in {tensors[name].file.name}" if name in tensors else "no such tensor in any shard"
            raise _error(path / shard_name, name, f"in this shard, which {_INDEX_NAME} names", got)
    return tensors


def _load_weight_map(index: Path) -> dict[str, str]:
    weight_map = _load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        got = "no such key" if weight_map is None else f"{weight_map!r:.60}"
        raise CheckpointError(f"{index}: expected an object weight_map (tensor -> shard), got {got}")
    for tensor, shard in weight_map.items():
        if not _is_shard_name(shard):
            raise _error(index, tensor, "the name of a *.safetensors file beside the index", f"{shard!r}")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        tensors = [tensor for tensor, shard in weight_map.items() if shard == missing[0]]
        raise CheckpointError(
            f"{index.parent / missing[0]}: expected the shard of {len(tensors)} tensors by {_INDEX_NAME} (the first is "
            f"{tensors[0]!r}), got no such file; {len(missing)} of {len(shards)} shards are missing"
        )
    return weight_map


def _is_shard_name(name: object) -> bool:
    """A plain file name: an index must not reach out of its directory."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name == PureWindowsPath(name).name  # which knows /, \\ and drives
        and "\0" not in name
    )


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "an empty directory"


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of a safetensors file: 8 bytes of length, JSON, and offsets against the file size."""
    with file.open("rb") as stream:
        size = file.stat().st_size
        prefix = stream.read(8)
        if prefix.startswith(b"version "):
            raise CheckpointError(f"{file}: expected a safetensors file, got a Git LFS pointer: run git lfs pull")
        if len(prefix) < 8:
            raise CheckpointError(f"{file}: expected 8 bytes of header length, got a file of {size} bytes: truncated")
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{file}: expected a header of at most {_MAX_HEADER_BYTES} bytes, got {length}: not a safetensors file"
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{file}: expected a header of {length} bytes, got {size - 8} bytes after its length: the file is "
                "truncated, download it again"
            )
        header = _parse_json(file, stream.read(length), "header")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, name, entry) for name, entry in header.items()}
    position = 0
    data_size = size - 8 - length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != position:
            raise _error(file, name, f"data at offset {position}, where the tensor before it ends", f"offset {begin}")
        if end > data_size:
            raise _error(
                file,
                name,
                f"data up to byte {8 + length + end} of the file",
                f"a file of {size} bytes",
                "the file is truncated, download it again",
            )
        position = end
    if position != data_size:
        raise CheckpointError(f"{file}: expected {position} bytes of tensor data, got {data_size}")
    return tensors


def _tensor_info(file: Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _error(file, name, "an object with dtype, shape, data_offsets", f"{entry!r:.100}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise _error(file, name, f"dtype one of {', '.join(_DTYPE_BITS)}", f"{dtype!r:.60}")
    if not _are_sizes(shape):
        raise _error(file, name, "a shape of non-negative integers", f"{shape!r:.60}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _error(file, name, "two data_offsets", f"{offsets!r:.60}")
    nbytes = offsets[1] - offsets[0]
    if nbytes * 8 != math.prod(shape) * _DTYPE_BITS[dtype]:
        raise _error(file, name, f"as many bytes as {dtype} {shape!r:.60} has", f"data_offsets {offsets}")
    return TensorInfo(name, dtype, tuple(shape), nbytes, file)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _load_json(file: Path) -> dict[str, Any]:
    return _parse_json(file, file.read_bytes(), "JSON")


def _parse_json(file: Path, content: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _error(file, twice, f"each key of the {what} once", "it twice")
        return result

    try:
        result = json.loads(content, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: expected valid JSON in the {what}, got {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, dict):
        raise CheckpointError(f"{file}: expected an object in the {what}, got {type(result).__name__}")
    return result


def _error(file: Path, tensor: str, expected: str, got: str, advice: str = "") -> CheckpointError:
    return CheckpointError(
        f"{file}: tensor {tensor!r}: expected {expected}, got {got}" + (f"; {advice}" if advice else "")
    )


def _ids(ids: Iterable[int]) -> str:
    """0..3, 7 for (0, 1, 2, 3, 7)."""
    runs: list[list[int]] = []
    for value in ids:
        if runs and value == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], value]
        else:
            runs.append([value])
    return ", ".join("..".join(map(str, run)) for run in runs) or "none"
