"""A plug-in inside a stand-in for its engine; transformers with the quantizer, and models for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import fake_vllm
from helpers.vllm_layers import Plugin


@pytest.fixture
def make_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Plugin]]:
    ours = [f"torch_nvfp4.integrations.vllm.{name}" for name in ("oracle", "experts", "platform")]

    def make(version: str = "0.33.0", device: str = "cpu", capability: tuple[int, int] | None = None) -> Plugin:
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        for name in ours:  # they have imported the vLLM of another test
            sys.modules.pop(name, None)
        modules = fake_vllm.engine(version, device, capability)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return Plugin(modules)

    yield make
    for name in ours:
        sys.modules.pop(name, None)


@pytest.fixture
def registered() -> Iterator[None]:
    """transformers knows the quantizer during the test. Only for modules that ask for transformers."""
    from torch_nvfp4.integrations.transformers import register, unregister

    register()
    yield
    unregister()


@pytest.fixture(scope="module")
def packed_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint per layout, which tests leave as it is. Only for modules that ask for transformers."""
    from helpers.hf_models import write_model

    return {
        layout: write_model(tmp_path_factory.mktemp(layout), layout) / "packed" for layout in ("deepseek", "modelopt")
    }
