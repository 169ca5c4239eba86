"""The choice of a backend is the module's, whatever the environment of the tests asks for."""

from __future__ import annotations

import pytest

from torch_nvfp4 import backends


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
