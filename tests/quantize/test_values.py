"""What torch-nvfp4 quantize writes, value by value, against numpy and files of the packages themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import dense_checkpoint as source
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.convert import LayerError, open_conversion
from torch_nvfp4.convert.source import TensorFiles
from torch_nvfp4.format import dequantize

GOLDEN = load_file(Path(__file__).parent.parent / "data" / "quantize_golden.safetensors")
LEAVES = {
    "modelopt": (".weight", ".weight_scale", ".weight_scale_2"),
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_global_scale"),
}


def convert(path: Path, destination: Path, threads: int = 1, **options: object) -> list[LayerError]:
    conversion = open_conversion(path, destination, **options)  # type: ignore[arg-type]
    try:
        conversion.write(threads)
        errors = conversion.compare(threads)
        conversion.finish()
    finally:
        conversion.close()
    return errors


def load(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_matrix(tensors: dict[str, Tensor], layout: str, module: str, expected: tuple, global_scale: float) -> None:
    codes, scale, stored = (tensors[module + leaf] for leaf in LEAVES[layout])
    np.testing.assert_array_equal(codes.numpy(), expected[0], module)
    np.testing.assert_array_equal(scale.view(torch.uint8).numpy(), expected[1], module)
    assert (stored.dtype, stored.shape) == (torch.float32, () if layout == "modelopt" else (1,))
    wanted = global_scale if layout == "modelopt" else 1 / np.float64(global_scale)
    np.testing.assert_allclose(stored.item(), wanted, rtol=0 if layout == "modelopt" else 2e-7)


def sources() -> dict[str, tuple[dict[str, Tensor], source.Dense, dict]]:
    """Name -> (tensors, what the experts mean, config)."""
    dense = source.experts()
    half, single = source.experts(torch.float16), source.experts(torch.float32)
    blocks = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [source.BLOCK, source.BLOCK]}}
    fp8, meant = source.to_fp8(source.per_expert(dense), ".experts.")
    fp8_dense = {key: meant[name] for key, name in zip(dense, source.per_expert(dense), strict=True)}
    fp8_stack, meant_stack = source.to_fp8(source.stacks(dense), ".experts.")
    return {
        "bf16": (source.per_expert(dense), dense, {}),
        "fp16": (source.per_expert(half), half, {}),
        "fp32": (source.per_expert(single), single, {}),
        "fp8": (fp8, fp8_dense, blocks),
        "stacks": (source.stacks(dense), dense, {}),
        "separate stacks": (source.stacks(dense, fused=False), dense, {}),
        "swapped stacks": (source.stacks(dense, swapped=True), dense, {}),
        "separate swapped stacks": (source.stacks(dense, swapped=True, fused=False), dense, {}),
        "fp8 stacks": (fp8_stack, split_stacks(meant_stack), blocks),
    }


def split_stacks(stacks: dict[str, Tensor]) -> source.Dense:
    result: source.Dense = {}
    for layer in range(source.LAYERS):
        both, down = (stacks[source.ROOT.format(layer) + name] for name in ("gate_up_proj", "down_proj"))
        for expert in range(source.EXPERTS):
            result[layer, expert, "gate"], result[layer, expert, "up"] = both[expert].chunk(2)
            result[layer, expert, "down"] = down[expert]
    return result


SOURCES = sources()


@pytest.mark.parametrize("layout", LEAVES)
@pytest.mark.parametrize("kind", SOURCES)
def test_every_value(tmp_path: Path, kind: str, layout: str) -> None:
    tensors, dense, config = SOURCES[kind]
    rest = source.others()
    path = source.write(tmp_path / "source", tensors | rest, source.CONFIG | config)
    errors = convert(path, tmp_path / "result", layout=layout)
    written = load(tmp_path / "result")
    for layer in range(source.LAYERS):
        for expert in range(source.EXPERTS):
            for roles in (("gate", "up"), ("down",)):
                global_scale, expected = source.oracle([dense[layer, expert, role] for role in roles])
                for role, matrix in zip(roles, expected, strict=True):
                    module = f"{source.ROOT.format(layer)}{expert}.{source.NAMES[role]}"
                    assert_matrix(written, layout, module, matrix, global_scale)
    for name, tensor in rest.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    assert len(written) == len(rest) + 3 * len(dense)
    assert [error.label for error in errors] == ["layer 0", "layer 1"]
    assert all(error.problem is None and 0.05 < error.relative_l2 < 0.15 for error in errors)
    assert errors[0].matrices == 3 * source.EXPERTS


def test_the_reader_reads_what_was_meant(tmp_path: Path) -> None:
    tensors, dense, _ = SOURCES["bf16"]
    path = source.write(tmp_path / "source", tensors | source.others())
    for layout in LEAVES:
        errors = convert(path, tmp_path / layout, layout=layout)
        checkpoint = Checkpoint.open(tmp_path / layout)
        assert (checkpoint.layout, checkpoint.layers, checkpoint.linears) == (layout, (0, 1), ())
        assert checkpoint.refusals() == ()
        worst = 0.0
        for layer in checkpoint.layers:
            w13, w2 = (dequantize(weight, torch.float64) for weight in checkpoint.experts(layer))
            for expert in range(source.EXPERTS):
                got = dict(zip(("gate", "up"), w13[expert].chunk(2), strict=True)) | {"down": w2[expert]}
                for role, values in got.items():
                    expected = dense[layer, expert, role].double()
                    worst = max(worst, float((values - expected).norm() / expected.norm().clamp(min=1e-30)))
        assert max(error.relative_l2 for error in errors) == pytest.approx(worst, rel=1e-4)


@pytest.mark.parametrize("layout", LEAVES)
def test_the_packages_own_bits(tmp_path: Path, layout: str) -> None:
    """The same bytes as in files of ModelOpt and compressed-tensors, so that their own code makes the same of them."""
    config = source.CONFIG | {
        "num_hidden_layers": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
    }
    dense = {(0, 0, role): GOLDEN[role] for role in ("gate", "up", "down")}
    path = source.write(tmp_path / "source", source.per_expert(dense) | source.others(1), config)
    convert(path, tmp_path / "result", layout=layout)
    written = load(tmp_path / "result")
    for role, name in source.NAMES.items():
        for leaf in LEAVES[layout]:
            got = written[f"{source.ROOT.format(0)}0.{name}{leaf}"]
            expected = GOLDEN[f"{layout}.{role}{leaf}"]
            assert got.dtype == expected.dtype
            assert torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), (role, leaf)
        codes, scale, stored = (written[f"{source.ROOT.format(0)}0.{name}{leaf}"] for leaf in LEAVES[layout])
        # Both multiply a code with the product or quotient of the scales in fp32; compressed-tensors rounds to bf16.
        step = scale.float() * stored if layout == "modelopt" else scale.float() / stored
        values = torch.tensor([*source.E2M1, *-source.E2M1], dtype=torch.float32)
        pairs = torch.stack((values[(codes & 15).int()], values[(codes >> 4).int()]), -1).flatten(-2)
        result = (pairs.unflatten(-1, (-1, 16)) * step.unsqueeze(-1)).flatten(-2)
        expected = GOLDEN[f"{layout}.{role}.dequantized"]
        assert torch.equal(result.to(expected.dtype), expected), role


def test_other_fp8_weights_become_bf16(tmp_path: Path) -> None:
    dense = source.experts()
    stored, meant = source.to_fp8(source.per_expert(dense) | source.others(), "_proj.weight")
    config = {"quant_method": "fp8", "weight_block_size": [source.BLOCK, source.BLOCK]}
    path = source.write(tmp_path / "source", stored, source.CONFIG | {"quantization_config": config})
    convert(path, tmp_path / "result")
    written = load(tmp_path / "result")
    assert not [name for name in written if name.endswith("_scale_inv")]
    attention = [name for name in meant if "self_attn" in name]
    assert len(attention) == 4 * source.LAYERS
    for name in attention:
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], meant[name].bfloat16())


def test_globs(tmp_path: Path) -> None:
    path = source.write(tmp_path / "source", source.per_expert(source.experts()) | source.others())
    options = {"include": ["*.experts.*", "*.self_attn.*"], "exclude": ["model.layers.1.mlp.*", "*.o_proj"]}
    for layout in LEAVES:
        convert(path, tmp_path / layout, layout=layout, **options)
    checkpoint = Checkpoint.open(tmp_path / "modelopt")
    assert checkpoint.layers == (0,)
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkv"]
    assert sorted(checkpoint.linears) == sorted(names)
    written, rest = load(tmp_path / "modelopt"), source.others()
    for layer in range(source.LAYERS):
        modules = [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkv"]
        global_scale, expected = source.oracle([rest[f"{module}.weight"] for module in modules])
        for module, matrix in zip(modules, expected, strict=True):
            assert_matrix(written, "modelopt", module, matrix, global_scale)
    left = {"lm_head", "model.embed_tokens"} | {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("mlp.gate", "self_attn.o_proj")
    }
    config = json.loads((tmp_path / "modelopt" / "config.json").read_text())
    assert set(config["quantization_config"]["ignore"]) == left | {"model.layers.1.mlp.experts*"}
    assert config["quantization_config"]["quant_algo"] == "W4A16_NVFP4"
    separate = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())["quantization"]
    assert separate["exclude_modules"] == config["quantization_config"]["ignore"]
    config = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())
    assert set(config["quantization_config"]["ignore"]) == left | {r"re:model\.layers\.1\.mlp\.experts\..*"}
    assert not (tmp_path / "compressed-tensors" / "hf_quant_config.json").exists()


def test_the_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    tensors, _, config = SOURCES["fp8"]
    path = source.write(tmp_path / "source", tensors | source.others(), source.CONFIG | config)
    results = []
    for threads in (1, 2, 7):
        convert(path, tmp_path / f"{threads}", threads)
        results.append(source.contents(tmp_path / f"{threads}"))
    assert results[0] == results[1] == results[2]
    assert "assets/chat.jinja" in results[0]
    assert "tokenizer.json" in results[0]
    assert not [name for name in results[0] if "journal" in name or "partial" in name or name.endswith(".bin")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_defaults_change_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    path = source.write(tmp_path / "source", source.per_expert(source.experts()) | source.others())
    for layout in LEAVES:
        convert(path, tmp_path / layout, layout=layout)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            for layout in LEAVES:
                convert(path, tmp_path / f"{layout} again", layout=layout)
    finally:
        torch.set_default_dtype(torch.float32)
    for layout in LEAVES:
        assert source.contents(tmp_path / f"{layout} again") == source.contents(tmp_path / layout)


def test_a_stack_is_never_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source.write(tmp_path / "source", source.stacks(source.experts()) | source.others())
    read, largest = TensorFiles.read, [0]

    def noting(self: TensorFiles, info: object, begin: int, nbytes: int) -> Tensor:
        largest[0] = max(largest[0], nbytes)
        return read(self, info, begin, nbytes)  # type: ignore[arg-type]

    monkeypatch.setattr(TensorFiles, "read", noting)
    convert(path, tmp_path / "result")
    assert largest[0] == 2 * source.HIDDEN * source.HIDDEN  # a projection of attention
