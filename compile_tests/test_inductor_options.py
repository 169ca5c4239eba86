"""``inductor_options``: the passes inside torch.compile and AOTInductor, and the caches that they are keys of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import torch_nvfp4
from helpers.gated_gemm import TOKENS, TOP_K, E, K, grouped_layer, linear_layer
from torch_nvfp4.compiler import inductor, inductor_options
from torch_nvfp4.testing import assert_accurate, random_routing


class Block(nn.Module):
    """A routed GEMM and a shared expert, each with an eager gate."""

    def __init__(self, limit: float = 10.0) -> None:
        super().__init__()
        grouped, dense = grouped_layer(), linear_layer()
        for name, tensor in zip(("packed", "scale"), grouped.args[1:3], strict=True):
            self.register_buffer(name, tensor)
        for name, tensor in zip(("shared_packed", "shared_scale"), dense.args[1:3], strict=True):
            self.register_buffer(name, tensor)
        self.limit = limit

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=self.limit)) * up.clamp(min=-self.limit, max=self.limit)

    def forward(self, x: Tensor, topk_ids: Tensor) -> Tensor:
        order, offsets = torch_nvfp4.route(topk_ids, None, E)
        return self.gate(torch_nvfp4.grouped_gemm(x, self.packed, self.scale, order, offsets))


class Shared(Block):
    """The shared expert alone; its input comes as columns."""

    def forward(self, columns: Tensor) -> Tensor:
        x = columns.mT.contiguous()  # a buffer whose layout Inductor may choose; the op needs rows
        return self.gate(torch_nvfp4.linear(x, self.shared_packed, self.shared_scale))


def block_inputs(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, K, generator=generator, dtype=torch.bfloat16) * 20
    return x, random_routing(tokens, E, TOP_K, generator=generator)[1]


def expected_block(block: Block, x: Tensor, topk_ids: Tensor) -> Tensor:
    order, offsets = torch_nvfp4.route(topk_ids, None, E)
    return torch_nvfp4.grouped_gemm_swiglu(x, block.packed, block.scale, order, offsets, clamp_limit=block.limit)


@pytest.fixture(scope="module")
def inductor_cache() -> Iterator[None]:
    """One empty cache for the module: its own, and warm from one test to the next where a test wants that."""
    with fresh_cache():
        yield


def compile_with(model: nn.Module, options: dict[str, Any] | None, **kwargs: Any) -> Any:
    """Compiled as by a new process that finds the caches as they are."""
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, fullgraph=True, options=options, **kwargs)


def test_caches_keep_fused_and_unfused_apart(inductor_cache: None) -> None:
    block, inputs = Block(), block_inputs()
    fused = expected_block(block, *inputs)
    with torch.no_grad():
        options = inductor_options()
        torch.testing.assert_close(compile_with(block, options)(*inputs), fused, rtol=0, atol=0)
        assert options["joint_custom_pre_pass"].fused == 1
        assert counters["inductor"]["fxgraph_cache_hit"] == 0

        # Without the pass: neither cache may answer with the fused graph.
        plain = compile_with(block, None)(*inputs)
        assert counters["inductor"]["fxgraph_cache_hit"] == 0
        assert not torch.equal(plain, fused)
        assert_accurate(plain, fused.double())

        # Both again, with warm caches.
        options = inductor_options()
        torch.testing.assert_close(compile_with(block, options)(*inputs), fused, rtol=0, atol=0)
        assert counters["inductor"]["fxgraph_cache_hit"] == 1
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
        assert options["joint_custom_pre_pass"].fused == 0  # the cache answered before the pass
        torch.testing.assert_close(compile_with(block, None)(*inputs), plain, rtol=0, atol=0)
        assert counters["inductor"]["fxgraph_cache_hit"] == 1

        # Another limit is another graph.
        other = Block(limit=3.0)
        out = compile_with(other, inductor_options())(*inputs)
        assert counters["inductor"]["fxgraph_cache_hit"] == 0
        torch.testing.assert_close(out, expected_block(other, *inputs), rtol=0, atol=0)


def test_uuid() -> None:
    def uuid(**kwargs: bool) -> str:
        return inductor_options(**kwargs)["joint_custom_pre_pass"].uuid()

    assert uuid() == uuid(fuse_gates=True)
    assert (
        len({uuid(), uuid(decompose_moe=True), uuid(fuse_gates=False), uuid(fuse_gates=False, decompose_moe=True)}) == 4
    )


PACKAGE = Path(torch_nvfp4.__file__).parent
# What decides how a graph is rewritten, with at least one file of each folder.
SOURCES = [
    *(path.relative_to(PACKAGE).as_posix() for path in sorted((PACKAGE / "compiler").glob("*.py"))),
    "gate.py",
    "ops/moe.py",
    "ops/_checks.py",
    "format.py",
]


@pytest.fixture(scope="module")
def package_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "torch_nvfp4"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.mark.parametrize("source", SOURCES)
def test_uuid_changes_with_every_source(source: str, package_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def uuid_of_new_process() -> str:
        inductor._package_digest.cache_clear()
        return inductor_options()["joint_custom_pre_pass"].uuid()

    here = uuid_of_new_process()
    with monkeypatch.context() as patch:
        patch.setattr(inductor, "_PACKAGE", package_copy)
        assert uuid_of_new_process() == here  # wherever it is installed
        file = package_copy / source
        original = file.read_bytes()
        file.write_bytes(original + b"# changed\n")
        assert uuid_of_new_process() != here
        file.write_bytes(original)
        assert uuid_of_new_process() == here
    inductor._package_digest.cache_clear()


def test_uuid_changes_with_a_new_and_a_renamed_source(package_copy: Path) -> None:
    digests = {inductor.source_digest(package_copy)}
    new = package_copy / "compiler" / "another.py"
    new.write_text("")
    digests.add(inductor.source_digest(package_copy))
    renamed = new.rename(new.with_name("other.py"))
    digests.add(inductor.source_digest(package_copy))
    renamed.unlink()
    assert len(digests) == 3


def test_uuid_reads_the_sources_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inductor_options()["joint_custom_pre_pass"].uuid()
    monkeypatch.setattr(inductor, "source_digest", None)
    inductor_options()["joint_custom_pre_pass"].uuid()


def test_compiled_without_recompiling_for_other_batches(inductor_cache: None) -> None:
    block = Block()
    options = inductor_options()
    with torch.no_grad():
        # Not dynamic=True, with which torch 2.15 makes the limit an input of the graph.
        compiled = compile_with(block, options)
        for tokens in (TOKENS, 3, 17):
            inputs = block_inputs(tokens)
            if tokens == TOKENS:
                for tensor in inputs:
                    torch._dynamo.mark_dynamic(tensor, 0)
            torch.testing.assert_close(compiled(*inputs), expected_block(block, *inputs), rtol=0, atol=0)
    assert options["joint_custom_pre_pass"].fused == 1
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("grad", [False, True])
def test_runs_with_and_without_grad_mode(inductor_cache: None, grad: bool) -> None:
    """The joint passes run for inference graphs whatever the grad mode; other limits so that no cache answers."""
    block, inputs, options = Block(limit=4.0 + grad), block_inputs(), inductor_options()
    with torch.set_grad_enabled(grad):
        out = compile_with(block, options)(*inputs)
    torch.testing.assert_close(out, expected_block(block, *inputs), rtol=0, atol=0)
    assert options["joint_custom_pre_pass"].fused == 1


def test_shared_expert_compiled(inductor_cache: None) -> None:
    """The routing that the pass makes for linear, for any batch, and rows where Inductor would choose columns."""
    block, options, dense = Shared(), inductor_options(), linear_layer()
    with torch.no_grad():
        compiled = compile_with(block, options)
        for tokens in (TOKENS, 3):
            x, _ = block_inputs(tokens)
            expected = dense._replace(args=(x, *dense.args[1:])).fused(clamp_limit=block.limit)
            columns = x.mT.contiguous()
            if tokens == TOKENS:
                torch._dynamo.mark_dynamic(columns, 1)
            torch.testing.assert_close(compiled(columns), expected, rtol=0, atol=0)
    assert options["joint_custom_pre_pass"].fused == 1
    assert counters["stats"]["unique_graphs"] == 1


def test_unbacked_batch(inductor_cache: None) -> None:
    """One compile for every batch, empty and one token included."""
    block, options = Block(limit=6.0), inductor_options()
    with torch.no_grad():
        compiled = compile_with(block, options)
        for tokens in (TOKENS, 0, 1):
            inputs = block_inputs(tokens)
            if tokens == TOKENS:
                for tensor in inputs:
                    torch._dynamo.decorators.mark_unbacked(tensor, 0)
            torch.testing.assert_close(compiled(*inputs), expected_block(block, *inputs), rtol=0, atol=0)
    assert options["joint_custom_pre_pass"].fused == 1
    assert counters["stats"]["unique_graphs"] == 1


def test_aot_inductor(inductor_cache: None, tmp_path: Path) -> None:
    """The options reach AOTInductor: the C++ that it writes (and here does not compile) calls the fused op."""
    block, inputs, options = Block(), block_inputs(), inductor_options()
    tokens = torch.export.Dim.DYNAMIC
    program = torch.export.export(block, inputs, dynamic_shapes=({0: tokens}, {0: tokens}))
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "block.pt2"),
        inductor_configs={**options, "aot_inductor.package_cpp_only": True},
    )
    assert options["joint_custom_pre_pass"].fused == 1
    with ZipFile(package) as archive:
        (calls,) = (json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".wrapper.json"))
    targets = [call["node"]["target"] for call in calls["nodes"]]
    assert targets == ["nvfp4::route", "nvfp4::grouped_gemm_swiglu"]
