"""The benchmark of transformers on tiny models: what it writes, what it decodes with, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.fp64_loop import dense as fp64_dense
from helpers.hf_models import greedy
from torch_nvfp4.bench.transformers import __main__ as command
from torch_nvfp4.bench.transformers import deepseek
from torch_nvfp4.bench.transformers.report import time_table
from torch_nvfp4.bench.vllm import model as qwen3
from torch_nvfp4.checkpoint import open_checkpoint
from torch_nvfp4.format import dequantize
from torch_nvfp4.testing import TOLERANCE

pytest.importorskip("transformers", minversion="5.23")

from torch_nvfp4.bench.transformers import loading, timing, values
from torch_nvfp4.bench.transformers.dense import write_dense

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["dsv4", "qwen3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = {"dsv4": deepseek, "qwen3": qwen3}[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    return module.write_model(directory / "model", module.TINY, device=CPU)


def test_a_failure_frees_the_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, vocab: int) -> None:
        assert (path / "complete.json").is_file()
        raise MemoryError("out of memory")

    monkeypatch.setattr(command, "write_tokenizer", fail)
    monkeypatch.setattr(command, "_directory", lambda asked, *_: asked or tmp_path / "default")
    for arguments, left in (([], []), (["--dir", str(tmp_path / "named")], ["model"])):
        with pytest.raises(MemoryError):
            command.main(["qwen3", "--tiny", "--layers", "1", *arguments])
        directory = tmp_path / ("named" if arguments else "default")
        assert [path.name for path in directory.iterdir()] == left


def test_deepseek_is_a_checkpoint_that_clamps_as_meant(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(deepseek.write_model(tmp_path, deepseek.TINY, device=CPU))
    assert (checkpoint.layers, checkpoint.num_experts, checkpoint.top_k) == ((0, 1, 2), 8, 2)
    assert [checkpoint.clamp_limit(layer) for layer in checkpoint.layers] == [10.0] * 3
    w13, w2 = checkpoint.experts(1)
    # Rows of gate and up enlarge a normalised input to half the limit; down takes that back, and is a third's branch.
    assert dequantize(w13).norm(dim=-1).mean() == pytest.approx(5.0, rel=0.05)
    assert dequantize(w2).norm(dim=-1).mean() == pytest.approx(0.5 / 3**0.5 / 17, rel=0.05)


def test_the_copy_in_bf16_has_the_values(path: Path, tmp_path: Path) -> None:
    write_dense(tmp_path, path, device=CPU, progress=lambda _: None)
    source = {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
    copy = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    packed = {name for name in copy if name + "_scale_2" in source}
    fp8 = {name for name in copy if source[name].dtype == torch.float8_e4m3fn}
    assert len(packed) == 3 * 8 * len({name.split("layers.")[1].split(".")[0] for name in packed})
    for name, value in copy.items():
        expected = source[name]
        if name in packed:
            expected = fp64_dense(expected, source[f"{name}_scale"], float(source[f"{name}_scale_2"].double()))
        elif name in fp8:
            scale = source[name.removesuffix("weight") + "scale"].double()
            blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            expected = expected.double() * blocks[: expected.shape[0], : expected.shape[1]]
        # fp32 before bf16, so a product just beside the middle of two may go either way.
        torch.testing.assert_close(value.double(), expected.double(), rtol=2**-8 * 1.001, atol=0)
        if name not in packed:
            assert torch.equal(value.double(), expected.double()), name


@pytest.mark.parametrize(("name", "graphs"), [("dsv4", 3), ("qwen3", 1)])
def test_compiled_steps_give_the_tokens_of_generate(name: str, graphs: int, tmp_path: Path) -> None:
    """With one graph for a whole step, or one before and two (by router) after a layer's attention."""
    module = {"dsv4": deepseek, "qwen3": qwen3}[name]
    model, _ = loading.load(module.write_model(tmp_path, module.TINY, device=CPU), packed=True, device=CPU)
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = greedy(model, ids, 10)
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    decoder = timing.decoder(model, 40, backend=backend)
    for _ in range(2):  # the second time with the caches of the first
        assert torch.equal(timing.tokens(decoder, ids, 9), expected)
    assert len(compiled) == graphs
    torch.compiler.reset()


def test_the_reference_sees_a_model_that_is_another(path: Path) -> None:
    """A model with one expert's weights changed is farther from it than one that is right."""
    model, _ = loading.load(path, packed=True, device=CPU)
    experts = values.expert_modules(model)
    reference = values.reference_model(path, model.state_dict(), experts, device=CPU)
    ids = torch.randint(3, 500, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    errors = values.expert_errors({"packed": model}, model, reference, ids, tuple(experts))
    assert max(error["packed"] for error in errors.values()) < TOLERANCE[torch.bfloat16]
    right = values.compare({"packed": model}, reference, [ids])["packed"]["mean_kl"]
    for name in experts:
        packed = model.get_submodule(name).packed
        w13, w2 = packed.unpacked_weights()
        swapped = w13._replace(data=torch.cat(w13.data.chunk(2, 1)[::-1], 1))
        model.get_submodule(name).packed = type(packed).from_weights(swapped, w2, quant_config=packed.quant_config)
    wrong = values.compare({"packed": model}, reference, [ids])["packed"]["mean_kl"]
    assert wrong > 20 * right


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    arguments = ["dsv4", "--tiny", "--device", "cpu", "--dir", str(tmp_path), "--compile-backend", "eager"]
    assert command.main([*arguments, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert list(result["loads"]) == ["bf16", "packed"]
    assert result["loads"]["bf16"]["file_bytes"] > 2 * result["loads"]["packed"]["file_bytes"]
    assert result["loads"]["packed"]["host_peak"] > 0
    assert result["scores"]["packed"]["mean_kl"] < 1e-3
    assert all(sides["packed"] < sides["bf16"] for sides in result["expert_errors"].values())
    sizes = [(row["kind"], row["size"]) for row in result["rows"]]
    assert sizes == [("block", "1"), ("block", "8"), ("prefill", "1 x 24"), ("decode", "2")]
    assert all(row["packed"] > 0 and row["bf16"] > 0 for row in result["rows"])
    printed = capsys.readouterr().out
    assert "relative L2 error of the experts against fp32" in printed
    assert "decode step, batch 2" in printed


def test_the_table() -> None:
    rows = [
        {"kind": "prefill", "size": "4 x 2048", "packed": 0.02, "bf16": 0.03},
        {"kind": "decode", "size": "16", "packed": 0.004},
    ]
    _, prefill, decode = (line.split()[-5:] for line in time_table(rows).splitlines())
    assert prefill == ["20.00", "30.00", "1.50", "409600.0", "273066.7"]
    assert decode == ["4.000", "-", "-", "4000.0", "-"]
