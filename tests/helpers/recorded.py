"""What the package's ops are called with."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class RecordedOps(TorchDispatchMode):
    """In ``values``, what each op of the package that has an argument of this name gets for it."""

    def __init__(self, argument: str) -> None:
        super().__init__()
        self.argument = argument
        self.values: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = op._schema.arguments if op.namespace == "nvfp4" else ()
        for position, argument in enumerate(arguments):
            if argument.name == self.argument:
                given = args[position] if position < len(args) else argument.default_value
                self.values.append((kwargs or {}).get(argument.name, given))
        return op(*args, **(kwargs or {}))
