"""What an integration relies on in an engine, held against what an installed engine has. Imports no engine."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["Load", "differences"]

Load = Callable[[str], Any]
"""Gives the module of a name, or raises ModuleNotFoundError."""


def differences(
    signatures: Mapping[tuple[str, str], tuple[str, ...]],
    attributes: Mapping[tuple[str, str], tuple[str, ...]],
    load: Load = importlib.import_module,
    *,
    exact: bool = True,
) -> Iterator[str]:
    """One text per name that is missing or has changed, each with what was expected and what came.

    Args:
        signatures: (module, dotted name of a function) -> its parameters, in order.
        attributes: (module, class) -> attributes, dataclass fields or enum members that it must have.
        load: what imports a module.
        exact: False: a function may have further parameters, and in another order, and () stands for something that
            only has to be there.
    """
    modules = {module: _loaded(load, module) for module, _ in (*signatures, *attributes)}
    for module, loaded in modules.items():
        if isinstance(loaded, Exception):
            yield f"{module}: expected a module that can be imported, got {type(loaded).__name__}: {loaded}"
    for (module, function), wanted in signatures.items():
        if isinstance(modules[module], Exception):
            continue
        found = _find(modules[module], function)
        got = None if found is None else _parameters_of(found)
        met = got == wanted if exact else found is not None and {*wanted} <= {*(got or ())}
        if not met:
            expected = _shown(wanted) if exact else f"at least {_shown(wanted)}" if wanted else "it to be there"
            have = "nothing" if found is None else type(found).__name__ if got is None else _shown(got)
            yield f"{module}.{function}: expected {expected}, got {have}"
    for (module, name), wanted in attributes.items():
        if isinstance(modules[module], Exception):
            continue
        found = _find(modules[module], name)
        has = set() if found is None else {*dir(found), *getattr(found, "__dataclass_fields__", ())}
        missing = [attribute for attribute in wanted if attribute not in has]
        if missing:
            lacks = "nothing" if found is None else f"one without {', '.join(missing)}"
            yield f"{module}.{name}: expected {', '.join(wanted)}, got {lacks}"


def _loaded(load: Load, module: str) -> Any:
    """The module, None where there is none of the name, or what it raises: an engine is not whole on every platform."""
    try:
        return load(module)
    except ModuleNotFoundError as error:
        itself = error.name is None or f"{module}.".startswith(f"{error.name}.")
        return None if itself else error
    except Exception as error:
        return error


def _find(module: Any, name: str) -> Any:
    """The object of a dotted name in a module, None where it is not there."""
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            break
    return found


def _parameters_of(function: Any) -> tuple[str, ...] | None:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def _shown(names: tuple[str, ...]) -> str:
    return f"({', '.join(names)})"
