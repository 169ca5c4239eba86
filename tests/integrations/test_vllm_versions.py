"""What the plug-in knows of each version of vLLM, against a table read out of their sources; the entry point."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import torch_nvfp4_vllm
from helpers import fake_vllm
from helpers.fake_vllm import ACTIVATION, CONFIG, KERNEL, ORACLE, VERSIONS, function
from torch_nvfp4.integrations.vllm import versions
from torch_nvfp4.integrations.vllm.versions import check_installed, unknown_version, unmet


def loader(modules: dict[str, ModuleType]) -> Any:
    def load(name: str) -> ModuleType:
        if name not in modules:
            raise ModuleNotFoundError(name)
        return modules[name]

    return load


def test_the_table_has_every_version_of_the_range() -> None:
    releases = {versions.release(version) for version in VERSIONS}
    assert releases == {(0, minor) for minor in range(versions.FIRST[1], versions.LAST[1] + 1)}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_as_its_sources_have_it(version: str) -> None:
    names = fake_vllm.names_of(version)
    assert set(names) == {*versions.SIGNATURES, *versions.ATTRIBUTES}
    number = versions.release(version)
    assert number is not None
    for module, name in versions.SIGNATURES:
        assert versions.parameters(module, name, number) == tuple(names[module, name]), name
    for place, wanted in versions.attributes(number).items():
        assert wanted == tuple(names[place])
    assert list(unmet(version, loader(fake_vllm.stubs(version)))) == []
    check_installed(version, loader(fake_vllm.stubs(version)))


@pytest.mark.parametrize("version", ["0.24.0", "0.33.0", "0.32.1", "0.32.0rc2", "0.25.1+cpu", "0.29.0.dev3+g1234"])
def test_known(version: str) -> None:
    assert unknown_version(version) is None


@pytest.mark.parametrize("version", ["0.23.0", "0.34.0", "1.30.0", "0.3", "0.1.dev1+g1", "dev", ""])
def test_unknown_versions_are_named(version: str) -> None:
    assert unknown_version(version) == f"expected vllm 0.24 to 0.33, got {version}"
    with pytest.raises(
        RuntimeError, match=re.escape(f"expected vllm 0.24 to 0.33, got {version}. Set TORCH_NVFP4_VLLM=off ")
    ):
        check_installed(version, loader({}))


def test_a_changed_signature_is_named_with_both() -> None:
    modules = fake_vllm.stubs("0.32.0")
    modules[ORACLE].select_nvfp4_moe_backend = function("f", ["config", "key"])  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError) as raised:
        check_installed("0.32.0", loader(modules))
    expected = f"{ORACLE}.select_nvfp4_moe_backend: expected (config, weight_key, activation_key), got (config, key)"
    assert f"does not know this vLLM (0.32.0): {expected}. Set TORCH_NVFP4_VLLM=off" in str(raised.value)
    # The signature of another version is a changed one too.
    modules = fake_vllm.stubs("0.26.0")
    problems = list(unmet("0.33.0", loader(modules)))
    assert [problem.split(":")[0].rpartition(".")[2] for problem in problems] == [
        "convert_to_nvfp4_moe_kernel_format", "make_nvfp4_moe_quant_config", "make", "FusedMoEConfig", "MoEActivation",
    ]  # fmt: skip
    assert problems[2].endswith("weight_dtype, is_scale_swizzled, gemm1_alpha, gemm1_beta, gemm1_clamp_limit)")
    assert problems[4].endswith("RELU2_NO_MUL, SITU, got one without SITU")


def test_what_is_missing_is_named() -> None:
    modules = fake_vllm.stubs("0.32.0")
    del modules[ORACLE].make_nvfp4_moe_quant_config
    del modules[ACTIVATION].MoEActivation.SWIGLUSTEP
    del modules[CONFIG].FusedMoEConfig.__dataclass_fields__["swiglu_limit"]
    del modules[KERNEL].FusedMoEExperts
    problems = list(unmet("0.32.0", loader(modules)))
    assert [problem.split(", got ")[1] for problem in problems] == [
        "nothing", "nothing", "nothing", "one without swiglu_limit", "nothing", "one without SWIGLUSTEP",
    ]  # fmt: skip
    del modules[ORACLE]
    assert sum(problem.startswith(ORACLE) for problem in unmet("0.32.0", loader(modules))) == 3


@pytest.mark.parametrize("error", [
    ImportError("cannot import name 'tl'"), ModuleNotFoundError("No module named 'triton'", name="triton"),
    OSError("libcuda.so.1: cannot open shared object file"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_module_that_cannot_be_imported_is_named_with_its_error(error: Exception) -> None:
    """And once: a vLLM of another platform must not end with an error that says nothing of this package."""
    modules = fake_vllm.stubs("0.32.0")

    def load(name: str) -> ModuleType:
        if name == ORACLE:
            raise error
        return modules[name]

    wanted = f"{ORACLE}: expected a module that can be imported, got {type(error).__name__}: {error}"
    assert list(unmet("0.32.0", load)) == [wanted]
    with pytest.raises(RuntimeError, match=re.escape(f"{wanted}. Set TORCH_NVFP4_VLLM=off to serve with")):
        check_installed("0.32.0", load)


def test_a_vllm_without_the_modules_is_refused_by_its_version() -> None:
    """Before the plug-in's own modules, which import classes that an older vLLM has not."""
    program = (
        "import sys, types; vllm = sys.modules['vllm'] = types.ModuleType('vllm'); vllm.__version__ = '0.20.1'; "
        "import torch_nvfp4_vllm; torch_nvfp4_vllm.register()"
    )
    folder = str(Path(torch_nvfp4_vllm.__file__).parent)
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_NVFP4_VLLM"}
    run = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "RuntimeError: torch_nvfp4's plug-in does not know this vLLM (0.20.1): expected vllm 0.24 to"
    )
    assert "Set TORCH_NVFP4_VLLM=off to serve with vLLM's own kernels" in last


def test_the_entry_point_imports_the_standard_library_alone() -> None:
    tree = ast.parse(Path(torch_nvfp4_vllm.__file__).read_text())
    at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    named = {alias.name if isinstance(node, ast.Import) else node.module for node in at_import for alias in node.names}
    assert {str(name).split(".")[0] for name in named} <= sys.stdlib_module_names
    program = (
        "import sys; sys.modules['torch'] = sys.modules['torch_nvfp4'] = None; import torch_nvfp4_vllm; "
        "import os; os.environ['TORCH_NVFP4_VLLM'] = 'off'; torch_nvfp4_vllm.register()"
    )
    folder = str(Path(torch_nvfp4_vllm.__file__).parent)
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder)


def test_the_entry_point_is_declared() -> None:
    text = (Path(__file__).parent.parent.parent / "pyproject.toml").read_text()
    declared = '[project.entry-points."vllm.general_plugins"]\ntorch_nvfp4 = "torch_nvfp4_vllm:register"\n'
    assert declared in text
    assert 'py-modules = ["torch_nvfp4_sglang", "torch_nvfp4_vllm"]' in text


@pytest.mark.parametrize(("value", "mode"), [(None, "auto"), ("", "auto"), ("auto", "auto"), ("require", "require")])
def test_mode(monkeypatch: pytest.MonkeyPatch, value: str | None, mode: str) -> None:
    monkeypatch.delenv("TORCH_NVFP4_VLLM", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCH_NVFP4_VLLM", value)
    assert torch_nvfp4_vllm.mode() == mode


@pytest.mark.parametrize("value", ["on", "AUTO", "1", "require "])
def test_a_bad_mode_names_the_three(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCH_NVFP4_VLLM", value)
    with pytest.raises(ValueError, match=f"^TORCH_NVFP4_VLLM: expected auto, require or off, got '{value}'$"):
        torch_nvfp4_vllm.register()


def test_vllm_calls_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's flag says that plug-ins are loaded before they are."""
    plugins = ModuleType("vllm.plugins")
    plugins.plugins_loaded = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.plugins", plugins)
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "on")
    with pytest.raises(ValueError, match="TORCH_NVFP4_VLLM: expected auto, require or off, got 'on'"):
        torch_nvfp4_vllm.register()
    assert plugins.plugins_loaded is False
    monkeypatch.setattr(plugins, "plugins_loaded", True)
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "off")
    torch_nvfp4_vllm.register()
    assert plugins.plugins_loaded is True


def test_off_leaves_vllm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_VLLM", "off")
    monkeypatch.setitem(sys.modules, "torch_nvfp4.integrations.vllm", None)
    torch_nvfp4_vllm.register()


def test_a_package_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_NVFP4_VLLM", raising=False)
    monkeypatch.setitem(sys.modules, "torch_nvfp4.integrations.vllm", None)
    with pytest.raises(RuntimeError, match=r"cannot be loaded: ModuleNotFoundError: .* TORCH_NVFP4_VLLM=off"):
        torch_nvfp4_vllm.register()


def test_importing_the_package_does_not_import_vllm() -> None:
    program = (
        "import sys; sys.modules['vllm'] = None; import torch_nvfp4.integrations.vllm, torch_nvfp4.integrations.report;"
        "import torch_nvfp4.integrations.vllm.support, torch_nvfp4.integrations.vllm.weights"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(torch_nvfp4_vllm.__file__).parent)
