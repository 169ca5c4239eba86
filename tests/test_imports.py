"""The architecture check on small trees, what ``import torch_nvfp4`` costs, and that every public name is described."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import torch_nvfp4

CHECK = Path(__file__).parent.parent / ".ci" / "check_imports.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_imports", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A tree in which everything is allowed; the cases below add to it.
GOOD = {
    "__init__.py": "from torch_nvfp4.nn import layer\n\ndef __getattr__(name):\n    import torch_nvfp4.compiler\n",
    "errors.py": "",
    "gate.py": "from torch_nvfp4.errors import refusal\n",
    "ops/__init__.py": "from torch_nvfp4.ops.moe import moe\n",
    "ops/_checks.py": "from torch_nvfp4.gate import Gate\n",
    "ops/moe.py": "from torch_nvfp4.ops import _checks\nfrom torch_nvfp4.ops._checks import _fail\n_checks._fail\n",
    "nn/__init__.py": "from torch_nvfp4.nn.layer import Layer\n",
    "nn/layer.py": "from torch_nvfp4 import ops\nfrom . import other\n",
    "nn/other.py": "import torch\ntorch._C\n",
    "compiler/__init__.py": "import torch._inductor\n",
    "bench/__init__.py": "def peers():\n    import transformers\n",
    "cli/__init__.py": "import rich.table, typer\nfrom torch_nvfp4 import compiler\n",
}


def violations(check: ModuleType, folder: Path, **files: str) -> list[str]:
    for name, text in {**GOOD, **files}.items():
        path = folder / "torch_nvfp4" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [problem.removeprefix("torch_nvfp4/") for problem in check.python_violations(folder)]


def test_a_good_tree_is_accepted(check: ModuleType, tmp_path: Path) -> None:
    assert violations(check, tmp_path) == []


LONG = "def f():\n" + "    x = 1\n" * 60

# File, what it says, and all that the check has to say to that.
BAD = [
    ("format.py", "from torch_nvfp4.ops import moe\n", "format.py: imports ops, which format may not depend on"),
    ("format.py", "def f():\n    import torch_nvfp4.nn\n", "format.py: imports nn, which format may not depend on"),
    ("ops/moe.py", "from torch_nvfp4.backends import cpu\n",
     "ops/moe.py: imports backends, which ops may not depend on"),
    ("model_config.py", "from torch_nvfp4 import gate\nimport torch_nvfp4.format\n",
     "model_config.py: imports format, which model_config may not depend on"),
    ("nn/other.py", "from .. import compiler\n", "nn/other.py: imports compiler, which nn may not depend on"),
    ("__init__.py", "from torch_nvfp4 import compiler\n",
     "__init__.py: imports compiler when it is imported itself; that belongs into a function"),
    ("verify.py", "from torch_nvfp4.fusion import fuse\n", "verify.py: imports fusion, the former name of compiler"),
    ("misc.py", "", "misc.py: module misc has no layer in .ci/check_imports.py"),
    ("nn/other.py", "from torch_nvfp4.ops import _checks\n",
     "nn/other.py: imports torch_nvfp4.ops._checks, a private module of torch_nvfp4.ops"),
    ("nn/other.py", "from torch_nvfp4.ops._checks import fail\n",
     "nn/other.py: imports torch_nvfp4.ops._checks, a private module of torch_nvfp4.ops"),
    ("nn/other.py", "from torch_nvfp4.ops.moe import _decomposed\n",
     "nn/other.py: imports _decomposed of torch_nvfp4.ops.moe, a private name of another package"),
    ("nn/other.py", "from torch_nvfp4.gate import _number\n",
     "nn/other.py: imports _number of torch_nvfp4.gate, a private name of another package"),
    ("nn/other.py", "from torch_nvfp4 import ops\nops._hidden()\n",
     "nn/other.py: reads ops._hidden, a private name of another package"),
    ("nn/other.py", "import typer\n", "nn/other.py: imports typer, which only cli may"),
    ("verify.py", "def f():\n    from rich.table import Table\n", "verify.py: imports rich, which only cli may"),
    ("backends/__init__.py", "import vllm.config\n",
     "backends/__init__.py: imports vllm, which only bench and integrations.vllm may"),
    ("integrations/vllm.py", "import transformers\n",
     "integrations/vllm.py: imports transformers, which only bench and integrations.transformers may"),
    ("compiler/other.py", "import importlib\nimportlib.import_module('torch_tensorrt._features')\n",
     "compiler/other.py: imports torch_tensorrt, which only compiler.tensorrt may"),
    ("ops/other.py", "from torch._inductor.utils import x\n",
     "ops/other.py: imports torch._inductor, which only compiler may"),
    ("nn/other.py", "x = 1\n" * 451, "nn/other.py: has 451 lines; at most 450: split it by subject"),
    ("nn/other.py", LONG, "nn/other.py: f has 61 lines; at most 60, or a line above it: # Over 60 lines: <reason>"),
    ("nn/other.py", "# Over 60 lines: it is long\n" + LONG,
     "nn/other.py: f has 61 lines; at most 60, or a line above it: # Over 60 lines: <reason>"),
    ("nn/other.py", "# Over 60 lines: one table of everything there is\ndef f():\n    pass\n",
     "nn/other.py: line 1 gives a reason for a function that is short"),
    ("nn/other.py", "def f():\n    from torch_nvfp4.nn import layer\n",
     "torch_nvfp4.nn.layer -> torch_nvfp4.nn.other -> torch_nvfp4.nn.layer: a circle of imports"),
    ("__init__.py", "if TYPE_CHECKING:\n    from torch_nvfp4 import compiler\n", ""),
    ("bench/run.py", "import torch_nvfp4.verify\n", ""),
    ("nn/other.py", "# Over 60 lines: one table of everything there is\n@cache\n" + LONG, ""),
    ("nn/other.py", "x = 1\n" * 450, ""),
    ("nn/other.py", LONG.removesuffix("    x = 1\n"), ""),
    ("integrations/vllm.py", "import vllm\n", ""),
]  # fmt: skip


@pytest.mark.parametrize(("file", "text", "expected"), BAD)
def test_a_bad_tree_is_refused(check: ModuleType, tmp_path: Path, file: str, text: str, expected: str) -> None:
    found = violations(check, tmp_path, **{file: text})
    assert found == ([expected] if expected else [])


def test_packages_that_import_each_other(check: ModuleType, tmp_path: Path) -> None:
    files = {"verify.py": "from torch_nvfp4.bench import run\n", "bench/report.py": "import torch_nvfp4.verify\n"}
    assert violations(check, tmp_path, **files, **{"bench/run.py": ""}) == [
        "bench -> verify -> bench: a circle of imports"
    ]


def test_the_package_keeps_the_rules() -> None:
    run = subprocess.run([sys.executable, str(CHECK)], cwd=CHECK.parent.parent, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "imports: one direction\n"), run.stderr


def test_import_needs_torch_alone() -> None:
    """Inductor takes seconds, and the command line's packages and the engines are for those who use them."""
    program = (
        "import sys, torch; before = set(sys.modules); import torch_nvfp4; "
        "print(*sorted({'.'.join(m.split('.')[:2]) for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "torch_nvfp4.nn" in loaded
    unwanted = ("torch._inductor", "torch_nvfp4.compiler", "torch_nvfp4.cli", "typer", "rich", "transformers", "triton")
    assert not [module for module in loaded if module.startswith(unwanted)]


PUBLIC = [
    "torch_nvfp4",
    "torch_nvfp4.backends",
    "torch_nvfp4.checkpoint",
    "torch_nvfp4.compiler",
    "torch_nvfp4.compiler.tensorrt",
    "torch_nvfp4.convert",
    "torch_nvfp4.errors",
    "torch_nvfp4.format",
    "torch_nvfp4.gate",
    "torch_nvfp4.integrations.report",
    "torch_nvfp4.integrations.transformers.versions",
    "torch_nvfp4.integrations.vllm",
    "torch_nvfp4.integrations.vllm.support",
    "torch_nvfp4.integrations.vllm.versions",
    "torch_nvfp4.integrations.vllm.weights",
    "torch_nvfp4.nn",
    "torch_nvfp4.ops",
    "torch_nvfp4.quant_config",
    "torch_nvfp4.reference",
    "torch_nvfp4.testing",
    "torch_nvfp4_vllm",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    missing = [] if module.__doc__ else [name]
    for public_name in public:
        value = getattr(module, public_name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not hasattr(module, "__all__") and value.__module__ != name:
            continue  # imported for the module's own use
        missing += [] if own_docstring(value) else [public_name]
        members = vars(value) if inspect.isclass(value) else {}
        for member, function in members.items():
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function) and not member.startswith("_") and not function.__doc__:
                missing.append(f"{public_name}.{member}")
    assert missing == []


def own_docstring(value: object) -> bool:
    """Whether there is one beside what a dataclass or a named tuple writes by itself."""
    text = value.__doc__ or ""
    return bool(text) and not text.startswith(f"{getattr(value, '__name__', '')}(")


def test_the_former_names_are_the_same_objects() -> None:
    pairs = {
        "fusion": ("compiler", ["GraphPass", "decompose_moe", "fuse_gates", "inductor_options"]),
        "tensorrt": (
            "compiler.tensorrt",
            ["available", "bind_arguments", "unavailable_reason", "unsupported_reason"],
        ),
    }
    for former, (present, names) in pairs.items():
        old, new = (importlib.import_module(f"torch_nvfp4.{name}") for name in (former, present))
        assert all(getattr(old, name) is getattr(new, name) for name in names)
    assert torch_nvfp4.inductor_options is importlib.import_module("torch_nvfp4.compiler").inductor_options
    with pytest.raises(AttributeError, match=r"module 'torch_nvfp4.compiler' has no attribute 'nothing'"):
        _ = importlib.import_module("torch_nvfp4.compiler").nothing


@pytest.mark.parametrize(
    "name", ["compiler", "distributed", "integrations.transformers", "mxfp4", "reference_fp8", "testing"]
)
def test_documented_submodules_are_attributes(name: str) -> None:
    """The README and the errors name them, as in ``torch_nvfp4.distributed.expert_maps``."""
    program = f"import torch_nvfp4; print(torch_nvfp4.{name}.__name__)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [f"torch_nvfp4.{name}"]


def test_attributes_that_are_not_there() -> None:
    assert "distributed" in dir(torch_nvfp4)
    with pytest.raises(AttributeError, match="module 'torch_nvfp4' has no attribute 'parallel'"):
        _ = torch_nvfp4.parallel  # type: ignore[attr-defined]
    integrations = importlib.import_module("torch_nvfp4.integrations")
    with pytest.raises(AttributeError, match=r"module 'torch_nvfp4.integrations' has no attribute 'keras'"):
        _ = integrations.keras


@pytest.mark.parametrize("name", ["torch_nvfp4", "torch_nvfp4.compiler", "torch_nvfp4.integrations.transformers"])
def test_dir_has_the_names_that_are_imported_at_their_first_use(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) <= set(dir(module))
