"""Builds torch_nvfp4's op libraries: _C (CPU, g++) and, where nvcc and a CUDA torch are found, _C_cuda (nvcc).

Both use only torch's headers and its stable ABI, so one build serves torch 2.11 and later. torch is deliberately no
build requirement: an isolated build would download a second copy of it. What an sdist holds does not depend on the
machine that packs it; which libraries are built is decided by the machine that builds.

Environment:
TORCH_NVFP4_BUILD_CUDA=auto|0|1  whether to build _C_cuda; auto: where there are nvcc and a CUDA torch
TORCH_NVFP4_CUDA_ARCHS           its architectures, by default "80;90a;90+PTX"
TORCH_NVFP4_TORCH_ROOT           the folder of the installed torch package
TORCH_NVFP4_CXX_FLAGS            flags behind those of the CPU library, as in -O0
TORCH_NVFP4_SANITIZE=1           a CPU library with the address and undefined-behaviour sanitizers
TORCH_NVFP4_EMULATE_AMX=1        a CPU library that runs the level amx without AMX, by slow plain C++
TORCH_NVFP4_RACECHECK=1          a CUDA library whose barriers compute-sanitizer's racecheck can follow
CXX, NVCC                        the compilers; nvcc's host compiler is its own choice (NVCC_CCBIN)
MAX_JOBS                         how many files are compiled at a time, by default one per processor
"""

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder on the path

import build_tools  # noqa: E402
from build_tools import BuildError, Candidate, Step  # noqa: E402

CSRC = ROOT / "csrc"
# Not setuptools' build_temp: pip's editable builds put that into a new folder each.
OBJECTS = ROOT / "build" / "objects"
WHEELS = ROOT / "build" / "wheels"  # what the build of a wheel goes through
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
CXX_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
# Kernels of one instruction level are chosen at run time, so only their own files may use its instructions.
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c")
AMX = (*AVX512, "-mamx-tile", "-mamx-bf16")
LEVEL_FLAGS = {"portable": (), "avx2": ("-mavx2", "-mfma", "-mf16c"), "avx512": AVX512, "amx": AMX}
PROGRAMS = {"bench", "fuzz"}  # folders of csrc that hold programs, not parts of the libraries


def torch_root() -> Path:
    """The installed torch package, without importing it (an isolated build cannot)."""
    named = os.environ.get("TORCH_NVFP4_TORCH_ROOT")
    candidates = [Path(named)] if named else [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    for candidate in candidates:
        if (candidate / "include" / "torch" / "csrc" / "stable").is_dir():
            return candidate
    looked = ", ".join(map(str, candidates))
    raise BuildError(
        f"expected an installed torch >= 2.11, found none in {looked}. Install torch first, or set "
        "TORCH_NVFP4_TORCH_ROOT to the folder of the torch package."
    )


def torch_cuda_version(root: Path) -> str | None:
    found = re.search(r"^cuda[^=]*=\s*'([^']+)'", (root / "version.py").read_text(), re.MULTILINE)
    return found.group(1) if found else None


def find_nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME")
    return (
        os.environ.get("NVCC")
        or (shutil.which("nvcc", path=f"{cuda_home}/bin") if cuda_home else None)
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def build_cuda(root: Path) -> bool:
    mode = os.environ.get("TORCH_NVFP4_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise BuildError(f"TORCH_NVFP4_BUILD_CUDA: expected auto, 0 or 1, got {mode!r}")
    if mode == "1" and find_nvcc() is None:
        raise BuildError("TORCH_NVFP4_BUILD_CUDA=1: expected nvcc on PATH, in CUDA_HOME/bin or as NVCC, found none")
    return mode == "1" or (mode == "auto" and find_nvcc() is not None and torch_cuda_version(root) is not None)


def cuda_tag() -> str:
    """cu130 for the CUDA 13.0 of nvcc, whose runtime the library holds."""
    nvcc = find_nvcc() or "nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise BuildError(f"{nvcc} --version: expected a release like 13.0, got {said!r}")
    return f"cu{release[1]}{release[2]}"


def gencode_flags() -> list[str]:
    """compute_90a PTX is tied to Hopper; compute_90 PTX is what newer architectures compile at load."""
    flags = []
    for arch in cuda_archs().split(";"):
        number, plus, ptx = arch.partition("+")
        if not re.fullmatch(r"\d{2,3}[af]?", number) or (plus and ptx != "PTX"):
            raise BuildError(f"TORCH_NVFP4_CUDA_ARCHS: expected a list like 80;90a;90+PTX, got {arch!r} in it")
        flags.append(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    return flags


def cuda_archs() -> str:
    return os.environ.get("TORCH_NVFP4_CUDA_ARCHS", "80;90a;90+PTX")


def max_jobs() -> int:
    text = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdecimal() or int(text) < 1:
        raise BuildError(f"MAX_JOBS: expected a number of at least 1, got {text!r}")
    return int(text)


def level_of(source: str) -> str | None:
    """The instruction level of a source: that of csrc/cpu/<level>.cpp and of csrc/cpu/levels/<level>, file or folder.

    None for a source of no level. Raises BuildError for a level without flags, which would be compiled for none.
    """
    path = Path(source).with_suffix("")
    named = path.parts[path.parts.index("levels") + 1] if "levels" in path.parts else path.stem
    if named in LEVEL_FLAGS:
        return named
    if "levels" in path.parts or ("cpu" in path.parts and re.match(r"sse|avx|amx|vnni|neon|sve", named)):
        raise BuildError(f"{source}: expected a level that LEVEL_FLAGS of setup.py has flags for, got {named!r}")
    return None


def runs_here(source: str) -> bool:
    """Whether this machine's processor family has the level of a source."""
    return level_of(source) in (None, "portable") or platform.machine() in ("x86_64", "AMD64")


def sources(*patterns: str) -> list[str]:
    found = {path.relative_to(ROOT) for pattern in patterns for path in CSRC.glob(pattern)}
    return sorted(str(path) for path in found if not PROGRAMS & set(path.parts))


def extensions() -> list[Extension]:
    """Both libraries with all their sources, wherever this runs: an sdist holds what any machine may build."""
    ops = sources("ops/**/*.cpp")
    return [
        Extension("torch_nvfp4._C", ops + sources("*.cpp", "cpu/**/*.cpp", "cuda/*.cpp")),
        Extension("torch_nvfp4._C_cuda", ops + sources("cuda/**/*.cu", "cuda/**/*.cpp")),
    ]


@dataclass(frozen=True)
class Toolchain:
    """How the sources of one library become objects and these a library."""

    folder: Path  # of its objects: one per variant, so that building one leaves the others current
    compile: tuple[str, ...]
    link: tuple[str, ...]  # the linker's flags, behind the objects
    linker: tuple[str, ...]
    compiler: str


def cpu_toolchain(root: Path, chosen: Candidate) -> Toolchain:
    sanitize = SANITIZERS if os.environ.get("TORCH_NVFP4_SANITIZE") == "1" else ()
    emulate = ("-DNVFP4_EMULATE_AMX",) if os.environ.get("TORCH_NVFP4_EMULATE_AMX") == "1" else ()
    flags = (*CXX_FLAGS, *sanitize, *emulate, *shlex.split(os.environ.get("TORCH_NVFP4_CXX_FLAGS", "")))
    link = ("-shared", *sanitize, f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")
    folder = OBJECTS / ("_C" + "-sanitize" * bool(sanitize) + "-amx" * bool(emulate))
    return Toolchain(folder, (*chosen.command, *flags), link, chosen.command, chosen.compiler)


def cuda_toolchain(root: Path, chosen: Candidate) -> Toolchain:
    host = ",".join(flag for flag in CXX_FLAGS if flag not in ("-O3", "-std=c++20", "-Wall", "-Wextra"))
    racecheck = ("-DNVFP4_RACECHECK",) if os.environ.get("TORCH_NVFP4_RACECHECK") == "1" else ()
    flags = ("-O3", "-std=c++20", "-DUSE_CUDA", "-Xcompiler", host, *gencode_flags(), *racecheck)
    # One list, as nvcc reorders separate ones.
    torch_libraries = "--no-as-needed,-ltorch,-ltorch_cpu,--as-needed,--exclude-libs=ALL"
    link = ("-shared", "-cudart", "static", f"-L{root / 'lib'}", "-Xlinker", torch_libraries)
    variant = cuda_archs().replace(";", "_") + ("-racecheck" if racecheck else "")
    return Toolchain(OBJECTS / f"_C_cuda-{variant}", (*chosen.command, *flags), link, chosen.command, chosen.compiler)


def check_library(library: Path, name: str, runtime: str | None) -> None:
    try:
        build_tools.check_runtime(library, runtime)
    except BuildError as error:
        raise BuildError(
            f"linking {name}: {error}. Its errors could end the process: name a compiler that links the C++ runtime "
            "dynamically as CXX (for nvcc: as NVCC_CCBIN)."
        ) from None


class BuildLibraries(build_ext):
    """Compiles the files of all libraries side by side, only those that changed, and links what they changed."""

    def run(self) -> None:
        self.root = torch_root()
        with_cuda = build_cuda(self.root)
        cuda_version = torch_cuda_version(self.root)
        if not with_cuda and cuda_version and os.environ.get("TORCH_NVFP4_BUILD_CUDA") != "0":
            say(
                f"this torch is built for CUDA {cuda_version}, but there is no nvcc on PATH, in CUDA_HOME/bin or as "
                "NVCC: building the CPU library only (TORCH_NVFP4_BUILD_CUDA=0 says that this is meant)"
            )
        for ext in [ext for ext in self.extensions if ext.name.endswith("_cuda") and not with_cuda]:
            self.extensions.remove(ext)
            filename = self.get_ext_filename(ext.name)
            (Path(self.build_lib) / filename).unlink(missing_ok=True)  # of an earlier build
            if self.inplace and (ROOT / filename).exists():
                say(f"{filename} is of an earlier build and stays as it is")
        with build_tools.exclusive(OBJECTS, say):
            super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python symbols inside, so no Python tag

    def build_extensions(self) -> None:
        runtime = build_tools.torch_runtime(self.root)
        compilations, links = [], []
        for ext in self.extensions:
            cuda = ext.name.endswith("_cuda")
            candidates = (
                build_tools.nvcc_candidates(str(find_nvcc()))
                if cuda
                else build_tools.cxx_candidates(os.environ.get("CXX"))
            )
            chosen = build_tools.trusted(candidates, runtime, OBJECTS / "probes", say)
            chain = (cuda_toolchain if cuda else cpu_toolchain)(self.root, chosen)
            compiled = [self.compilation(source, chain, cuda) for source in ext.sources if runs_here(source)]
            objects = tuple(step.output for step in compiled)
            command = (*chain.linker, *map(str, objects), *chain.link)
            library = chain.folder / f"{ext.name.rpartition('.')[2]}.so"
            check = functools.partial(check_library, name=ext.name, runtime=runtime)
            compilations += compiled
            links.append(Step(f"linking {ext.name}", command, chain.compiler, library, objects, check=check))
        # CUDA's files first: each takes minutes.
        build_tools.run_steps(reversed(compilations), max_jobs(), say, force=bool(self.force))
        build_tools.run_steps(links, max_jobs(), say)
        self.libraries_built = dict(
            zip((ext.name for ext in self.extensions), (link.output for link in links), strict=True)
        )
        for name, library in self.libraries_built.items():
            build_tools.place(library, Path(self.get_ext_fullpath(name)))

    def compilation(self, source: str, chain: Toolchain, cuda: bool) -> Step:
        level = None if cuda else level_of(source)
        flags = (*chain.compile, *(LEVEL_FLAGS[level] if level else ()))
        command = (*flags, "-isystem", str(self.root / "include"), STABLE_ABI, "-c", str(ROOT / source))
        output = chain.folder / f"{Path(source).relative_to('csrc')}.o"
        return Step(f"compiling {source}", command, chain.compiler, output, (ROOT / source,), finds_headers=True)

    def copy_extensions_to_source(self) -> None:
        for name, library in self.libraries_built.items():
            build_tools.place(library, ROOT / self.get_ext_filename(name))


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>, and a build tag, 0cpu or 0cu130: the name says whether the CUDA library is inside."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.bdist_dir = str(WHEELS / "tree")

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]

    def run(self) -> None:
        """One at a time, in folders that begin empty: what an earlier tree left there would come into the wheel.

        The wheel appears under its name only when it is whole.
        """
        with build_tools.exclusive(WHEELS, say):
            for leftover in ("lib", "tree", "dist"):
                shutil.rmtree(WHEELS / leftover, ignore_errors=True)
            build = self.get_finalized_command("build")
            if self.skip_build:
                with_cuda = (Path(build.build_lib) / "torch_nvfp4" / "_C_cuda.so").exists()
            else:
                with_cuda = build_cuda(torch_root())
                build.build_lib = str(WHEELS / "lib")
            self.build_number = self.build_number or f"0{cuda_tag() if with_cuda else 'cpu'}"
            dist_dir, self.dist_dir = Path(self.dist_dir), str(WHEELS / "dist")
            super().run()
            self.dist_dir = str(dist_dir)
            command, python, written = self.distribution.dist_files.pop()
            wheel = dist_dir / Path(written).name
            wheel.parent.mkdir(parents=True, exist_ok=True)
            build_tools.write_atomically(wheel, Path(written).read_bytes())
            Path(written).unlink()
            self.distribution.dist_files.append((command, python, str(wheel)))


def say(message: str) -> None:
    sys.stdout.write(f"torch_nvfp4: {message}\n")  # in one piece: files compile side by side
    sys.stdout.flush()


def main() -> None:
    try:
        setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
    except BuildError as error:
        raise SystemExit(f"torch_nvfp4: {error}") from None


if __name__ == "__main__":
    main()
