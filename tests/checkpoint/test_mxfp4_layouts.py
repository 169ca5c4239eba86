"""MXFP4 experts, biases and experts without a gate in checkpoints: what is damaged or has no NVFP4 is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.checkpoint_files import raises
from helpers.fp64_loop import experts_of, raw_tensors
from torch_nvfp4.checkpoint import Checkpoint, variants, write_checkpoint
from torch_nvfp4.convert import open_conversion
from torch_nvfp4.format import dequantize
from torch_nvfp4.gate import Gate
from torch_nvfp4.nn import NVFP4Experts

HIDDEN, INTERMEDIATE, EXPERTS = 64, 96, 4
DEEPSEEK = "layers.0.ffn.experts."
GPT_OSS = "model.layers.0.mlp.experts."


def make(path: Path, layout: Any) -> Path:
    return write_checkpoint(
        path, layout=layout, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, n_routed_experts=EXPERTS,
        num_experts_per_tok=2, num_hidden_layers=2, swiglu_limit=2.0,
    )  # fmt: skip


def rewrite(path: Path, tensors: dict[str, Tensor]) -> Path:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def changed(path: Path, layout: str, **tensors: Tensor | None) -> Path:
    """Written with other tensors (None: without them); the names after layer 0's experts, with __ for a dot."""
    content = raw_tensors(make(path, layout))
    root = DEEPSEEK if layout.startswith("deepseek") else GPT_OSS
    for key, tensor in tensors.items():
        name = root + key.lstrip("_").replace("__", ".")
        if tensor is None:
            del content[name]
        else:
            content[name] = tensor
    return rewrite(path, content)


GONE = "expected in a shard, got no such tensor"
U8, I8 = torch.uint8, torch.int8


def e8m0(*shape: int) -> Tensor:
    return torch.full(shape, 120, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("layout", "name", "tensor", "words"),
    [
        ("deepseek-mxfp4", "_1__w3__scale", e8m0(96, 4).view(torch.float8_e8m0fnu),
         "expected shape [96, 2] (out, in / 32), got [96, 4]"),
        ("deepseek-mxfp4", "_1__w3__weight", torch.zeros(96, 24, dtype=I8), "in a multiple of 32, got [96, 24]"),
        ("deepseek-mxfp4", "_1__w2__weight", torch.zeros(32, 48, dtype=I8), "expected shape [32, 3] (out, in / 32)"),
        ("deepseek-mxfp4", "_1__w3__scale", None, GONE),
        ("deepseek-mxfp4", "_1__w3__weight", None, GONE),
        ("quark-mxfp4", "_1__up_proj__weight_scale", None, GONE),
        ("gpt-oss", "gate_up_proj_blocks", torch.zeros(4, 192, 32, dtype=U8),
         "expected shape [experts, out, in / 32, 16], got [4, 192, 32]"),
        ("gpt-oss", "gate_up_proj_blocks", torch.zeros(4, 192, 4, 8, dtype=U8), "in / 32, 16], got [4, 192, 4, 8]"),
        ("gpt-oss", "gate_up_proj_scales", e8m0(4, 192, 1),
         "expected shape [4, 192, 2] (experts, out, in / 32), got [4, 192, 1]"),
        ("gpt-oss", "gate_up_proj_scales", torch.zeros(4, 192, 2), "expected dtype F8_E8M0 or U8, got F32"),
        ("gpt-oss", "down_proj_scales", None, GONE),
        ("gpt-oss", "down_proj_blocks", None, GONE),
    ],
)  # fmt: skip
def test_damaged_modules(layout: str, name: str, tensor: Tensor | None, words: str, tmp_path: Path) -> None:
    changed(tmp_path, layout, **{name: tensor})
    with raises(words):
        Checkpoint.open(tmp_path)


def test_another_size_of_gpt_oss(tmp_path: Path) -> None:
    blocks, scales = torch.zeros(4, 128, 2, 16, dtype=torch.uint8), e8m0(4, 128, 2)
    changed(tmp_path, "gpt-oss", gate_up_proj_blocks=blocks, gate_up_proj_scales=scales)
    with raises("down_proj_blocks'", "expected shape [4, 64, 2, 16] for hidden size 64, intermediate size 64", "got"):
        Checkpoint.open(tmp_path)


def test_exponents_that_nvfp4_does_not_have(tmp_path: Path) -> None:
    """Named by tensor, row and group; a rank whose slice has only one of them loads, with the same values."""
    content = raw_tensors(make(tmp_path, "deepseek-mxfp4"))
    scale = content[f"{DEEPSEEK}2.w2.scale"].view(torch.uint8)
    scale[:], scale[7, 0], scale[40, 2] = 120, 130, 112
    rewrite(tmp_path, content)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.refusals() == ()  # headers do not tell
    words = ("2.w2.scale'", "expected exponents within 18 octaves in one matrix", "got 2^-15 at row 40, group 2")
    for load in (lambda: checkpoint.experts(0), lambda: checkpoint.linear(f"{DEEPSEEK}2.w2")):
        with raises(*words, "and 2^3 at row 7, group 0"):
            load()
    checkpoint.experts(1)
    expected = dense(content, "deepseek-mxfp4")[2].down
    for rank in range(6):
        part = checkpoint.experts(0, tp_rank=rank, tp_size=6).w2
        assert torch.equal(dequantize(part, torch.float64)[2], expected[:, 16 * rank : 16 * rank + 16])
    scale[40, 2] = 113
    rewrite(tmp_path, content)
    whole = dequantize(Checkpoint.open(tmp_path).experts(0).w2, torch.float64)
    assert torch.equal(whole[2], dense(content, "deepseek-mxfp4")[2].down)


def dense(content: dict[str, Tensor], layout: str) -> Any:
    return experts_of(content, layout, 0, EXPERTS, INTERMEDIATE)


def test_exponents_of_gpt_oss(tmp_path: Path) -> None:
    """Up rows are the odd ones of the stack. A NaN is named in the same way."""
    content = raw_tensors(make(tmp_path, "gpt-oss"))
    scales = content[f"{GPT_OSS}gate_up_proj_scales"]
    scales[3, 2 * 11 + 1, 1], scales[3, 1, 0] = 20, 140
    rewrite(tmp_path, content)
    words = ("gate_up_proj_scales'", "got 2^-107 at row 23, group 1 of expert 3 and 2^13 at row 1, group 0 of expert 3")
    with raises(*words):
        Checkpoint.open(tmp_path).experts(0)
    Checkpoint.open(tmp_path).experts(0, ep_rank=0, ep_size=2)
    with raises("got 2^-107 at row 23, group 1 of expert 3 and"):
        Checkpoint.open(tmp_path).experts(0, ep_rank=3, ep_size=4)
    scales[3, 23, 1] = 255
    rewrite(tmp_path, content)
    with raises("gate_up_proj_scales'", "expected finite E8M0 scales, got NaN (0xff) at row 23, group 1 of expert 3"):
        Checkpoint.open(tmp_path).experts(0)
    scales[3, 23, 1] = 120
    content[f"{GPT_OSS}down_proj_scales"][1, 5, 2] = 255
    rewrite(tmp_path, content)
    with raises("down_proj_scales'", "got NaN (0xff) at row 5, group 2 of expert 1"):
        Checkpoint.open(tmp_path).experts(0, tp_rank=5, tp_size=6)  # half of group 2
    Checkpoint.open(tmp_path).experts(0, tp_rank=3, tp_size=6)
    with raises("got NaN (0xff) at row 5, group 2 of expert 1"):
        Checkpoint.open(tmp_path).experts(0, tp_rank=1, tp_size=2)  # half of group 1, and group 2
    content[f"{GPT_OSS}down_proj_scales"][1, 5, 2] = 160
    rewrite(tmp_path, content)
    with raises("at row", "of expert 1 and 2^33 at row 5, group 2 of expert 1"):
        Checkpoint.open(tmp_path).experts(0, tp_rank=1, tp_size=2)


@pytest.mark.parametrize("layout", ["deepseek-mxfp4", "gpt-oss"])
def test_slices_that_begin_within_a_group(layout: str, tmp_path: Path) -> None:
    """48 of 96 columns of down are one group of 32 and a half, with a scale of its own in each."""
    content = raw_tensors(make(tmp_path, layout))
    names = [f"{DEEPSEEK}{e}.w2.scale" for e in range(EXPERTS)]
    for name in names if layout != "gpt-oss" else [f"{GPT_OSS}down_proj_scales"]:
        content[name].view(torch.uint8)[..., :] = torch.tensor([118, 120, 123], dtype=torch.uint8)
    rewrite(tmp_path, content)
    checkpoint = Checkpoint.open(tmp_path)
    for rank in range(2):
        got = dequantize(checkpoint.experts(0, tp_rank=rank, tp_size=2).w2, torch.float64)
        for index, expert in enumerate(dense(content, layout)):
            assert torch.equal(got[index], expert.down[:, 48 * rank : 48 * rank + 48])


def test_blocks_alternate_in_any_model(tmp_path: Path) -> None:
    """What a fine-tuned model calls itself does not change what its tensors are."""
    content = raw_tensors(make(tmp_path, "gpt-oss"))
    variants.change_config(tmp_path, model_type="another")
    got = dequantize(Checkpoint.open(tmp_path).experts(0).w13, torch.float64)
    for index, expert in enumerate(dense(content, "gpt-oss")):
        assert torch.equal(got[index], torch.cat((expert.gate, expert.up)))


def test_the_gate_of_blocks_is_not_guessed(tmp_path: Path) -> None:
    """Of a model that calls itself something else the config has to say it: silu would be wrong without a word."""
    path = make(tmp_path / "source", "gpt-oss")
    known = Gate("silu", 2.0, 1.702, 1.0)  # type: ignore[arg-type]
    assert Checkpoint.open(path).gate(0) == known
    variants.change_config(path, model_type="another")
    checkpoint = Checkpoint.open(path)
    words = ("expected model_type gpt_oss, or swiglu_alpha, swiglu_beta and swiglu_limit", "got model_type 'another'")
    for load in (lambda: checkpoint.gate(1), lambda: NVFP4Experts.from_checkpoint(checkpoint, 0)):
        with raises(*words):
            load()
    assert [refusal.what for refusal in checkpoint.refusals()] == ["layer 0", "layer 1"]
    with raises(*words):
        open_conversion(path, tmp_path / "result")
    variants.change_config(path, swiglu_alpha=1.702, swiglu_beta=1.0)
    assert Checkpoint.open(path).gate(0) == known
    variants.change_config(path, swiglu_alpha=1.0, swiglu_beta=0.0, swiglu_limit=0.0)
    assert Checkpoint.open(path).gate(0) == Gate()


def test_gate_and_up_share_a_global_scale_where_they_can(tmp_path: Path) -> None:
    content = raw_tensors(make(tmp_path, "deepseek-mxfp4"))
    content[f"{DEEPSEEK}1.w1.scale"].view(torch.uint8)[:] = 60
    rewrite(tmp_path, content)
    w13, _w2 = Checkpoint.open(tmp_path).experts(0)
    same = (w13.global_scale[:, 0] == w13.global_scale[:, 1]).tolist()
    assert same == [True, False, True, True]
    got = dequantize(w13, torch.float64)
    for index, expert in enumerate(dense(content, "deepseek-mxfp4")):
        assert torch.equal(got[index], torch.cat((expert.gate, expert.up)))


def test_zeros_of_any_exponent(tmp_path: Path) -> None:
    """A padded or pruned row of zeros may have any scale."""
    content = raw_tensors(make(tmp_path, "gpt-oss"))
    content[f"{GPT_OSS}down_proj_blocks"][:, 3] = 0
    content[f"{GPT_OSS}down_proj_scales"][:, 3] = 0
    rewrite(tmp_path, content)
    got = dequantize(Checkpoint.open(tmp_path).experts(0).w2, torch.float64)
    for index, expert in enumerate(dense(content, "gpt-oss")):
        assert torch.equal(got[index], expert.down)


def test_nvfp4_beside_mxfp4_in_one_layer(tmp_path: Path) -> None:
    content = raw_tensors(make(tmp_path, "deepseek-mxfp4"))
    other = raw_tensors(make(tmp_path / "nvfp4", "deepseek"))
    for name in [name for name in content if re.match(r"layers\.1\.ffn\.experts\.\d\.w2", name)]:
        del content[name]
    content |= {name: tensor for name, tensor in other.items() if re.match(r"layers\.1\.ffn\.experts\.\d\.w2", name)}
    rewrite(tmp_path, content)
    checkpoint = Checkpoint.open(tmp_path)
    words = "NVFP4 like other projections of the experts of layer 1, got I8 (MXFP4)"
    with raises(words, "in several formats are not supported"):
        checkpoint.experts(1)
    assert [refusal.what for refusal in checkpoint.refusals()] == ["layer 1"]
    checkpoint.experts(0)


def test_layers_of_both_formats(tmp_path: Path) -> None:
    content = raw_tensors(make(tmp_path, "deepseek-mxfp4"))
    other = raw_tensors(make(tmp_path / "nvfp4", "deepseek"))
    content = {name: tensor for name, tensor in content.items() if not name.startswith("layers.1.ffn.experts.")}
    content |= {name: tensor for name, tensor in other.items() if name.startswith("layers.1.ffn.experts.")}
    rewrite(tmp_path, content)
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.layout, checkpoint.layers, checkpoint.refusals()) == ("deepseek-mxfp4", (0, 1), ())
    names = [category.name for category in checkpoint.summary().categories]
    assert names[:2] == ["NVFP4 experts", "MXFP4 experts"]
    for layer, layout in enumerate(("deepseek-mxfp4", "deepseek")):
        w13, w2 = checkpoint.experts(layer)
        for index, expert in enumerate(experts_of(content, layout, layer, EXPERTS, INTERMEDIATE)):
            assert expert.gate is not None
            assert torch.equal(dequantize(w13, torch.float64)[index], torch.cat((expert.gate, expert.up)))
            assert torch.equal(dequantize(w2, torch.float64)[index], expert.down)


def test_two_stacks_in_one_layer(tmp_path: Path) -> None:
    """MXFP4 experts of a draft beside NVFP4 ones are passed over; two MXFP4 stacks are not told apart."""
    content = raw_tensors(make(tmp_path, "deepseek"))
    draft = {
        f"draft.{name}": tensor for name, tensor in raw_tensors(make(tmp_path / "mxfp4", "deepseek-mxfp4")).items()
    }
    draft = {name: tensor for name, tensor in draft.items() if ".ffn.experts." in name}
    for tensors in (content | draft, draft | content):
        rewrite(tmp_path, tensors)
        checkpoint = Checkpoint.open(tmp_path)
        assert (checkpoint.layout, checkpoint.layers, checkpoint.refusals()) == ("deepseek", (0, 1), ())
        checkpoint.experts(1)
    rewrite(tmp_path, draft | {name.replace("draft", "other"): tensor.clone() for name, tensor in draft.items()})
    with raises("expected the MXFP4 experts of layer 0 under", "got", "too"):
        Checkpoint.open(tmp_path)


# Biases.

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("gate_up_proj_bias", torch.ones(4, 96, dtype=BF16), "expected shape [4, 192], one value per row, got [4, 96]"),
        ("down_proj_bias", torch.ones(64, dtype=BF16), "expected shape [4, 64], one value per row, got [64]"),
        ("down_proj_bias", torch.ones(4, 64).long(), "expected dtype BF16 or F16 or F32, got I64"),
    ],
)
def test_biases_that_do_not_fit(name: str, tensor: Tensor, words: str, tmp_path: Path) -> None:
    changed(tmp_path, "gpt-oss", **{name: tensor})
    checkpoint = Checkpoint.open(tmp_path)
    with raises(f"{name}'", words) as caught:
        checkpoint.experts(0)
    assert checkpoint.refusals() == (("layer 0", str(caught.value)),)
    checkpoint.experts(1)


def test_two_biases_of_one_module(tmp_path: Path) -> None:
    changed(tmp_path, "gpt-oss", down_proj__bias=torch.ones(4, 64))
    with raises("down_proj.bias'", "expected one bias, got", "down_proj_bias' too"):
        Checkpoint.open(tmp_path).experts(0)


def test_a_bias_that_is_not_finite(tmp_path: Path) -> None:
    bias = torch.ones(4, 192, dtype=torch.float32)
    bias[2, 2 * 5 + 1] = float("inf")
    checkpoint = Checkpoint.open(changed(tmp_path, "gpt-oss", gate_up_proj_bias=bias))
    with raises("gate_up_proj_bias'", "expected finite biases, got NaN or infinity in row 5 of 0..95 of expert 2"):
        checkpoint.experts(0)


def test_biases_of_one_gemm_alone(tmp_path: Path) -> None:
    weights = Checkpoint.open(changed(tmp_path, "gpt-oss", down_proj_bias=None)).experts(0)
    assert weights.w2_bias is None
    assert weights.w13_bias is not None
    assert weights.w13_bias.shape == (4, 192)


@pytest.mark.parametrize("layout", ["modelopt", "quark-mxfp4", "modelopt-stack"])
def test_biases_of_modules(layout: str, tmp_path: Path) -> None:
    """As llm-compressor and ModelOpt write gpt-oss's experts: `.bias` beside the codes."""
    make(tmp_path, layout)
    generator = torch.Generator().manual_seed(2)
    added = {}

    def bias(module: str, codes: Tensor) -> Tensor | None:
        if "experts." not in module and ".moe." not in module:
            return None
        added[module] = torch.randn(codes.shape[:-1], generator=generator).half()
        return added[module]

    variants.add_leaves(tmp_path, ".bias", bias)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.refusals() == ()
    weights = checkpoint.experts(1)
    assert weights.w13_bias is not None
    assert weights.w2_bias is not None
    for expert in range(EXPERTS):
        if layout == "modelopt-stack":
            root = "model.language_model.layers.1.moe."
            gate, up, down = (added[f"{root}{name}_proj"][expert] for name in ("gate", "up", "down"))
        else:
            root = f"model.layers.1.mlp.experts.{expert}."
            gate, up, down = (added[f"{root}{name}_proj"] for name in ("gate", "up", "down"))
        assert torch.equal(weights.w13_bias[expert], torch.cat((gate, up)).float())
        assert torch.equal(weights.w2_bias[expert], down.float())


def test_biases_of_some_experts(tmp_path: Path) -> None:
    make(tmp_path, "modelopt")
    variants.add_leaves(
        tmp_path, ".bias", lambda module, codes: torch.ones(len(codes)) if "experts.2.up_proj" in module else None
    )
    with raises("experts.2.up_proj.bias'", "expected biases for all projections", "got none for model.layers.0"):
        Checkpoint.open(tmp_path)


def test_biases_of_rows_of_all_experts(tmp_path: Path) -> None:
    make(tmp_path, "modelopt-rows")
    variants.add_leaves(
        tmp_path, ".bias", lambda module, codes: torch.ones(len(codes)) if "layers.1.mlp" in module else None
    )
    checkpoint = Checkpoint.open(tmp_path)
    with raises("expected no bias of stacked rows"):
        checkpoint.experts(1)


# No gate.


def test_relu2_alone_makes_a_missing_gate_no_damage(tmp_path: Path) -> None:
    make(tmp_path, "nemotron")
    assert not Checkpoint.open(tmp_path).experts(0).gated
    variants.change_config(tmp_path, mlp_hidden_act="silu")
    with raises("expected a gate projection (w1 or gate_proj), got ['down_proj', 'up_proj'] only", "has silu"):
        Checkpoint.open(tmp_path)


def test_a_gate_of_one_expert(tmp_path: Path) -> None:
    content = raw_tensors(make(tmp_path, "nemotron"))
    root = "backbone.layers.0.mixer.experts.1."
    content |= {n.replace("up_proj", "gate_proj"): t.clone() for n, t in content.items() if n.startswith(f"{root}up")}
    rewrite(tmp_path, content)
    with raises("experts.0.gate_proj.weight'", "expected in a shard, got no such tensor"):
        Checkpoint.open(tmp_path)


def test_missing_up_of_experts_without_a_gate(tmp_path: Path) -> None:
    content = raw_tensors(make(tmp_path, "nemotron"))
    rewrite(tmp_path, {name: tensor for name, tensor in content.items() if "layers.0.mixer.experts.1.up" not in name})
    with raises("experts.1.up_proj.weight'", "expected in a shard, got no such tensor"):
        Checkpoint.open(tmp_path)
