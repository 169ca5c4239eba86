"""What packaging and building promise: the version, the sources of each library, rebuilds, compilers, sdist and wheel.

Builds run setup.py as a user does, in a folder of their own: mostly on small stand-ins for the sources, torch and nvcc,
behind compilers that write down what they were asked for; once, from an unpacked sdist, on the real sources.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner

import torch_nvfp4
from torch_nvfp4 import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGING = ("setup.py", "build_tools.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
GXX = next(path for path in map(shutil.which, ("g++", "c++", "clang++")) if path)


def load_setup() -> ModuleType:
    """setup.py, which builds only as __main__."""
    spec = importlib.util.spec_from_file_location("setup_of_torch_nvfp4", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.object(sys, "path", [*sys.path]), patch.dict(sys.modules, {spec.name: module}):
        spec.loader.exec_module(module)
    return module


setup_py = load_setup()
build_tools = setup_py.build_tools


def write(path: Path, text: str, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_one_version() -> None:
    """The command line, the package and the file that packaging reads say the same."""
    declared = re.search(r'^__version__ = "(.+)"$', (ROOT / "torch_nvfp4/_version.py").read_text(), re.MULTILINE)
    result = CliRunner().invoke(cli.app, ["--version"])
    assert declared is not None
    assert torch_nvfp4.__version__ == declared[1]
    assert (result.exit_code, result.stdout) == (0, f"torch-nvfp4 {declared[1]}\n")


# Which sources, with which flags


def test_every_source_has_its_library() -> None:
    cpu, cuda = ({Path(source) for source in ext.sources} for ext in setup_py.extensions())
    files = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")}
    programs = {path for path in files if {"bench", "fuzz"} & set(path.parts)}
    assert files - programs == cpu | cuda
    # The choice of a kernel is host arithmetic, which the CPU library explains without a GPU.
    host_only = {path for path in files if path.match("csrc/cuda/*.cpp")}
    assert cpu & cuda == {path for path in files if path.parts[1] == "ops"} | host_only
    assert {path.parts[1] for path in cuda} == {"ops", "cuda"}


@pytest.mark.parametrize(
    ("source", "level"),
    [
        ("csrc/cpu/avx2.cpp", "avx2"),
        ("csrc/cpu/levels/avx512.cpp", "avx512"),
        ("csrc/cpu/levels/avx512/moe.cpp", "avx512"),
        ("csrc/cpu/portable.cpp", "portable"),
        ("csrc/cpu/level.cpp", None),
        ("csrc/ops/moe.cpp", None),
        ("csrc/library.cpp", None),
    ],
)
def test_level_of_a_source(source: str, level: str | None) -> None:
    assert setup_py.level_of(source) == level


@pytest.mark.parametrize("source", ["csrc/cpu/levels/avx10.cpp", "csrc/cpu/levels/sve/moe.cpp", "csrc/cpu/neon.cpp"])
def test_level_without_flags_is_an_error(source: str) -> None:
    named = source.removeprefix("csrc/cpu/").removeprefix("levels/").split("/")[0].removesuffix(".cpp")
    with pytest.raises(build_tools.BuildError, match=f"{source}: expected a level .* got '{named}'"):
        setup_py.level_of(source)


@pytest.mark.parametrize("archs", ["sm_90", "90a,80", "90+SASS", "", "90+"])
def test_bad_architectures_are_refused(archs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_CUDA_ARCHS", archs)
    with pytest.raises(build_tools.BuildError, match=r"TORCH_NVFP4_CUDA_ARCHS: expected a list like .*, got '"):
        setup_py.gencode_flags()


# Builds of stand-ins

CSRC = {
    "library.cpp": '#include "kernels.h"\n#include <torch/csrc/stable/library.h>\nint library() { return A + T; }\n',
    "kernels.h": "#pragma once\n#define A 1\n",
    "ops/op.cpp": '#include "../kernels.h"\n#include <torch/csrc/stable/library.h>\n'
    "int op(int x) {\n  if (x < A + T) throw x;\n  return x;\n}\n",
    "cpu/gate.inl": "inline int gate(int x) { return x + 2; }\n",
    "cpu/rows.cpp": "int rows() { return 3; }\n",
    "cpu/levels/portable.cpp": '#include "../gate.inl"\nint portable(int x) { return gate(x); }\n',
    "cpu/levels/avx2.cpp": '#include "../gate.inl"\nint avx2(int x) { return gate(x) * LEVEL; }\n',
    "cpu/bench/loop.cpp": "#error a program of its own\n",
    "cuda/device/gate.cuh": "inline int gate(int x) { return x + 5; }\n",
    "cuda/kernels/moe.cu": '#include "../device/gate.cuh"\nint moe_cuda(int x) { return gate(x); }\n',
}
CPU = {"csrc/library.cpp", "csrc/cpu/rows.cpp", "csrc/cpu/levels/portable.cpp", "csrc/cpu/levels/avx2.cpp"}
CPU |= {"csrc/ops/op.cpp"}
CUDA = {"csrc/ops/op.cpp", "csrc/cuda/kernels/moe.cu"}
LEVELS = {"csrc/cpu/levels/portable.cpp", "csrc/cpu/levels/avx2.cpp"}

# What nvcc does as far as a build can tell: --version, its own spelling of flags, and a host compiler that links.
FAKE_NVCC = """#!/bin/sh
host=${NVCC_CCBIN:-g++}
while [ $# -gt 0 ]; do
  case "$1" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;;
    -ccbin) host=$2; shift;;
    -cudart) shift;;
    -gencode=*) ;;
    -Xcompiler) arguments="$arguments $(echo "$2" | tr , ' ')"; shift;;
    -Xlinker) arguments="$arguments -Wl,$2"; shift;;
    *.cu) what=${1#"$TREE/"}; arguments="$arguments -x c++ $1 -x none";;
    *.cpp) what=${1#"$TREE/"}; arguments="$arguments $1";;
    *) arguments="$arguments $1";;
  esac
  shift
done
case "$what" in *probe.cpp) ;; *) echo "nvcc ${what:-link}" >> "$LOG";; esac
exec $host $arguments
"""
LOGGING_CXX = """#!/bin/sh
for argument; do
  case "$argument" in
    --version|*probe.cpp) exec GXX FLAGS "$@";;
    *.cpp) what=${argument#"$TREE/"};;
    -o) output=next;;
    *) [ "$output" = next ] && output=$argument;;
  esac
done
echo "cxx ${what:-link}" >> "$LOG"
TROUBLE
exec GXX FLAGS "$@"
""".replace("GXX", GXX)


def logging_cxx(path: Path, trouble: str = "", flags: str = "") -> Path:
    """A compiler that writes down its sources; ``trouble``: shell commands that know $what and $output."""
    return write(path, LOGGING_CXX.replace("TROUBLE", trouble).replace("FLAGS", flags), 0o755)


class Tree:
    """A project of stand-ins: setup.py and its machinery are the real ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "compiled.log"
        for name in PACKAGING:
            shutil.copy(ROOT / name, write(folder / name, ""))
        shutil.copy(ROOT / "torch_nvfp4/_version.py", write(folder / "torch_nvfp4/_version.py", ""))
        write(folder / "torch_nvfp4/__init__.py", "")
        write(folder / "torch_nvfp4/py.typed", "")
        setup = (folder / "setup.py").read_text()
        # Flags that say the level on any processor.
        write(folder / "setup.py", setup.replace('"avx2": ("-mavx2", "-mfma", "-mf16c")', '"avx2": ("-DLEVEL=2",)'))
        for name, text in CSRC.items():
            write(folder / "csrc" / name, text)
        self.torch = folder / "torch"
        write(self.torch / "include/torch/csrc/stable/library.h", "#define T 7\n")
        write(self.torch / "version.py", "cuda: Optional[str] = '13.0'\n")
        (self.torch / "lib").mkdir()
        thrower = write(folder / "c10.cpp", build_tools.PROBE)
        for name in ("c10", "torch", "torch_cpu"):
            self.run([GXX, "-shared", "-fPIC", str(thrower), "-o", str(self.torch / f"lib/lib{name}.so")], check=True)
        self.cxx = logging_cxx(folder / "bin/cxx")
        self.nvcc = write(folder / "bin/nvcc", FAKE_NVCC, 0o755)

    def run(self, command: list[str], check: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=clean_environment(**variables), capture_output=True, text=True, check=check
        )

    def variables(self) -> dict[str, str]:
        named = {"CXX": str(self.cxx), "NVCC": str(self.nvcc), "TORCH_NVFP4_TORCH_ROOT": str(self.torch)}
        return named | {"LOG": str(self.log), "TREE": str(self.folder), "MAX_JOBS": "2"}

    def setup(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.log.unlink(missing_ok=True)
        command = [sys.executable, "setup.py", "-q", *(arguments or ("build_ext", "--inplace"))]
        return self.run(command, **(self.variables() | variables))

    def build(self, *arguments: str, **variables: str) -> set[str]:
        """Builds in place and returns what was compiled and linked: "cxx csrc/library.cpp", "nvcc link"."""
        done = self.setup(*arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.compiled()

    def compiled(self) -> set[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        assert len(lines) == len(set(lines)), "compiled twice in one build"
        return set(lines)

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def needed(self, library: str = "torch_nvfp4/_C.so") -> list[str]:
        return build_tools.needed_libraries(self.folder / library)


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's, without what a build reads, and with ``variables``."""
    read = ("CXX", "NVCC", "CUDA_HOME", "MAX_JOBS", *build_tools.ENVIRONMENT, *build_tools.NVCC_ENVIRONMENT)
    kept = {name: text for name, text in os.environ.items() if name not in read and "TORCH_NVFP4" not in name}
    return kept | variables


def cxx(*sources: str) -> set[str]:
    return {f"cxx {source}" for source in sources}


def nvcc(*sources: str) -> set[str]:
    return {f"nvcc {source}" for source in sources}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("built"))
    assert tree.build() == cxx(*CPU, "link") | nvcc(*CUDA, "link")
    return tree


@pytest.fixture
def tree(built: Tree) -> Iterator[Tree]:
    """The built tree, left as it was: whatever a test changes there is put back."""
    built.build()
    folders = ("csrc", "torch", "torch_nvfp4", "bin")
    files = [path for folder in folders for path in (built.folder / folder).rglob("*") if path.is_file()]
    kept = {path: path.read_bytes() for path in (*files, built.folder / "setup.py")}
    yield built
    for path, content in kept.items():
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def test_nothing_changed(tree: Tree) -> None:
    """Dates do not count, nor do files that no compiler reads."""
    for path in tree.folder.joinpath("csrc").rglob("*.*"):
        path.touch()
    write(tree.folder / "csrc/NOTES.md", "new")
    write(tree.folder / "README.md", "new")
    library = (tree.folder / "torch_nvfp4/_C.so").stat()
    assert tree.build() == set()
    assert (tree.folder / "torch_nvfp4/_C.so").stat().st_ino == library.st_ino


LINKS = {"cxx link", "nvcc link"}
HEADER_USERS = cxx("csrc/library.cpp", "csrc/ops/op.cpp") | nvcc("csrc/ops/op.cpp")


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("csrc/cpu/rows.cpp", "3", "4", cxx("csrc/cpu/rows.cpp", "link")),
        ("csrc/cpu/gate.inl", "+ 2", "+ 3", cxx(*LEVELS, "link")),
        ("csrc/cpu/gate.inl", "inline", "/* the same code */ inline", cxx(*LEVELS)),
        ("csrc/kernels.h", "A 1", "A 2", HEADER_USERS | LINKS),
        ("csrc/cuda/device/gate.cuh", "+ 5", "+ 6", nvcc("csrc/cuda/kernels/moe.cu", "link")),
        ("torch/include/torch/csrc/stable/library.h", "T 7", "T 8", HEADER_USERS | LINKS),
        ("setup.py", "-DLEVEL=2", "-DLEVEL=3", cxx("csrc/cpu/levels/avx2.cpp", "link")),
        ("setup.py", '"-fPIC", "-f', '"-fPIC", "-DNEW", "-f', cxx(*CPU) | nvcc(*CUDA)),
        ("setup.py", '"-ltorch", "-ltorch_cpu")', '"-ltorch", "-ltorch_cpu", "-s")', {"cxx link"}),
    ],
)
def test_edit_recompiles_what_it_must(tree: Tree, file: str, old: str, new: str, expected: set[str]) -> None:
    """An older date on a changed file, as another version of torch brings, changes nothing about it."""
    tree.edit(file, old, new)
    os.utime(tree.folder / file, (1, 1))
    assert tree.build() == expected
    assert tree.build() == set()


def test_flags_of_the_environment(tree: Tree) -> None:
    assert tree.build(TORCH_NVFP4_CXX_FLAGS="-O0") == cxx(*CPU, "link")
    assert tree.build(TORCH_NVFP4_CXX_FLAGS="-O0") == set()
    assert tree.build() == cxx(*CPU, "link")


def test_architectures_and_variants_have_objects_of_their_own(tree: Tree) -> None:
    assert tree.build(TORCH_NVFP4_CUDA_ARCHS="90a") == nvcc(*CUDA, "link")
    assert tree.build() == set()
    assert tree.build(TORCH_NVFP4_CUDA_ARCHS="90a") == set()
    assert tree.build(TORCH_NVFP4_RACECHECK="1") == nvcc(*CUDA, "link")
    assert tree.build("build_ext", "--build-lib", "build/elsewhere") == set()
    assert tree.build("build_ext", "--build-lib", "build/elsewhere", TORCH_NVFP4_BUILD_CUDA="0") == set()
    assert not (tree.folder / "build/elsewhere/torch_nvfp4/_C_cuda.so").exists()
    assert tree.build("build_ext", "--build-lib", "build/elsewhere") == set()
    assert (tree.folder / "build/elsewhere/torch_nvfp4/_C_cuda.so").exists()


def test_another_compiler_recompiles_its_library(tree: Tree) -> None:
    elsewhere = shutil.copy(tree.cxx, tree.folder / "bin/another")
    assert tree.build(CXX=str(elsewhere)) == cxx(*CPU, "link")
    assert tree.build() == cxx(*CPU, "link")
    # The same path, a new version: cc1plus changes with it, g++ itself may not.
    tree.edit("bin/cxx", "--version|", '--version) echo "g++ 99"; exit;;\n    ')
    assert tree.build() == cxx(*CPU, "link")
    tree.edit("bin/nvcc", "V13.0.88", "V13.0.99")
    assert tree.build() == nvcc(*CUDA, "link")
    assert tree.build(NVCC_APPEND_FLAGS="-lineinfo") == nvcc(*CUDA, "link")
    assert tree.build(NVCC_APPEND_FLAGS="-lineinfo", CPATH="/nowhere") == cxx(*CPU, "link") | nvcc(*CUDA, "link")


def test_lost_object_and_lost_library(tree: Tree) -> None:
    objects = tree.folder / "build/objects/_C"
    (objects / "cpu/rows.cpp.o").unlink()
    (tree.folder / "torch_nvfp4/_C.so").unlink()
    assert tree.build() == cxx("csrc/cpu/rows.cpp")  # the same object again: no link
    assert (tree.folder / "torch_nvfp4/_C.so").read_bytes() == (objects / "_C.so").read_bytes()
    (objects / "_C.so").unlink()
    assert tree.build() == {"cxx link"}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("_C/cpu/rows.cpp.o", cxx("csrc/cpu/rows.cpp")),
        ("_C/_C.so", cxx("link")),
        ("_C_cuda-80_90a_90+PTX/cuda/kernels/moe.cu.o", nvcc("csrc/cuda/kernels/moe.cu")),
    ],
)
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_damaged_output_is_made_again(tree: Tree, file: str, expected: set[str], kept: float) -> None:
    """As after a full disk or a power cut. ld takes an object of 0 bytes for an empty script, and links on."""
    library = (tree.folder / "torch_nvfp4/_C.so").read_bytes()
    damaged = tree.folder / "build/objects" / file
    whole = damaged.read_bytes()
    os.truncate(damaged, int(len(whole) * kept))
    assert tree.build() == expected
    assert damaged.read_bytes() == whole
    assert (tree.folder / "torch_nvfp4/_C.so").read_bytes() == library
    assert tree.build() == set()


def test_interrupted_compile_leaves_no_object(tree: Tree) -> None:
    """A compiler killed in the middle, with half an object written; what was finished before stays."""
    logging_cxx(tree.cxx, 'case "$what" in *rows.cpp) echo half > "$output"; kill -9 $$;; esac')
    assert tree.setup(MAX_JOBS="1").returncode == 1
    folder = tree.folder / "build/objects/_C/cpu"
    assert "half\n" not in [path.read_text(errors="replace") for path in folder.glob("*.*")]
    assert not list(tree.folder.joinpath("build/objects").rglob("partial-*"))
    before = tree.compiled()
    logging_cxx(tree.cxx, "# mended")
    assert "cxx csrc/cpu/rows.cpp" in before & tree.build()


def test_killed_build_is_taken_up(tree: Tree) -> None:
    """setup.py itself killed in the middle of a compile; and, by hand, between an object and its record."""
    tree.edit("csrc/cpu/rows.cpp", "3", "4")
    tree.edit("bin/cxx", "exec", 'case "$what" in *rows.cpp) echo half > "$output"; kill -9 $PPID; exit 1;; esac\nexec')
    assert tree.setup().returncode == -signal.SIGKILL
    objects = tree.folder / "build/objects"
    assert list(objects.rglob("partial-*"))
    logging_cxx(tree.cxx)
    assert "cxx csrc/cpu/rows.cpp" in tree.build()
    assert not list(objects.rglob("partial-*"))
    (objects / "_C/cpu/rows.cpp.o").write_bytes(b"of another source")
    (objects / "_C/cpu/rows.cpp.o.json").write_text("{")
    assert tree.build() == cxx("csrc/cpu/rows.cpp")


def test_two_builds_take_turns(tree: Tree) -> None:
    tree.edit("csrc/cpu/rows.cpp", "3", "4")
    tree.log.unlink(missing_ok=True)
    with build_tools.exclusive(tree.folder / "build/objects", print):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = clean_environment(**tree.variables())
        second = subprocess.Popen(command, cwd=tree.folder, env=environment, stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert second.stdout.readline().startswith("torch_nvfp4: waiting for another build in ")
        compiled_meanwhile = tree.compiled()
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0, output
    assert (compiled_meanwhile, "compiling csrc/cpu/rows.cpp" in output) == (set(), True)


def test_edit_during_a_compile_is_not_lost(tree: Tree) -> None:
    """The object is of the text before, so the next build makes it again."""
    once, source = tree.folder / "edit-once", tree.folder / "csrc/cpu/rows.cpp"
    edit = f'{GXX} "$@" || exit 1; [ -e {once} ] && rm {once} && sleep 0.05 && sed -i "s/4/5/" {source}; exit 0'
    logging_cxx(tree.cxx, f'case "$what" in *rows.cpp) {edit};; esac')
    tree.build()
    once.touch()
    tree.edit("csrc/cpu/rows.cpp", "3", "4")
    (tree.folder / "build/objects/_C/cpu/rows.cpp.o.json").unlink()  # else the text before has been read already
    assert tree.build() == cxx("csrc/cpu/rows.cpp", "link")
    assert "5" in source.read_text()
    assert tree.build() == cxx("csrc/cpu/rows.cpp", "link")
    assert tree.build() == set()


def test_no_record_of_another_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that dies between output and record leaves no record of the output before."""
    source = write(tmp_path / "a.cpp", "int a;")
    step, other = (
        build_tools.Step("compiling", (GXX, flag, "-c", str(source)), "g++", tmp_path / "a.o", (source,), True)
        for flag in ("-O0", "-O1")
    )
    step.run()
    assert (step.is_current(), other.is_current()) == (True, False)
    with monkeypatch.context() as patched:
        patched.setattr(build_tools, "write_atomically", None)
        with pytest.raises(TypeError):
            other.run()
    assert (step.is_current(), other.is_current()) == (False, False)


def test_files_of_both_libraries_compile_side_by_side(tree: Tree) -> None:
    """Each compiler waits until the other has started."""
    meet = "touch {0}; for i in 1 2 3 4 5 6 7 8 9; do [ -e {1} ] && break; sleep 0.5; done; [ -e {1} ] || exit 1\n"
    here, there = tree.folder / "cxx.started", tree.folder / "nvcc.started"
    logging_cxx(tree.cxx, f'case "$what" in *library.cpp) {meet.format(here, there)};; esac')
    tree.edit("bin/nvcc", "exec $host", f'case "$what" in *moe.cu) {meet.format(there, here)};; esac\nexec $host')
    shutil.rmtree(tree.folder / "build")
    assert tree.build(MAX_JOBS="8") == cxx(*CPU, "link") | nvcc(*CUDA, "link")


def test_editable_install_compiles_nothing_again(tree: Tree) -> None:
    """pip gives each editable build a new folder to work in."""
    code = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    tree.log.unlink(missing_ok=True)
    done = tree.run([sys.executable, "-c", code, str(tree.folder / "wheels")], **tree.variables())
    assert done.returncode == 0, done.stdout + done.stderr
    assert tree.compiled() == set()


def test_failed_compile_is_told_in_the_compilers_words(tree: Tree) -> None:
    tree.edit("csrc/cpu/rows.cpp", "return 3", "return undeclared_name")
    done = tree.setup(MAX_JOBS="1")
    assert done.returncode == 1
    assert "compiling csrc/cpu/rows.cpp failed (1):" in done.stderr
    command = next(line for line in done.stderr.splitlines() if line.startswith(str(tree.cxx)))
    assert f"-c {tree.folder}/csrc/cpu/rows.cpp" in command
    assert "undeclared_name" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "cxx link" not in tree.compiled()


def test_libraries_are_replaced_whole(tree: Tree) -> None:
    """A process that has the old library mapped keeps it: the new one is another file of the same name."""
    library = tree.folder / "torch_nvfp4/_C.so"
    with library.open("rb") as mapped:
        before = mapped.read()
        tree.edit("csrc/cpu/rows.cpp", "3", "4")
        tree.build()
        mapped.seek(0)
        assert mapped.read() == before
    assert library.read_bytes() != before


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MAX_JOBS": "many"}, "MAX_JOBS: expected a number of at least 1, got 'many'"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS: expected a number of at least 1, got '0'"),
        ({"CXX": "no-such-g++"}, "CXX: expected a C++ compiler, got 'no-such-g++', which is not on PATH"),
        ({"CXX": "false"}, "trying CXX=false failed (1):\nfalse "),
        ({"TORCH_NVFP4_BUILD_CUDA": "yes"}, "TORCH_NVFP4_BUILD_CUDA: expected auto, 0 or 1, got 'yes'"),
        (
            {"TORCH_NVFP4_CUDA_ARCHS": "sm_90"},
            "TORCH_NVFP4_CUDA_ARCHS: expected a list like 80;90a;90+PTX, got 'sm_90'",
        ),
        ({"TORCH_NVFP4_TORCH_ROOT": "/nowhere"}, "expected an installed torch >= 2.11, found none in /nowhere"),
        ({"NVCC": "/nowhere/nvcc"}, "expected a compiler, got '/nowhere/nvcc', which is not on PATH"),
    ],
)
def test_bad_environment_is_told(tree: Tree, variables: dict[str, str], words: str) -> None:
    done = tree.setup(**variables)
    assert done.returncode == 1
    assert f"torch_nvfp4: {words}" in done.stderr
    assert "Traceback" not in done.stderr


# Compilers that link the C++ runtime statically


def static_cxx(path: Path) -> Path:
    return logging_cxx(path, flags="-static-libstdc++")


def test_static_runtime_falls_back_to_a_compiler_on_the_path(tree: Tree) -> None:
    static_cxx(tree.cxx)
    done = tree.setup()
    assert done.returncode == 0, done.stderr
    assert f"CXX={tree.cxx}: expected a library that needs libstdc++.so.6, as torch's do, got one that" in done.stdout
    assert "Building with g++ instead." in done.stdout
    assert "libstdc++.so.6" in tree.needed()
    assert not cxx(*CPU) & tree.compiled()


def test_static_runtime_is_not_left_to_inductor(tree: Tree) -> None:
    """build_tools.py prints what `make demo` runs with."""
    for compiler, expected in ((static_cxx(tree.folder / "bin/static"), "g++"), (tree.cxx, str(tree.cxx))):
        done = tree.run([sys.executable, "build_tools.py"], **(tree.variables() | {"CXX": str(compiler)}))
        assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr
    recipe = re.search(r"^demo:.*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    assert recipe[1].startswith("$(RUN_CXX) ")


def test_static_runtime_everywhere_stops_with_words(tree: Tree) -> None:
    library = (tree.folder / "torch_nvfp4/_C.so").read_bytes()
    folder = tree.folder / "static"
    for name in build_tools.COMPILERS:
        static_cxx(folder / name)
    done = tree.setup(PATH=f"{folder}:{os.environ['PATH']}", CXX=str(folder / "g++"))
    assert done.returncode == 1
    assert "expected a C++ compiler whose libraries need libstdc++.so.6, as torch's do, got" in done.stderr
    for name in (f"CXX={folder / 'g++'}", *build_tools.COMPILERS):
        assert f"\n{name}: expected a library that needs libstdc++.so.6" in done.stderr
    assert "apt-get install g++" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree.compiled() == set()
    assert (tree.folder / "torch_nvfp4/_C.so").read_bytes() == library


def test_static_runtime_of_nvccs_host_compiler_falls_back(tree: Tree) -> None:
    """nvcc links with its host compiler."""
    static = static_cxx(tree.folder / "bin/static-host")
    done = tree.setup(NVCC_CCBIN=str(static))
    assert done.returncode == 0, done.stderr
    assert f"{tree.nvcc} with its own host compiler: expected a library that needs libstdc++.so.6" in done.stdout
    assert f"Building with {tree.nvcc} -ccbin g++ instead." in done.stdout
    assert "libstdc++.so.6" in tree.needed("torch_nvfp4/_C_cuda.so")


@pytest.mark.parametrize("library", ["_C", "_C_cuda"])
def test_finished_library_is_checked(tree: Tree, library: str) -> None:
    """A compiler that links one file's library well, and ours statically: the library that was there stays."""
    before = (tree.folder / f"torch_nvfp4/{library}.so").read_bytes()
    static = 'case "$what" in \'\') set -- -static-libstdc++ "$@";; esac'
    if library == "_C":
        logging_cxx(tree.cxx, static)
    else:
        tree.edit("bin/nvcc", "exec $host", 'case "$what" in \'\') host="$host -static-libstdc++";; esac\nexec $host')
    done = tree.setup()
    assert done.returncode == 1
    assert f"linking torch_nvfp4.{library}: expected a library that needs libstdc++.so.6, as torch's do" in done.stderr
    assert (tree.folder / f"torch_nvfp4/{library}.so").read_bytes() == before
    assert tree.setup().returncode == 1


def test_needed_libraries(tmp_path: Path) -> None:
    """In the order in which the linker was given them."""
    source = write(tmp_path / "empty.c", "")
    build = [GXX, "-shared", "-fPIC", "-nostdlib", "-Wl,--no-as-needed", str(source)]
    for name in ("second", "first"):
        subprocess.run([*build, f"-Wl,-soname,lib{name}.so.3", "-o", str(tmp_path / f"lib{name}.so")], check=True)
    target = tmp_path / "both.so"
    subprocess.run([*build, "-o", str(target), f"-L{tmp_path}", "-lfirst", "-lsecond"], check=True)
    assert build_tools.needed_libraries(target) == ["libfirst.so.3", "libsecond.so.3"]
    assert build_tools.needed_libraries(tmp_path / "libfirst.so") == []
    assert build_tools.needed_libraries(source) is None


def test_the_libraries_in_use_share_torchs_runtime() -> None:
    root = Path(torch.__file__).parent
    runtime = build_tools.torch_runtime(root)
    for path in torch_nvfp4.library_paths():
        build_tools.check_runtime(Path(path), runtime)
        assert runtime in subprocess.run(["ldd", path], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        ("a.o: a.cpp b.h\n", ["a.cpp", "b.h"]),
        ("a.o : a.cu \\\n    c\\ d.cuh \\\n    e.h\n", ["a.cu", "c d.cuh", "e.h"]),
        ("a.o: \\\n a$$b.cpp x\\#y.h", ["a$b.cpp", "x#y.h"]),
    ],
)
def test_listed_files(listing: str, expected: list[str]) -> None:
    """As gcc and nvcc write them."""
    assert build_tools.listed_files(listing) == [Path(name) for name in expected]


# sdist and wheel


def copy_of_the_tree(folder: Path) -> Path:
    """Without what builds left there: an egg-info would tell the sdist about files."""
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


def sdist(tree: Path, **variables: str) -> Path:
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tree / "packed")]
    environment = clean_environment(**variables)
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "packed").iterdir()
    return archive


def members(archive: Path) -> dict[str, int]:
    """Each file's name below the sdist's folder, and its size."""
    with tarfile.open(archive) as packed:
        return {info.name.partition("/")[2]: info.size for info in packed.getmembers() if info.isfile()}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist made where there are neither torch nor compilers."""
    tree = copy_of_the_tree(tmp_path_factory.mktemp("sdist") / "tree")
    return sdist(tree, PATH="/nowhere", TORCH_NVFP4_TORCH_ROOT="/nowhere")


def test_sdist_holds_the_same_files_everywhere(packed: Path, built: Tree, tmp_path: Path) -> None:
    with_cuda = copy_of_the_tree(tmp_path / "tree")
    there = sdist(with_cuda, **built.variables(), TORCH_NVFP4_BUILD_CUDA="1")
    assert there.name == packed.name == f"torch_nvfp4-{torch_nvfp4.__version__}.tar.gz"
    assert members(there) == members(packed)


def test_sdist_holds_all_that_building_and_testing_take(packed: Path) -> None:
    folders = ("csrc", "torch_nvfp4", "tests", "compile_tests", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    made = {".so", ".pyc", ".o"}
    expected = {str(path.relative_to(ROOT)) for path in files if path.suffix not in made}
    expected |= {*PACKAGING, "Makefile", "constraints.txt", "conftest.py", ".clang-format", "CHANGELOG.md"}
    held = set(members(packed))
    assert expected - held == set()
    assert {name for name in held if Path(name).suffix in made} == set()


SMOKE = """
import torch, torch_nvfp4
print(torch_nvfp4.__file__, torch_nvfp4.__version__)
torch.manual_seed(0)
w13 = torch_nvfp4.quantize(torch.randn(4, 64, 32) / 4, gated=True)
w2 = torch_nvfp4.quantize(torch.randn(4, 32, 32) / 4)
p13, p2 = torch_nvfp4.pack(w13, gated=True), torch_nvfp4.pack(w2)
x, topk_weights, topk_ids = torch.randn(5, 32), torch.rand(5, 2), torch.randint(0, 4, (5, 2))
y = torch_nvfp4.moe(x, p13, w13.global_scale, p2, w2.global_scale, topk_weights, topk_ids, clamp_limit=0.5)
expected = torch_nvfp4.reference.moe(x, w13, w2, topk_weights, topk_ids, clamp_limit=0.5)
assert (y.double() - expected).norm() <= 1e-5 * expected.norm()
try:
    torch.ops.nvfp4.moe(x[:, :16].contiguous(), p13, w13.global_scale, p2, w2.global_scale, topk_weights, topk_ids)
except RuntimeError as error:  # thrown in the library
    assert "nvfp4::moe: w2 must have shape" in str(error), error
else:
    raise AssertionError("hidden_states with half of the columns were accepted")
"""


def test_sdist_builds_a_wheel_that_works(packed: Path, tmp_path: Path) -> None:
    """Unpacked, built into a wheel, installed into a folder of its own, run; -O0, which only shortens the build."""
    shutil.unpack_archive(packed, tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    variables = {"TORCH_NVFP4_CXX_FLAGS": "-O0", "TORCH_NVFP4_BUILD_CUDA": "0", "MAX_JOBS": "2"}
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    wheels = str(tmp_path / "wheels")
    for command in (
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", wheels, str(source)],
        [*pip, "install", *offline, "--target", str(tmp_path / "site"), "--find-links", wheels, "torch-nvfp4"],
    ):
        done = subprocess.run(command, env=clean_environment(**variables), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = Path(wheels).iterdir()
    assert re.fullmatch(rf"torch_nvfp4-{torch_nvfp4.__version__}-0cpu-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    environment = clean_environment(PYTHONPATH=str(tmp_path / "site"))
    done = subprocess.run([sys.executable, "-c", SMOKE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "site/torch_nvfp4/__init__.py"), torch_nvfp4.__version__]


def wheel_of(tree: Tree, **variables: str) -> tuple[str, set[str]]:
    """The name of the wheel that pip's way of building makes, and the files of the package in it."""
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    folder = tree.folder / "wheels"
    done = tree.run([sys.executable, "-c", code, str(folder)], **(tree.variables() | variables))
    assert done.returncode == 0, done.stdout + done.stderr
    name = done.stdout.splitlines()[-1]
    with zipfile.ZipFile(folder / name) as wheel:
        return name, {path for path in wheel.namelist() if path.startswith("torch_nvfp4/")}


def test_a_wheel_says_whether_it_holds_the_cuda_library(tree: Tree) -> None:
    """Also where an earlier build left a CUDA library, or the tree a module that it no longer has."""
    package = {f"torch_nvfp4/{name}" for name in ("__init__.py", "_version.py", "py.typed", "_C.so")}
    start = f"torch_nvfp4-{torch_nvfp4.__version__}-"
    removed = write(tree.folder / "torch_nvfp4/removed.py", "")
    name, files = wheel_of(tree)
    assert name.startswith(f"{start}0cu130-py3-none-")
    assert files == package | {"torch_nvfp4/_C_cuda.so", "torch_nvfp4/removed.py"}
    removed.unlink()
    assert (tree.folder / "torch_nvfp4/_C_cuda.so").exists()
    name, files = wheel_of(tree, TORCH_NVFP4_BUILD_CUDA="0")
    assert name.startswith(f"{start}0cpu-py3-none-")
    assert files == package


def test_two_wheels_at_once(tree: Tree) -> None:
    """The second waits for the first, and each is whole."""
    folders = [tree.folder / "first", tree.folder / "second"]
    with build_tools.exclusive(tree.folder / "build/wheels", print):
        running = [
            subprocess.Popen(
                [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(folder)], cwd=tree.folder,
                env=clean_environment(**tree.variables()), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for folder in folders
        ]  # fmt: skip
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("torch_nvfp4: waiting for another build in ")
    package = {f"torch_nvfp4/{name}" for name in ("__init__.py", "_version.py", "py.typed", "_C.so", "_C_cuda.so")}
    for process, folder in zip(running, folders, strict=True):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        (wheel,) = folder.iterdir()
        with zipfile.ZipFile(wheel) as content:
            assert content.testzip() is None
            assert {path for path in content.namelist() if path.startswith("torch_nvfp4/")} == package


def test_a_wheel_that_cannot_be_finished_is_not_there(tree: Tree) -> None:
    """Nor does anything of it come into the next one."""
    line = "            super().run()\n            self.dist_dir"
    tree.edit("setup.py", line, line.replace("self", "1 / 0; self"))
    broken = tree.setup("bdist_wheel", "-d", "broken", "--keep-temp")
    assert broken.returncode == 1
    assert "ZeroDivisionError" in broken.stderr
    assert not (tree.folder / "broken").exists()
    write(tree.folder / "build/wheels/tree/torch_nvfp4/of_a_killed_build.py", "")
    write(tree.folder / "build/wheels/dist/partial.whl", "")
    tree.edit("setup.py", "1 / 0; ", "")
    assert tree.setup("bdist_wheel", "-d", "whole").returncode == 0
    (wheel,) = (tree.folder / "whole").iterdir()
    with zipfile.ZipFile(wheel) as content:
        assert "torch_nvfp4/of_a_killed_build.py" not in content.namelist()


def test_cuda_torch_without_nvcc_is_told(tree: Tree) -> None:
    """The build goes on for the CPU; nobody is left to find out at run time why."""
    tree.edit("setup.py", '"/usr/local/cuda/bin"', '"/nowhere"')
    torch_only = tree.variables() | {"PATH": str(only_a_compiler(tree.folder / "host"))}
    del torch_only["NVCC"]
    with patch.object(tree, "variables", lambda: torch_only):
        done = tree.setup()
        assert done.returncode == 0, done.stderr
        assert "this torch is built for CUDA 13.0, but there is no nvcc on PATH" in done.stdout
        assert "torch_nvfp4/_C_cuda.so is of an earlier build and stays as it is" in done.stdout
        assert "no nvcc" not in tree.setup(TORCH_NVFP4_BUILD_CUDA="0").stdout
        done = tree.setup(TORCH_NVFP4_BUILD_CUDA="1")
    assert done.returncode == 1
    assert "TORCH_NVFP4_BUILD_CUDA=1: expected nvcc on PATH, in CUDA_HOME/bin or as NVCC, found none" in done.stderr


def only_a_compiler(folder: Path) -> Path:
    for name in ("sh", "as", "ld", "tr"):
        write(folder / name, f'#!/bin/sh\nexec {shutil.which(name)} "$@"\n', 0o755)
    return folder


# What stands beside the sources


def test_hooks_run_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    lint = {line.strip().replace("$(BIN)/", "").replace(" $(CXX_SOURCES)", "") for line in recipe[1].splitlines()}
    hooks = re.findall(r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert set(hooks) == lint
    assert len(hooks) == len(lint)


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert torch_nvfp4.__version__ in headings
