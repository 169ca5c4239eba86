"""The checkpoint reader: layouts with one matrix per expert against hand-spelled files, slices, and what is read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.checkpoint_files import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    LAYOUT_NAMES,
    SHARD_1,
    SHARD_2,
    SPELLINGS,
    assert_equal,
    leaves_of,
    make_tensors,
    raises,
    random_leaves,
    write,
    write_changed,
)
from torch_nvfp4.checkpoint import Checkpoint, write_checkpoint
from torch_nvfp4.checkpoint.headers import TensorInfo
from torch_nvfp4.checkpoint.weights import Shards
from torch_nvfp4.format import dequantize


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


def test_only_some_layers_are_nvfp4(tmp_path: Path) -> None:
    def unquantize_layer_0(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("layers.0.ffn")]:
            tensor = tensors.pop(name)
            if name.endswith("weight"):
                tensors[name] = torch.zeros(tensor.shape[0], 2 * tensor.shape[1], dtype=torch.bfloat16)

    checkpoint = Checkpoint.open(write_changed(tmp_path, unquantize_layer_0))
    assert checkpoint.layers == (1,)
    with raises("expected a layer with NVFP4 or MXFP4 experts (1), got 0"):
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
    with raises("expected a checkpoint with NVFP4 or MXFP4 experts, got none"):
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


@pytest.mark.parametrize("threads", [1, 2, 3, 100])
def test_threads_read_the_same_bytes(threads: int, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Checkpoint.open(original).experts(1, progress=lambda *_: None)  # read by one thread
    used: set[int] = set()
    read = Shards.read

    def noting(shards: Shards, info: TensorInfo, begin: int, out: Tensor) -> None:
        used.add(id(shards))
        read(shards, info, begin, out)

    monkeypatch.setattr(Shards, "read", noting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    before = len(os.listdir("/proc/self/fd"))
    got = Checkpoint.open(original).experts(1)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(used) == min(threads, EXPERTS)
    for a, b in zip(expected, got, strict=True):
        for part, other in zip(a, b, strict=True):
            assert_equal(other, part)


def test_threads_read_in_inference_mode(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of its own begins outside inference mode, and may not write what was allocated inside."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    checkpoint = Checkpoint.open(original)
    expected = checkpoint.experts(0)
    with torch.inference_mode():
        weights = checkpoint.experts(0)
    for weight, other in zip(weights, expected, strict=True):
        for part, wanted in zip(weight, other, strict=True):
            assert part.is_inference()
            assert_equal(part, wanted)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_expert_that_is_wrong_is_named(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread finds its error first."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    names = [f"layers.0.ffn.experts.{expert}.w3.weight_scale_2" for expert in (1, 3)]
    write_changed(tmp_path, lambda tensors: tensors.update((name, torch.tensor(float("nan"))) for name in names))
    with raises(names[0], "a finite global scale, got nan"):
        Checkpoint.open(tmp_path).experts(0)


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of each tensor that were read."""
    counts: dict[str, int] = {}
    read = Shards.read

    def counting(shards: Shards, info: TensorInfo, begin: int, out: Tensor) -> None:
        counts[info.name] = counts.get(info.name, 0) + out.nbytes
        read(shards, info, begin, out)

    monkeypatch.setattr(Shards, "read", counting)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_defaults_change_nothing(original: Path, dtype: torch.dtype) -> None:
    """Models are often loaded under another default dtype, or inside ``with torch.device("cuda")``."""
    checkpoint = Checkpoint.open(original)

    def read() -> list[Tensor]:
        w13, w2 = checkpoint.experts(1)
        return [*w13, *w2, *checkpoint.linear("layers.1.ffn.experts.2.w3"), checkpoint.expert_map()]

    expected = read()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            got = read()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert_equal(a, b)
