"""Where the tests run: on the CPU, at every instruction level that it has, and on a GPU where there is one."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torch_nvfp4  # noqa: F401  (registers the ops)
from helpers.levels import LEVELS


def load_build_tools() -> ModuleType:
    """What the build knows about compilers. Not on the path: that would hide which torch_nvfp4 is installed."""
    spec = importlib.util.spec_from_file_location("build_tools", Path(__file__).with_name("build_tools.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


build_tools = load_build_tools()

HAS_GPU = torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key("nvfp4::moe", "CUDA")
DEVICES = ["cpu", *(["cuda"] if HAS_GPU else [])]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="fail unless the tests that need a GPU can run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU and the CUDA library; skipped where there is none")
    if config.getoption("--gpu") and not HAS_GPU:
        what = "torch without a CUDA device" if not torch.cuda.is_available() else "torch_nvfp4 without _C_cuda.so"
        raise pytest.UsageError(f"--gpu: expected a CUDA device and torch_nvfp4's CUDA library, got {what}")
    if config.getoption("numprocesses", None):
        let_idle_threads_sleep()


def let_idle_threads_sleep() -> None:
    """Makes OpenMP's threads in the workers of pytest-xdist, which start later, sleep where they would spin.

    Each worker has a thread per core, so that what one spins on another worker computes on: it takes up to ten times
    as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_sessionstart() -> None:
    heed_signals()
    use_the_builds_compiler()


def heed_signals() -> None:
    """Undoes that SIGINT and SIGHUP are ignored, as in a job in the background or under nohup.

    The tests send them to processes, which would inherit that.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def use_the_builds_compiler() -> None:
    """Makes Inductor use the compiler that the build would take in the place of a $CXX that links libstdc++ statically.

    Such a $CXX gives each package a libstdc++ of its own beside torch's. The two take locale facets for each other's,
    as ids are unique in a process and facets are not, and a package of any model crashes while it is loaded. Nor can
    g++ with -static-libstdc++ precompile the headers of Inductor's kernels.
    """
    if "CXX" not in os.environ:
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(build_tools.BuildError):
        os.environ["CXX"] = build_tools.chosen_cxx(Path(torch.__file__).parent, Path(folder), print)
    inductor_config = sys.modules.get("torch._inductor.config")  # reads $CXX once, as it is imported
    if inductor_config is not None:
        inductor_config.cpp.cxx = (None, os.environ["CXX"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="no GPU, or no CUDA library"))


@pytest.fixture(autouse=True)
def _default_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_NVFP4_CPU_LEVEL", raising=False)


@pytest.fixture(scope="session")
def package_compiler() -> str:
    """The compiler that AOTInductor uses."""
    return os.environ.get("CXX", "g++")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device, the CPU at its best level."""
    return request.param


@pytest.fixture(params=[*(f"cpu-{level}" for level in LEVELS), *DEVICES[1:]])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of every kernel: the CPU once per instruction level."""
    device, _, level = request.param.partition("-")
    if level:
        monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", level)
    return device
