"""The benchmark's accounting against numbers worked out by hand, its protocol on a fake clock, and its errors."""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.utils import fresh_cache
from typer.testing import CliRunner

from torch_nvfp4 import bench, ops, reference
from torch_nvfp4.bench import cpu, cpu_engines
from torch_nvfp4.cli import app
from torch_nvfp4.cli.bench_table import bench_table
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.compiler import GraphPass
from torch_nvfp4.format import NVFP4Weight, dequantize
from torch_nvfp4.testing import random_routing, random_weight, relative_l2

TINY = bench.Shape(experts=4, hidden=64, intermediate=32, top_k=2)
# 3 * 64 * 32 values of 4.5 bits, and three global scales.
TINY_EXPERT_BYTES = 3456 + 12


def test_accounting_by_hand():
    shape = bench.Shape(experts=16, hidden=4096, intermediate=2048, top_k=6)
    # 25,165,824 values an expert: 12,582,912 bytes of codes, 1,572,864 of block scales, 12 of global scales.
    assert shape.expert_bytes == 14_155_788
    assert shape.flop(1) == 301_989_888
    assert shape.flop(256) == 77_309_411_328
    ids = torch.tensor([[3, 5, 3], [5, -1, 16]])  # two experts; -1 and 16 are none
    assert shape.experts_hit(ids) == 2
    assert shape.touched_bytes(ids) == 2 * 14_155_788
    assert TINY.expert_bytes == TINY_EXPERT_BYTES
    assert bench.SHAPES["dsv4-flash"].expert_bytes * 256 == 3_623_881_728


def test_cases_differ_in_routing_and_repeat_with_the_seed():
    first, second = itertools.islice(bench.cases(TINY, 8), 2)
    again = next(bench.cases(TINY, 8))
    assert torch.equal(first.hidden_states, again.hidden_states)
    assert torch.equal(first.topk_ids, again.topk_ids)
    assert not torch.equal(first.topk_ids, second.topk_ids)
    assert not torch.equal(first.hidden_states, second.hidden_states)
    torch.testing.assert_close(first.topk_weights.sum(-1), torch.ones(8))


def test_skewed_cases():
    """Sigma 1.5: of 256 experts, 8 per token, the most popular one is an outlier; without skew none is."""
    shape = bench.Shape(256, 32, 16, 8)
    shares = {}
    for skew in (0.0, 1.5):
        ids = torch.cat([case.topk_ids for case in itertools.islice(bench.cases(shape, 2000, skew=skew), 1)])
        assert all(row.unique().numel() == 8 for row in ids)
        assert int(ids.min()) >= 0
        assert int(ids.max()) < 256
        shares[skew] = ids.flatten().bincount(minlength=256).sort(descending=True).values / ids.numel() * 256
    # Log-normal popularity of sigma 1.5: its mean is 3.08 times its median, and a token's 8 experts are distinct.
    assert shares[0.0][0] < 1.6
    assert 8 < shares[1.5][0] <= 32
    assert 0.2 < shares[1.5][128] < 0.6
    first, second = itertools.islice(bench.cases(shape, 64, skew=1.5), 2)
    assert not torch.equal(first.topk_ids.flatten().bincount(), second.topk_ids.flatten().bincount())
    assert torch.equal(first.topk_ids, next(bench.cases(shape, 64, skew=1.5)).topk_ids)
    torch.testing.assert_close(first.topk_weights.sum(-1), torch.ones(64))


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(("activation", "limit"), [("silu", 5.0), ("silu", None), ("swiglustep", 5.0), ("gelu", None)])
def test_dequantize_then_matmul_is_the_layer(activation, limit, on_input):
    generator = torch.Generator().manual_seed(0)
    w13 = random_weight((4, 64, 64), gated=True, generator=generator)
    w2 = random_weight((4, 64, 32), generator=generator)
    x = torch.randn(9, 64, generator=generator)
    topk_weights, topk_ids = random_routing(9, 4, 2, generator=generator)
    topk_ids[0] = torch.tensor([1, 1])
    topk_ids[1] = torch.tensor([-1, 4])
    out = bench.dequantize_then_matmul(
        bench.Case(x, topk_weights, topk_ids), w13, w2, activation=activation, clamp_limit=limit,
        apply_router_weight_on_input=on_input,
    )  # fmt: skip
    expected = reference.moe(
        x, w13, w2, topk_weights, topk_ids, activation=activation, clamp_limit=limit,
        apply_router_weight_on_input=on_input,
    )  # fmt: skip
    assert relative_l2(out, expected) < 1e-5
    assert torch.equal(out[1], torch.zeros(64))


def test_transformers_computes_the_same_layer():
    pytest.importorskip("transformers")
    layer = bench.Layer.random(TINY, clamp_limit=5.0)
    contenders = bench.transformers_contenders(layer)
    assert [c.name for c in contenders] == ["eager bf16", "grouped_mm bf16", "eager fp16", "grouped_mm fp16"]
    bench.check_agreement([bench.our_contender(layer, torch.bfloat16), *contenders], next(bench.cases(TINY, 8)))


def ops_in(graph):
    return sorted(str(node.target) for node in graph.nodes if str(node.target).startswith("nvfp4."))


def test_compiled_contenders_are_what_their_names_say(device, monkeypatch):
    run_pass, graphs = GraphPass.__call__, []

    def record(self, graph):
        run_pass(self, graph)
        graphs.append(ops_in(graph))

    monkeypatch.setattr(GraphPass, "__call__", record)
    layer = bench.Layer.random(TINY, clamp_limit=1.0, device=device)
    torch.compiler.reset()
    with fresh_cache(), torch.inference_mode():
        contenders = bench.compiled_contenders(layer, torch.bfloat16)
        assert [c.name for c in contenders] == ["gate fused", "gate Inductor", "gate eager"]
        ours = bench.our_contender(layer, torch.bfloat16)
        for tokens in (8, 1, 5):
            bench.check_agreement([ours, *contenders], next(bench.cases(TINY, tokens, device=device)))
    route, gemm, combine = "nvfp4.route.default", "nvfp4.grouped_gemm.default", "nvfp4.combine.default"
    assert graphs == [[combine, gemm, "nvfp4.grouped_gemm_swiglu.default", route], [combine, gemm, gemm, route]]


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "tile"), [(1, 8), (7, 16), (300, 56), (5000, 64)])
def test_aligned_slots(tokens, tile):
    pytest.importorskip("triton")
    from torch_nvfp4.bench.align import align

    topk_ids = random_routing(tokens, 7, 3, generator=torch.Generator().manual_seed(tokens))[1]
    order, offsets = ops.route(topk_ids.cuda(), None, 7)
    slots, experts = [], []
    for expert in range(7):
        mine = (topk_ids.flatten() == expert).nonzero().flatten().tolist()
        filling = [topk_ids.numel()] * (-len(mine) % tile)
        slots += mine + filling
        experts += [expert] * ((len(mine) + len(filling)) // tile)
    aligned = align(order, offsets, tile)
    assert aligned["num_tokens_padded"].tolist() == [len(slots)]
    assert aligned["sorted_ids"][: len(slots)].tolist() == slots
    assert aligned["expert_ids"][: len(experts)].tolist() == experts


def test_a_contender_without_the_clamp_is_not_timed():
    layer = bench.Layer.random(TINY, clamp_limit=2.0)
    ours = bench.our_contender(layer, torch.bfloat16)
    unclamped = bench.dequantize_contender(
        bench.Layer(layer.shape, layer.w13, layer.w2, clamp_limit=1e9), torch.bfloat16
    )
    with pytest.raises(bench.BenchError, match="expected dequantize to agree with torch_nvfp4"):
        bench.check_agreement([ours, unclamped], next(bench.cases(TINY, 8)))


class FakeProbes:
    """1 GB/s and 1 TFLOP/s in even rounds, 2 GB/s and 2 TFLOP/s in odd ones."""

    matmul_dtype = torch.float32

    def __init__(self):
        self.reads = self.matmuls = 0

    def read_rate(self):
        self.reads += 1
        return (1.0 + (self.reads - 1) // 2 % 2) * 1e9

    def matmul_rate(self):
        self.matmuls += 1
        return (1.0 + (self.matmuls - 1) % 2) * 1e12


def test_ratios_are_taken_within_a_round(monkeypatch):
    # The machine is twice as fast in odd rounds: times halve, ratios stay.
    now = {"round": 0}

    def ours(case):
        return torch.zeros_like(case.hidden_states)

    def peer(case):
        return torch.ones_like(case.hidden_states)

    def fake_seconds(run):
        out = run()
        factor = 1.0 + now["round"] % 2
        if float(out.sum()) == 0.0:
            return 8e-6 / factor
        now["round"] += 1  # the only peer ends the round
        return 24e-6 / factor

    monkeypatch.setattr(cpu, "wall_seconds", fake_seconds)
    monkeypatch.setattr(cpu, "peak_extra_bytes", lambda run: 5)
    # All four experts of every routing are hit, so that each round touches the same bytes.
    shape = TINY._replace(top_k=4)
    contenders = [bench.Contender("torch_nvfp4", ours, torch.float32), bench.Contender("peer", peer, torch.float32)]
    row = bench.measure_cpu(shape, 3, contenders, FakeProbes(), seconds=math.inf)
    touched = 4 * TINY_EXPERT_BYTES
    assert row.rounds == 40
    assert row.experts_hit == 4
    assert row.touched_bytes == touched
    assert row.flop == 2 * 3 * 4 * 3 * 64 * 32
    assert row.speedup == {"peer": pytest.approx(3.0)}
    assert row.over_read == pytest.approx(8e-6 / (touched / 1e9))
    assert row.over_floor == row.over_read  # 13.9 us to read, 0.15 us to multiply
    assert row.read_seconds == pytest.approx(touched / 1.5e9)  # the median of 1 and 2 GB/s
    assert row.floor_seconds == row.read_seconds
    assert row.matmul_dtype == "fp32"
    assert row.seconds == {"torch_nvfp4": pytest.approx(6e-6), "peer": pytest.approx(18e-6)}
    assert row.extra_bytes == 5
    assert row.best("p") == "peer"
    assert row.best("x") is None


@pytest.mark.parametrize("fastest", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_floor_multiplies_as_torch_is_fastest(fastest, monkeypatch):
    multiplied = []

    def linear(x, weight):
        assert x.dtype == weight.dtype
        multiplied.append(x.dtype)

    monkeypatch.setattr(cpu.F, "linear", linear)
    monkeypatch.setattr(cpu, "wall_seconds", lambda run: [run(), 1.0 if multiplied[-1] is fastest else 3.0][1])
    probes = cpu.Probes(read_bytes=64, matmul_size=(8, 4, 16))
    assert set(multiplied) == {torch.bfloat16, torch.float16, torch.float32}
    assert probes.matmul_dtype is fastest
    multiplied.clear()
    assert probes.matmul_rate() == 2 * 8 * 4 * 16
    assert multiplied == [fastest]


def test_a_slow_peer_sits_rounds_out(monkeypatch):
    calls = []

    def run(name, out):
        calls.append(name)
        return out

    monkeypatch.setattr(cpu, "wall_seconds", lambda call: [call(), 1e-3 if calls[-1] == "ours" else 10.0][1])
    monkeypatch.setattr(cpu, "peak_extra_bytes", lambda run: None)
    contenders = [
        bench.Contender("ours", lambda case: run("ours", case.hidden_states), torch.float32),
        bench.Contender("slow", lambda case: run("slow", case.hidden_states), torch.float32),
    ]
    row = bench.measure_cpu(TINY, 1, contenders, FakeProbes(), seconds=0.0, min_rounds=5)
    assert row.rounds == 5
    assert calls.count("ours") == 6  # one warm-up
    assert calls.count("slow") == 3  # one warm-up, and two rounds
    assert row.speedup["slow"] == pytest.approx(1e4)


def test_peak_extra_bytes():
    def allocate():
        torch.ones(64 * 2**20, dtype=torch.uint8)
        torch.ones(16 * 2**20, dtype=torch.uint8)

    allocate()
    peak = bench.peak_extra_bytes(allocate)
    if peak is None:
        pytest.skip("this system does not tell the peak")
    assert 60 * 2**20 < peak < 76 * 2**20
    assert bench.peak_extra_bytes(lambda: None) < 8 * 2**20


def test_a_call_holds_no_dequantized_matrix():
    shape = bench.Shape(experts=4, hidden=2048, intermediate=1024, top_k=2)
    ours = bench.our_contender(bench.Layer.random(shape, clamp_limit=10.0), torch.bfloat16)
    case = next(bench.cases(shape, 4))
    case = case._replace(hidden_states=case.hidden_states.to(torch.bfloat16))
    ours.run(case)
    peak = bench.peak_extra_bytes(lambda: ours.run(case))
    if peak is None:
        pytest.skip("this system does not tell the peak")
    assert peak < 3 * 2**20  # w2 of one expert alone takes 4 MiB in bf16


def test_a_tiny_run(tmp_path):
    peers = ["--peer", "dequantize"]
    arguments = ["bench", "--device", "cpu", "--tokens", "1,5", "--shape", "4,64,32,2", "--seconds", "0", *peers]
    file = tmp_path / "report.json"
    result = CliRunner().invoke(app, [*arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["shape"] == {"experts": 4, "hidden": 64, "intermediate": 32, "top_k": 2}
    assert report["dtype"] == "bf16"
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert [row["tokens"] for row in report["rows"]] == [1, 5]
    for row in report["rows"]:
        # The rounds' routings follow one warm-up each of the two contenders.
        routings = itertools.islice(bench.cases(TINY, row["tokens"]), 2, 2 + row["rounds"])
        hits = [len(set(case.topk_ids.flatten().tolist())) for case in routings]
        assert row["experts_hit"] == pytest.approx(sum(hits) / len(hits))
        assert row["touched_bytes"] == pytest.approx(TINY_EXPERT_BYTES * sum(hits) / len(hits))
        assert row["flop"] == 2 * row["tokens"] * 2 * 3 * 64 * 32
        assert row["read_seconds"] == pytest.approx(row["touched_bytes"] / row["read_rate"])
        assert row["compute_seconds"] == pytest.approx(row["flop"] / row["matmul_rate"])
        assert row["floor_seconds"] == max(row["read_seconds"], row["compute_seconds"])
        assert set(row["seconds"]) == {"torch_nvfp4", "dequantize"}
        assert min(row["seconds"].values()) > 0
    assert "E=4 K=64 I=32 top-k 2, bf16 activations, clamp 10" in result.output
    assert max(map(len, result.output.splitlines())) <= 120


def test_a_tiny_run_of_compiled_layers(device, tmp_path):
    file = tmp_path / "report.json"
    arguments = ["--device", device, "--tokens", "3", "--shape", "4,64,32,2", "--seconds", "0", "--peer", "compiled"]
    result = CliRunner().invoke(app, ["bench", *arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert list(report["versions"]) == ["torch"]
    (row,) = report["rows"]
    assert list(row["seconds"]) == ["torch_nvfp4", "gate fused", "gate Inductor", "gate eager"]
    assert set(row["speedup"]) == set(row["seconds"]) - {"torch_nvfp4"}
    assert min(row["seconds"].values()) > 0
    # The peers hold the same weights, so that none of them is a 16-bit one.
    assert "16-bit" not in result.output
    assert max(map(len, result.output.splitlines())) <= 120


def make_report(device, peers):
    row = bench.Row(
        tokens=8192, experts_hit=255.9, touched_bytes=3e9, flop=2 * 10**12, rounds=5, read_rate=3e9, matmul_rate=1e12,
        read_seconds=1e-3, compute_seconds=1e-4, seconds=dict.fromkeys(("torch_nvfp4", *peers), 0.01234567),
        over_read=2.0, over_floor=2.0, speedup=dict.fromkeys(peers, 2.0), extra_bytes=10**9,
        errors={"torch_nvfp4": 0.00264, "fp8": 0.0672} if "fp8" in peers else {},
    )  # fmt: skip
    return bench.Report(device, "a processor", 2, "today", {}, TINY._asdict(), "bf16", 10.0, [row])


def test_host_ratios_are_taken_within_a_round(monkeypatch):
    """A fake clock on which the machine is twice as slow in every other round."""
    clock = itertools.count()
    costs = {"add": 1.0, "moe": 4.0, "module": 6.0}
    now = [0.0]
    slow = [1.0]

    def cost(name):
        def run():
            now[0] += costs[name] * slow[0]

        return run

    def contenders(layer, tokens, dtype):
        del layer, tokens, dtype
        runs = {bench.host.ADD: cost("add"), bench.host.MOE: cost("moe"), bench.host.MODULE: cost("module")}
        add = runs[bench.host.ADD]

        def first_of_a_round():
            if next(clock) % 100 == 0:
                slow[0] = 3.0 - slow[0]
            add()

        return runs | {bench.host.ADD: first_of_a_round}

    monkeypatch.setattr(bench.host, "host_contenders", contenders)
    monkeypatch.setattr(bench.host.time, "perf_counter", lambda: now[0])
    layer = bench.Layer.random(TINY, clamp_limit=10.0)
    rows = bench.measure_host(layer, 1, dtype=torch.bfloat16, seconds=0.0, min_rounds=6)
    assert [row.mode for row in rows] == ["inference", "no_grad", "grad"]
    for row in rows:
        assert row.rounds == 6
        assert row.over_add == pytest.approx({"aten add": 1.0, "moe": 4.0, "NVFP4Experts": 6.0})
        assert row.module_over_moe == pytest.approx(1.5)
        assert row.seconds["moe"] == pytest.approx(6.0)  # the median of 4 and 8


def test_host_time_of_a_tiny_layer(tmp_path):
    """The table and the JSON have the same figures, and what is timed computes the layer."""
    file = tmp_path / "host.json"
    arguments = ["bench", "--device", "cpu", "--host-time", "--shape", "4,64,32,2", "--tokens", "1,3", "--seconds", "0"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["shape"] == TINY._asdict()
    assert [(row["tokens"], row["mode"]) for row in report["rows"]] == [
        (tokens, mode) for tokens in (1, 3) for mode in ("inference", "no_grad", "grad")
    ]
    assert all(set(row["seconds"]) == set(row["over_add"]) for row in report["rows"])
    assert all(row["over_add"]["aten add"] == 1.0 for row in report["rows"])
    layer = bench.Layer.random(TINY, clamp_limit=10.0)
    runs = bench.host.host_contenders(layer, 3, torch.bfloat16)
    case = next(bench.cases(TINY, 3))
    expected = bench.dequantize_then_matmul(case, layer.w13, layer.w2, clamp_limit=10.0)
    for name in (bench.host.MOE, bench.host.MODULE, "torch.ops.nvfp4.moe"):
        assert relative_l2(runs[name](), expected) < 1e-2


@pytest.mark.parametrize(
    ("device", "peers"),
    [
        ("cpu", ["gate fused", "gate Inductor", "gate eager", "dequantize"]),
        ("cuda", ["gate fused", "gate Inductor", "gate eager"]),
        ("cuda", ["vllm", "humming indexed", "humming grouped"]),
        ("cuda", ["fp8", "vllm"]),
    ],
)
def test_tables_fit_120_columns(device, peers, capsys):
    Terminal().table(*bench_table(make_report(device, peers)))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 120
    assert "2.00x" in lines[-1] or "2.0x" in lines[-1]


def test_errors_of_fp8_activations(capsys):
    report = make_report("cuda", ["fp8"])
    report.input_quant = "fp8"
    Terminal().table(*bench_table(report))
    assert "6.72e-02" in capsys.readouterr().out
    assert bench.caption(report).endswith(" error: relative L2 against fp64 of the same weights; torch_nvfp4 0.00264.")
    assert "error" not in bench.caption(make_report("cuda", ["vllm"]))
    assert report.to_json()["rows"][0]["errors"]["fp8"] == 0.0672


def test_fp64_errors_are_those_of_the_first_tokens():
    layer = bench.Layer.random(TINY, clamp_limit=10.0)
    ours = bench.our_contender(layer, torch.bfloat16)
    off = dataclasses.replace(
        ours, name="off", run=lambda case: torch.cat((ours.run(case)[:256] * 1.25, case[0][256:]))
    )
    case = next(bench.cases(TINY, 300))
    errors = bench.fp64_errors(layer, [ours, off], case)
    x, topk_weights, topk_ids = (part[:256] for part in case)
    exact = bench.Case(x.bfloat16().double(), topk_weights, topk_ids)
    expected = bench.dequantize_then_matmul(exact, layer.w13, layer.w2, clamp_limit=10.0)
    output = ours.run(bench.Case(x.bfloat16(), topk_weights, topk_ids))
    assert errors["torch_nvfp4"] == pytest.approx(relative_l2(output, expected), rel=1e-3)
    assert errors["off"] == pytest.approx(0.25, rel=0.02)


def test_each_contender_has_its_own_agreement():
    layer = bench.Layer.random(TINY, clamp_limit=10.0)
    ours = bench.our_contender(layer, torch.bfloat16)
    near = dataclasses.replace(ours, name="near", run=lambda case: ours.run(case) * 1.1)
    case = next(bench.cases(TINY, 3))
    with pytest.raises(bench.BenchError, match=r"near to agree with torch_nvfp4 .* of 0\.03, got 0\.(1|09)"):
        bench.check_agreement([ours, near], case)
    bench.check_agreement([ours, dataclasses.replace(near, agreement=bench.layer.FP8_AGREEMENT)], case)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    bench.plot(make_report("cpu", ["dequantize"]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1,x"], "expected positive integers between commas, got '1,x'"),
        (["--tokens", "0"], "expected positive integers between commas, got '0'"),
        (["--shape", "4,64,32"], "expected E,K,I,TOPK or one of cpu, dsv4-flash"),
        (["--shape", "4,60,32,2"], "expected positive sizes with K and I multiples of 16, got '4,60,32,2'"),
        (["--shape", "4,64,32,5"], "expected TOPK <= E, got '4,64,32,5'"),
        (["--dtype", "int8"], "--dtype: expected one of bf16, fp16, fp32 on cpu, got 'int8'"),
        (
            ["--peer", "vllm"],
            "--peer: expected one of dequantize, transformers, compiled, ggml, kt, none on cpu, got 'vllm'",
        ),
        (["--clamp-limit", "-1"], "expected clamp_limit to be finite and positive"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["--input-quant", "fp8"], "--input-quant fp8: expected a GPU of compute capability 9.0, got cpu; leave"),
        (["--input-quant", "fp4"], "--input-quant: expected fp8, got 'fp4'"),
        (["--host-time", "--input-quant", "fp8"], "--input-quant fp8: expected no --host-time beside it, got both"),
        (["--skew", "-1"], "--skew: expected a finite sigma of at least 0, got -1"),
        (["--skew", "nan"], "--skew: expected a finite sigma of at least 0, got nan"),
    ],
)
def test_errors(arguments, message):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    result = CliRunner().invoke(app, ["bench", *device, *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"torch-nvfp4 bench: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu():
    result = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert result.exit_code == 2
    assert result.stderr.startswith("torch-nvfp4 bench: --device cuda: expected a CUDA device, got a machine")


def test_a_plot_needs_matplotlib_before_anything_is_measured(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--plot", str(tmp_path / "plot.png")])
    assert result.exit_code == 2
    assert "--plot: expected matplotlib, which is not installed; pip install 'torch-nvfp4[bench]'" in result.stderr


def test_global_scales_of_the_random_layer_fit_peers_with_one_per_expert():
    layer = bench.Layer.random(TINY, clamp_limit=10.0)
    assert isinstance(layer.w13, NVFP4Weight)
    assert layer.w13.global_scale.shape == (4, 2)
    assert torch.equal(layer.w13.global_scale[:, 0], layer.w13.global_scale[:, 1])
    assert layer.w13.data.shape == (4, 64, 32)
    assert layer.w2.data.shape == (4, 64, 16)


def test_ggml_blocks_hold_the_weight():
    weight = random_weight((2, 8, 128), generator=torch.Generator().manual_seed(0))
    blocks = cpu_engines.ggml_blocks(weight)
    assert blocks.shape == (2, 8, 2, 36)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat((values, -values))
    dense = torch.empty(2, 8, 128)
    for column in range(128):
        block, group, place = column // 64, column % 64 // 16, column % 16
        byte = blocks[..., block, 4 + group * 8 + place % 8].int()
        code = byte >> 4 if place >= 8 else byte & 15
        dense[..., column] = values[code] * blocks[..., block, group].view(torch.float8_e4m3fn).float()
    assert torch.equal(dense * weight.global_scale[:, None, None], dequantize(weight, torch.float32))


def test_ggml_agrees():
    pytest.importorskip("ggml")
    shape = bench.Shape(experts=4, hidden=128, intermediate=64, top_k=2)
    layer = bench.Layer.random(shape, clamp_limit=1.0)
    contenders = [bench.our_contender(layer, torch.bfloat16), cpu_engines.ggml_contender(layer)]
    for tokens in (1, 2, 7, 1):
        bench.check_agreement(contenders, next(bench.cases(shape, tokens)))


def test_kt_is_refused_with_its_reason(monkeypatch):
    """kt-kernel's own words, where it is installed: a layer without its clamp is another function."""

    def wrapper(*_, method, swiglu_limit, **__):
        raise ValueError(f"swiglu_limit={swiglu_limit} is only supported on 'MXFP4', got {method}")

    monkeypatch.setitem(sys.modules, "kt_kernel", SimpleNamespace(KTMoEWrapper=wrapper))
    words = (
        r"--peer kt: expected a kt-kernel whose NVFP4 takes swiglu_limit=10, got: swiglu_limit=10.0 is only .* NVFP4"
    )
    with pytest.raises(bench.BenchError, match=words):
        cpu_engines.kt_contender(bench.Layer.random(TINY, clamp_limit=10.0))


@pytest.mark.parametrize(
    "workspaces",
    [
        pytest.param({"get_marlin_workspace": lambda device: ("workspace", device)}, id="since-0.31"),
        pytest.param(
            {"marlin_make_workspace_new": lambda device, blocks: ("workspace", device) if blocks == 4 else None},
            id="before",
        ),
        pytest.param({}, id="neither"),
    ],
)
def test_marlin_gets_its_workspace_from_each_vllm(workspaces, monkeypatch):
    layer = bench.Layer.random(TINY, clamp_limit=10.0)
    device = layer.w13.data.device

    def prepare(described, w13, s13, g13, w2, s2, g2, is_act_and_mul):
        return w13, s13, g13, w2, s2, g2

    def fused_marlin_moe(x, w13, w2, bias1, bias2, s13, s2, topk_weights, topk_ids, *, workspace, **how):
        assert workspace == ("workspace", device)
        assert (how["global_scale2"] == layer.w2.global_scale).all()
        case = bench.Case(x, topk_weights, topk_ids)
        return bench.dequantize_then_matmul(case, layer.w13, layer.w2, clamp_limit=10.0)

    layers = "vllm.model_executor.layers"
    types = SimpleNamespace(float4_e2m1f=SimpleNamespace(id=1))
    modules = {
        f"{layers}.fused_moe.experts.marlin_moe": SimpleNamespace(fused_marlin_moe=fused_marlin_moe, **workspaces),
        f"{layers}.quantization.utils.marlin_utils_fp4": SimpleNamespace(prepare_nvfp4_moe_layer_for_marlin=prepare),
        "vllm.scalar_type": SimpleNamespace(scalar_types=types),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(silu_and_mul_with_clamp=None), raising=False)
    if not workspaces:
        with pytest.raises(bench.BenchError, match=r"expected vLLM .* got: .*marlin_make_workspace_new"):
            bench.vllm_contender(layer, torch.bfloat16)
        return
    contenders = [bench.our_contender(layer, torch.bfloat16), bench.vllm_contender(layer, torch.bfloat16)]
    bench.check_agreement(contenders, next(bench.cases(TINY, 3)))


def test_flashinfer_is_tuned_for_each_number_of_tokens(monkeypatch):
    layer = bench.Layer.random(TINY, clamp_limit=10.0)
    ran = []

    def run_moe(x, ids, weights, w1, s1, g1, w2, s2, g2, out, workspace, **how):
        assert (w1.shape, g1.shape, w2.shape) == ((4, 64, 32), (4,), (4, 64, 16))
        assert (how["activation"], how["activation_fp4"]) == (("swiglu", 10.0), False)
        ran.append((workspace, how["block_size"], how["gemm1_config"], how["gemm2_config"]))
        return bench.dequantize_then_matmul(bench.Case(x, weights, ids), layer.w13, layer.w2, clamp_limit=10.0)

    def time_once(run, case):
        run(case)
        _, slots, first, second = ran[-1]
        return abs(slots - 64) + (first != (256, 64, 2)) + (second != (128, 256, 2))

    fp4 = SimpleNamespace(
        run_moe=run_moe, allocate_workspace=lambda **sizes: sizes["num_tokens"], GemmConfig=lambda *tile: tile
    )
    modules = {"flashinfer.fused_moe.cutile.fp4": fp4}
    modules["flashinfer.fused_moe.api"] = SimpleNamespace(SwiGLU=lambda limit: ("swiglu", limit))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("torch_nvfp4.bench.contenders._time_once", time_once)
    with pytest.raises(bench.BenchError, match="expected --dtype bf16, its only activations, got fp16"):
        bench.flashinfer_contender(layer, torch.float16)
    contenders = [bench.our_contender(layer, torch.bfloat16), bench.flashinfer_contender(layer, torch.bfloat16)]
    for tokens, slots in ((3, 32), (40, 64)):  # few slots per expert: tiles of 16 and 32 alone
        case = next(bench.cases(TINY, tokens))
        bench.check_agreement(contenders, case)
        assert ran[-1] == (tokens, slots, (256, 64, 2), (128, 256, 2))
        tried = len(ran)
        bench.check_agreement(contenders, case)
        assert len(ran) == tried + 1  # tuned once


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("vllm", bench.vllm_contender),
        ("humming", bench.humming_contenders),
        ("ggml", lambda layer, _: cpu_engines.ggml_contender(layer)),
        ("kt_kernel", lambda layer, _: cpu_engines.kt_contender(layer)),
        ("flashinfer", bench.flashinfer_contender),
    ],
)
def test_a_peer_that_is_not_installed(package, make):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(
        bench.BenchError,
        match=f"--peer {package.removesuffix('_kernel')}: expected .*, got: No module named '{package}'",
    ):
        make(bench.Layer.random(TINY, clamp_limit=10.0), torch.bfloat16)
