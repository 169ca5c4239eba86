"""Writes torch_nvfp4/ops/namespace.pyi: the types of ``torch.ops.nvfp4``, out of the schemas of the built library.

python .ci/write_op_types.py           # writes the file
python .ci/write_op_types.py --check   # exits with 1 and says what to run where the file is not current
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import torch_nvfp4  # noqa: F401  (registers the ops)

TARGET = Path(__file__).parent.parent / "torch_nvfp4" / "ops" / "namespace.pyi"
HEAD = """# Written by .ci/write_op_types.py out of the schemas of the ops.

from typing import Protocol, overload

from torch import Tensor
"""
TYPES = {"Tensor": "Tensor", "int": "int", "float": "float", "bool": "bool", "number": "float"}


def python_type(schema_type: torch.Type) -> str:
    """The annotation of one schema type, such as ``Tensor | None``."""
    text = str(schema_type)
    if text.startswith("Optional["):
        return f"{TYPES[text[9:-1]]} | None"
    return TYPES[text]


def signature(schema: torch.FunctionSchema) -> str:
    """``__call__`` of one overload, without its decorator."""
    parts, keyword_only = ["self"], False
    for argument in schema.arguments:
        if argument.kwarg_only and not keyword_only:
            parts.append("*")
            keyword_only = True
        default = f" = {argument.default_value!r}" if argument.has_default_value() else ""
        parts.append(f"{argument.name}: {python_type(argument.type)}{default}")
    returns = [python_type(value.type) for value in schema.returns]
    result = "None" if not returns else returns[0] if len(returns) == 1 else f"tuple[{', '.join(returns)}]"
    lines = "".join(f"        {part},\n" for part in parts)
    return f"    def __call__(\n{lines}    ) -> {result}: ...\n"


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def text() -> str:
    """The whole file."""
    schemas: dict[str, dict[str, torch.FunctionSchema]] = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("nvfp4::"):
            schemas.setdefault(schema.name.partition("::")[2], {})[schema.overload_name or "default"] = schema
    body = ""
    for op, overloads in sorted(schemas.items()):
        for overload, schema in sorted(overloads.items()):
            body += f"\nclass {camel(op)}{camel(overload)}(Protocol):\n{signature(schema)}"
        several = len(overloads) > 1
        base = "Protocol" if several else f"{camel(op)}Default, Protocol"
        body += f"\nclass {camel(op)}({base}):\n"
        for overload in sorted(overloads):
            body += f"    @property\n    def {overload}(self) -> {camel(op)}{camel(overload)}: ...\n"
        if several:
            body += "".join("    @overload\n" + signature(schema) for _, schema in sorted(overloads.items()))
    body += "\nclass Namespace(Protocol):\n"
    body += "".join(f"    @property\n    def {op}(self) -> {camel(op)}: ...\n" for op in sorted(schemas))
    return f"{HEAD}{body}\nnvfp4: Namespace\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if TARGET.read_text() != text():
            sys.exit(f"{TARGET.name} is not what the library's schemas give: run python .ci/write_op_types.py")
    else:
        TARGET.write_text(text())
