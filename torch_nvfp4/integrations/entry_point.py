"""Whether an engine would load torch_nvfp4's plug-in. Imports no engine."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from types import ModuleType

__all__ = ["plugin_error"]


def plugin_error(module: ModuleType, group: str, variable: str, allowed: Sequence[str] | None) -> str | None:
    """Why an engine that starts in this environment would not load the plug-in, or None.

    Args:
        module: the plug-in's, with ``mode`` and ``ENVIRONMENT_VARIABLE``.
        group: of entry points, in which the engine looks for plug-ins.
        variable: the name of the environment variable that says which of them it loads.
        allowed: what it says; None: all of them.
    """
    try:
        if module.mode() == "off":
            return f"{module.ENVIRONMENT_VARIABLE}=off"
    except ValueError as error:
        return str(error)
    entries = importlib.metadata.entry_points(group=group)
    plugin = next((entry.name for entry in entries if "torch_nvfp4" in entry.value), None)
    if plugin is None:
        return f"expected the entry point torch_nvfp4 in the group {group}, got none; install torch_nvfp4 with pip"
    if allowed is not None and plugin not in allowed:
        return f"expected {plugin} in {variable}, got {','.join(allowed)!r}"
    return None
