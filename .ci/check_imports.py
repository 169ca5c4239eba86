"""Holds the architecture: who may import whom and what, and how long a module and a function may be.

- A module of torch_nvfp4 imports no later layer, nobody's circle closes, and no package reaches into another's private
  modules and names.
- The command line's and each engine's packages are imported only where ``OWNERS`` says.
- A Python module has at most 450 lines. A function has at most 60, or a comment above it that says why not:
  ``# Over 60 lines: <reason>``.
- Device code includes no torch, and its siblings do not include each other.

Run from the repository root; prints every violation and exits 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "torch_nvfp4"
# Each module or package may import those of its own layer and of earlier ones.
LAYERS = [
    {"_lazy", "_version", "_start", "errors"},
    {"format"},
    {"gate", "activation", "config_sections", "mxfp4"},
    {"reference", "reference_fp8", "model_config", "testing"},
    {"ops", "checkpoint", "quant_config"},
    {"backends"},
    {"nn"},
    {"compiler", "fusion", "tensorrt", "distributed", "verify", "convert", "bench", "integrations", "demo"},
    {"cli", "__main__"},
]
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
# Modules with fewer dependencies than their layer allows.
ONLY = {
    "config_sections": {"errors"},
    "model_config": {"config_sections", "errors", "gate"},
    "mxfp4": {"format"},
    "checkpoint": {"errors", "format", "gate", "model_config", "mxfp4"},
    "convert": {"_version", "errors", "format", "model_config", "mxfp4", "checkpoint"},
    "quant_config": {"config_sections", "errors", "gate", "model_config"},
}
FORMER = {"activation": "gate", "fusion": "compiler", "tensorrt": "compiler.tensorrt", "demo": "checkpoint"}
"""Names that users of earlier versions import, and what the package itself imports instead."""
# Below ``import torch_nvfp4``, which has to be quick and to need torch alone.
EAGER = RANK["nn"]
# By package: the modules that may import it. The benchmark has engines as contenders.
OWNERS = {
    "typer": {"cli"},
    "rich": {"cli"},
    "transformers": {"integrations.transformers", "bench"},
    "vllm": {"integrations.vllm", "bench"},
    "sglang": {"integrations.sglang", "bench"},
    "flashinfer": {"backends.flashinfer_trtllm", "bench"},
    "tensorrt": {"compiler.tensorrt"},
    "torch_tensorrt": {"compiler.tensorrt"},
    "torch._inductor": {"compiler"},
    "matplotlib": {"bench"},
}
MODULE_LINES, FUNCTION_LINES = 450, 60
TORCH_FREE = ("csrc/common.h", "csrc/kernels.h", "csrc/cpu", "csrc/cuda")
# In csrc/cuda/device: common <- ptx/* (one family of instructions per file) <- decode (the packed format, which the
# others work on) <- these. Neither the families nor these include one another.
CUDA_SIBLINGS = {"mma", "pipeline", "scheduler", "epilogue", "gather", "ragged_tiles"}
CUDA_FAMILIES = {"arithmetic", "async_copy", "control", "mbarrier", "memory", "mma", "wgmma"}


class Import(NamedTuple):
    """One imported module or name."""

    target: str  # "torch_nvfp4.ops.moe": the module that holds it
    name: str | None  # what is taken from the module, None for the module itself
    lazy: bool  # within a function, or for type checkers alone


class Module:
    """A file of the package, and what it imports."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path.relative_to(root)
        parts = self.path.with_suffix("").parts
        self.is_package = parts[-1] == "__init__"
        self.name = ".".join(parts[:-1] if self.is_package else parts)
        self.package = self.name if self.is_package else self.name.rpartition(".")[0]
        self.text = path.read_text()
        self.tree = ast.parse(self.text)

    @property
    def unit(self) -> str:
        """The module or package directly below torch_nvfp4 that it is or belongs to, "" for torch_nvfp4 itself."""
        return unit_of(self.name)

    def imports(self, modules: set[str]) -> Iterator[Import]:
        """Every import, inside functions too; ``from package import module`` counts as one of the module."""
        lazy_nodes = {
            id(inner)
            for node in ast.walk(self.tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            for inner in ast.walk(node)
        }
        for node in ast.walk(self.tree):
            lazy = id(node) in lazy_nodes
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, None, lazy) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = self.package.split(".")
                    base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
                for alias in node.names:
                    module = f"{base}.{alias.name}"
                    yield Import(module, None, lazy) if module in modules else Import(base, alias.name, lazy)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
                argument = node.args[0]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(argument.value, None, lazy)


def unit_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def layer_violations(module: Module, imports: list[Import]) -> Iterator[str]:
    """Imports of a later layer, of a former name, and of anything that ``import torch_nvfp4`` must not wait for."""
    unit = module.unit
    if unit and unit not in RANK:
        yield f"module {unit} has no layer in .ci/check_imports.py"
        return
    for target, _, lazy in imports:
        other = unit_of(target)
        if not target.startswith(PACKAGE + ".") or other == unit:
            continue
        if not unit:
            if not lazy and RANK.get(other, len(LAYERS)) > EAGER:
                yield f"imports {other} when it is imported itself; that belongs into a function"
        elif other in FORMER:
            yield f"imports {other}, the former name of {FORMER[other]}"
        elif other not in ONLY.get(unit, RANK) or RANK.get(other, len(LAYERS)) > RANK[unit]:
            yield f"imports {other}, which {unit} may not depend on"


def privacy_violations(module: Module, imports: list[Import]) -> Iterator[str]:
    """Private modules and names of other packages, imported or read off an imported module."""

    def foreign(owner: str) -> bool:
        """Whether ``owner``, a package, is neither the module's nor (torch_nvfp4 aside) around it."""
        return module.package != owner and (owner == PACKAGE or not module.package.startswith(owner + "."))

    aliases: dict[str, str] = {}
    for target, name, _ in imports:
        if not target.startswith(PACKAGE):
            continue
        parts = target.split(".")
        for depth, part in enumerate(parts):
            owner = ".".join(parts[:depth])
            if is_private(part) and owner != PACKAGE and foreign(owner):
                yield f"imports {target}, a private module of {owner}"
        package = target.rpartition(".")[0] or PACKAGE
        if name is not None and is_private(name) and foreign(package):
            yield f"imports {name} of {target}, a private name of another package"
        if name is None:
            aliases[parts[-1]] = target
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and isinstance(node.value, ast.Name):
            target = aliases.get(node.value.id)
            if target is not None and foreign(target.rpartition(".")[0]):
                yield f"reads {node.value.id}.{node.attr}, a private name of another package"


def owner_violations(module: Module, imports: list[Import]) -> Iterator[str]:
    """Packages that belong to another module."""
    place = module.name.removeprefix(PACKAGE + ".")
    for package, owners in OWNERS.items():
        uses = any(target == package or target.startswith(package + ".") for target, _, _ in imports)
        if uses and not any(place == owner or place.startswith(owner + ".") for owner in owners):
            yield f"imports {package}, which only {' and '.join(sorted(owners))} may"


def size_violations(module: Module) -> Iterator[str]:
    """Modules and functions that are too long without a reason, and reasons that are not needed."""
    lines = module.text.splitlines()
    if len(lines) > MODULE_LINES:
        yield f"has {len(lines)} lines; at most {MODULE_LINES}: split it by subject"
    marker = f"# Over {FUNCTION_LINES} lines: "
    reasons = {number for number, line in enumerate(lines, 1) if line.strip().startswith(marker.strip())}
    for node in ast.walk(module.tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length <= FUNCTION_LINES:
            continue
        comment = lines[first - 2].strip() if first > 1 else ""
        reasons.discard(first - 1)
        if len(comment.removeprefix(marker).split()) < 4 or not comment.startswith(marker):
            yield f"{node.name} has {length} lines; at most {FUNCTION_LINES}, or a line above it: {marker}<reason>"
    yield from (f"line {number} gives a reason for a function that is short" for number in sorted(reasons))


def circle_violations(graph: dict[str, set[str]]) -> Iterator[str]:
    """Circles of the graph, each named once."""
    state: dict[str, bool] = {}  # False while on the path, True when done

    def visit(node: str, path: list[str]) -> Iterator[str]:
        if state.get(node) is False:
            yield f"{' -> '.join([*path[path.index(node) :], node])}: a circle of imports"
        elif node not in state:
            state[node] = False
            for target in sorted(graph.get(node, ())):
                yield from visit(target, [*path, node])
            state[node] = True

    for node in sorted(graph):
        yield from visit(node, [])


def python_violations(root: Path) -> list[str]:
    """What is wrong with the package in ``root``, one line per violation."""
    modules = [Module(path, root) for path in sorted((root / PACKAGE).rglob("*.py"))]
    names = {module.name for module in modules}
    problems: list[str] = []
    files: dict[str, set[str]] = {module.name: set() for module in modules}
    units: dict[str, set[str]] = {module.unit: set() for module in modules if module.unit}
    for module in modules:
        imports = list(module.imports(names))
        files[module.name] |= {target for target, _, _ in imports if target in names} - {module.name}
        if module.unit:
            units[module.unit] |= {unit_of(target) for target, _, _ in imports if target in names} - {module.unit, ""}
        found = [
            *layer_violations(module, imports),
            *privacy_violations(module, imports),
            *owner_violations(module, imports),
            *size_violations(module),
        ]
        problems += [f"{module.path}: {problem}" for problem in dict.fromkeys(found)]
    return problems + list(dict.fromkeys([*circle_violations(files), *circle_violations(units)]))


def cpp_violations() -> list[str]:
    problems = []
    for top in TORCH_FREE:
        files = [Path(top)] if Path(top).is_file() else sorted(p for p in Path(top).rglob("*") if p.is_file())
        for path in files:
            if path.suffix in (".md", ".png"):
                continue
            for include in re.findall(r'^\s*#include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE):
                if include.startswith(("torch/", "ATen/", "c10/")):
                    problems.append(f"{path}: includes {include}; kernels know no torch")
                stem = Path(include).stem
                siblings = CUDA_FAMILIES if path.parent.name == "ptx" else CUDA_SIBLINGS
                below = path.parent.name == "device" and include.startswith("ptx/")
                is_sibling = path.stem in siblings and stem in siblings - {path.stem} and not below
                if "cuda/device" in str(path) and is_sibling:
                    problems.append(f"{path}: includes its sibling {include}")
    return problems


if __name__ == "__main__":
    violations = python_violations(Path()) + cpp_violations()
    print("\n".join(violations) if violations else "imports: one direction")
    sys.exit(bool(violations))
