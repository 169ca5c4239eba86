"""The command line: values in its JSON against independent computation, exit codes, and one-line errors."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import safetensors.torch
import torch
from typer.models import OptionInfo
from typer.testing import CliRunner

import torch_nvfp4
from torch_nvfp4 import bench
from torch_nvfp4.checkpoint import synthetic
from torch_nvfp4.checkpoint.synthetic import LayoutName
from torch_nvfp4.cli import app, demo
from torch_nvfp4.cli.select import AMX_TOKENS, FEW_TOKENS, TILE_TOKENS, cpu_choices
from torch_nvfp4.demo import write_checkpoint
from torch_nvfp4.gate import Gate
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.quant_config import MoEQuantConfig
from torch_nvfp4.verify import covering_routing

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, LAYERS, LIMIT = 4, 64, 32, 2, 3, 7.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, num_hidden_layers=LAYERS, swiglu_limit=LIMIT,
    )  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line_error(result, command, *parts):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith(f"torch-nvfp4 {command}: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def stored(checkpoint):
    """Every tensor of the checkpoint, read without this package."""
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def dense(tensors, module):
    """An NVFP4 module in fp64, value by value from its leaves."""
    data, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"].to(torch.float64)
    codes = torch.stack((data & 15, data >> 4), -1).flatten(-2).long()
    values = torch.tensor(E2M1 + [-value for value in E2M1], dtype=torch.float64)[codes]
    return values * scale.repeat_interleave(16, -1) * tensors[f"{module}.weight_scale_2"].to(torch.float64)


def plain_layer(tensors, layer, x, topk_weights, topk_ids):
    """The layer in fp64 slot by slot, and the share of its pre-activations that the limit changes."""
    out = torch.zeros_like(x, dtype=torch.float64)
    changed = count = 0
    for token in range(x.shape[0]):
        for slot in range(topk_ids.shape[1]):
            w1, w3, w2 = (
                dense(tensors, f"layers.{layer}.ffn.experts.{int(topk_ids[token, slot])}.{name}")
                for name in ("w1", "w3", "w2")
            )
            gate, up = w1 @ x[token].double(), w3 @ x[token].double()
            changed += int((gate > LIMIT).sum() + (up.abs() > LIMIT).sum())
            count += 2 * INTERMEDIATE
            gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
            out[token] += float(topk_weights[token, slot]) * (w2 @ (gate / (1 + torch.exp(-gate)) * up))
    return out, changed / count


def test_info(monkeypatch):
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", "portable")
    result = run("info", "--json", "-")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["libraries"]["torch"].startswith(torch.__version__)
    assert facts["libraries"]["ops"].split(", ")[0].endswith("_C.so")
    assert facts["hardware"]["CPU instruction level"].startswith("portable, asked for by TORCH_NVFP4_CPU_LEVEL; ")
    assert f"torch uses {torch.get_num_threads()} threads" in facts["hardware"]["CPU"]
    on_cpu = {entry["backend"]: entry for entry in facts["backends"] if entry["device"] == "cpu"}
    assert list(on_cpu) == ["flashinfer_trtllm", "marlin", "cpu", "reference", "wgmma_fp8"]
    assert [entry["input_quant"] for entry in on_cpu.values()] == [None, None, None, None, "fp8"]
    assert on_cpu["wgmma_fp8"]["clamped"] == "expected a GPU of compute capability 9.0, got cpu"
    assert on_cpu["cpu"]["clamped"] is None
    assert on_cpu["cpu"]["unclamped"] is None
    assert on_cpu["marlin"]["clamped"] == "expected a cuda device, got cpu"


def test_info_as_a_table():
    result = run("info")
    assert result.exit_code == 0
    assert "usable" in result.stdout
    assert "expected a cuda device, got cpu" in result.stdout


def test_the_detected_level_can_run(monkeypatch):
    monkeypatch.delenv("TORCH_NVFP4_CPU_LEVEL", raising=False)
    level = json.loads(run("info", "--json", "-").stdout)["hardware"]["CPU instruction level"].split(",")[0]
    assert level in ("portable", "avx2", "avx512", "amx")
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", level)
    torch_nvfp4.swiglu(torch.randn(2, 8))
    higher = {"portable": "avx2", "avx2": "avx512", "avx512": "amx"}.get(level)
    if higher is not None:
        monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", higher)
        with pytest.raises(RuntimeError, match=f"at most {level}"):
            torch_nvfp4.swiglu(torch.randn(2, 8))


def test_inspect(checkpoint):
    result = run("inspect", checkpoint, "--device", "cpu", "--json", "-")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    tensors = stored(checkpoint)
    experts = {name: tensor for name, tensor in tensors.items() if ".ffn.experts." in name and "mtp." not in name}
    category = next(entry for entry in facts["categories"] if entry["name"] == "NVFP4 experts")
    assert category["modules"] == LAYERS * EXPERTS * 3
    assert category["tensors"] == LAYERS * EXPERTS * 3 * 4 == len(experts)
    assert category["nbytes"] == sum(tensor.nbytes for tensor in experts.values())
    assert category["nbytes"] == LAYERS * EXPERTS * 3 * (HIDDEN * INTERMEDIATE * 9 // 16 + 8)
    assert facts["nbytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert facts["layers"] == [0, 1, 2]
    assert facts["clamp_limits"] == {"0": LIMIT, "1": LIMIT, "2": LIMIT}
    assert facts["gates"] == [{"gate": "silu, clamp_limit 7", "layers": [0, 1, 2]}]
    assert (facts["num_experts"], facts["top_k"]) == (EXPERTS, TOP_K)
    assert (facts["hidden_size"], facts["intermediate_size"]) == (HIDDEN, INTERMEDIATE)
    assert facts["layout"] == "deepseek"
    assert facts["backend"] == "cpu"
    assert facts["asked_for"] is False
    assert facts["passed_over"]["marlin"] == "expected a cuda device, got cpu"


def test_inspect_as_a_table(checkpoint):
    result = run("inspect", checkpoint, "--device", "cpu", "--backend", "reference")
    assert result.exit_code == 0, result.output
    assert "silu, clamp_limit 7 (layers 0..2)" in result.stdout
    assert "3 (0..2): 4 experts, top-k 2, hidden 64, intermediate 32" in result.stdout
    assert "backend on cpu: reference (as asked for)" in result.stdout
    assert "not cpu: usable, but another one was asked for" in result.stdout


def test_inspect_without_experts(tmp_path):
    safetensors.torch.save_file({"embed.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    result = run("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    assert "no NVFP4 or MXFP4 experts: no backend is needed" in result.stdout
    assert_one_line_error(
        run("verify", tmp_path), "verify", "expected a checkpoint with NVFP4 or MXFP4 experts, got none"
    )
    assert_one_line_error(
        run("demo", "--checkpoint", tmp_path), "demo", "expected a checkpoint with NVFP4 or MXFP4 experts"
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_verify_reports_the_true_error(checkpoint, tmp_path, name, dtype):
    file = tmp_path / "checks.json"
    arguments = ("--device", "cpu", "--tokens", "5", "--seed", "3", "--dtype", name, "--layer", "1", "--json", file)
    result = run("verify", checkpoint, *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    (check,) = report["layers"]

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, HIDDEN, generator=generator).to(dtype)
    topk_weights, topk_ids = covering_routing(5, EXPERTS, TOP_K, generator=generator)
    expected, clamped = plain_layer(stored(checkpoint), 1, x, topk_weights, topk_ids)
    experts = NVFP4Experts.from_checkpoint(checkpoint, 1)
    out = experts(x, topk_weights, topk_ids).double()
    assert check["relative_l2"] == pytest.approx(float((out - expected).norm() / expected.norm()), rel=1e-6)
    assert check["clamped_share"] == pytest.approx(clamped)
    assert clamped > 0.1
    assert check["experts_hit"] == len(set(topk_ids.flatten().tolist())) == EXPERTS
    assert check["experts_unchecked"] == []
    assert check["tolerance"] == {"bf16": 4e-3, "fp16": 5e-4, "fp32": 1e-5}[name]
    assert check["backend"] == "cpu"
    assert check["passed"] is report["passed"] is True
    assert f"{clamped:.1%}" in result.stdout
    assert "verify passed: 1 layer within" in result.stdout


def test_verify_all_layers(checkpoint):
    result = run("verify", checkpoint, "--device", "cpu", "--json", "-")
    assert result.exit_code == 0, result.output
    assert [check["layer"] for check in json.loads(result.stdout)["layers"]] == [0, 1, 2]


def test_verify_of_a_layer_named_twice(checkpoint):
    layers = ("--layer", "2", "--layer", "0", "--layer", "2")
    result = run("verify", checkpoint, "--device", "cpu", *layers, "--json", "-")
    assert [check["layer"] for check in json.loads(result.stdout)["layers"]] == [2, 0]
    assert "verify passed: 2 layers within" in run("verify", checkpoint, "--device", "cpu", *layers).stdout


def test_verify_sees_a_dropped_clamp(checkpoint, monkeypatch):
    # On the way to the kernel only: the reference that verify compares with keeps the limit.
    from_checkpoint = NVFP4Experts.from_checkpoint

    def without_clamp(*args, **kwargs):
        experts = from_checkpoint(*args, **kwargs)
        experts.quant_config = MoEQuantConfig(Gate(experts.quant_config.activation))
        return experts

    monkeypatch.setattr(NVFP4Experts, "from_checkpoint", without_clamp)
    result = run("verify", checkpoint, "--device", "cpu", "--layer", "2", "--json", "-")
    assert result.exit_code == 1
    (check,) = json.loads(result.stdout)["layers"]
    assert check["relative_l2"] > 0.1
    assert check["passed"] is False
    assert (
        "1 of 1 layer failed: 2; layer 2: expected an error of at most 0.004, got a relative error of " in result.stderr
    )


def test_verify_sees_nan(checkpoint, monkeypatch):
    forward = NVFP4Experts.forward

    def with_nan(*arguments):
        out = forward(*arguments)
        out[0, 0] = math.nan
        return out

    monkeypatch.setattr(NVFP4Experts, "forward", with_nan)
    result = run("verify", checkpoint, "--device", "cpu", "--layer", "0", "--json", "-")
    assert result.exit_code == 1
    (check,) = json.loads(result.stdout)["layers"]
    assert check["relative_l2"] is None


def test_demo(checkpoint, tmp_path, monkeypatch):
    """What `make demo` does, with a tiny checkpoint and without Inductor's compiler."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend="aot_eager", **options))
    monkeypatch.setattr(demo, "write_checkpoint", lambda path: shutil.copytree(checkpoint, path))
    monkeypatch.setattr(demo, "DEMO_TOKENS", (5,))
    file = tmp_path / "demo.json"
    result = run("demo", "--device", "cpu", "--layers", "2", "--keep", tmp_path / "kept", "--json", file)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "kept" / "config.json").exists()
    report = json.loads(file.read_text())
    assert report["checkpoint"]["backend"] == "cpu"
    rows = {(row["tokens"], row["mode"]): row for row in report["rows"]}
    assert set(rows) == {(5, "eager"), (5, "compiled")}
    for (tokens, mode), row in rows.items():
        assert 0 < row["relative_l2"] <= 4e-3
        assert 0.1 < row["clamped_share"] < 0.9
        assert row["seconds"] > 0
        hit = len(set(next(bench.cases(bench.Shape(4, 64, 32, 2), tokens)).topk_ids.flatten().tolist()))
        assert row["touched_bytes"] == hit * (3 * HIDDEN * INTERMEDIATE * 9 // 16 + 12), mode
    assert "demo passed: 2 layers, eager and compiled, within 0.004 of fp64" in result.stdout
    if importlib.util.find_spec("transformers") is None:
        assert "pip install 'torch-nvfp4[transformers]', and demo does that too" in result.stdout
        assert "pip install" in report["generation"]
    else:
        generation = report["generation"]
        assert len(generation["tokens"]) == 24
        assert len(set(generation["tokens"])) > 4
        assert 0 < generation["mean_kl"] <= 0.1
        assert f"transformers {generation['transformers']} generated 24 tokens on the packed weights" in result.stdout


def test_demo_shows_no_share_where_nothing_clamps(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(demo, "DEMO_TOKENS", (5,))
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    path = write_checkpoint(tmp_path / "nemotron", num_hidden_layers=1, layout="nemotron", **sizes)
    result = run("demo", "--device", "cpu", "--checkpoint", path, "--json", tmp_path / "demo.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [row["clamped_share"] for row in rows] == [None, None]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[3] for line in lines if line[:2] in (["5", "eager"], ["5", "compiled"])] == ["-", "-"]


def test_demo_of_layers_that_differ(tmp_path, monkeypatch):
    """In their number of experts; and the baseline that is timed applies the router's weight where the layers do."""
    path = write_checkpoint(
        tmp_path / "checkpoint", hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, n_routed_experts=[32, 2],
        num_experts_per_tok=1, num_hidden_layers=2, swiglu_limit=LIMIT,
    )  # fmt: skip
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"apply_router_weight_on_input": True}))
    baseline, on_input = bench.dequantize_then_matmul, []

    def recorded(*args, **kwargs):
        on_input.append(kwargs["apply_router_weight_on_input"])
        return baseline(*args, **kwargs)

    monkeypatch.setattr(bench, "dequantize_then_matmul", recorded)
    monkeypatch.setattr(demo, "DEMO_TOKENS", (1, 16))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    result = run("demo", "--checkpoint", path, "--device", "cpu", "--json", "-")
    assert result.exit_code == 0, result.output
    assert on_input == [True] * 8  # two layers, timed twice at each number of tokens
    for row in json.loads(result.stdout)["rows"]:
        assert 0 < row["relative_l2"] <= 4e-3
        hit = sum(
            next(bench.cases(bench.Shape(experts, HIDDEN, INTERMEDIATE, 1), row["tokens"])).topk_ids.unique().numel()
            for experts in (32, 2)
        )
        assert row["touched_bytes"] == hit * (3 * HIDDEN * INTERMEDIATE * 9 // 16 + 12) // 2


@pytest.mark.parametrize("layout", get_args(LayoutName))
def test_demo_of_every_layout(layout, tmp_path, monkeypatch):
    """Also of experts without a gate, with biases, and with Kimi-K3's gate."""
    path = synthetic.write_checkpoint(
        tmp_path, layout=layout, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, n_routed_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, swiglu_limit=LIMIT,
    )  # fmt: skip
    monkeypatch.setattr(demo, "DEMO_TOKENS", (5,))
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend="aot_eager", **options))
    result = run("demo", "--checkpoint", path, "--device", "cpu", "--json", tmp_path / "demo.json")
    assert result.exit_code == 0, result.output
    for row in json.loads((tmp_path / "demo.json").read_text())["rows"]:
        assert 0 < row["relative_l2"] <= 4e-3
    assert "demo passed: 2 layers, eager and compiled, within 0.004 of fp64" in result.stdout


def test_demo_fails_when_a_layer_is_wrong(checkpoint, monkeypatch):
    monkeypatch.setattr(demo, "DEMO_TOKENS", (2,))
    monkeypatch.setattr(demo, "TOLERANCE", {torch.bfloat16: 1e-9})
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    result = run("demo", "--checkpoint", checkpoint, "--device", "cpu", "--layers", "1")
    assert result.exit_code == 1
    assert "the largest error of a layer: expected at most 1e-09, got " in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_errors_of_the_checkpoint(command, checkpoint, tmp_path):
    missing = tmp_path / "nowhere"
    assert_one_line_error(
        run(command, missing), command, f"{missing}: expected a checkpoint directory, got no such path"
    )
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_one_line_error(run(command, broken), command, str(shard))


def test_errors_of_the_request(checkpoint):
    assert_one_line_error(
        run("inspect", checkpoint, "--device", "cpu", "--backend", "marlin"), "inspect",
        "backend='marlin' cannot run this MoE layer", "expected a cuda device, got cpu",
    )  # fmt: skip
    assert_one_line_error(run("verify", checkpoint, "--layer", "9"), "verify", "NVFP4 or MXFP4 experts (0..2), got 9")
    assert_one_line_error(run("verify", checkpoint, "--dtype", "int4"), "verify", "--dtype: expected one of bf16, fp16")
    assert_one_line_error(
        run("verify", checkpoint, "--device", "cpu", "--input-quant", "fp8"), "verify",
        "--input-quant fp8: expected a GPU of compute capability 9.0, got cpu; leave the option out",
    )  # fmt: skip
    assert_one_line_error(
        run("verify", checkpoint, "--input-quant", "int8"), "verify", "--input-quant: expected fp8, got 'int8'"
    )
    assert_one_line_error(run("verify", checkpoint, "--device", "tpu"), "verify", "--device: expected cpu, cuda or")
    assert_one_line_error(run("inspect", checkpoint, "--device", "cuda:99"), "inspect", "--device: expected one of")
    assert_one_line_error(
        run("demo", "--checkpoint", checkpoint, "--keep", checkpoint),
        "demo",
        "expected --checkpoint or --keep, got both",
    )


@pytest.mark.parametrize("arguments", [["bench", "--shape", "4,64,32,2", "--peer", "none"], ["verify"]])
def test_an_unknown_cpu_level(checkpoint, monkeypatch, arguments):
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", "avx1024")
    result = run(*arguments, *([checkpoint] if arguments[0] == "verify" else []), "--device", "cpu")
    assert_one_line_error(result, arguments[0], "TORCH_NVFP4_CPU_LEVEL: expected one of", "got 'avx1024'")


@pytest.mark.parametrize("command", ["info", "inspect", "verify", "quantize", "bench", "demo", "generate", "serve"])
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"torch-nvfp4 {command}" in result.stdout


def test_every_option_names_its_flag():
    """Some releases of typer take a metavar that spells the parameter's name as the flag: ``--DEVICE``."""
    unnamed = [
        f"{command.callback.__module__}: {name}"
        for command in app.registered_commands
        for name, hint in get_type_hints(command.callback, include_extras=True).items()
        for option in getattr(hint, "__metadata__", ())
        # Inside Annotated the first flag is what typer calls the default.
        if isinstance(option, OptionInfo) and not str(option.default).startswith("--")
    ]
    assert unnamed == []


def test_as_a_module(checkpoint):
    done = subprocess.run(
        [sys.executable, "-m", "torch_nvfp4", "inspect", str(checkpoint / "config.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "expected a checkpoint directory, got a file" in done.stderr


def test_select_on_the_cpu(monkeypatch):
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", "portable")
    arguments = ("info", "--device", "cpu", "--shape", "16,64,32,2", "--select", "1,64,65", "--json", "-")
    facts = json.loads(run(*arguments).stdout)
    assert facts["level"] == "portable"
    assert [choice["per_expert"] for choice in facts["choices"]] == [[1, 1], [8, 8], [8, 9]]
    assert {choice["arithmetic"] for choice in facts["choices"]} == {"fp32"}
    shape = bench.Shape(16, 64, 32, 2)
    few, mixed, many = cpu_choices(shape, [64, 65, 72], torch.bfloat16, "avx512")
    assert few.path == "codes decoded straight into registers"
    assert many.path.startswith("blocks of 64 columns decoded into L1")
    assert mixed.path == f"{few.path}; {many.path}"
    few, mixed, many = cpu_choices(shape, [32, 33, 9000], torch.bfloat16, "amx")
    assert (few.arithmetic, mixed.arithmetic, many.arithmetic) == ("int16", "int16; bf16", "bf16")
    assert many.path.endswith(f"up to {AMX_TOKENS} tokens at a time")
    assert cpu_choices(shape, [64], torch.float32, "amx") == cpu_choices(shape, [64], torch.float32, "avx512")
    assert cpu_choices(shape, [1], torch.float32, "avx2")[0].path.startswith("blocks")
    assert_one_line_error(run("info", "--shape", "cpu"), "info", "--shape: expected --select beside it")


@pytest.mark.parametrize(
    ("device", "kernels"),
    [
        ("h100", ["few_slots_mlp (bulk copies, mma.sync)", "stream_gemm (bulk copies, mma.sync)", "wgmma_experts"]),
        ("A100", ["few_slots_mlp (cp.async, mma.sync)", "stream_gemm (cp.async, mma.sync)", "stream_gemm (cp.async"]),
    ],
)
def test_select_on_a_gpu_that_is_not_here(device, kernels):
    arguments = ("info", "--device", device, "--shape", "256,4096,2048,6", "--select", "1,64,4096")
    choices = json.loads(run(*arguments, "--json", "-").stdout)["choices"]
    assert [choice["M"] for choice in choices] == ["1", "64", "4096"]
    assert all(choice["kernel"].startswith(kernel) for choice, kernel in zip(choices, kernels, strict=True))
    assert all(choice["why"] for choice in choices)
    table = run(*arguments).stdout
    assert all(choice["kernel"] in table for choice in choices)
    assert_one_line_error(run("info", "--device", "h9000", "--select", "1"), "info", "--device: expected")


def test_select_knows_the_numbers_of_the_kernels():
    folder = Path(__file__).parent.parent / "csrc" / "cpu"
    levels = folder / "levels"
    for level, tokens in FEW_TOKENS.items():
        assert f"constexpr int kFewTokens = {tokens};" in (levels / f"{level}.cpp").read_text()
    assert f"constexpr int kMaxTileTokens = {TILE_TOKENS};" in (folder / "level_kernels.h").read_text()
    assert f"constexpr int kMostTokens = {AMX_TOKENS};" in (levels / "amx.cpp").read_text()
    assert "kFewTokens" not in (levels / "portable.cpp").read_text()
