"""Builds torch_nvfp4's op libraries: _C (CPU, g++) and, where nvcc and a CUDA torch are found, _C_cuda (nvcc).

Both use only torch's headers and its stable ABI, so one build serves torch 2.11 and later. torch is deliberately no
build requirement: an isolated build would download a second copy of it.

Environment: TORCH_NVFP4_BUILD_CUDA=auto|0|1, TORCH_NVFP4_CUDA_ARCHS (default "80;90a;90+PTX"), TORCH_NVFP4_TORCH_ROOT
(the installed torch package's folder), TORCH_NVFP4_SANITIZE=1 (address and undefined-behaviour sanitizers),
TORCH_NVFP4_RACECHECK=1 (a CUDA library whose barriers compute-sanitizer's racecheck can follow), CXX, NVCC, MAX_JOBS.
"""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
# Kernels of one instruction level are chosen at run time, so only their own files may use its instructions.
LEVEL_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mfma",
        "-mf16c",
    ],
}


def torch_root() -> Path:
    """The installed torch package, without importing it (an isolated build cannot)."""
    named = os.environ.get("TORCH_NVFP4_TORCH_ROOT")
    candidates = [Path(named)] if named else [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    for candidate in candidates:
        if (candidate / "include" / "torch" / "csrc" / "stable").is_dir():
            return candidate
    looked = ", ".join(map(str, candidates))
    raise SystemExit(
        f"torch_nvfp4: expected an installed torch >= 2.11, found none in {looked}. Install torch first, or set "
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
        raise SystemExit(f"TORCH_NVFP4_BUILD_CUDA: expected auto, 0 or 1, got {mode!r}")
    if mode == "1" and find_nvcc() is None:
        raise SystemExit("TORCH_NVFP4_BUILD_CUDA=1: expected nvcc on PATH, in CUDA_HOME/bin or as NVCC, found none")
    return mode == "1" or (mode == "auto" and find_nvcc() is not None and torch_cuda_version(root) is not None)


def gencode_flags() -> list[str]:
    """compute_90a PTX is tied to Hopper; compute_90 PTX is what newer architectures compile at load."""
    flags = []
    for arch in os.environ.get("TORCH_NVFP4_CUDA_ARCHS", "80;90a;90+PTX").split(";"):
        number, _, ptx = arch.partition("+")
        flags.append(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    return flags


class BuildLibraries(build_ext):
    """Compiles each library's sources in parallel, only those that changed, with per-file flags."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python symbols inside, so no Python tag

    def build_extension(self, ext: Extension) -> None:
        root = torch_root()
        cuda = ext.name.endswith("_cuda")
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp) / ext.name
        includes = ["-isystem", str(root / "include"), STABLE_ABI]
        if cuda:
            compiler = find_nvcc()
            host = ",".join(flag for flag in CXX_FLAGS if flag not in ("-O3", "-std=c++20", "-Wall", "-Wextra"))
            compile_flags = ["-O3", "-std=c++20", "-DUSE_CUDA", "-Xcompiler", host, *gencode_flags()]
            if os.environ.get("TORCH_NVFP4_RACECHECK") == "1":
                compile_flags.append("-DNVFP4_RACECHECK")
            torch_libraries = "--no-as-needed,-ltorch,-ltorch_cpu,--as-needed,--exclude-libs=ALL"
            link = ["-shared", "-cudart", "static", f"-L{root / 'lib'}", "-Xlinker", torch_libraries]
        else:
            compiler = os.environ.get("CXX", "g++")
            sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
            sanitize = sanitize if os.environ.get("TORCH_NVFP4_SANITIZE") == "1" else []
            compile_flags = [*CXX_FLAGS, *sanitize]
            link = ["-shared", *sanitize, f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]

        newest_header = max(path.stat().st_mtime for path in (*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), Path(__file__)))

        def compile_source(source: str) -> str:
            obj = objects / Path(source).relative_to("csrc").with_suffix(".o")
            if obj.exists() and obj.stat().st_mtime > max(newest_header, (ROOT / source).stat().st_mtime):
                return str(obj)
            obj.parent.mkdir(parents=True, exist_ok=True)
            flags = compile_flags if cuda else [*compile_flags, *LEVEL_FLAGS.get(Path(source).stem, [])]
            self.announce(f"compiling {source}", level=2)
            subprocess.run([compiler, *flags, *includes, "-c", str(ROOT / source), "-o", str(obj)], check=True)
            return str(obj)

        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            compiled = list(pool.map(compile_source, ext.sources))
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, *compiled, *link, "-o", str(target)], check=True)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def sources(*patterns: str) -> list[str]:
    found = sorted(path for pattern in patterns for path in CSRC.glob(pattern))
    return [str(path.relative_to(ROOT)) for path in found]


def extensions() -> list[Extension]:
    ops = sources("ops/*.cpp")
    cpu = sources("library.cpp", "cpu/*.cpp", "cuda/*.cpp")  # what of cuda/ is plain C++ answers without a GPU too
    if platform.machine() not in ("x86_64", "AMD64"):
        cpu = [path for path in cpu if Path(path).stem not in LEVEL_FLAGS]
    libraries = [Extension("torch_nvfp4._C", ops + cpu)]
    if build_cuda(torch_root()):
        libraries.append(Extension("torch_nvfp4._C_cuda", ops + sources("cuda/**/*.cu", "cuda/**/*.cpp")))
    return libraries


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
