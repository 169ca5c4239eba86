"""Holds the direction of imports: a module of torch_nvfp4 imports no later layer, and device code no torch.

Run from the repository root; prints every violation and exits 1 if there is one.
"""

import ast
import re
import sys
from pathlib import Path

# Each module may import those of its own layer and of earlier ones.
LAYERS = [
    {"_version", "format"},
    {"activation"},
    {"reference"},
    {"checkpoint", "testing"},
    {"backends", "quant_config"},
    {"ops"},
    {"nn", "fusion", "export", "distributed", "tensorrt"},
    {"integrations", "demo", "bench"},
    {"cli", "__main__"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
ONLY = {"checkpoint": {"format"}}  # modules with fewer dependencies than their layer allows
TORCH_FREE = ("csrc/kernels.h", "csrc/cpu", "csrc/cuda/device", "csrc/cuda/kernels")
# common <- ptx <- decode (the packed format, which the others work on) <- these, which never include each other.
CUDA_SIBLINGS = {"mma", "wgmma", "pipeline", "scheduler", "epilogue"}


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "torch_nvfp4":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("torch_nvfp4."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("torch_nvfp4.")}
    return found


def python_violations() -> list[str]:
    problems = []
    for path in sorted(Path("torch_nvfp4").rglob("*.py")):
        module = path.relative_to("torch_nvfp4").with_suffix("").parts[0]
        if module == "__init__":
            continue
        if module not in RANK:
            problems.append(f"{path}: module {module} has no layer in .ci/check_imports.py")
            continue
        for name in imported_modules(path) - {module}:
            allowed = name in ONLY[module] if module in ONLY else RANK.get(name, len(LAYERS)) <= RANK[module]
            if not allowed:
                problems.append(f"{path}: imports {name}, which comes after {module}")
        # The benchmark imports it too, as a peer.
        uses_transformers = re.search(r"^\s*(import|from) transformers", path.read_text(), re.MULTILINE)
        if uses_transformers and module not in ("integrations", "bench"):
            problems.append(f"{path}: only integrations may import transformers")
    return problems


def cpp_violations() -> list[str]:
    problems = []
    for top in TORCH_FREE:
        files = [Path(top)] if Path(top).is_file() else sorted(p for p in Path(top).rglob("*") if p.is_file())
        for path in files:
            if path.suffix == ".md":
                continue
            for include in re.findall(r'^\s*#include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE):
                if include.startswith(("torch/", "ATen/", "c10/")):
                    problems.append(f"{path}: includes {include}; kernels know no torch")
                stem = Path(include).stem
                if "cuda/device" in str(path) and path.stem in CUDA_SIBLINGS and stem in CUDA_SIBLINGS - {path.stem}:
                    problems.append(f"{path}: includes its sibling {include}")
    return problems


if __name__ == "__main__":
    violations = python_violations() + cpp_violations()
    print("\n".join(violations) if violations else "imports: one direction")
    sys.exit(bool(violations))
