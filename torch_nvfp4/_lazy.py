"""Names of a package that are imported when they are first asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def imported_at_first_use(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of ``package``: by name the submodule that has it, "" for a submodule itself.

    Assign them under ``if not TYPE_CHECKING``: for type checkers every name would be there, as Any.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"{package}.{modules[name] or name}")
        return getattr(module, name) if modules[name] else module

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names
