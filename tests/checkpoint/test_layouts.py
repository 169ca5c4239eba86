"""Every layout of published checkpoints: values against an fp64 loop over the raw tensors, slices, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.checkpoint_files import raises
from helpers.fp64_loop import Matrices, experts_of, moe, raw_tensors
from torch_nvfp4 import NVFP4Experts
from torch_nvfp4.checkpoint import Checkpoint, ExpertWeights, variants, write_checkpoint
from torch_nvfp4.checkpoint.layouts import LAYOUTS
from torch_nvfp4.checkpoint.synthetic import LayoutName
from torch_nvfp4.format import NVFP4Weight, dequantize
from torch_nvfp4.testing import random_routing, relative_l2

HIDDEN, LIMIT, LAYERS = 64, 2.0, 2
EXPERTS, INTERMEDIATE = (4, 2), (32, 64)  # of layers 0 and 1
NAMES = get_args(LayoutName)
# What the models of these layouts do that others do not.
SPECIAL: dict[str, dict[str, Any]] = {
    "modelopt-stack": {"kind": "swiglustep"},
    "modelopt-parameters": {"on_input": True},
    "nemotron": {"kind": "relu2"},
    "compressed-tensors-mxfp4": {"kind": "situ"},
    "gpt-oss": {"kind": "gpt-oss"},
}


def make(path: Path, layout: Any = "modelopt", **changes: Any) -> Path:
    sizes: dict[str, Any] = {"n_routed_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE}
    sizes |= {"hidden_size": HIDDEN, "num_experts_per_tok": 2, "num_hidden_layers": LAYERS, "swiglu_limit": LIMIT}
    return write_checkpoint(path, layout=layout, **(sizes | changes))


def inputs(num_experts: int, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, HIDDEN, generator=generator)
    return x, *random_routing(6, num_experts, top_k, generator=generator)


def check(path: Path, layer: int, experts: list[Matrices], **gate: Any) -> None:
    """The loaded layer, whole and in every slice, against the loop."""
    args = inputs(len(experts))
    expected = moe(args[0], experts, *args[1:], **gate)
    assert relative_l2(NVFP4Experts.from_checkpoint(path, layer)(*args), expected) < 1e-5
    for kind in ("tp", "ep"):
        parts = [
            NVFP4Experts.from_checkpoint(path, layer, **{f"{kind}_rank": rank, f"{kind}_size": 2})(*args)
            for rank in range(2)
        ]
        assert relative_l2(parts[0] + parts[1], expected) < 1e-5, kind


def test_every_row_of_the_table_is_written() -> None:
    assert tuple(sorted(NAMES, key=NAMES.index)) == NAMES
    assert {layout.name for layout in LAYOUTS} == set(NAMES)


def check_read(weights: ExpertWeights, experts: list[Matrices], rows: slice, rtol: float) -> None:
    """What was read, in fp64, against the raw tensors; `rows` of gate and up, columns of down."""
    gated = experts[0].gate is not None
    assert weights.gated == gated
    w13, w2 = dequantize(weights.w13, torch.float64), dequantize(weights.w2, torch.float64)
    assert weights.w13.global_scale.shape == ((len(experts), 2) if gated else (len(experts),))
    assert weights.w2.global_scale.shape == (len(experts),)
    for index, expert in enumerate(experts):
        first = [matrix[rows] for matrix in (expert.gate, expert.up) if matrix is not None]
        for actual, wanted in ((w13[index], torch.cat(first)), (w2[index], expert.down[:, rows])):
            assert actual.shape == wanted.shape
            assert torch.allclose(actual, wanted, rtol=rtol, atol=0.0)
        if expert.gate_bias is None:
            assert weights.w13_bias is None
            assert weights.w2_bias is None
            continue
        assert weights.w13_bias is not None
        assert weights.w13_bias.dtype == torch.float32
        assert torch.equal(weights.w13_bias[index].double(), torch.cat((expert.gate_bias[rows], expert.up_bias[rows])))
        assert weights.w2_bias is not None
        assert weights.w2_bias.dtype == torch.float32
        first_rank = rows.start == 0
        assert torch.equal(weights.w2_bias[index].double(), expert.down_bias * (1.0 if first_rank else 0.0))


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("layout", NAMES)
def test_read_values_of_every_layout(layout: str, layer: int, tmp_path: Path) -> None:
    """Whole, and in slices of 16 of I, which are half a group of MXFP4. Exact but for stored reciprocals."""
    make(tmp_path, layout)
    num, intermediate = EXPERTS[layer], INTERMEDIATE[layer]
    experts = experts_of(tmp_path, layout, layer, num, intermediate)
    checkpoint = Checkpoint.open(tmp_path)
    rtol = 2e-7 if layout.startswith("compressed-tensors") else 0.0
    check_read(checkpoint.experts(layer), experts, slice(0, intermediate), rtol)
    size = intermediate // 16
    for rank in range(size):
        part = checkpoint.experts(layer, tp_rank=rank, tp_size=size)
        check_read(part, experts, slice(16 * rank, 16 * rank + 16), rtol)
    for rank in range(2):
        part = checkpoint.experts(layer, ep_rank=rank, ep_size=2)
        check_read(part, experts[rank * num // 2 : (rank + 1) * num // 2], slice(0, intermediate), rtol)


def test_biases_are_not_lost(tmp_path: Path) -> None:
    make(tmp_path, "gpt-oss")
    with raises("w13 and w2 alone of experts with w13_bias and w2_bias"):
        _w13, _w2 = Checkpoint.open(tmp_path).experts(0)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("layout", NAMES)
def test_values_of_every_layout(layout: str, layer: int, tmp_path: Path) -> None:
    """Numbers and sizes of the experts differ between the layers, as after pruning."""
    make(tmp_path, layout)
    experts = experts_of(tmp_path, layout, layer, EXPERTS[layer], INTERMEDIATE[layer])
    check(tmp_path, layer, experts, limit=LIMIT, **SPECIAL.get(layout, {}))


@pytest.mark.parametrize("biased", [("up_proj", "gate_proj", "down_proj"), ("up_proj", "gate_proj"), ("down_proj",)])
def test_values_with_biases_of_nvfp4(biased: tuple[str, ...], tmp_path: Path) -> None:
    """`.bias` beside the codes, as llm-compressor and ModelOpt write them; of both GEMMs or of one."""
    make(tmp_path, "modelopt")
    generator = torch.Generator().manual_seed(7)
    added: dict[str, Tensor] = {}

    def bias(module: str, codes: Tensor) -> Tensor | None:
        if "layers.1.mlp.experts." not in module or not module.endswith(biased):
            return None
        added[module] = torch.randn(len(codes), generator=generator).to(torch.bfloat16)
        return added[module]

    variants.add_leaves(tmp_path, ".bias", bias)
    experts = []
    for index, expert in enumerate(experts_of(tmp_path, "modelopt", 1, EXPERTS[1], INTERMEDIATE[1])):
        names = (f"model.layers.1.mlp.experts.{index}.{name}_proj" for name in ("gate", "up", "down"))
        biases = (added[name].double() if name in added else None for name in names)
        experts.append(Matrices(*expert[:3], *biases))
    assert len(added) == len(biased) * EXPERTS[1]
    check(tmp_path, 1, experts, limit=LIMIT)


@pytest.mark.parametrize("layout", NAMES)
def test_summary_of_every_layout(layout: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make(tmp_path, layout))
    summary = checkpoint.summary()
    assert (summary.layout, summary.layers, summary.refusals, summary.left_out) == (layout, (0, 1), (), 0)
    assert summary.expert_counts == dict(enumerate(EXPERTS))
    assert summary.intermediate_sizes == dict(enumerate(INTERMEDIATE))
    assert summary.apply_router_weight_on_input == (layout == "modelopt-parameters")
    for layer in range(LAYERS):
        config = checkpoint.layer_config(layer)
        assert config.gated == config.gate.gated == (layout != "nemotron")
        assert config.has_w13_bias == config.has_w2_bias == (layout == "gpt-oss")
        assert (config.num_experts, config.intermediate_size) == (EXPERTS[layer], INTERMEDIATE[layer])
        assert (config.hidden_size, config.top_k) == (HIDDEN, 2)
        assert config.gate == checkpoint.gate(layer)
        assert config.apply_router_weight_on_input == (layout == "modelopt-parameters")
    assert len(checkpoint.expert_map(layer=1)) == EXPERTS[1]
    assert len(checkpoint.expert_map()) == EXPERTS[0]


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("part", ["data", "scale", "global_scale"])
def test_missing_leaf_of_every_layout(layout: str, part: str, tmp_path: Path) -> None:
    make(tmp_path, layout)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    spelling = next(row.spelling for row in LAYOUTS if row.name == layout)
    leaf = getattr(spelling, part)
    if leaf is None:
        return  # MXFP4 has no global scale
    suffix = ("w2" if layout.startswith("deepseek") or "tensors-mxfp4" in layout else "down_proj") + leaf
    names = [name for name in content["weight_map"] if re.search(r"\.(experts|moe)\.", name)]
    name = next(name for name in names if name.endswith(suffix))
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with raises(f"'{name}'", "expected in a shard, got no such tensor"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("layout", [row.name for row in LAYOUTS if row.kind != "matrix"])
def test_stacks_of_different_lengths(layout: str, tmp_path: Path) -> None:
    """down_proj has one expert more than the config and the other projections."""
    make(tmp_path, layout)
    row = next(row for row in LAYOUTS if row.name == layout)
    tensors = raw_tensors(tmp_path)
    for name, tensor in tensors.items():
        if ".layers.0." in name and "down_proj" in name and tensor.dim() and tensor.numel() > 1:
            k = HIDDEN if row.kind == "rows" else 1
            raw = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
            tensors[name] = torch.cat((raw, raw[:k])).view(tensor.dtype)
    rewrite(tmp_path, tensors)
    with raises("expected as many experts as", "down_proj", "has, 5, got 4"):
        Checkpoint.open(tmp_path)


def rewrite(path: Path, tensors: dict[str, Tensor]) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def test_stack_of_unknown_leaves(tmp_path: Path) -> None:
    make(tmp_path, "modelopt-stack")
    tensors = {
        re.sub(r"moe\.(\w+_proj)\.weight$", r"moe.\1.weight_packed", name): tensor
        for name, tensor in raw_tensors(tmp_path).items()
    }
    rewrite(tmp_path, tensors)
    with raises("weight_global_scale'", "expected in a shard, got no such tensor"):
        Checkpoint.open(tmp_path)


def test_global_scale_for_another_number_of_experts(tmp_path: Path) -> None:
    make(tmp_path, "modelopt-stack")
    tensors = raw_tensors(tmp_path)
    name = "model.language_model.layers.0.moe.up_proj.weight_scale_2"
    tensors[name] = tensors[name][:3].clone()
    rewrite(tmp_path, tensors)
    with raises(f"'{name}'", "expected shape [] or [1] or [4] or [4, 1] or [4, 1, 1], got [3]"):
        Checkpoint.open(tmp_path)


def test_rows_of_a_broken_number_of_experts(tmp_path: Path) -> None:
    make(tmp_path, "modelopt-rows")
    tensors = raw_tensors(tmp_path)
    for leaf in ("weight", "weight_scale"):
        name = f"model.language_model.layers.0.mlp.experts.gate_up_proj.{leaf}"
        tensors[name] = tensors[name].view(torch.uint8)[:-1].clone().view(tensors[name].dtype)
    rewrite(tmp_path, tensors)
    with raises("gate_up_proj.weight'", "expected rows of whole experts, a multiple of 64, got 255"):
        Checkpoint.open(tmp_path)


def test_nan_scale_in_a_stack(tmp_path: Path) -> None:
    make(tmp_path, "compressed-tensors-parameters")
    tensors = raw_tensors(tmp_path)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj_scale"
    tensors[name].view(torch.uint8)[2, 37, 1] = 0x7F
    rewrite(tmp_path, tensors)
    with raises(f"'{name}'", "expected finite F8_E4M3 scales", "at row 37, group 1 of expert 2"):
        Checkpoint.open(tmp_path).experts(0)


def test_a_stack_is_no_linear(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make(tmp_path, "modelopt-stack"))
    with raises("expected the name of an NVFP4 module", "moe.gate_proj"):
        checkpoint.linear("model.language_model.layers.0.moe.gate_proj")


def test_dense_modules_called_moe_are_linears(tmp_path: Path) -> None:
    make(tmp_path)
    tensors = raw_tensors(tmp_path)
    variants.add_tensors(
        tmp_path,
        {
            name.replace("self_attn.q_proj", "moe.up_proj"): tensor.clone()
            for name, tensor in tensors.items()
            if "layers.0.self_attn.q_proj" in name
        },
    )
    assert "model.layers.0.moe.up_proj" in Checkpoint.open(tmp_path).linears


# The index is the authority.


def test_index_names_an_overlay(tmp_path: Path) -> None:
    """Stale copies of some experts stay in the shards that they had."""
    make(tmp_path)
    expected = [experts_of(tmp_path, "modelopt", layer, EXPERTS[layer], INTERMEDIATE[layer]) for layer in range(LAYERS)]
    moved = [name for name in raw_tensors(tmp_path) if re.search(r"experts\.[02]\.", name)]
    variants.move_to_overlay(tmp_path, moved)
    for layer in range(LAYERS):
        check(tmp_path, layer, expected[layer], limit=LIMIT)
    summary = Checkpoint.open(tmp_path).summary()
    assert (summary.shards, summary.left_out) == (3, len(moved))


def test_index_does_not_name_stale_tensors(tmp_path: Path) -> None:
    """Experts past those of the config, a bias and an MXFP4 expert are in a shard and not in the checkpoint."""
    make(tmp_path)
    expected = experts_of(tmp_path, "modelopt", 0, EXPERTS[0], INTERMEDIATE[0])
    count = variants.add_stale_tensors(
        tmp_path, lambda name: name.replace("experts.1.", "experts.9.") if "experts.1." in name else None
    )
    count += variants.add_stale_tensors(
        tmp_path, lambda name: name.replace(".weight", ".bias") if "experts.0.up_proj.weight" in name else None
    )
    check(tmp_path, 0, expected, limit=LIMIT)
    summary = Checkpoint.open(tmp_path).summary()
    assert (summary.left_out, summary.refusals) == (count, ())
    assert count > 8
    (tmp_path / "model.safetensors.index.json").unlink()
    with raises("expected experts 0..3 in layer 0 (from config.json), got also expert 9"):
        Checkpoint.open(tmp_path)


# Two stacks in one checkpoint.


def test_unquantized_stack_beside_nvfp4(tmp_path: Path) -> None:
    make(tmp_path)
    expected = experts_of(tmp_path, "modelopt", 0, EXPERTS[0], INTERMEDIATE[0])
    variants.add_stack(tmp_path, "talker.model.layers.0.mlp.experts")
    config = json.loads((tmp_path / "config.json").read_text())
    omni = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"text_config": config},
        "talker_config": {"num_experts": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(omni))
    check(tmp_path, 0, expected, limit=LIMIT)
    assert Checkpoint.open(tmp_path).summary().model_type == "qwen3_moe"


def test_two_nvfp4_stacks_in_one_layer(tmp_path: Path) -> None:
    make(tmp_path)
    tensors = raw_tensors(tmp_path)
    talker = {f"talker.{name}": tensor.clone() for name, tensor in tensors.items() if ".layers.0.mlp.experts." in name}
    variants.add_tensors(tmp_path, talker)
    with raises("expected the NVFP4 experts of layer 0 under", "got", "too"):
        Checkpoint.open(tmp_path)


def test_single_experts_beside_a_stack(tmp_path: Path) -> None:
    make(tmp_path, "compressed-tensors-parameters")
    root = "model.language_model.layers.0.mlp.experts."
    variants.add_tensors(tmp_path, {f"{root}0.gate_proj.weight": torch.ones(2, 2)})
    with raises(f"expected one layout for the experts of layer 0, got tensors of single experts under '{root}'"):
        Checkpoint.open(tmp_path)


def test_gate_up_and_gate(tmp_path: Path) -> None:
    make(tmp_path, "modelopt-stack")
    tensors = raw_tensors(tmp_path)
    root = "model.language_model.layers.0.moe."
    variants.add_tensors(
        tmp_path,
        {
            name.replace("up_proj", "gate_up_proj"): tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith(f"{root}up_proj")
        },
    )
    with raises(root, "expected gate and up in one projection or in two", "gate_up_proj"):
        Checkpoint.open(tmp_path)


# Leaves that nothing applies.


@pytest.mark.parametrize("layout", ["deepseek", "compressed-tensors", "modelopt-stack"])
def test_awq_scales_of_one_change_nothing(layout: str, tmp_path: Path) -> None:
    make(tmp_path, layout)
    expected = experts_of(tmp_path, layout, 0, EXPERTS[0], INTERMEDIATE[0])
    variants.add_leaves(
        tmp_path, ".pre_quant_scale", lambda module, codes: torch.ones(2 * codes.shape[-1], dtype=torch.bfloat16)
    )
    check(tmp_path, 0, expected, limit=LIMIT, **SPECIAL.get(layout, {}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.refusals() == ()
    for name in checkpoint.linears:
        checkpoint.linear(name)


@pytest.mark.parametrize(
    ("leaf", "value", "words"),
    [
        (".pre_quant_scale", torch.tensor([1.0, 1.0, 0.5]), ("expected ones", "got 0.5", "quantize without AWQ")),
        (".pre_quant_scale", torch.ones(3, dtype=torch.int32), ("expected ones", "got dtype I32")),
        (".zero_point", torch.ones(1), ("only codes, scales, biases and input scales, got a leaf 'zero_point'",)),
    ],
)
@pytest.mark.parametrize("layout", ["modelopt", "modelopt-stack"])
def test_refusals_are_what_loading_refuses(
    layout: str, leaf: str, value: Tensor, words: tuple[str, ...], tmp_path: Path
) -> None:
    make(tmp_path, layout)
    variants.add_leaves(tmp_path, leaf, lambda module, codes: value if ".layers.1." in module else None)
    checkpoint = Checkpoint.open(tmp_path)
    refusals = {refusal.what: refusal.reason for refusal in checkpoint.refusals()}
    assert checkpoint.summary().refusals == checkpoint.refusals()
    assert checkpoint.layers == (0, 1)
    linears = {name for name in checkpoint.linears if ".layers.1." in name}
    assert refusals.keys() == {"layer 1"} | linears
    checkpoint.experts(0)
    with raises(*words) as caught:
        checkpoint.experts(1)
    assert str(caught.value) == refusals["layer 1"]
    for name in linears:
        with raises(*words) as caught:
            checkpoint.linear(name)
        assert str(caught.value) == refusals[name]


def test_several_leaves_are_named_at_once(tmp_path: Path) -> None:
    make(tmp_path)
    for leaf in (".smooth_factor", ".zero_point"):
        variants.add_leaves(tmp_path, leaf, lambda module, codes: torch.ones(1))
    with raises("leaves 'smooth_factor' and 'zero_point' that nothing would apply"):
        Checkpoint.open(tmp_path).experts(0)


# Layers in several formats.


def replace_down(path: Path, layers: tuple[int, ...], **leaves: Tensor) -> None:
    tensors = raw_tensors(path)
    for name in [name for name in tensors if re.search(rf"layers\.{list(layers)}.*down_proj", name)]:
        module = name[: name.index("down_proj") + len("down_proj")]
        del tensors[name]
        tensors.update({f"{module}.{leaf}": tensor.clone() for leaf, tensor in leaves.items()})
    rewrite(path, tensors)


FP8 = torch.zeros(HIDDEN, 32).to(torch.float8_e4m3fn)


def test_fp8_down_beside_nvfp4_in_one_layer(tmp_path: Path) -> None:
    make(tmp_path)
    expected = experts_of(tmp_path, "modelopt", 0, EXPERTS[0], INTERMEDIATE[0])
    replace_down(tmp_path, (1,), weight=FP8, weight_scale=torch.ones(()), input_scale=torch.ones(()))
    checkpoint = Checkpoint.open(tmp_path)
    check(tmp_path, 0, expected, limit=LIMIT)
    words = ("down_proj.weight'", "NVFP4 like other projections of the experts of layer 1", "got F8_E4M3 (FP8)")
    with raises(*words, "not supported") as caught:
        checkpoint.experts(1)
    assert checkpoint.refusals() == (("layer 1", str(caught.value)),)
    assert checkpoint.layers == (0, 1)
    with raises(*words):
        checkpoint.layer_config(1)


def test_nothing_could_be_loaded(tmp_path: Path) -> None:
    make(tmp_path)
    replace_down(tmp_path, (0, 1), weight=FP8, weight_scale=torch.ones(()))
    with raises("NVFP4 like other projections of the experts of layer 0", "got F8_E4M3"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("layout", ["modelopt", "modelopt-stack"])
def test_experts_without_a_gate(layout: str, tmp_path: Path) -> None:
    make(tmp_path, layout)
    rewrite(tmp_path, {name: tensor for name, tensor in raw_tensors(tmp_path).items() if "gate_proj" not in name})
    with raises("expected a gate projection", "['down_proj', 'up_proj'] only, and config.json has silu", "relu2"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("layout", ["compressed-tensors-parameters", "modelopt-parameters"])
def test_interleaved_gate_and_up_of_nvfp4(layout: str, tmp_path: Path) -> None:
    """gpt-oss's model type makes rows alternate, in stacks [E, out, in] and [E, in, out]."""
    make(tmp_path, layout)
    variants.change_config(tmp_path, model_type="gpt_oss")
    experts = experts_of(tmp_path, layout, 0, EXPERTS[0], INTERMEDIATE[0])
    one_scale = layout == "modelopt-parameters"  # for gate and up: otherwise the loop's halves have their own
    for part, (start, stop) in {None: (0, 32), 0: (0, 16), 1: (16, 32)}.items():
        ranks = {} if part is None else {"tp_rank": part, "tp_size": 2}
        w13, w2 = Checkpoint.open(tmp_path).experts(0, **ranks)
        for index, expert in enumerate(experts):
            assert expert.gate is not None
            rows = torch.cat((expert.gate, expert.up))
            wanted = torch.cat((rows[2 * start : 2 * stop : 2], rows[2 * start + 1 : 2 * stop : 2]))
            got = dequantize(NVFP4Weight(*(leaf[index] for leaf in w13)), torch.float64)
            if one_scale:
                assert torch.equal(got, wanted)
            else:
                assert torch.equal(got.sign(), wanted.sign())
            down = dequantize(NVFP4Weight(*(leaf[index] for leaf in w2)), torch.float64)
            assert torch.allclose(down, expert.down[:, start:stop], rtol=2e-7, atol=0)


def test_scales_without_codes(tmp_path: Path) -> None:
    make(tmp_path)
    root = "model.layers.0.mlp.experts."
    tensors = {name: tensor for name, tensor in raw_tensors(tmp_path).items() if root not in name}
    tensors |= {f"{root}{name}_weight_scale": torch.ones(4, 4, 4) for name in ("gate_up_proj", "down_proj")}
    rewrite(tmp_path, tensors)
    with raises(f"'{root}gate_up_proj'", "expected in a shard, got no such tensor", "has ['_weight_scale']"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("quant_algo", ["W4A16_NVFP4", "MIXED_PRECISION", "NVFP4"])
def test_quant_algo_is_reported_and_headers_decide(quant_algo: str, tmp_path: Path) -> None:
    make(tmp_path)
    expected = experts_of(tmp_path, "modelopt", 0, EXPERTS[0], INTERMEDIATE[0])
    quantized = {
        "model.layers.0.mlp.experts": {"quant_algo": "NVFP4"},
        "model.layers.1.self_attn": {"quant_algo": "FP8"},
    }
    section = {"quant_method": "modelopt", "quant_algo": quant_algo, "quantized_layers": quantized}
    variants.change_config(tmp_path, quantization_config=section)
    tensors = {name: tensor for name, tensor in raw_tensors(tmp_path).items() if "input_scale" not in name}
    rewrite(tmp_path, tensors)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.summary().quant_algo == quant_algo
    args = inputs(EXPERTS[0])
    out = NVFP4Experts.from_checkpoint(checkpoint, 0)(*args)
    assert relative_l2(out, moe(args[0], expected, *args[1:], limit=LIMIT)) < 1e-5


# What the models' configs mean.


def test_llama4_scales_the_input(tmp_path: Path) -> None:
    """On the output, as elsewhere, the result is another one; also with experts stored one by one."""
    make(tmp_path)
    experts = experts_of(tmp_path, "modelopt", 0, EXPERTS[0], INTERMEDIATE[0])
    variants.change_config(tmp_path, model_type="llama4_text")
    check(tmp_path, 0, experts, limit=LIMIT, on_input=True)
    args = inputs(EXPERTS[0])
    one, other = (moe(args[0], experts, *args[1:], limit=LIMIT, on_input=on_input) for on_input in (True, False))
    assert relative_l2(one, other) > 0.1


def test_gemma4_keys(tmp_path: Path) -> None:
    make(tmp_path, swiglu_limit=None)
    experts = experts_of(tmp_path, "modelopt", 0, EXPERTS[0], INTERMEDIATE[0])
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"top_k_experts": config.pop("num_experts_per_tok"), "hidden_activation": "gelu_pytorch_tanh"}
    del config["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": config}))
    assert Checkpoint.open(tmp_path).top_k == 2
    check(tmp_path, 0, experts, kind="gelu_tanh")


def test_ling_limits(tmp_path: Path) -> None:
    make(tmp_path, swiglu_limit=None)
    variants.change_config(
        tmp_path,
        model_type="bailing_moe_v3",
        expert_swiglu_limit_list=[0.0, 0.5],
        share_expert_swiglu_limit_list=[0.25, 0.25],
    )
    for layer, gate in enumerate(({}, {"kind": "swiglustep", "limit": 0.5})):
        experts = experts_of(tmp_path, "modelopt", layer, EXPERTS[layer], INTERMEDIATE[layer])
        check(tmp_path, layer, experts, **gate)


def test_sizes_of_layers_against_the_config(tmp_path: Path) -> None:
    make(tmp_path)
    variants.change_config(tmp_path, num_experts=[4, 3])
    with raises("expected experts 0..2 in layer 1 (from config.json), got no expert 2"):
        Checkpoint.open(tmp_path)
    variants.change_config(tmp_path, num_experts=[4, 2], moe_intermediate_size=[32, 48])
    with raises("layers.1.", "for hidden size 64, intermediate size 48, got [64, 32]"):
        Checkpoint.open(tmp_path)
    # A list of another length counts layers in an unknown way: the tensors decide.
    variants.change_config(tmp_path, num_experts=[9], moe_intermediate_size=[9])
    assert Checkpoint.open(tmp_path).summary().expert_counts == {0: 4, 1: 2}
