"""The checkpoint reader: every layout against hand-spelled files, slices, what is read, and every error."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torch_nvfp4.checkpoint import weights as weights_module
from torch_nvfp4.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from torch_nvfp4.demo import write_checkpoint
from torch_nvfp4.format import dequantize
from torch_nvfp4.gate import Gate

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 64, 96, 4, 2
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

# Each layout's names, spelled out: module of an expert's gate, up, down, and the four leaves.
SPELLINGS = {
    "deepseek": ("layers.{}.ffn.experts.{}.", ("w1", "w3", "w2"), "modelopt"),
    "modelopt": ("model.layers.{}.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj"), "modelopt"),
    "nested": ("language_model.model.layers.{}.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj"), "modelopt"),
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.", ("w1", "w3", "w2"), "modelopt"),
    "compressed": ("model.layers.{}.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj"), "compressed"),
}
LAYOUT_NAMES = {"nested": "modelopt", "mixtral": "modelopt", "compressed": "compressed-tensors"}
CONFIG = {
    "model_type": "deepseek_v4",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTERMEDIATE,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "swiglu_limit": 7.0,
}


def random_codes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def random_leaves(generator: torch.Generator, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, E4M3 scales of either sign without NaN, and a 0-d global scale that is a power of two times 1.5."""
    scale = random_codes(generator, rows, cols // 16)
    scale[(scale & 0x7F) == 0x7F] = 0x38
    exponent = torch.randint(-13, -9, (), generator=generator)
    return random_codes(generator, rows, cols // 2), scale.view(torch.float8_e4m3fn), 1.5 * torch.exp2(exponent.float())


def leaves_of(kind: str, module: str, codes: Tensor, scale: Tensor, global_scale: Tensor) -> dict[str, Tensor]:
    if kind == "modelopt":
        return {
            f"{module}.weight": codes,
            f"{module}.weight_scale": scale,
            f"{module}.weight_scale_2": global_scale,
            f"{module}.input_scale": torch.tensor(0.25),
        }
    return {
        f"{module}.weight_packed": codes,
        f"{module}.weight_scale": scale,
        f"{module}.weight_global_scale": (1.0 / global_scale).reshape(1),
        f"{module}.input_global_scale": torch.tensor([4.0]),
    }


Weights = dict[tuple[int, int, str], tuple[Tensor, Tensor, Tensor]]


def make_tensors(spelling: str = "deepseek") -> tuple[dict[str, Tensor], Weights]:
    """Every tensor of a small checkpoint, and (layer, expert, gate/up/down) -> the three leaves."""
    generator = torch.Generator().manual_seed(1)
    module, names, kind = SPELLINGS[spelling]
    tensors: dict[str, Tensor] = {}
    weights: Weights = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
            for role, name, (rows, cols) in zip(("gate", "up", "down"), names, shapes, strict=True):
                leaves = random_leaves(generator, rows, cols)
                weights[layer, expert, role] = leaves
                tensors |= leaves_of(kind, module.format(layer, expert) + name, *leaves)
        tensors[f"layers.{layer}.attn_norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return tensors, weights


def write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """Two shards, the second with the names of layer 1, an index and config.json."""
    path.mkdir(exist_ok=True)
    second = {name: tensor for name, tensor in tensors.items() if "layers.1." in name}
    first = {name: tensor for name, tensor in tensors.items() if name not in second}
    save_file(first, path / SHARD_1)
    save_file(second, path / SHARD_2)
    weight_map = dict.fromkeys(first, SHARD_1) | dict.fromkeys(second, SHARD_2)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("original"), make_tensors()[0])


@pytest.fixture
def damaged(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def write_changed(path: Path, change: Callable[[dict[str, Tensor]], object], spelling: str = "deepseek") -> Path:
    tensors, _ = make_tensors(spelling)
    change(tensors)
    return write(path, tensors)


def raises(*parts: object) -> Any:
    """A CheckpointError whose text has the parts in this order."""
    return pytest.raises(CheckpointError, match=r"[\s\S]*".join(re.escape(str(part)) for part in parts))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits (E4M3 has no comparison on the CPU)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype == torch.float8_e4m3fn:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_experts_of_every_layout(spelling: str, tmp_path: Path) -> None:
    tensors, weights = make_tensors(spelling)
    checkpoint = Checkpoint.open(write(tmp_path, tensors))
    assert checkpoint.layout == LAYOUT_NAMES.get(spelling, spelling)
    assert checkpoint.layers == (0, 1)
    assert checkpoint.linears == ()
    for layer in range(LAYERS):
        w13, w2 = checkpoint.experts(layer)
        assert w13.data.shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2)
        assert w13.global_scale.shape == (EXPERTS, 2)
        assert w2.data.shape == (EXPERTS, HIDDEN, INTERMEDIATE // 2)
        assert w2.global_scale.shape == (EXPERTS,)
        for expert in range(EXPERTS):
            gate, up, down = (weights[layer, expert, role] for role in ("gate", "up", "down"))
            assert_equal(w13.data[expert, :INTERMEDIATE], gate[0])
            assert_equal(w13.data[expert, INTERMEDIATE:], up[0])
            assert_equal(w13.scale[expert, :INTERMEDIATE], gate[1])
            assert_equal(w13.scale[expert, INTERMEDIATE:], up[1])
            assert_equal(w2.data[expert], down[0])
            assert_equal(w2.scale[expert], down[1])
            # 1 / (1 / (1.5 * 2^n)) is off by a rounding.
            rtol = 2.0**-23 if spelling == "compressed" else 0.0
            expected = torch.stack((gate[2], up[2], down[2]))
            actual = torch.stack((*w13.global_scale[expert], w2.global_scale[expert]))
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("layout", ["deepseek", "modelopt", "compressed-tensors"])
def test_demo_checkpoint(layout: Any, tmp_path: Path) -> None:
    """What write_checkpoint writes is what its layout says, and the reader finds it."""
    write_checkpoint(
        tmp_path,
        hidden_size=128,
        moe_intermediate_size=64,
        n_routed_experts=3,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        swiglu_limit=5.0,
        layout=layout,
    )
    tensors = load_file(tmp_path / SHARD_1) | load_file(tmp_path / SHARD_2)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == tensors.keys()
    assert set(weight_map.values()) == {SHARD_1, SHARD_2}
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.layout == layout
    assert checkpoint.layers == (0, 1, 2, 3)
    assert (checkpoint.hidden_size, checkpoint.intermediate_size) == (128, 64)
    assert (checkpoint.num_experts, checkpoint.top_k) == (3, 2)
    assert [checkpoint.activation(layer) for layer in range(4)] == [Gate("silu", 5.0, 1.0, 0.0)] * 4
    module, names, kind = SPELLINGS[layout.replace("-tensors", "")]
    data, global_scale = (
        ("weight", "weight_scale_2") if kind == "modelopt" else ("weight_packed", "weight_global_scale")
    )
    for layer in range(4):
        w13, w2 = checkpoint.experts(layer)
        for expert in range(3):
            w1, w3, down = (module.format(layer, expert) + name for name in names)
            assert_equal(w13.data[expert], torch.cat((tensors[f"{w1}.{data}"], tensors[f"{w3}.{data}"])))
            assert_equal(w2.data[expert], tensors[f"{down}.{data}"])
            assert_equal(w2.scale[expert], tensors[f"{down}.weight_scale"])
            scales = torch.stack([tensors[f"{name}.{global_scale}"].reshape(()) for name in (w1, w3, down)])
            expected = scales if kind == "modelopt" else 1 / scales
            assert_equal(torch.stack((*w13.global_scale[expert], w2.global_scale[expert])), expected)
            assert not torch.equal(w13.global_scale[expert, 0], w13.global_scale[expert, 1])


def test_demo_limit_bites(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path,
        hidden_size=256,
        moe_intermediate_size=256,
        n_routed_experts=2,
        num_experts_per_tok=1,
        swiglu_limit=0.5,
    )
    w13, w2 = Checkpoint.open(tmp_path).experts(3)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    gate, up = (x @ dequantize(w13)[1].T).chunk(2, dim=-1)
    assert 0.2 < (gate > 0.5).float().mean() < 0.3
    assert 0.14 < (up.abs() > 0.5).float().mean() < 0.23
    assert (w2.global_scale > 0).all()


def test_demo_deepseek_dtypes(tmp_path: Path) -> None:
    """The leaves beside the experts have the names, dtypes and block shapes of the published checkpoint."""
    write_checkpoint(tmp_path, hidden_size=192, moe_intermediate_size=64, n_routed_experts=2, num_experts_per_tok=1)
    tensors = load_file(tmp_path / SHARD_1) | load_file(tmp_path / SHARD_2)
    block_scaled = [name.removesuffix(".scale") for name in tensors if name.endswith(".scale") and "mtp" not in name]
    assert {name.split(".", 2)[2] for name in block_scaled} == {
        *(f"attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")),
        *(f"ffn.shared_experts.{name}" for name in ("w1", "w2", "w3")),
    }
    for name in block_scaled:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
        assert (weight.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float8_e8m0fnu)
        assert scale.shape == tuple(math.ceil(size / 128) for size in weight.shape)
        assert weight.float().isfinite().all()
        # Dequantized, a weight with standard deviation in^-0.5 again.
        blocks = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        dense = weight.float() * blocks[: weight.shape[0], : weight.shape[1]]
        assert 0.9 < dense.std() * weight.shape[1] ** 0.5 < 1.1
    expected = {
        "layers.0.ffn.experts.0.w1.weight": torch.uint8,
        "layers.0.ffn.experts.0.w1.weight_scale": torch.float8_e4m3fn,
        "layers.0.ffn.experts.0.w1.weight_scale_2": torch.float32,
        "layers.0.ffn.experts.0.w1.input_scale": torch.float32,
        "layers.0.ffn.gate.weight": torch.bfloat16,
        "layers.0.ffn.gate.tid2eid": torch.int64,
        "layers.1.ffn.gate.bias": torch.float32,
        "layers.1.attn.compressor.wkv.weight": torch.bfloat16,
        "layers.1.attn.indexer.weights_proj.weight": torch.bfloat16,
        "layers.0.attn.attn_sink": torch.float32,
        "layers.0.hc_attn_fn": torch.float32,
        "layers.0.attn_norm.weight": torch.bfloat16,
        "embed.weight": torch.bfloat16,
        "head.weight": torch.bfloat16,
        "norm.weight": torch.bfloat16,
        "mtp.0.ffn.experts.0.w1.weight": torch.int8,
        "mtp.0.ffn.experts.0.w1.scale": torch.float8_e8m0fnu,
    }
    assert {name: tensors[name].dtype for name in expected} == expected
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["swiglu_limit"] == 10.0
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert config["quantization_config"]["moe_quant_algo"] == "NVFP4"


def test_demo_same_arguments_same_bytes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 2, "num_experts_per_tok": 1}
    one, two, other = (
        write_checkpoint(tmp_path / name, **sizes, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()
    assert (one / SHARD_1).read_bytes() != (other / SHARD_1).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 100}, "hidden_size to be a positive multiple of 16, got 100"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size to be a positive multiple of 16, got 0"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok <= 32, got 33"),
        ({"num_hidden_layers": 0}, "num_hidden_layers >= 1, got 0"),
        ({"layout": "gguf"}, "compressed-tensors, got 'gguf'"),
        ({"swiglu_limit": math.nan}, "positive and finite, or None, got nan"),
        ({"swiglu_limit": 0.0}, "positive and finite, or None, got 0.0"),
    ],
)
def test_demo_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_checkpoint(tmp_path, **arguments)


def test_single_file_without_index(tmp_path: Path) -> None:
    tensors, weights = make_tensors()
    for name in ("model.safetensors", "anything.safetensors"):
        path = tmp_path / name
        path.mkdir()
        save_file(tensors, path / name)
        (path / "config.json").write_text(json.dumps(CONFIG))
        assert_equal(open_checkpoint(str(path)).experts(1).w2.data[3], weights[1, 3, "down"][0])


def test_several_files_without_index(damaged: Path) -> None:
    (damaged / INDEX).unlink()
    assert Checkpoint.open(damaged).layers == (0, 1)


def test_symlinked_shards(damaged: Path, tmp_path: Path) -> None:
    """The Hugging Face cache links each file of a snapshot to a blob outside of it."""
    blob = tmp_path / "blob"
    (damaged / SHARD_1).rename(blob)
    (damaged / SHARD_1).symlink_to(blob)
    assert_equal(Checkpoint.open(damaged).experts(0).w2.data[0], make_tensors()[1][0, 0, "down"][0])


def test_only_some_layers_are_nvfp4(tmp_path: Path) -> None:
    def unquantize_layer_0(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("layers.0.ffn")]:
            tensor = tensors.pop(name)
            if name.endswith("weight"):
                tensors[name] = torch.zeros(tensor.shape[0], 2 * tensor.shape[1], dtype=torch.bfloat16)

    checkpoint = Checkpoint.open(write_changed(tmp_path, unquantize_layer_0))
    assert checkpoint.layers == (1,)
    with raises("expected a layer with NVFP4 experts (1), got 0"):
        checkpoint.experts(0)


@pytest.mark.parametrize("kind", ["modelopt", "compressed"])
def test_linears(kind: str, tmp_path: Path) -> None:
    leaves = random_leaves(torch.Generator().manual_seed(2), 48, 32)
    tensors = leaves_of(kind, "model.layers.0.self_attn.q_proj", *leaves)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    checkpoint = Checkpoint.open(write(tmp_path, tensors))
    assert checkpoint.layers == ()
    assert checkpoint.linears == ("model.layers.0.self_attn.q_proj",)
    assert checkpoint.layout == ("modelopt" if kind == "modelopt" else "compressed-tensors")
    data, scale, global_scale = checkpoint.linear("model.layers.0.self_attn.q_proj")
    assert_equal(data, leaves[0])
    assert_equal(scale, leaves[1])
    torch.testing.assert_close(global_scale, leaves[2], rtol=2.0**-23, atol=0.0)
    assert_equal(checkpoint.tensor("model.layers.0.self_attn.q_proj.bias"), torch.ones(48))
    with raises(tmp_path, "expected the name of an NVFP4 module, got 'model.layers.0.self_attn.k_proj'"):
        checkpoint.linear("model.layers.0.self_attn.k_proj")
    with raises(tmp_path, "expected the name of one of", "got 'nothing'"):
        checkpoint.tensor("nothing")
    with raises("expected a checkpoint with NVFP4 experts, got none"):
        _ = checkpoint.num_experts


def test_linear_reads_one_expert_projection(original: Path) -> None:
    _, weights = make_tensors()
    data, scale, global_scale = Checkpoint.open(original).linear("layers.1.ffn.experts.2.w3")
    assert_equal(data, weights[1, 2, "up"][0])
    assert_equal(scale, weights[1, 2, "up"][1])
    assert_equal(global_scale, weights[1, 2, "up"][2])


def test_summary(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hidden_size=128, moe_intermediate_size=64, n_routed_experts=3, num_experts_per_tok=2)
    summary = Checkpoint.open(tmp_path).summary()
    assert (summary.layout, summary.model_type) == ("deepseek", "deepseek_v4")
    assert (summary.quant_method, summary.quant_algo) == ("fp8", "NVFP4")
    assert (summary.layers, summary.num_experts, summary.top_k) == ((0, 1, 2, 3), 3, 2)
    assert (summary.hidden_size, summary.intermediate_size, summary.hidden_act) == (128, 64, "silu")
    assert summary.clamp_limits == dict.fromkeys(range(4), 10.0)
    assert summary.shards == 2
    tensors = load_file(tmp_path / SHARD_1) | load_file(tmp_path / SHARD_2)
    assert summary.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(category.nbytes for category in summary.categories) == summary.nbytes
    assert sum(category.tensors for category in summary.categories) == len(tensors)
    by_name = {category.name: category for category in summary.categories}
    # 4 layers, 3 experts, 3 projections with codes, block scales, a global scale and an input scale.
    assert (by_name["NVFP4 experts"].modules, by_name["NVFP4 experts"].tensors) == (36, 144)
    assert by_name["NVFP4 experts"].nbytes == 36 * (128 * 64 * 9 // 16 + 8)
    # 5 of attention and 3 of the shared expert in 4 layers, an indexer in 2 of them.
    assert by_name["FP8 in blocks"].modules == 34
    assert by_name["ignored (multi-token prediction)"].example.startswith("mtp.0.")
    assert "NVFP4 linears" not in by_name


def test_summary_of_dense_quantization(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path,
        hidden_size=64,
        moe_intermediate_size=32,
        n_routed_experts=2,
        num_experts_per_tok=1,
        num_hidden_layers=1,
        layout="modelopt",
    )
    by_name = {category.name: category for category in Checkpoint.open(tmp_path).summary().categories}
    assert by_name["NVFP4 linears"].modules == 4
    assert by_name["KV cache scales"].tensors == 2


def test_quantization_section_only_in_hf_quant_config(damaged: Path) -> None:
    (damaged / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert Checkpoint.open(damaged).summary().quant_algo == "NVFP4"


@pytest.mark.parametrize(("tp_size", "ep_size"), [(1, 2), (2, 1), (3, 1), (6, 4), (2, 2)])
def test_slices_are_slices_of_the_whole(original: Path, tp_size: int, ep_size: int) -> None:
    checkpoint = Checkpoint.open(original)
    whole13, whole2 = checkpoint.experts(1)
    width, num = INTERMEDIATE // tp_size, EXPERTS // ep_size
    for tp_rank in range(tp_size):
        for ep_rank in range(ep_size):
            w13, w2 = checkpoint.experts(1, tp_rank=tp_rank, tp_size=tp_size, ep_rank=ep_rank, ep_size=ep_size)
            experts = slice(ep_rank * num, (ep_rank + 1) * num)
            rows = torch.arange(tp_rank * width, (tp_rank + 1) * width)
            both = torch.cat((rows, INTERMEDIATE + rows))
            assert_equal(w13.data, whole13.data[experts, both])
            assert_equal(w13.scale.view(torch.uint8), whole13.scale.view(torch.uint8)[experts, both])
            assert_equal(w13.global_scale, whole13.global_scale[experts])
            expected = dequantize(whole2)[experts][:, :, rows]
            torch.testing.assert_close(dequantize(w2), expected, rtol=0.0, atol=0.0)
            assert w2.scale.shape == (num, HIDDEN, width // 16)
            assert w13.data.is_contiguous()
            assert w2.data.is_contiguous()


def test_expert_map(original: Path) -> None:
    checkpoint = Checkpoint.open(original)
    assert_equal(checkpoint.expert_map(), torch.arange(4, dtype=torch.int32))
    assert_equal(checkpoint.expert_map(1, 2), torch.tensor([-1, -1, 0, 1], dtype=torch.int32))
    assert_equal(checkpoint.expert_map(0, 4), torch.tensor([0, -1, -1, -1], dtype=torch.int32))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"tp_size": 4}, ("tp_size that splits the intermediate size 96 into multiples of 16", "tp_size 4: 24 each")),
        ({"tp_size": 5}, ("tp_size that splits the intermediate size 96", "got tp_size 5: 19.2 each")),
        ({"ep_size": 3}, ("ep_size that splits the number of experts 4 into whole experts", "ep_size 3: 1.33333 each")),
        ({"tp_rank": 2, "tp_size": 2}, ("0 <= tp_rank < tp_size", "tp_rank 2, tp_size 2")),
        ({"ep_rank": -1}, ("0 <= ep_rank < ep_size", "ep_rank -1, ep_size 1")),
        ({"ep_size": 0}, ("ep_size >= 1", "ep_size 0")),
    ],
)
def test_bad_slices(original: Path, arguments: dict[str, int], parts: tuple[str, ...]) -> None:
    with raises(original, *parts):
        Checkpoint.open(original).experts(0, **arguments)


def test_progress(original: Path) -> None:
    calls: list[tuple[int, int]] = []
    Checkpoint.open(original).experts(0, ep_size=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of each tensor that the safetensors library was asked for."""
    counts: dict[str, int] = {}

    class Counting:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self._file = safetensors.safe_open(*arguments, **keywords)

        def __enter__(self) -> Counting:
            self._file.__enter__()
            return self

        def __exit__(self, *exception: Any) -> None:
            self._file.__exit__(*exception)

        def get_tensor(self, name: str) -> Tensor:
            tensor = self._file.get_tensor(name)
            counts[name] = counts.get(name, 0) + tensor.nbytes
            return tensor

    monkeypatch.setattr(weights_module, "safe_open", Counting)
    return counts


def test_reads_one_layer_once(original: Path, read_bytes: dict[str, int]) -> None:
    checkpoint = Checkpoint.open(original)
    checkpoint.summary()
    assert read_bytes == {}
    checkpoint.experts(1)
    tensors, _ = make_tensors()
    assert read_bytes == {
        name: tensor.nbytes
        for name, tensor in tensors.items()
        if name.startswith("layers.1.ffn.experts") and not name.endswith("input_scale")
    }


def test_reads_one_rank(original: Path, read_bytes: dict[str, int]) -> None:
    Checkpoint.open(original).experts(0, ep_rank=1, ep_size=2)
    assert {name.split(".")[4] for name in read_bytes} == {"2", "3"}


def test_other_layers_may_be_damaged(damaged: Path) -> None:
    expected = Checkpoint.open(damaged).experts(0)
    header_end = 8 + struct.unpack("<Q", (damaged / SHARD_2).read_bytes()[:8])[0]
    with (damaged / SHARD_2).open("r+b") as shard:
        size = shard.seek(0, 2)
        shard.seek(header_end)
        shard.write(b"\xff" * (size - header_end))
    checkpoint = Checkpoint.open(damaged)
    for actual, wanted in zip(checkpoint.experts(0), expected, strict=True):
        for one, other in zip(actual, wanted, strict=True):
            assert_equal(one, other)
    with raises(SHARD_2, "NaN"):
        checkpoint.experts(1)


def activation_of(path: Path, changes: dict[str, Any], layer: int = 0) -> Gate:
    config = {key: value for key, value in (CONFIG | changes).items() if value != "absent"}
    (path / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(path).activation(layer)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("silu", 7.0, 1.0, 0.0)),
        ({"swiglu_limit": None}, ("silu", None, 1.0, 0.0)),
        ({"swiglu_limit": 0}, ("silu", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "hidden_act": "absent"}, ("silu", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "hidden_act": "gelu"}, ("gelu", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "hidden_act": "gelu_pytorch_tanh"}, ("gelu_tanh", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "hidden_act": "relu2"}, ("relu2", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "text_config": {"swiglu_limit": 5, "hidden_act": "silu"}}, ("silu", 5.0, 1.0, 0.0)),
        ({"swiglu_alpha": 1.702, "swiglu_beta": 1.0}, ("silu", 7.0, 1.702, 1.0)),
        ({"hidden_act": "swigluoai", "swiglu_alpha": 1.5}, ("silu", 7.0, 1.5, 1.0)),
        ({"model_type": "gpt_oss"}, ("silu", 7.0, 1.702, 1.0)),
        ({"model_type": "minimax_m3", "swiglu_alpha": 1.702}, ("silu", 7.0, 1.702, 1.0)),
        ({"swiglu_limit": [7.0, 5.0]}, ("silu", 5.0, 1.0, 0.0)),
        ({"swiglu_limit": None, "swiglu_limits": [0, 5, 0]}, ("swiglustep", 5.0, 1.0, 0.0)),
        ({"swiglu_limit": None, "swiglu_limits_shared": [9, 9]}, ("silu", None, 1.0, 0.0)),
        ({"swiglu_limit": "absent", "swiglu_limits": [5, None], "model_type": "step3p5"}, ("silu", None, 1.0, 0.0)),
        ({"model_type": "step3p5"}, ("swiglustep", 7.0, 1.0, 0.0)),
    ],
)  # fmt: skip
def test_activation(damaged: Path, changes: dict[str, Any], expected: tuple[str, float | None, float, float]) -> None:
    assert activation_of(damaged, changes, layer=1) == Gate(*expected)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"swiglu_limit": -1.0}, ("swiglu_limit: expected a positive, finite number", "got -1.0")),
        ({"swiglu_limit": math.nan}, ("swiglu_limit: expected a positive, finite number", "got nan")),
        ({"swiglu_limit": math.inf}, ("swiglu_limit: expected a positive, finite number", "got inf")),
        ({"swiglu_limit": True}, ("swiglu_limit: expected a positive, finite number", "got True")),
        ({"swiglu_limit": "7"}, ("swiglu_limit: expected a positive, finite number", "got '7'")),
        ({"swiglu_limit": {"0": 7.0}}, ("swiglu_limit: expected a positive, finite number", "got {'0': 7.0}")),
        ({"swiglu_limit": [7.0]}, ("swiglu_limit: expected 2 limits, got 1",)),
        ({"swiglu_limit": [7.0, "x"]}, ("swiglu_limit[1]: expected a positive", "got 'x'")),
        ({"swiglu_limits": [7.0, 5.0]}, ("expected swiglu_limit or swiglu_limits, got both: 7.0 and [7.0, 5.0]",)),
        ({"text_config": {"swiglu_limit": 5.0}}, ("swiglu_limit: expected one value, got 7.0, and 5.0 in text",)),
        ({"gemm1_clamp_limit": 7.0}, ("gemm1_clamp_limit: expected", "got 7.0", "never dropped")),
        ({"text_config": {"mlp_clamp": [0, 3]}}, ("text_config.mlp_clamp: expected", "got [0, 3]")),
        ({"vision_config": {"swiglu_limit": 3}}, ("vision_config.swiglu_limit: expected", "got 3")),
        ({"thinker_config": {"swiglu_limit": 3}}, ("swiglu_limit: expected one value, got 7.0, and 3.0 in thinker",)),
        ({"hidden_act": "gelu"}, ("expected hidden_act 'silu' beside a swiglu limit, got 'gelu' with limit 7.0",)),
        ({"hidden_act": "tanh"}, ("hidden_act: expected one of", "got 'tanh'")),
        ({"swiglu_limit": "absent", "model_type": "gpt_oss"}, ("expected swiglu_limit", "gpt_oss clamps", "got no")),
        ({"swiglu_alpha": 1.7}, ("expected swiglu_beta beside swiglu_alpha 1.7, got no such key",)),
        ({"swiglu_alpha": "x"}, ("swiglu_alpha: expected a finite number, got 'x'",)),
        ({"model_type": "step3p5", "swiglu_beta": 1.0}, ("expected no swiglu_alpha, swiglu_beta with Step-3.5's",)),
        ({"swiglu_limit": "absent", "hidden_act": "gelu", "swiglu_beta": 1.0}, ("swiglu_alpha 1.0", "got 'gelu'")),
        ({"n_routed_experts": "4"}, ("n_routed_experts: expected a non-negative integer, got '4'",)),
    ],
)  # fmt: skip
def test_activation_that_is_not_understood(damaged: Path, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    with raises(damaged / "config.json", *parts):
        activation_of(damaged, changes)


def test_unclear_limits_raise_when_opened(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {"act_clamp": 7.0}))
    with raises(damaged / "config.json", "act_clamp"):
        Checkpoint.open(damaged)


def test_limits_of_nothing_are_not_refused(damaged: Path) -> None:
    unrelated = {
        "act_clamp": None,
        "mlp_clip": 0,
        "time_step_limit": [0.0, 1.0],
        "quantization_config": {"act_clip": 3},
    }
    assert activation_of(damaged, unrelated).clamp_limit == 7.0


def test_top_k_not_declared(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps({"num_local_experts": EXPERTS}))
    checkpoint = Checkpoint.open(damaged)
    assert (checkpoint.num_experts, checkpoint.hidden_size, checkpoint.intermediate_size) == (4, HIDDEN, INTERMEDIATE)
    with raises(damaged / "config.json", "expected a key num_experts_per_tok", "got none"):
        _ = checkpoint.top_k


@pytest.mark.parametrize("root", ["mtp.0.layers.0.", "model.mtp.", "model.layers.2."])
def test_multi_token_prediction_is_ignored(root: str, tmp_path: Path) -> None:
    tensors, _ = make_tensors()
    for leaf, tensor in (("weight", torch.zeros(4, 8, dtype=torch.int8)), ("scale", torch.zeros(4, 1))):
        tensors[f"{root}ffn.experts.0.w1.{leaf}"] = tensor
    write(tmp_path, tensors, CONFIG | {"num_nextn_predict_layers": 1})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.layers == (0, 1)
    ignored = next(c for c in checkpoint.summary().categories if c.name == "ignored (multi-token prediction)")
    assert (ignored.modules, ignored.tensors, ignored.nbytes) == (1, 2, 48)


def test_missing_directory(tmp_path: Path) -> None:
    with raises(tmp_path / "none", "expected a checkpoint directory, got no such path"):
        Checkpoint.open(tmp_path / "none")
    (tmp_path / "file").touch()
    with raises(tmp_path / "file", "expected a checkpoint directory, got a file"):
        Checkpoint.open(tmp_path / "file")


def test_missing_config(damaged: Path) -> None:
    (damaged / "config.json").unlink()
    with raises(damaged, "expected config.json in the directory, got", SHARD_1):
        Checkpoint.open(damaged)


@pytest.mark.parametrize("name", ["config.json", INDEX, "hf_quant_config.json"])
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"a": 1', ("expected valid JSON", "JSONDecodeError")),
        (b"\xff\xfe\xfd", ("expected valid JSON", "UnicodeDecodeError")),
        (b"[" * 100_000, ("expected valid JSON", "RecursionError")),
        (b"[1]", ("expected an object in the JSON, got list",)),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', ("'b'", "each key of the JSON once, got it twice")),
    ],
)
def test_bad_json(damaged: Path, name: str, content: bytes, parts: tuple[str, ...]) -> None:
    (damaged / name).write_bytes(content)
    with raises(damaged / name, *parts):
        Checkpoint.open(damaged)


def test_pickle_is_not_read(damaged: Path) -> None:
    for name in (INDEX, SHARD_1, SHARD_2):
        (damaged / name).unlink()
    torch.save({}, damaged / "pytorch_model.bin")
    with raises(damaged, f"expected {INDEX}", "got config.json, pytorch_model.bin", "pickled checkpoints are not read"):
        Checkpoint.open(damaged)


def change_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    change(weight_map)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "shard",
    [
        *("../outside.safetensors", "/etc/outside.safetensors", "sub/a.safetensors", "..\\a.safetensors"),
        *("c:a.safetensors", "a\0.safetensors", "pytorch_model.bin", "", "..", None, 3),
    ],
)
def test_index_names_no_shard_beside_it(damaged: Path, shard: object) -> None:
    change_index(damaged, lambda weight_map: weight_map.update({"norm.weight": shard}))
    with raises(damaged / INDEX, "'norm.weight'", "expected the name of a *.safetensors file", f"got {shard!r}"):
        Checkpoint.open(damaged)


@pytest.mark.parametrize(
    ("content", "got"), [({}, "no such key"), ({"weight_map": []}, "[]"), ({"weight_map": {}}, "{}")]
)
def test_index_without_weight_map(damaged: Path, content: Any, got: str) -> None:
    (damaged / INDEX).write_text(json.dumps(content))
    with raises(damaged / INDEX, "expected an object weight_map", f"got {got}"):
        Checkpoint.open(damaged)


def test_index_names_a_tensor_that_no_shard_holds(damaged: Path) -> None:
    change_index(damaged, lambda weight_map: weight_map.update({"head.weight": SHARD_2}))
    with raises(
        damaged / SHARD_2, "'head.weight'", f"expected in this shard, which {INDEX} names", "got no such tensor"
    ):
        Checkpoint.open(damaged)


def test_index_names_the_wrong_shard(damaged: Path) -> None:
    name = "layers.0.ffn.experts.0.w1.weight"
    change_index(damaged, lambda weight_map: weight_map.update({name: SHARD_2}))
    with raises(damaged / SHARD_2, f"'{name}'", "expected in this shard", f"got it in {SHARD_1}"):
        Checkpoint.open(damaged)


def test_index_names_a_tensor_twice(damaged: Path) -> None:
    text = (damaged / INDEX).read_text().replace('"weight_map": {', '"weight_map": {"layers.0.attn_norm.weight": "x",')
    (damaged / INDEX).write_text(text)
    with raises(damaged / INDEX, "'layers.0.attn_norm.weight'", "expected each key of the JSON once, got it twice"):
        Checkpoint.open(damaged)


def test_missing_shard(damaged: Path) -> None:
    (damaged / SHARD_2).unlink()
    with raises(damaged / SHARD_2, "layers.1.", "got no such file; 1 of 2 shards are missing"):
        Checkpoint.open(damaged)


def test_tensor_in_two_shards_without_an_index(damaged: Path) -> None:
    second = load_file(damaged / SHARD_2)
    second["layers.0.ffn.experts.1.w2.weight"] = torch.zeros(HIDDEN, INTERMEDIATE // 2, dtype=torch.uint8)
    save_file(second, damaged / SHARD_2)
    (damaged / INDEX).unlink()
    with raises(
        damaged / SHARD_2, "'layers.0.ffn.experts.1.w2.weight'", "each tensor in one shard", f"it in {SHARD_1} too"
    ):
        Checkpoint.open(damaged)


def write_raw(file: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "parts"),
    [
        (b"", b"", 2**40, ("expected a header of at most 100000000 bytes, got 1099511627776",)),
        (b"{}", b"", 100, ("expected a header of 100 bytes, got 2 bytes after its length", "truncated")),
        (b"{", b"", None, ("expected valid JSON in the header",)),
        (b"[]", b"", None, ("expected an object in the header, got list",)),
        (b'{"a": 1, "a": 2}', b"", None, ("'a'", "expected each key of the header once, got it twice")),
        ({"a": 1}, b"", None, ("'a'", "expected an object with dtype, shape, data_offsets, got 1")),
        ({"a": entry(0, 1, "Q4")}, b"1", None, ("'a'", "expected dtype one of", "got 'Q4'")),
        ({"a": entry(0, 1, ["U8"])}, b"1", None, ("'a'", "expected dtype one of", "got ['U8']")),
        ({"a": entry(0, 1, shape=[-1])}, b"1", None, ("'a'", "expected a shape of non-negative integers, got [-1]")),
        ({"a": entry(0, 1, shape=[True])}, b"1", None, ("'a'", "a shape of non-negative integers, got [True]")),
        ({"a": entry(0, 1, shape=[2**62] * 8)}, b"1", None, ("'a'", "as many bytes as U8", "data_offsets [0, 1]")),
        ({"a": entry(0, 1, shape=[1] * 100_000)}, b"1", None, ("'a'", "at most 8 dimensions, got 100000")),
        ({"a": entry(0, 6, "F32", [2])}, b"123456", None, ("'a'", "as many bytes as F32 [2]", "data_offsets [0, 6]")),
        ({"a": entry(0, -1)}, b"", None, ("'a'", "expected a shape")),
        ({"a": entry(0, 1) | {"data_offsets": [0]}}, b"1", None, ("'a'", "expected two data_offsets, got [0]")),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"123", None, ("'b'", "expected data at offset 2", "got offset 1")),
        ({"a": entry(0, 2), "b": entry(3, 4)}, b"1234", None, ("'b'", "expected data at offset 2", "got offset 3")),
        ({"a": entry(0, 2)}, b"123", None, ("expected 2 bytes of tensor data, got 3",)),
    ],
)  # fmt: skip
def test_bad_header(damaged: Path, header: Any, data: bytes, length: int | None, parts: tuple[str, ...]) -> None:
    write_raw(damaged / SHARD_1, header, data, length)
    with raises(damaged / SHARD_1, *parts):
        Checkpoint.open(damaged)


def test_git_lfs_pointer(damaged: Path) -> None:
    (damaged / SHARD_1).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with raises(damaged / SHARD_1, "got a Git LFS pointer"):
        Checkpoint.open(damaged)


def test_truncated_data(damaged: Path) -> None:
    content = (damaged / SHARD_2).read_bytes()
    (damaged / SHARD_2).write_bytes(content[:-1])
    last = max(
        (value["data_offsets"][1], name)
        for name, value in json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]).items()
    )[1]
    size = len(content)
    with raises(
        damaged / SHARD_2, f"'{last}'", f"up to byte {size} of", f"got a file of {size - 1} bytes", "truncated"
    ):
        Checkpoint.open(damaged)


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_truncated_header(damaged: Path, size: int) -> None:
    (damaged / SHARD_1).write_bytes((damaged / SHARD_1).read_bytes()[:size])
    with raises(damaged / SHARD_1, "expected", "header", "truncated"):
        Checkpoint.open(damaged)


def test_truncated_after_opening(damaged: Path) -> None:
    checkpoint = Checkpoint.open(damaged)
    (damaged / SHARD_1).write_bytes((damaged / SHARD_1).read_bytes()[:-1])
    with raises(damaged / SHARD_1, "expected the file as it was when it was opened"):
        checkpoint.experts(0)


def test_replaced_after_opening(damaged: Path) -> None:
    checkpoint = Checkpoint.open(damaged)
    tensors = load_file(damaged / SHARD_1)
    save_file(
        {name: tensor[:1] if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}, damaged / SHARD_1
    )
    name = "layers.0.ffn.experts.0.w1.weight"
    with raises(
        damaged / SHARD_1, f"'{name}'", "expected U8 [96, 32] as when it was opened", "got torch.uint8 [1, 32]"
    ):
        checkpoint.experts(0)


@pytest.mark.parametrize("spelling", ["deepseek", "compressed"])
@pytest.mark.parametrize("leaf", ["data", "scale", "global_scale"])
def test_missing_leaf(spelling: str, leaf: str, tmp_path: Path) -> None:
    module, names, kind = SPELLINGS[spelling]
    leaves = {
        "modelopt": {"data": "weight", "scale": "weight_scale", "global_scale": "weight_scale_2"},
        "compressed": {"data": "weight_packed", "scale": "weight_scale", "global_scale": "weight_global_scale"},
    }[kind]
    name = f"{module.format(1, 2)}{names[2]}.{leaves[leaf]}"
    write_changed(tmp_path, lambda tensors: tensors.pop(name), spelling)
    with raises(SHARD_2, f"'{name}'", "expected in a shard, got no such tensor"):
        Checkpoint.open(tmp_path)


def test_missing_input_scale_is_fine(tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "input_scale" in name])
    assert Checkpoint.open(tmp_path).layers == (0, 1)


def test_missing_projection(tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: drop(tensors, "layers.1.ffn.experts.2.w3."))
    with raises(tmp_path, "'layers.1.ffn.experts.2.w3.weight'", "expected in a shard, got no such tensor"):
        Checkpoint.open(tmp_path)


def test_experts_without_a_gate(tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: drop(tensors, ".w1."))
    with raises(
        tmp_path, "layers.0.ffn.experts.0.*", "expected a gate projection (w1 or gate_proj)", "['w2', 'w3'] only"
    ):
        Checkpoint.open(tmp_path)


def drop(tensors: dict[str, Tensor], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


@pytest.mark.parametrize(("expert", "got"), [(0, "no expert 0"), (3, "no expert 3")])
def test_missing_expert(expert: int, got: str, tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: drop(tensors, f"layers.1.ffn.experts.{expert}."))
    with raises(
        tmp_path, "layers.1.ffn.experts.M.*", "expected experts 0..3 in layer 1 (from config.json)", f"got {got}"
    ):
        Checkpoint.open(tmp_path)


def test_missing_expert_that_the_config_does_not_count(tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: drop(tensors, "layers.1.ffn.experts.1."))
    (tmp_path / "config.json").write_text("{}")
    with raises("expected experts 0..3 in layer 1 (from the largest id), got no expert 1"):
        Checkpoint.open(tmp_path)
    write_changed(tmp_path, lambda tensors: drop(tensors, "layers.1.ffn.experts.3."))
    (tmp_path / "config.json").write_text("{}")
    with raises("layer 1: expected 4 experts, got 3"):
        Checkpoint.open(tmp_path)


def test_more_experts_than_the_config_declares(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {"n_routed_experts": 2}))
    with raises("expected experts 0..1 in layer 0 (from config.json), got also expert 2..3"):
        Checkpoint.open(damaged)


def test_one_expert_that_is_not_quantized(tmp_path: Path) -> None:
    def unquantize(tensors: dict[str, Tensor]) -> None:
        drop(tensors, "layers.0.ffn.experts.1.w1.")
        tensors["layers.0.ffn.experts.1.w1.weight"] = torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.bfloat16)

    write_changed(tmp_path, unquantize)
    checkpoint = Checkpoint.open(tmp_path)
    words = (SHARD_1, "'layers.0.ffn.experts.1.w1.weight'", "expected NVFP4 like other", "got BF16 (unquantized)")
    with raises(*words):
        checkpoint.experts(0)
    checkpoint.experts(1)


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ("model.layers.0.ffn.experts.0.w1", ("'layers.0.ffn.experts.'", "'model.layers.0.ffn.experts.' too")),
        ("layers.0.ffn.experts.0.gate_proj", ("one gate projection, got 'layers.0.ffn.experts.0.", "' too")),
        ("layers.0.ffn.experts.00.w1", ("one gate projection, got 'layers.0.ffn.experts.0", ".w1' too")),
    ],
)
def test_two_spellings_of_one_expert(other: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    leaves = random_leaves(torch.Generator(), INTERMEDIATE, HIDDEN)
    write_changed(tmp_path, lambda tensors: tensors.update(leaves_of("modelopt", other, *leaves)))
    with raises(SHARD_1, "expected", *parts):
        Checkpoint.open(tmp_path)


NAME = "layers.1.ffn.experts.3.w2"


@pytest.mark.parametrize(
    ("leaf", "tensor", "expected", "got"),
    [
        ("weight", torch.zeros(64, 48, dtype=torch.int8), "dtype U8", "I8"),
        ("weight", torch.zeros(64, 96, dtype=torch.bfloat16), "dtype U8", "BF16"),
        ("weight_scale", torch.ones(64, 6), "dtype F8_E4M3", "F32"),
        ("weight_scale_2", torch.ones((), dtype=torch.bfloat16), "dtype F32", "BF16"),
        ("weight", torch.zeros(64, 44, dtype=torch.uint8), "shape [out, in / 2] with in a multiple of 16", "[64, 44]"),
        ("weight", torch.zeros(64 * 48, dtype=torch.uint8), "shape [out, in / 2]", "[3072]"),
        ("weight_scale", torch.ones(64, 5).to(torch.float8_e4m3fn), "shape [64, 6] (out, in / 16)", "[64, 5]"),
        ("weight_scale", torch.ones(6, 64).to(torch.float8_e4m3fn), "shape [64, 6] (out, in / 16)", "[6, 64]"),
        ("weight_scale_2", torch.ones(2), "shape [] or [1]", "[2]"),
    ],
)
def test_wrong_leaf(leaf: str, tensor: Tensor, expected: str, got: str, tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: tensors.update({f"{NAME}.{leaf}": tensor}))
    with raises(tmp_path / SHARD_2, f"'{NAME}.{leaf}'", f"expected {expected}", f"got {got}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("rows", "cols"), [(HIDDEN, INTERMEDIATE + 16), (HIDDEN + 1, INTERMEDIATE)])
def test_expert_of_another_shape(rows: int, cols: int, tmp_path: Path) -> None:
    leaves = random_leaves(torch.Generator(), rows, cols)
    write_changed(tmp_path, lambda tensors: tensors.update(leaves_of("modelopt", NAME, *leaves)))
    expected = "shape [64, 48] for hidden size 64, intermediate size 96"
    with raises(tmp_path / SHARD_2, f"'{NAME}.weight'", f"expected {expected}", f"got [{rows}, {cols // 2}]"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "moe_intermediate_size"])
def test_experts_of_another_shape_than_the_config(damaged: Path, key: str) -> None:
    (damaged / "config.json").write_text(json.dumps(CONFIG | {key: 128}))
    with raises(damaged / SHARD_1, "'layers.0.ffn.experts.0.w1.weight'", "expected shape", "128", "got [96, 32]"):
        Checkpoint.open(damaged)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
@pytest.mark.parametrize("tp_rank", [0, 1])
def test_nan_scale(byte: int, tp_rank: int, tmp_path: Path) -> None:
    """Row and group are those of the whole tensor, also when a slice is read; a slice without the NaN loads."""
    write_changed(tmp_path, lambda tensors: tensors[f"{NAME}.weight_scale"].view(torch.uint8).__setitem__((5, 4), byte))
    checkpoint = Checkpoint.open(tmp_path)
    message = ("expected finite F8_E4M3 scales", f"got NaN ({byte:#x}) at row 5, group 4")
    with raises(tmp_path / SHARD_2, f"'{NAME}.weight_scale'", *message):
        checkpoint.experts(1)
    if tp_rank == 1:
        with raises(tmp_path / SHARD_2, f"'{NAME}.weight_scale'", *message):
            checkpoint.experts(1, tp_rank=1, tp_size=2)
    else:
        checkpoint.experts(1, tp_rank=0, tp_size=2)
    checkpoint.experts(0)


def test_nan_scale_of_sliced_rows(tmp_path: Path) -> None:
    name = "layers.0.ffn.experts.1.w3.weight_scale"
    write_changed(tmp_path, lambda tensors: tensors[name].view(torch.uint8).__setitem__((50, 3), 0x7F))
    with raises(f"'{name}'", "at row 50, group 3"):
        Checkpoint.open(tmp_path).experts(0, tp_rank=1, tp_size=2)


@pytest.mark.parametrize(
    ("spelling", "value", "expected"),
    [
        ("deepseek", math.nan, "a finite global scale, got nan"),
        ("deepseek", math.inf, "a finite global scale, got inf"),
        ("compressed", -math.inf, "a finite global scale, got -inf"),
        ("compressed", 0.0, "a global scale with a finite reciprocal, got 0.0"),
    ],
)
def test_bad_global_scale(spelling: str, value: float, expected: str, tmp_path: Path) -> None:
    module, names, kind = SPELLINGS[spelling]
    leaf = "weight_scale_2" if kind == "modelopt" else "weight_global_scale"
    name = f"{module.format(0, 1)}{names[1]}.{leaf}"
    write_changed(tmp_path, lambda tensors: tensors[name].fill_(value), spelling)
    with raises(tmp_path / SHARD_1, f"'{name}'", f"expected {expected}"):
        Checkpoint.open(tmp_path).experts(0)


def test_leaf_that_nothing_would_apply(tmp_path: Path) -> None:
    name = "layers.0.ffn.experts.1.w3.pre_quant_scale"
    write_changed(tmp_path, lambda tensors: tensors.update({name: torch.full((HIDDEN,), 1.5)}))
    checkpoint = Checkpoint.open(tmp_path)
    with raises(f"'{name}'", "expected ones", "got 1.5"):
        checkpoint.experts(0)
    with raises(f"'{name}'", "expected ones", "got 1.5"):
        checkpoint.linear("layers.0.ffn.experts.1.w3")
    checkpoint.experts(1)


@pytest.mark.parametrize(
    ("data", "scale", "leaves"),
    [
        (torch.int8, torch.float8_e8m0fnu, ("weight", "scale")),
        (torch.uint8, torch.uint8, ("weight_packed", "weight_scale")),
    ],
)
def test_mxfp4_experts(data: torch.dtype, scale: torch.dtype, leaves: tuple[str, str], tmp_path: Path) -> None:
    def to_mxfp4(tensors: dict[str, Tensor]) -> None:
        drop(tensors, ".experts.")
        for expert in range(EXPERTS):
            for name, rows, cols in (("w1", INTERMEDIATE, HIDDEN), ("w2", HIDDEN, INTERMEDIATE)):
                module = f"layers.0.ffn.experts.{expert}.{name}"
                tensors[f"{module}.{leaves[0]}"] = torch.zeros(rows, cols // 2, dtype=data)
                tensors[f"{module}.{leaves[1]}"] = torch.ones(rows, cols // 32).to(scale)

    write_changed(tmp_path, to_mxfp4)
    with raises(SHARD_1, ".weight", "expected NVFP4 experts", "the MXFP4 original, not its NVFP4 conversion"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("leaves", "category"),
    [
        ({"weight": torch.float8_e4m3fn, "scale": torch.float8_e8m0fnu}, "FP8 in blocks"),
        ({"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32}, "FP8 in blocks"),
        ({"weight": torch.float8_e4m3fn, "weight_scale": torch.float32}, "FP8 in blocks"),
        ({"weight": torch.float8_e4m3fn}, "FP8"),
        ({"weight": torch.int8, "scale": torch.float8_e8m0fnu}, "MXFP4"),
        ({"weight_packed": torch.int32, "weight_scale": torch.bfloat16}, "other quantized"),
        ({"weight": torch.uint8}, "other quantized"),
        ({"weight": torch.bfloat16, "bias": torch.bfloat16}, "unquantized"),
    ],
)
def test_categories(leaves: dict[str, torch.dtype], category: str, tmp_path: Path) -> None:
    tensors = {f"model.head.{leaf}": torch.ones(2, 2).to(dtype) for leaf, dtype in leaves.items()}
    checkpoint = Checkpoint.open(write(tmp_path, tensors))
    (only,) = checkpoint.summary().categories
    assert (only.name, only.modules, only.tensors) == (category, 1, len(leaves))
    assert only.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (checkpoint.layout, checkpoint.linears) == (None, ())
    assert checkpoint.summary().num_experts is None
