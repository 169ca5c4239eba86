"""Where the tests run: on the CPU, at every instruction level that it has, and on a GPU where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import torch_nvfp4  # noqa: F401  (registers the ops)

# Processor flags that a level needs, as /proc/cpuinfo names them: a second opinion on the library's own detection.
LEVEL_FLAGS = {
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}


def processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}


LEVELS = [level for level, needed in LEVEL_FLAGS.items() if needed <= processor_flags()]
HAS_GPU = torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key("nvfp4::moe", "CUDA")
DEVICES = ["cpu", *(["cuda"] if HAS_GPU else [])]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="fail unless the tests that need a GPU can run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU and the CUDA library; skipped where there is none")
    if config.getoption("--gpu") and not HAS_GPU:
        what = "torch without a CUDA device" if not torch.cuda.is_available() else "torch_nvfp4 without _C_cuda.so"
        raise pytest.UsageError(f"--gpu: expected a CUDA device and torch_nvfp4's CUDA library, got {what}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="no GPU, or no CUDA library"))


@pytest.fixture(autouse=True)
def _default_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_NVFP4_CPU_LEVEL", raising=False)


# What a package of AOTInductor does first, as it reads the name of its device.
PROBE = """#include <regex>
extern "C" int probe() { return std::regex_match("cuda:0", std::regex("([a-z]+)(:([0-9]+))?")); }
"""
CALL_PROBE = "import ctypes, sys, torch; sys.exit(ctypes.CDLL(sys.argv[1]).probe() != 1)"


def builds_for_torch(compiler: str, folder: Path) -> bool:
    """Whether a library by this compiler works in a process of torch."""
    source, library = folder / "probe.cpp", folder / "probe.so"
    source.write_text(PROBE)
    build = [compiler, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)]
    run = [sys.executable, "-c", CALL_PROBE, str(library)]
    return shutil.which(compiler) is not None and all(
        subprocess.run(command, capture_output=True).returncode == 0 for command in (build, run)
    )


@pytest.fixture(scope="session")
def package_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The compiler that AOTInductor uses: $CXX, or the first on the path that works where $CXX does not.

    A $CXX that links libstdc++ statically gives each package a libstdc++ of its own beside torch's. The two take locale
    facets for each other's, as ids are unique in a process and facets are not, and a package of any model crashes while
    it is loaded.
    """
    wanted = os.environ.get("CXX")
    folder = tmp_path_factory.mktemp("compiler")
    if wanted is None or builds_for_torch(wanted, folder):
        yield wanted or "g++"
        return
    import torch._inductor.config as inductor_config  # a second or two that most runs need not wait for

    compiler = next((name for name in ("g++", "c++", "clang++") if builds_for_torch(name, folder)), wanted)
    with patch.dict(os.environ, CXX=compiler), inductor_config.patch({"cpp.cxx": (None, compiler)}):
        yield compiler


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
