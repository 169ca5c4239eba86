"""Corners of the compiler, each of which gives the right value or an error that says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import torch_nvfp4
from torch_nvfp4 import NVFP4Experts

EXPERTS, HIDDEN, INNER, TOP_K = 4, 64, 32, 2


def layer(limit: float = 7.0, seed: int = 0) -> NVFP4Experts:
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator)
    return NVFP4Experts.from_float(w13, torch.randn(EXPERTS, HIDDEN, INNER, generator=generator), clamp_limit=limit)


def inputs(tokens: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.randint(0, EXPERTS, (tokens, TOP_K), generator=generator)
    return x, torch.rand(tokens, TOP_K, generator=generator), ids


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def test_a_limit_out_of_a_tensor_is_refused_by_name() -> None:
    experts = layer()
    weights = [experts.get_buffer(name) for name in ("w13", "w13_global_scale", "w2", "w2_global_scale")]

    def run(x: Tensor, topk_weights: Tensor, ids: Tensor, limit: Tensor) -> Tensor:
        return torch_nvfp4.moe(x, *weights, topk_weights, ids, clamp_limit=limit.item())

    with torch._dynamo.config.patch(capture_scalar_outputs=True), torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        with pytest.raises(
            Exception, match=r"nvfp4::moe\(\) Expected .* for argument .*clamp_limit.*(?s:.*)data-dependent"
        ):
            compiled(*inputs(), torch.tensor(7.0))
    broken = torch.compile(run, backend="aot_eager")  # without fullgraph the number is read between two graphs
    with torch.no_grad():
        for limit in (0.5, 7.0):
            assert torch.equal(broken(*inputs(), torch.tensor(limit)), run(*inputs(), torch.tensor(limit)))


LIMITS = [0.25 * (number + 1) for number in range(12)]  # more than torch's recompile limit of 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(limit, seed) for seed, limit in enumerate(LIMITS))

    def forward(self, x: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        for experts in self.layers:
            x = x + experts(x, topk_weights, ids) / 1000
        return x


def test_a_model_of_many_limits_compiles_once() -> None:
    model, counter = Model(), CompileCounter()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        assert torch.equal(compiled(*inputs()), model(*inputs()))
    assert counter.frame_count == 1


def test_one_function_of_many_limits_compiles_once_for_each() -> None:
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def run(experts: NVFP4Experts, x: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = experts(x, topk_weights, ids)
        return result

    layers = Model().layers
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=16):
        for experts in layers:
            assert torch.equal(run(experts, *inputs()), experts(*inputs()))
    assert counter.frame_count == len(LIMITS)


def test_nested_compile_region() -> None:
    experts = layer()
    region = torch.compiler.nested_compile_region(lambda *arguments: experts(*arguments))
    with torch.no_grad():
        compiled = torch.compile(lambda *given: region(*given) + region(*given), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs()), experts(*inputs()) + experts(*inputs()))


@pytest.mark.parametrize("option", ["cpp_wrapper", "freezing"])
def test_inductor_options(option: str) -> None:
    experts = layer()
    with torch.no_grad():
        compiled = torch.compile(experts, fullgraph=True, options={option: True})
        assert torch.equal(compiled(*inputs()), experts(*inputs()))


def test_load_constants_replaces_every_weight(tmp_path: Path) -> None:
    """Inductor writes constants of up to 8 numbers into the code, here w2's global scales, unless it is told to keep
    them: then a package takes the weights of another layer."""
    experts, other = layer(), layer(seed=1)
    with torch.no_grad():
        program = torch.export.export(experts, inputs())
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "experts.pt2"),
            inductor_configs={"always_keep_tensor_constants": True},
        )
        package = torch._inductor.aoti_load_package(path)
        assert torch.equal(package(*inputs()), experts(*inputs()))
        names = package.get_constant_fqns()
        assert sorted(names) == ["w13", "w13_global_scale", "w2", "w2_global_scale"]
        package.load_constants({name: other.get_buffer(name) for name in names}, check_full_update=True)
        assert torch.equal(package(*inputs()), other(*inputs()))


PROGRAM = """
import os, sys
from pathlib import Path
import torch
import torch._inductor.compile_fx
from torch._dynamo.utils import counters
import torch_nvfp4
folder = Path(sys.argv[1])
path = folder / "artifacts"

def run(step):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / step)
    if step == "load":
        assert torch.compiler.load_cache_artifacts(path.read_bytes()) is not None
    torch.manual_seed(0)
    experts = torch_nvfp4.NVFP4Experts.from_float(torch.randn(4, 64, 64), torch.randn(4, 64, 32), clamp_limit=7.0)
    x, weights, ids = torch.randn(8, 64), torch.rand(8, 2), torch.randint(0, 4, (8, 2))
    with torch.no_grad():
        compiled = torch.compile(lambda *given: torch.relu(experts(*given)), fullgraph=True)
        assert torch.equal(compiled(x, weights, ids), torch.relu(experts(x, weights, ids)))
    if step == "save":
        path.write_bytes(torch.compiler.save_cache_artifacts()[0])
    print(step, counters["aot_autograd"]["autograd_cache_hit"], flush=True)

for step in ("save", "load"):
    child = os.fork()  # a process for each, of which neither has to import torch
    if child == 0:
        run(step)
        break
    assert os.waitpid(child, 0)[1] == 0, step
"""


def test_cache_artifacts_across_processes(tmp_path: Path) -> None:
    # What Inductor compiles to see which instructions the compiler has, and ahead of its kernels, takes longest.
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_VEC_ISA_OK": "1", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["save 0", "load 1"]


def test_onnx_names_the_op_that_it_does_not_know() -> None:
    pytest.importorskip("onnxscript")
    with torch.no_grad(), pytest.raises(Exception, match=r"nvfp4\.moe") as error:
        torch.onnx.export(layer(), inputs(), dynamo=True)
    assert "ONNX" in f"{type(error.value).__name__} {error.value}"
