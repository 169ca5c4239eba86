"""Experts split over ranks, against the whole layer on one; see helpers/ranks.py."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, distributed, nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import torch_nvfp4
from torch_nvfp4 import Gate, NVFP4Experts, NVFP4Weight, reference
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.checkpoint.headers import read_header
from torch_nvfp4.checkpoint.synthetic import write_checkpoint
from torch_nvfp4.distributed import (
    ExpertsPlan,
    ParallelExperts,
    expert_range,
    load_experts,
    parallelize_experts,
    slice_experts,
)
from torch_nvfp4.errors import CheckpointError
from torch_nvfp4.quant_config import MoEQuantConfig
from torch_nvfp4.testing import FP8_TOLERANCE, TOLERANCE, random_routing, random_weight, relative_l2

DEVICE = os.environ["RANKS_DEVICE"]
DTYPE = torch.float32 if DEVICE == "cpu" else torch.float16
# Parts of a sum are rounded to 16 bits on each rank, and so is the sum of each two.
ERROR = TOLERANCE[DTYPE] * (1 if DEVICE == "cpu" else 2)
WORLD = int(os.environ["WORLD_SIZE"])
RANK = int(os.environ["RANK"])
K, INNER, TOP_K = 64, 128, 3
GATES = (Gate("silu", 0.5), Gate("silu", 0.7, 1.702, 1.0), Gate("swiglustep", 0.3), Gate("gelu_tanh"))


def meshes() -> Iterator[tuple[DeviceMesh, dict[str, Any]]]:
    """Every way to split over these ranks, as a mesh and tp and ep of a plan."""
    line = init_device_mesh(DEVICE, (WORLD,), mesh_dim_names=("ranks",))
    yield line, {"tp": "ranks"}
    yield line, {"ep": 0}
    if WORLD == 4:
        square = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("a", "b"))
        yield square, {"tp": "a", "ep": "b"}
        yield square, {"tp": "b", "ep": "a"}
        yield square, {"ep": "b"}  # along a all do the same


def weights(experts: int) -> tuple[NVFP4Weight, NVFP4Weight]:
    generator = torch.Generator().manual_seed(experts)
    w13 = random_weight((experts, 2 * INNER, K), gated=True, generator=generator, device=DEVICE)
    return w13, random_weight((experts, K, INNER), generator=generator, device=DEVICE)


def tokens(count: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Some ids belong to no expert, some experts are there twice in a token."""
    generator = torch.Generator().manual_seed(1000 * seed + count)
    x = torch.randn(count, K, generator=generator).to(DEVICE, DTYPE)
    topk_weights, ids = random_routing(count, experts, TOP_K, generator=generator, device=DEVICE)
    ids[::3, 0] = -1
    ids[1::3, 0] = experts + 5
    ids[2::3, 1] = ids[2::3, 2]
    return x, topk_weights, ids


def close(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == DTYPE
    error = relative_l2(result, expected)
    assert error < ERROR, error


def case_every_plan_computes_what_one_rank_does() -> None:
    for mesh, split in meshes():
        for number, gate in enumerate(GATES):
            experts = (5, 3, 8, 1)[number]  # uneven; 3 and 1 leave ranks without experts
            on_input = number == 1
            w13, w2 = weights(experts)
            quant = MoEQuantConfig(gate, apply_router_weight_on_input=on_input)
            whole = NVFP4Experts.from_weights(w13, w2, quant_config=quant)
            parallel = parallelize_experts(whole, mesh, ExpertsPlan(**split))
            for count in (1, 6, 0):
                arguments = tokens(count, experts)
                exact = reference.moe(
                    arguments[0], w13, w2, *arguments[1:], **gate.kwargs(), apply_router_weight_on_input=on_input
                )
                close(parallel(*arguments), exact)
            batch = [tensor.view(2, 3, -1) for tensor in tokens(6, experts)]
            close(parallel(*batch), whole(*batch))


def case_biases_and_experts_without_a_gate() -> None:
    generator = torch.Generator().manual_seed(7)
    for gate, rows in ((Gate("silu", 0.7, 1.702, 1.0), 2 * INNER), (Gate("relu2", gated=False), INNER)):
        w13 = random_weight((5, rows, K), gated=gate.gated, generator=generator, device=DEVICE)
        w2 = random_weight((5, K, INNER), generator=generator, device=DEVICE)
        biases = [torch.randn(5, size, generator=generator).to(DEVICE) for size in (rows, K)]
        whole = NVFP4Experts.from_weights(
            w13, w2, w13_bias=biases[0], w2_bias=biases[1], quant_config=MoEQuantConfig(gate)
        )
        arguments = tokens(6, 5)
        exact = reference.moe(arguments[0], w13, w2, *arguments[1:], None, *biases, **gate.kwargs())
        close(whole(*arguments), exact)
        for mesh, split in meshes():
            close(parallelize_experts(whole, mesh, ExpertsPlan(**split))(*arguments), exact)


def case_fp8_activations() -> None:
    mesh = init_device_mesh(DEVICE, (WORLD,))
    with checkpoint() as path:
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match=r"input_quant='fp8' cannot run .* capability 9\.0, got cpu"):
                load_experts(path, 0, mesh, ExpertsPlan(tp=0), device=DEVICE, input_quant="fp8")
            return
        if torch.cuda.get_device_capability()[0] != 9:
            return
        whole = NVFP4Experts.from_checkpoint(path, 0, device=DEVICE, input_quant="fp8")
        arguments = tokens(40, 6)
        for mesh, split in meshes():
            plan = ExpertsPlan(**split)
            for parallel in (
                load_experts(path, 0, mesh, plan, device=DEVICE, input_quant="fp8"),
                parallelize_experts(whole, mesh, plan),
            ):
                assert parallel.experts is not None
                assert (parallel.experts.input_quant, parallel.experts.backend) == ("fp8", "wgmma_fp8")
                # A part of the intermediate has a scale of its own, so that its values are rounded otherwise.
                assert relative_l2(parallel(*arguments), whole(*arguments)) < 2 * FP8_TOLERANCE


def case_uneven_experts() -> None:
    assert [len(expert_range(5, rank, 4)) for rank in range(4)] == [2, 1, 1, 1]
    assert [list(expert_range(2, rank, 4)) for rank in range(4)] == [[0], [1], [], []]
    mesh = init_device_mesh(DEVICE, (WORLD,))
    parallel = parallelize_experts(NVFP4Experts.from_weights(*weights(1)), mesh, ExpertsPlan(ep=0))
    assert (parallel.experts is None) == (RANK > 0)
    assert list(parallel.expert_range) == ([0] if RANK == 0 else [])
    parallel = parallelize_experts(NVFP4Experts.from_weights(*weights(WORLD + 1)), mesh, ExpertsPlan(ep=0))
    assert parallel.experts is not None
    assert parallel.experts.num_experts == (2 if RANK == 0 else 1)


def case_sums_in_fp32() -> None:
    mesh = init_device_mesh(DEVICE, (WORLD,))
    w13, w2 = weights(4)
    whole = NVFP4Experts.from_weights(w13, w2, clamp_limit=0.5)
    x, topk_weights, ids = tokens(64, 4)
    x = x.bfloat16()
    exact = reference.moe(x, w13, w2, topk_weights, ids, clamp_limit=0.5)
    for dtype in (torch.float32, None):
        result = parallelize_experts(whole, mesh, ExpertsPlan(tp=0, reduce_dtype=dtype))(x, topk_weights, ids)
        assert result.dtype == torch.bfloat16
        assert relative_l2(result, exact) < TOLERANCE[torch.bfloat16]


def case_slices_are_packed_after() -> None:
    """A slice of the packed bytes passes every check of shapes, and is garbage: the reason for the order."""
    w13, w2 = weights(2)
    for part in range(2):
        s13, s2 = slice_experts(w13, w2, range(1, 2), part, 2)
        gate_up = torch_nvfp4.dequantize(w13)[1].view(2, 2, INNER // 2, K)[:, part].flatten(0, 1)
        assert torch.equal(torch_nvfp4.dequantize(s13)[0], gate_up)
        columns = torch_nvfp4.dequantize(w2)[1, :, part * INNER // 2 : (part + 1) * INNER // 2]
        assert torch.equal(torch_nvfp4.dequantize(s2)[0], columns)


def case_sharded_tokens() -> None:
    for mesh, split in meshes():
        if "ep" not in split:
            continue
        for experts, counts in ((5, (4, 0, 7, 1)), (2, (3, 5, 1, 2)), (8, (0, 0, 0, 0)), (1, (2, 3, 4, 1))):
            w13, w2 = weights(experts)
            whole = NVFP4Experts.from_weights(w13, w2, clamp_limit=0.5)
            parallel = parallelize_experts(whole, mesh, ExpertsPlan(**split, tokens="sharded"))
            place = (
                mesh.get_local_rank(split["ep"]) if isinstance(split["ep"], int) else mesh[split["ep"]].get_local_rank()
            )
            arguments = tokens(counts[place], experts, seed=place)  # the same along tp
            exact = reference.moe(arguments[0], w13, w2, *arguments[1:], clamp_limit=0.5)
            close(parallel(*arguments), exact)
            assert torch.equal(parallel(*arguments), parallel(*arguments))
        all_to_one = tokens(9, 5)[:2]
        ids = torch.zeros(9, TOP_K, dtype=torch.int32, device=DEVICE)
        whole = NVFP4Experts.from_weights(*weights(5), clamp_limit=0.5)
        parallel = parallelize_experts(whole, mesh, ExpertsPlan(**split, tokens="sharded"))
        close(parallel(*all_to_one, ids), whole(*all_to_one, ids))
        batch = [tensor.view(1, 9, -1) for tensor in (*all_to_one, ids)]
        close(parallel(*batch), whole(*batch))


def case_sharded_ids_of_no_expert() -> None:
    """Beyond int32, in which ids are sent: 2**32 is not expert 0."""
    mesh = init_device_mesh(DEVICE, (WORLD,))
    whole = NVFP4Experts.from_weights(*weights(5), clamp_limit=0.5)
    parallel = parallelize_experts(whole, mesh, ExpertsPlan(ep=0, tokens="sharded"))
    x, topk_weights, ids = tokens(9, 5, seed=RANK)
    ids[:, 1] += 2**32
    close(parallel(x, topk_weights, ids), whole(x, topk_weights, ids))


def case_sharded_tokens_that_cannot_be_sent() -> None:
    """One rank's arguments are wrong: it says so, and the others do not wait for it."""
    mesh = init_device_mesh(DEVICE, (WORLD,))
    whole = NVFP4Experts.from_weights(*weights(5))
    parallel = parallelize_experts(whole, mesh, ExpertsPlan(ep=0, tokens="sharded"))
    x, topk_weights, ids = tokens(6, 5)
    half = TOP_K - 1
    rows: tuple[tuple[tuple[Tensor, Tensor, Tensor], str], ...] = (
        ((x, topk_weights[:4], ids[:4]), r"got hidden_states \[6, 64\], topk_weights \[4, 3\], topk_ids \[4, 3\]"),
        ((x, topk_weights, ids[:, :half]), r"got hidden_states .* topk_ids \[6, 2\]"),
        ((x, topk_weights, ids.float()), "expected topk_ids in int32 or int64 .* got topk_ids torch.float32"),
        ((x, ids, ids), "topk_weights in a floating point dtype, got topk_ids torch.int64, topk_weights torch.int64"),
        (
            (x.view(2, 3, K), topk_weights.view(3, 2, TOP_K), ids.view(3, 2, TOP_K)),
            r"the same dimensions before the last one, got hidden_states \[2, 3, 64\], topk_weights \[3, 2, 3\]",
        ),
        ((x.double(), topk_weights, ids), "hidden_states: expected .*float32, got torch.float64"),
    )
    for wrong, words in rows:
        expected = (ValueError, words) if RANK == 1 else (RuntimeError, "got none of rank 1 of the group")
        with pytest.raises(expected[0], match=expected[1]):
            parallel(*(wrong if RANK == 1 else (x, topk_weights, ids)))
    other = ((x.bfloat16(), topk_weights, ids), (x, topk_weights[:, :half].contiguous(), ids[:, :half].contiguous()))
    for given in other:
        words = r"the same from every rank, K = 64, top_k = \d, torch.\w+, got K = 64, top_k = \d, torch.\w+ of rank"
        with pytest.raises(RuntimeError, match=words):
            parallel(*(given if RANK == 1 else (x, topk_weights, ids)))
    close(parallel(x, topk_weights, ids), whole(x, topk_weights, ids))


def case_ranks_without_experts_do_as_the_others() -> None:
    """Whatever the strides of the input and of what flows back, and with an input that the op refuses."""
    mesh = init_device_mesh(DEVICE, (WORLD,))
    whole = NVFP4Experts.from_weights(*weights(1), clamp_limit=0.5)
    parallel = parallelize_experts(whole, mesh, ExpertsPlan(ep=0))
    assert (parallel.experts is None) == (RANK > 0)
    assert (not parallel.state_dict()) == (RANK > 0)
    parallel.load_state_dict(parallel.state_dict())
    *inputs, ids = tokens(K, 1)
    strided = inputs[0].t().contiguous().t()
    assert not strided.is_contiguous()
    with torch.no_grad():
        assert torch.equal(parallel(strided, inputs[1], ids), whole(strided, inputs[1], ids))
    flow = torch.randn(K, K, generator=torch.Generator().manual_seed(9)).to(DEVICE, DTYPE).t()
    grads = []
    for run in (parallel, whole):
        leaves = [strided.detach().requires_grad_(), inputs[1].detach().t().contiguous().t().requires_grad_()]
        grads.append(torch.autograd.grad(run(*leaves, ids), leaves, flow))
    for grad, expected in zip(*grads, strict=True):
        assert relative_l2(grad, expected) < ERROR
    with pytest.raises(ValueError, match=r"expected hidden_states \[\.\.\., 64\] \(hidden_size\), got \[\d+, 32\]"):
        parallel(inputs[0][:, : K // 2].contiguous(), inputs[1], ids)


@contextmanager
def checkpoint() -> Iterator[Path]:
    """A small checkpoint that rank 0 writes, whose experts two ranks, but not four, share evenly."""
    folder = [tempfile.mkdtemp() if RANK == 0 else None]
    distributed.broadcast_object_list(folder, src=0)
    path = Path(str(folder[0]))
    if RANK == 0:
        write_checkpoint(
            path, num_hidden_layers=1, n_routed_experts=6, num_experts_per_tok=TOP_K, hidden_size=K,
            moe_intermediate_size=INNER,
        )  # fmt: skip
    distributed.barrier()
    yield path
    distributed.barrier()


def case_ranks_read_their_part() -> None:
    with checkpoint() as path:
        layer = Checkpoint.open(path).layers[0]
        whole = NVFP4Experts.from_checkpoint(path, layer, device=DEVICE)
        arguments = tokens(7, 6)
        expected = whole(*arguments)
        for mesh, split in meshes():
            loaded = load_experts(path, layer, mesh, ExpertsPlan(**split), device=DEVICE)
            sliced = parallelize_experts(whole, mesh, ExpertsPlan(**split))
            assert loaded.experts is not None
            assert sliced.experts is not None
            states = [part.experts.state_dict() for part in (loaded, sliced)]
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key].cpu(), states[1][key].cpu()) for key in states[0])
            assert loaded.experts.clamp_limit == whole.clamp_limit
            close(loaded(*arguments), expected)
        with pytest.raises(ValueError, match=r"expected experts as a range of consecutive ones below 6.*range\(5, 7\)"):
            Checkpoint.open(path).experts(layer, experts=range(5, 7))
        with pytest.raises(ValueError, match=r"expected experts as a range .*ep_size 2"):
            Checkpoint.open(path).experts(layer, experts=range(3), ep_size=2)


SCALE = ".experts.5.w2.weight_scale"


def case_all_ranks_fail_where_one_does() -> None:
    """Of the experts of the last rank one has a scale of NaN, which the others do not read."""
    with checkpoint() as path:
        layer = Checkpoint.open(path).layers[0]
        if RANK == 0:
            headers = [read_header(shard) for shard in path.glob("*.safetensors")]
            (info,) = (info for header in headers for name, info in header.items() if name.endswith(SCALE))
            with info.file.open("r+b") as file:
                file.seek(info.begin)
                file.write(b"\x7f")
        distributed.barrier()
        words = "NaN" if RANK == WORLD - 1 else "got an error on another rank"
        with pytest.raises(CheckpointError, match=words):
            load_experts(path, layer, init_device_mesh(DEVICE, (WORLD,)), ExpertsPlan(ep=0), device=DEVICE)


class Projected(nn.Module):
    """What DistributedDataParallel takes: something that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(K, K, bias=False, device=DEVICE, dtype=DTYPE)
        nn.init.eye_(self.project.weight)
        self.experts = NVFP4Experts.from_weights(*weights(5), clamp_limit=0.5)

    def forward(self, x: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = self.experts(self.project(x), topk_weights, ids)
        return result


def case_distributed_data_parallel() -> None:
    """It makes every buffer that of rank 0, and so every rank's experts those of rank 0."""
    mesh = init_device_mesh(DEVICE, (WORLD,))
    arguments = tokens(6, 5)
    expected = Projected()(*arguments)
    model = DistributedDataParallel(parallelize_experts(Projected(), mesh, ExpertsPlan(ep=0)))
    close(model(*arguments).detach(), expected.detach())
    close(model(*arguments).detach(), expected.detach())
    even = NVFP4Experts.from_weights(*weights(WORLD))  # else the broadcast itself fails
    model = Projected()
    model.experts = parallelize_experts(even, mesh, ExpertsPlan(ep=0))
    wrapped = DistributedDataParallel(nn.Sequential(model))
    if RANK > 0:
        with pytest.raises(RuntimeError, match="expected this rank's own experts, got buffers that were written in"):
            wrapped.module[0](*arguments)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        experts = NVFP4Experts.from_weights(*weights(5), clamp_limit=0.5)
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": experts}), nn.ModuleDict({"experts": experts})])
        self.last = NVFP4Experts.from_weights(*weights(4), gate=Gate("gelu"))

    def forward(self, x: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["experts"](x, topk_weights, ids) * 0.01
        result: Tensor = self.last(x, topk_weights, ids.clamp(max=3))
        return result


def case_a_model() -> None:
    mesh = init_device_mesh(DEVICE, (WORLD,))
    model, arguments = Model(), tokens(5, 5)
    expected = model(*arguments)
    assert parallelize_experts(model, mesh, ExpertsPlan(ep=0)) is model
    assert isinstance(model.last, ParallelExperts)
    assert model.layers[0]["experts"] is model.layers[1]["experts"]
    close(model(*arguments), expected)
    assert f"of {WORLD}" in repr(model)
    assert "tokens=replicated" in repr(model)
    with pytest.raises(ValueError, match="expected NVFP4Experts in it, got Model without"):
        parallelize_experts(model, mesh, ExpertsPlan(ep=0))


def case_compiles_with_functional_collectives() -> None:
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            graphs.append(str(graph.graph))
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep)(module, inputs)

    for mesh, split in meshes():
        torch._dynamo.reset()
        graphs.clear()
        whole = NVFP4Experts.from_weights(*weights(5), clamp_limit=0.5)
        parallel = parallelize_experts(whole, mesh, ExpertsPlan(**split))
        compiled = torch.compile(parallel, fullgraph=True, dynamic=True, backend=backend)
        with torch.no_grad():
            for count in (4, 9):
                arguments = tokens(count, 5)
                close(compiled(*arguments), whole(*arguments))
        assert len(graphs) == 1, len(graphs)
        assert graphs[0].count("_c10d_functional.all_reduce") == len(split)
        assert "nvfp4.moe" in graphs[0]


def case_gradients_are_those_of_the_layer() -> None:
    generator = torch.Generator().manual_seed(9)
    direction = torch.randn(6, K, generator=generator).to(DEVICE, torch.float64)
    for experts, on_input in ((5, False), (1, True)):  # 1 leaves ranks without experts
        w13, w2 = weights(experts)
        biases = [torch.randn(experts, size, generator=generator).to(DEVICE) for size in (2 * INNER, K)]
        quant = MoEQuantConfig(Gate("silu", 0.5), apply_router_weight_on_input=on_input)
        whole = NVFP4Experts.from_weights(w13, w2, w13_bias=biases[0], w2_bias=biases[1], quant_config=quant)
        *inputs, ids = tokens(6, experts)
        exact = [tensor.double().requires_grad_() for tensor in inputs]
        output = reference.moe(
            exact[0], w13, w2, exact[1], ids, None, *biases, clamp_limit=0.5, apply_router_weight_on_input=on_input
        )
        expected = torch.autograd.grad((output * direction).sum(), exact)
        for mesh, split in meshes():
            parallel = parallelize_experts(whole, mesh, ExpertsPlan(**split))
            for wanted in ((0,), (1,), (0, 1)):
                leaves = [tensor.detach().requires_grad_(index in wanted) for index, tensor in enumerate(inputs)]
                output = parallel(*leaves, ids)
                grads = torch.autograd.grad(output, [leaves[index] for index in wanted], direction.to(output.dtype))
                for index, grad in zip(wanted, grads, strict=True):
                    assert relative_l2(grad, expected[index]) < ERROR
    sharded = parallelize_experts(whole, init_device_mesh(DEVICE, (WORLD,)), ExpertsPlan(ep=0, tokens="sharded"))
    with pytest.raises(NotImplementedError, match="expected no gradient through experts whose tokens are sharded"):
        sharded(*leaves, ids)


def case_functional_gradients() -> None:
    """torch.func.grad passes through the sums over ranks, also on a rank without experts."""
    *inputs, ids = tokens(6, 1)
    whole = NVFP4Experts.from_weights(*weights(1), clamp_limit=0.5)
    parallel = parallelize_experts(whole, init_device_mesh(DEVICE, (WORLD,)), ExpertsPlan(ep=0))
    got, expected = (
        torch.func.grad(lambda *leaves, run=run: run(*leaves, ids).float().square().sum(), (0, 1))(*inputs)
        for run in (parallel, whole)
    )
    for grad, exact in zip(got, expected, strict=True):
        assert relative_l2(grad, exact) < ERROR


def case_autocast() -> None:
    """float32 tokens become 16 bits on every rank, those without experts included."""
    mesh = init_device_mesh(DEVICE, (WORLD,))
    for experts in (1, 5):
        whole = NVFP4Experts.from_weights(*weights(experts), clamp_limit=0.5)
        x, *routing = tokens(6, experts)
        expected = whole(x.bfloat16(), *routing)
        for tokens_are in ("sharded", "replicated"):
            parallel = parallelize_experts(whole, mesh, ExpertsPlan(ep=0, tokens=tokens_are))
            with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.no_grad():
                got = parallel(x.float(), *routing)
            assert got.dtype == torch.bfloat16
            assert relative_l2(got, expected) < 2 * TOLERANCE[torch.bfloat16]


def case_words_of_inputs() -> None:
    """What is wrong on every rank; of one rank: case_sharded_tokens_that_cannot_be_sent."""
    mesh = init_device_mesh(DEVICE, (WORLD,))
    x, topk_weights, ids = tokens(6, 4)
    whole = NVFP4Experts.from_weights(*weights(4))
    for tokens_are in ("sharded", "replicated"):
        parallel = parallelize_experts(whole, mesh, ExpertsPlan(ep=0, tokens=tokens_are))
        with pytest.raises(ValueError, match=r"expected hidden_states \[..., 64\] \(hidden_size\), got \[6, 32\]"):
            parallel(x[:, :32], topk_weights, ids)
    for mesh_given, plan in (("cpu", ExpertsPlan(ep=0)), (mesh, {"ep": 0})):
        got = f"got {type(mesh_given).__name__} and {type(plan).__name__}"
        with pytest.raises(TypeError, match=f"expected a DeviceMesh .* and an ExpertsPlan, {got}"):
            parallelize_experts(whole, mesh_given, plan)  # type: ignore[call-overload]


def case_compiled_gradients_2() -> None:
    mesh = init_device_mesh(DEVICE, (WORLD,))
    whole = NVFP4Experts.from_weights(*weights(1), clamp_limit=0.5)  # the other rank has no expert
    parallel = parallelize_experts(whole, mesh, ExpertsPlan(ep=0))
    torch._dynamo.reset()
    compiled = torch.compile(parallel, fullgraph=True, backend="aot_eager")
    *inputs, ids = tokens(6, 1)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    direction = torch.randn(6, K, generator=torch.Generator().manual_seed(9)).to(DEVICE, DTYPE)
    grads = [torch.autograd.grad(run(*leaves, ids), leaves, direction) for run in (compiled, whole)]
    for grad, expected in zip(*grads, strict=True):
        assert relative_l2(grad, expected) < ERROR


class TwoLayers(nn.Module):
    """A layer that has an expert on one rank alone, behind a router and a layer with experts on two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = NVFP4Experts.from_weights(*weights(2), clamp_limit=0.5)
        self.second = NVFP4Experts.from_weights(*weights(1), clamp_limit=0.5)

    def forward(self, x: Tensor, router: Tensor) -> Tensor:
        for experts, count in ((self.first, 2), (self.second, 1)):
            topk_weights, ids = (x.float() @ router[:, :count]).softmax(-1).topk(1)
            x = x + experts(x, topk_weights, ids)
        return x


def case_compiled_gradients_of_two_layers() -> None:
    """Every rank meets the others in the same sums in the same order, also where it has no experts."""
    mesh = init_device_mesh(DEVICE, (WORLD,))
    whole = TwoLayers()
    parallel = parallelize_experts(copy.deepcopy(whole), mesh, ExpertsPlan(ep=0))
    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,  # Inductor's
    )
    compiled = torch.compile(parallel, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(6, K, generator=generator).to(DEVICE, DTYPE)
    router, flow = (torch.randn(K, size, generator=generator).to(DEVICE) for size in (2, 6))
    grads = []
    for run in (compiled, whole):
        leaves = [x.detach().requires_grad_(), router.detach().requires_grad_()]
        grads.append(torch.autograd.grad(run(*leaves), leaves, flow.t().to(DTYPE)))
    for grad, expected in zip(*grads, strict=True):
        assert relative_l2(grad, expected) < 10 * ERROR  # sums over ranks that are rounded in two layers


def case_words_of_plans() -> None:
    mesh = init_device_mesh(DEVICE, (WORLD,), mesh_dim_names=("ranks",))
    whole = NVFP4Experts.from_weights(*weights(4))
    rows = (
        (lambda: ExpertsPlan(), "for tp, ep or both, got None for both"),
        (lambda: ExpertsPlan(tp="a", ep="a"), "two dimensions of the mesh for tp and ep, got 'a' for both"),
        (lambda: ExpertsPlan(tp=0, tokens="sharded"), "expected a dimension of the mesh for ep"),
        (lambda: ExpertsPlan(tp=0, tokens="split"), "expected 'replicated' or 'sharded', got 'split'"),
        (lambda: ExpertsPlan(tp=0, reduce_dtype=torch.int32), "expected a floating point dtype, got torch.int32"),
        (lambda: parallelize_experts(whole, mesh, ExpertsPlan(tp="tp")), r"\('ranks', or an index below 1\), got 'tp'"),
        (lambda: parallelize_experts(whole, mesh, ExpertsPlan(tp=1)), "an index below 1.*got 1"),
        (lambda: parallelize_experts(nn.Linear(2, 2), mesh, ExpertsPlan(tp=0)), "expected NVFP4Experts .* got Linear"),
        (lambda: slice_experts(*weights(2), range(2), 0, 3), "multiples of 16 .* got tp_size 3: 42.6667 each"),
        (lambda: slice_experts(*weights(2), range(2), 2, 2), "got tp_rank 2, tp_size 2"),
        (lambda: expert_range(4, 4, 4), "0 <= rank < size, got rank 4, size 4"),
    )
    for call, words in rows:
        with pytest.raises(ValueError, match=words):
            call()
    mapped = NVFP4Experts.from_weights(*weights(4), expert_map=torch.arange(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="expected experts without an expert_map, got one"):
        parallelize_experts(mapped, mesh, ExpertsPlan(ep=0))
    with pytest.raises(ValueError, match="expected experts with weights, got them on the meta device"):
        parallelize_experts(copy.deepcopy(whole).to("meta"), mesh, ExpertsPlan(ep=0))
    if WORLD == 4:
        small = DeviceMesh(DEVICE, [0, 1])
        if RANK > 1:
            with pytest.raises(ValueError, match=f"expected a mesh that this rank is in, got .* on rank {RANK}"):
                parallelize_experts(whole, small, ExpertsPlan(ep=0))
