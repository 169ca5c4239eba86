"""AOTInductor: a package with a dynamic token dimension, run in Python and in a process without Python.

Private torch APIs: ``torch._inductor.aoti_compile_and_package`` and ``aoti_load_package``; in cpp/run_package.cpp
``torch::inductor::AOTIModelPackageLoader`` and ``torch::jit::pickle_load``. Run with torch 2.11, 2.13 and 2.15 on the
CPU, with 2.11 on a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import torch_nvfp4
from torch_nvfp4.nn import NVFP4Experts, NVFP4Linear
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, LIMIT = 4, 96, 64, 2, 0.5
TOKENS = (1, 2, 3, 17, 64, 200, 0)  # the package is traced with 4
ROOT = Path(torch.__file__).parent

Inputs = tuple[Tensor, Tensor, Tensor]


class Model(nn.Module):
    """Routed experts, and a dense layer on top with aten ops in between."""

    def __init__(self, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w13 = random_weight((EXPERTS, 2 * INTERMEDIATE, HIDDEN), gated=True, generator=generator, device=device)
        w2 = random_weight((EXPERTS, HIDDEN, INTERMEDIATE), generator=generator, device=device)
        self.experts = NVFP4Experts.from_weights(w13, w2, clamp_limit=LIMIT)
        self.dense = NVFP4Linear.from_weight(random_weight((48, HIDDEN), generator=generator, device=device))

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
        routed = self.experts(x, topk_weights, topk_ids)
        return routed, self.dense((x + routed).relu())


def make_inputs(tokens: int, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(device, torch.bfloat16)
    return x, *random_routing(tokens, EXPERTS, TOP_K, generator=generator, device=device)


@dataclass
class Package:
    model: Model
    device: str
    path: Path

    def check(self, inputs: Inputs, outputs: tuple[Tensor, Tensor]) -> None:
        routed, dense = (output.cpu() for output in outputs)
        eager_routed, eager_dense = (output.cpu() for output in self.model(*inputs))
        assert torch.equal(routed, eager_routed)
        torch.testing.assert_close(dense, eager_dense)
        weights = self.model.experts.unpacked_weights()
        assert_accurate(routed, torch_nvfp4.reference.moe(inputs[0], *weights, *inputs[1:], clamp_limit=LIMIT).cpu())


@pytest.fixture(scope="module")
def compiling(
    package_compiler: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """The C++ program, compiled while the package is."""
    if shutil.which(package_compiler) is None:
        pytest.skip(f"needs the C++ compiler {package_compiler}")
    program = tmp_path_factory.mktemp("cpp") / "run_package"
    source = Path(__file__).parent / "cpp" / "run_package.cpp"
    cuda = ["-ltorch_cuda"] if (ROOT / "lib" / "libtorch_cuda.so").exists() else []
    link = [f"-L{ROOT / 'lib'}", f"-Wl,-rpath,{ROOT / 'lib'}", "-Wl,--allow-shlib-undefined", "-Wl,--no-as-needed"]
    link += ["-ltorch", "-ltorch_cpu", *cuda, "-lc10", "-ldl"]
    command = [package_compiler, "-std=c++20", str(source), "-isystem", str(ROOT / "include"), *link]
    command += ["-o", str(program)]
    compiler = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield program, compiler
    compiler.kill()
    compiler.wait()


@pytest.fixture(scope="module")
def program(compiling: tuple[Path, subprocess.Popen[str]]) -> Path:
    path, compiler = compiling
    messages, _ = compiler.communicate()
    assert compiler.returncode == 0, messages
    return path


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def package(request: pytest.FixtureRequest, compiling: object, tmp_path_factory: pytest.TempPathFactory) -> Package:
    device: str = request.param
    model = Model(device)
    tokens = Dim("tokens", min=0, max=4096)
    program = torch.export.export(model, make_inputs(4, device), dynamic_shapes=({0: tokens},) * 3)
    path = tmp_path_factory.mktemp(device) / "model.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return Package(model, device, path)


def run_program(
    program: Path, package: Package, folder: Path, calls: list[Inputs], libraries: list[str]
) -> subprocess.CompletedProcess[str]:
    torch.save(tuple(tuple(tensor.cpu() for tensor in call) for call in calls), folder / "inputs.pt")
    arguments = [program, package.path, package.device, folder / "inputs.pt", folder / "outputs.pt", *libraries]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300)


def test_in_python(package: Package) -> None:
    loaded = torch._inductor.aoti_load_package(str(package.path))
    for tokens in TOKENS:
        inputs = make_inputs(tokens, package.device)
        package.check(inputs, loaded(*inputs))


def test_in_a_process_without_python(package: Package, program: Path, tmp_path: Path) -> None:
    calls = [make_inputs(tokens, package.device) for tokens in TOKENS]
    libraries = torch_nvfp4.library_paths()
    ran = run_program(program, package, tmp_path, calls, libraries)
    assert ran.returncode == 0, ran.stderr
    for call, outputs in zip(calls, torch.load(tmp_path / "outputs.pt"), strict=True):
        package.check(call, outputs)
    for binary in (str(program), *libraries):
        linked = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
        assert "libtorch_cpu.so" in linked
        assert "libpython" not in linked
        assert "libtorch_python" not in linked


def test_the_program_says_what_is_missing(package: Package, program: Path, tmp_path: Path) -> None:
    calls = [make_inputs(2, package.device)]
    ran = run_program(program, package, tmp_path, calls, ["/nowhere/_C.so"])
    assert ran.returncode == 1
    assert "/nowhere/_C.so: cannot open shared object file" in ran.stderr
    # A library without the ops stands for "forgot the op library".
    ran = run_program(program, package, tmp_path, calls, [str(ROOT / "lib" / "libc10.so")])
    assert ran.returncode == 1
    assert "Could not find schema for nvfp4::moe" in ran.stderr


def test_the_op_checks_its_inputs_inside_a_package(package: Package, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = torch._inductor.aoti_load_package(str(package.path))
    x, topk_weights, topk_ids = make_inputs(3, package.device)
    with pytest.raises(RuntimeError) as error:
        loaded(x, topk_weights.double(), topk_ids)
    # torch 2.11 prints what an op says, and raises that a call failed.
    said = str(error.value) if torch.__version__ >= "2.13" else capfd.readouterr().err
    assert "nvfp4::moe: topk_weights must be float32, got float64" in said
