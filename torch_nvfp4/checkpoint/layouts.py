"""How published checkpoints name and arrange NVFP4 and MXFP4 experts: a table with one row per layout.

Which row a layer follows is decided from the safetensors headers, by which tensors there are, under which names, of
which rank and dtype. A checkpoint in a new layout is a new row of `LAYOUTS` (and of `SPELLINGS`, where the leaves have
new names), a row in the writer and a test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from torch_nvfp4.checkpoint.headers import TensorInfo, tensor_error
from torch_nvfp4.errors import CheckpointError, refusal, shown
from torch_nvfp4.format import GROUP_SIZE
from torch_nvfp4.mxfp4 import GROUP_SIZE as MXFP4_GROUP_SIZE

__all__ = ["LAYOUTS", "PROJECTIONS", "SPELLINGS", "Layout", "Spelling"]


class Spelling(NamedTuple):
    """What stands after a module's name in the names of its tensors. MXFP4 has no global scale."""

    data: str  # U8, two e2m1 codes per byte; of MXFP4 I8 too
    scale: str  # F8_E4M3, one per 16 values; of MXFP4 F8_E8M0 (or U8 with its bytes), one per 32
    global_scale: str | None  # F32
    input_scale: str  # not used: activations stay 16-bit
    reciprocal: bool  # the stored global scale is 1 / weight_scale_2

    @property
    def is_mxfp4(self) -> bool:
        return self.global_scale is None

    @property
    def is_interleaved(self) -> bool:
        """Whether rows of gate and up alternate in gate_up, whatever config.json calls the model."""
        return self == GPT_OSS

    @property
    def group_size(self) -> int:
        """Values that share one scale."""
        return MXFP4_GROUP_SIZE if self.is_mxfp4 else GROUP_SIZE

    def dtypes(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(leaf, dtypes that it may have) of the leaves that have to be there."""
        if self.global_scale is None:
            return (self.data, ("U8", "I8")), (self.scale, ("F8_E8M0", "U8"))
        return (self.data, ("U8",)), (self.scale, ("F8_E4M3",)), (self.global_scale, ("F32",))


MODELOPT = Spelling(".weight", ".weight_scale", ".weight_scale_2", ".input_scale", reciprocal=False)
COMPRESSED_TENSORS = Spelling(
    ".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale", reciprocal=True
)
# Experts that transformers holds as parameters and not as modules: a suffix instead of a leaf.
MODELOPT_PARAMETER = Spelling("", "_weight_scale", "_weight_scale_2", "_input_scale", reciprocal=False)
COMPRESSED_TENSORS_PARAMETER = Spelling("_packed", "_scale", "_global_scale", "_input_global_scale", reciprocal=True)
SPELLINGS = (COMPRESSED_TENSORS, COMPRESSED_TENSORS_PARAMETER, MODELOPT, MODELOPT_PARAMETER)
DEEPSEEK_MXFP4 = Spelling(".weight", ".scale", None, ".input_scale", reciprocal=False)
QUARK_MXFP4 = Spelling(".weight", ".weight_scale", None, ".input_scale", reciprocal=False)
COMPRESSED_TENSORS_MXFP4 = Spelling(".weight_packed", ".weight_scale", None, ".input_global_scale", reciprocal=False)
# Blocks [E, out, in / 32, 16] are the bytes of [E, out, in / 2].
GPT_OSS = Spelling("_blocks", "_scales", None, "_input_scale", reciprocal=False)
MXFP4_SPELLINGS = (GPT_OSS, COMPRESSED_TENSORS_MXFP4, DEEPSEEK_MXFP4, QUARK_MXFP4)

Kind = Literal["matrix", "stack", "rows"]


class Layout(NamedTuple):
    """How the experts of a layer are stored.

    `kind` is "matrix" for one matrix [rows, cols] per expert, "stack" for one tensor [E, rows, cols] per projection,
    "rows" for one tensor [E * rows, cols] per projection. A stack of NVFP4 may have its last two dimensions swapped,
    which its shapes tell, and gate and up may be one projection gate_up: gate rows first, or in gpt-oss in turns.
    """

    name: str
    kind: Kind
    spelling: Spelling
    root: str  # what has to stand before the experts, as a regular expression
    seen_in: str


LAYOUTS = (
    Layout("deepseek", "matrix", MODELOPT, r"layers\.\d+\.ffn\.experts\.", "DeepSeek-V4-Flash-NVFP4"),
    Layout(
        "nemotron", "matrix", MODELOPT, r"(?:.+\.)?layers\.\d+\.mixer\.experts\.", "Nemotron-3 NVFP4, which has no gate"
    ),
    Layout("modelopt", "matrix", MODELOPT, r".*", "Qwen3-30B-A3B-NVFP4, DeepSeek-R1-FP4"),
    Layout("compressed-tensors", "matrix", COMPRESSED_TENSORS, r".*", "models quantized by llm-compressor"),
    Layout("modelopt-stack", "stack", MODELOPT, r".*", "Step-3.7-Flash-NVFP4"),
    Layout("compressed-tensors-stack", "stack", COMPRESSED_TENSORS, r".*", "llm-compressor with fused experts"),
    Layout("modelopt-parameters", "stack", MODELOPT_PARAMETER, r".*", "Llama-4 NVFP4 (last two dimensions swapped)"),
    Layout(
        "compressed-tensors-parameters",
        "stack",
        COMPRESSED_TENSORS_PARAMETER,
        r".*",
        "Qwen3.6-35B-A3B and Gemma-4-26B-A4B NVFP4",
    ),
    Layout("modelopt-rows", "rows", MODELOPT, r".*", "as compressed-tensors-rows"),
    Layout("compressed-tensors-rows", "rows", COMPRESSED_TENSORS, r".*", "KAT-Coder NVFP4"),
    Layout("deepseek-mxfp4", "matrix", DEEPSEEK_MXFP4, r".*", "DeepSeek-V4-Flash as published, DeepSeek-V4.1-Flash"),
    Layout("quark-mxfp4", "matrix", QUARK_MXFP4, r".*", "models quantized to MXFP4 by Quark"),
    Layout("compressed-tensors-mxfp4", "matrix", COMPRESSED_TENSORS_MXFP4, r".*", "Kimi-K3"),
    Layout("gpt-oss", "stack", GPT_OSS, r".*", "gpt-oss-20b, gpt-oss-120b"),
)

# The projections of an expert; gate_up is both, gate rows first.
PROJECTIONS = {
    "w1": "gate", "gate_proj": "gate",
    "w3": "up", "up_proj": "up",
    "w2": "down", "down_proj": "down",
    "gate_up_proj": "gate_up", "w13": "gate_up",
}  # fmt: skip
_LONGEST_FIRST = sorted(PROJECTIONS, key=len, reverse=True)
# Modules that hold stacks of experts.
_NODES = ("experts", "moe")

# What `scheme` calls the ways to store a module, and how a summary does.
CATEGORY_OF_SCHEME = {
    "nvfp4": "NVFP4 linears",
    "mxfp4": "MXFP4",
    "fp8-block": "FP8 in blocks",
    "fp8": "FP8",
    "other": "other quantized",
    "unquantized": "unquantized",
}
EXPERTS_OF_SCHEME = {"nvfp4": "NVFP4 experts", "mxfp4": "MXFP4 experts"}
_GLOBAL_SCALES = {spelling.global_scale for spelling in SPELLINGS}
_SCALES = (".weight_scale", ".scale", "_weight_scale", "_scale", "_scales")
_FP4_MARKS = {".weight_scale", ".input_scale", "_weight_scale", "_input_scale", "_scale"}
# Leaves that change nothing where they are all ones: the activation scales of AWQ.
UNIT_LEAVES = ("pre_quant_scale",)
# Leaves that experts may have: `moe` adds them.
BIAS_LEAVES = (".bias", "_bias")
BIAS_DTYPES = ("BF16", "F16", "F32")

Leaves = Mapping[str, TensorInfo]


class Unsupported(CheckpointError):
    """The files are sound and hold something that cannot be loaded: the layer is refused, not the checkpoint."""


class ExpertName(NamedTuple):
    """The name of a module that holds a projection of one expert, or (expert None) of all experts of a layer."""

    root: str  # up to the experts, with the dot
    layer: int
    expert: int | None
    projection: str


class Stored(NamedTuple):
    """The checked tensors of one module: `num` matrices [rows, cols], num 1 where it is not a stack."""

    name: str
    kind: Kind
    num: int
    rows: int
    cols: int
    swapped: bool  # stored as [num, cols, rows]
    spelling: Spelling
    data: TensorInfo
    scale: TensorInfo
    global_scale: TensorInfo | None  # None: MXFP4
    others: tuple[tuple[str, TensorInfo], ...]  # (leaf, tensor): more leaves, which loading has to look at

    @property
    def bias(self) -> TensorInfo | None:
        """The bias of a module of experts; not checked."""
        return next((info for leaf, info in self.others if leaf in BIAS_LEAVES), None)


class Matrix(NamedTuple):
    """One matrix [rows, stored.cols]: rows from `first_row` on of the matrix of an expert in a module.

    interleaved: every second row from `first_row` on (gate 0, up 0, gate 1, ...), as in gpt-oss.
    """

    stored: Stored
    expert: int
    first_row: int
    rows: int
    half: int  # 1 for up in gate_up: the column of a global scale of (gate, up)
    interleaved: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the module holds this matrix and no other."""
        return self.stored.kind == "matrix" and self.rows == self.stored.rows

    def stored_rows(self, rows: slice) -> slice:
        """Where these rows of the matrix lie among those of the module's matrix."""
        step = 2 if self.interleaved else 1
        begin = self.first_row + step * rows.start
        return slice(begin, begin + step * (rows.stop - rows.start), step)


def split_name(name: str) -> tuple[str, str]:
    """(module, leaf) of a tensor's name. A leaf has its dot, or is the suffix of a parameter ("_packed", "")."""
    parent, _, last = name.rpartition(".")
    if parent.rpartition(".")[2] in _NODES:
        for projection in _LONGEST_FIRST:
            suffix = last.removeprefix(projection)
            if len(suffix) < len(last) and suffix[:1] in ("", "_"):
                return f"{parent}.{projection}", suffix
    return parent, f".{last}"


def expert_name(module: str) -> ExpertName | None:
    """What a module's name says, None where it is not a projection of experts of a layer."""
    parts = module.split(".")
    if parts[-1] not in PROJECTIONS:
        return None
    if len(parts) > 2 and parts[-3] == "experts" and _is_id(parts[-2]):
        root, expert = parts[:-2], int(parts[-2])
    elif len(parts) > 1 and parts[-2] in _NODES:
        root, expert = parts[:-1], None
    else:
        return None
    for position in range(len(root) - 3, -1, -1):
        if root[position] == "layers" and _is_id(root[position + 1]):
            return ExpertName(".".join(root) + ".", int(root[position + 1]), expert, parts[-1])
    return None


def _is_id(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= 6


def codes_of(leaves: Leaves) -> TensorInfo | None:
    """The tensor that holds a module's values, in any format."""
    names = (".weight_packed", ".weight", "_packed", "", "_blocks")
    return next((leaves[name] for name in names if name in leaves), None)


def scheme(leaves: Leaves) -> str:
    """How a module is stored, by its leaves. A damaged NVFP4 module is still "nvfp4": `stored` then says why."""
    codes = codes_of(leaves)
    scale = next((leaves[name] for name in _SCALES if name in leaves), None)
    if leaves.keys() & _GLOBAL_SCALES:
        return "nvfp4"
    if leaves.keys() & {GPT_OSS.data, GPT_OSS.scale}:
        return "mxfp4"
    if codes is None:
        return "unquantized"
    if codes.dtype in ("U8", "I8") and scale is not None and scale.dtype in ("U8", "F8_E8M0"):
        return "mxfp4"
    if ".weight_packed" in leaves or "_packed" in leaves:
        return "nvfp4" if codes.dtype == "U8" else "other"
    if codes.dtype == "U8":
        return "nvfp4" if leaves.keys() & _FP4_MARKS else "other"
    if codes.dtype in ("F8_E4M3", "F8_E5M2"):
        if ".scale" in leaves or ".weight_scale_inv" in leaves:
            return "fp8-block"
        return "fp8-block" if scale is not None and len(scale.shape) == 2 and min(scale.shape) > 1 else "fp8"
    return "other" if scale is not None or codes.dtype == "I8" else "unquantized"


def spelling_of(leaves: Leaves, kind: str = "nvfp4") -> Spelling:
    """The spelling whose codes or global scale are there; ModelOpt's where none are. Of MXFP4 that whose scale is."""
    if kind == "mxfp4":
        found = [s for s in MXFP4_SPELLINGS if s.data in leaves or s.scale in leaves]
        return max(found, key=lambda s: (s.data in leaves) + (s.scale in leaves), default=DEEPSEEK_MXFP4)
    for spelling in SPELLINGS:
        if leaves.keys() & {spelling.data, spelling.global_scale}:
            return spelling
    return MODELOPT_PARAMETER if any(leaf.startswith("_") for leaf in leaves) else MODELOPT


def kind_of(leaves: Leaves, per_expert: bool) -> Kind:
    if per_expert:
        return "matrix"
    spellings = (*SPELLINGS, *MXFP4_SPELLINGS)
    ranks = [len(leaves[leaf].shape) for spelling in spellings for leaf in spelling[:2] if leaf in leaves]
    return "rows" if ranks[:1] == [2] else "stack"


def layout_of(name: ExpertName, leaves: Leaves, scheme: str = "nvfp4") -> Layout:
    """The row of the table that an NVFP4 or MXFP4 module of experts follows."""
    spelling, kind = spelling_of(leaves, scheme), kind_of(leaves, name.expert is not None)
    for layout in LAYOUTS:
        if (layout.kind, layout.spelling) == (kind, spelling) and re.fullmatch(layout.root, name.root, re.DOTALL):
            return layout
    info = codes_of(leaves) or next(iter(leaves.values()))
    arranged = {"matrix": "one matrix per expert", "stack": "stacks [E, out, in]", "rows": "stacks [E * out, in]"}
    expected = f"experts in a known layout ({', '.join(layout.name for layout in LAYOUTS)})"
    got = f"{arranged[kind]} with the leaves {_names(leaves)}"
    raise tensor_error(info.file, info.name, expected, got, kind=Unsupported)


def _names(leaves: Leaves) -> str:
    return shown(sorted(leaf.removeprefix(".") for leaf in leaves)) if leaves else "no leaves"


def stored(path: Path, module: str, leaves: Leaves, spelling: Spelling, kind: Kind, *, gate_up: bool = False) -> Stored:
    """Checks the leaves of a quantized module: all there, with the right dtypes and with shapes that fit each other.

    How many matrices the rows of kind "rows" are is not in the shapes of one module: see `with_num`.
    """
    for leaf, _ in spelling.dtypes():
        if leaf not in leaves:
            file = next(iter(leaves.values())).file if leaves else path
            got = f"no such tensor ({shown(module)[1:-1]} has {_names(leaves)})"
            raise CheckpointError(refusal(f"{file}: tensor {shown(module + leaf)}", "in a shard", got))
    for leaf, dtypes in spelling.dtypes():
        if leaves[leaf].dtype not in dtypes:
            info = leaves[leaf]
            raise tensor_error(info.file, info.name, f"dtype {' or '.join(dtypes)}", info.dtype)
    data, scale = leaves[spelling.data], leaves[spelling.scale]
    global_scale = None if spelling.global_scale is None else leaves[spelling.global_scale]
    swapped, batch, rows, cols = _sizes(data, scale, spelling, kind)
    known = {*spelling[:3], *(other.input_scale for other in (*SPELLINGS, *MXFP4_SPELLINGS))}
    others = tuple(sorted((leaf, info) for leaf, info in leaves.items() if leaf not in known))
    result = Stored(module, kind, 1, rows, cols, swapped, spelling, data, scale, global_scale, others)
    return result if kind == "rows" else with_num(result, batch[0] if batch else 1, gate_up)


def _sizes(
    data: TensorInfo, scale: TensorInfo, spelling: Spelling, kind: Kind
) -> tuple[bool, tuple[int, ...], int, int]:
    """(swapped, batch, rows, cols) of codes whose shape fits that of their scales."""
    shape, groups, size = data.shape, scale.shape, spelling.group_size
    rank = 3 if kind == "stack" else 2
    if spelling == GPT_OSS:
        if len(shape) != 4 or shape[3] != size // 2:
            expected = f"shape [experts, out, in / {size}, {size // 2}]"
            raise tensor_error(data.file, data.name, expected, f"{list(shape)}")
        shape = (*shape[:2], shape[2] * shape[3])
    swapped = not spelling.is_mxfp4 and rank == 3 == len(shape)
    swapped = swapped and groups == (shape[0], shape[1] * 2 // size, shape[2])
    if swapped:
        shape, groups = (shape[0], shape[2], shape[1]), (groups[0], groups[2], groups[1])
    experts = "experts, " if rank == 3 else ""
    if len(shape) != rank or 0 in shape or shape[-1] % (size // 2):
        expected = f"shape [{experts}out, in / 2] with in a multiple of {size}"
        raise tensor_error(data.file, data.name, expected, f"{list(data.shape)}")
    *batch, rows, cols = *shape[:-1], shape[-1] * 2
    if groups != (*batch, rows, cols // size):
        expected = f"shape {[*batch, rows, cols // size]} ({experts}out, in / {size})"
        raise tensor_error(scale.file, scale.name, expected, f"{list(scale.shape)}")
    return swapped, tuple(batch), rows, cols


def with_num(module: Stored, num: int, gate_up: bool) -> Stored:
    """The module as `num` matrices; checks that its global scale is one for all, one per matrix or per half."""
    info = module.global_scale
    rows = module.rows // num if module.kind == "rows" else module.rows
    if info is None:
        return module._replace(num=num, rows=rows)
    allowed: list[tuple[int, ...]] = [(), (1,)]
    if module.kind != "matrix":
        allowed += [(num,), (num, 1), (num, 1, 1)]
    if gate_up:
        allowed.append((2,) if module.kind == "matrix" else (num, 2))
    if info.shape not in allowed:
        expected = "shape " + " or ".join(dict.fromkeys(str(list(shape)) for shape in allowed))
        raise tensor_error(info.file, info.name, expected, f"{list(info.shape)}")
    return module._replace(num=num, rows=rows)
