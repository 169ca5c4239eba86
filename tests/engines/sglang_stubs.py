"""Lets SGLang's modules be imported without a GPU: stand-ins for two libraries of others, none for SGLang's own code.

- ``sgl_kernel``: CUDA kernels, which has no build that loads without a GPU. SGLang imports names from it.
- ``torchvision``: PyPI's build is for CUDA's torch and does not load beside torch for CPUs. SGLang imports it for
  images.

Nothing that the tests run calls into either.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
import unittest.mock
from typing import Any

__all__ = ["install"]

NAMES = ("sgl_kernel", "torchvision")


class _StandIn(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 (a module's)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return unittest.mock.MagicMock(name=f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in NAMES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Has to run before SGLang is imported."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    # transformers decides at its import whether there is a torchvision: there is none.
    import transformers.image_processing_utils
    import transformers.image_utils  # noqa: F401

    sys.meta_path.insert(0, _Finder())
