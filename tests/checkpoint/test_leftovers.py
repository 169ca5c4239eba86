"""Tensors beside the leaves of NVFP4 modules: what would change the result is refused by name, the rest loads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from helpers.checkpoint_files import EXPERTS, HIDDEN, INTERMEDIATE, leaves_of, raises, random_leaves, write_changed
from torch_nvfp4.checkpoint import Checkpoint, variants, write_checkpoint
from torch_nvfp4.checkpoint.headers import TensorInfo
from torch_nvfp4.checkpoint.leftovers import leftovers
from torch_nvfp4.checkpoint.synthetic import LayoutName

ROOT = "layers.0.ffn."


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("experts.0.w1.lora_A.weight", torch.ones(8, HIDDEN)),
        ("experts.0.w1.input_quantizer._pre_quant_scale", torch.full((HIDDEN,), 3.0)),
        ("experts.0.w2.R4_input.weight", torch.eye(INTERMEDIATE).flip(0)),
        ("experts.0.w1_bias", torch.ones(INTERMEDIATE)),
        ("experts.gate_up_bias", torch.ones(EXPERTS, 2 * INTERMEDIATE)),
        ("experts.0.w4.weight", torch.ones(HIDDEN, HIDDEN)),
        ("experts.0.pre_quant_scale", torch.full((HIDDEN,), 3.0)),
        ("experts.1234567.w1.weight", torch.ones(8, HIDDEN)),
        ("experts.0.w1.lora_A.k_scale", torch.ones(1)),
        ("experts.0.mtp_head.weight", torch.ones(1)),
    ],
)
def test_tensor_beside_the_projections(name: str, tensor: Tensor, tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: tensors.update({ROOT + name: tensor}))
    checkpoint = Checkpoint.open(tmp_path)
    with raises(ROOT + name, "expected", "got") as caught:
        checkpoint.experts(0)
    assert checkpoint.refusals() == (("layer 0", str(caught.value)),)
    checkpoint.experts(1)


def test_fourth_nvfp4_projection(tmp_path: Path) -> None:
    leaves = leaves_of("modelopt", f"{ROOT}experts.0.w4", *random_leaves(torch.Generator(), HIDDEN, HIDDEN))
    write_changed(tmp_path, lambda tensors: tensors.update(leaves))
    with raises(
        f"{ROOT}experts.0.w4.weight'", "expected only codes, scales, biases and input scales, got leaves '0.w4.weight'"
    ):
        Checkpoint.open(tmp_path).experts(0)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("experts.input_scale", torch.ones(EXPERTS)),
        ("experts.0.input_scale", torch.ones(())),
        ("experts.0.w1.input_quantizer._amax", torch.ones(())),
        ("experts.0.w1.input_quantizer._pre_quant_scale", torch.ones(HIDDEN)),
        ("experts.e_score_correction_bias", torch.ones(EXPERTS)),
        ("experts.shared_expert.w1.weight", torch.ones(4, HIDDEN)),
        ("gate.weight", torch.ones(EXPERTS, HIDDEN)),
        ("gate.bias", torch.ones(EXPERTS)),
        ("experts_norm.weight", torch.ones(HIDDEN)),
    ],
)
def test_tensor_that_changes_nothing(name: str, tensor: Tensor, tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: tensors.update({ROOT + name: tensor}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.refusals() == ()
    checkpoint.experts(0)


@pytest.mark.parametrize("layout", get_args(LayoutName))
@pytest.mark.parametrize("name", ["{}gate_up_bias", "{}0.down_proj.lora_B.weight", "{}down_proj.lora_B.weight"])
def test_every_layout(layout: LayoutName, name: str, tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, hidden_size=32, moe_intermediate_size=32, n_routed_experts=2, num_experts_per_tok=1,
        num_hidden_layers=2, layout=layout,
    )  # fmt: skip
    checkpoint = Checkpoint.open(tmp_path)
    root = next(
        name for name in checkpoint.tensors if ".experts." in name or (".moe." in name and ".moe.gate." not in name)
    )
    root = root[: max(root.rfind(".experts.") + 9, root.rfind(".moe.") + 5)].replace("layers.1.", "layers.0.")
    if name.startswith("{}0.") and ".moe." in root:
        return  # no expert has a module of its own there
    variants.add_tensors(tmp_path, {name.format(root): torch.ones(4)})
    with raises(name.format(root), "expected only codes, scales, biases and input scales, got a leaf"):
        Checkpoint.open(tmp_path).experts(0)


def test_router_of_a_block_called_moe(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, hidden_size=32, moe_intermediate_size=32, n_routed_experts=2, num_experts_per_tok=1,
        num_hidden_layers=2, layout="modelopt-stack",
    )  # fmt: skip
    root = "model.language_model.layers.0.moe."
    variants.add_tensors(tmp_path, {f"{root}gate.weight": torch.ones(2, 32), f"{root}router_bias": torch.ones(2)})
    assert Checkpoint.open(tmp_path).refusals() == ()


def test_adapter_beside_a_linear(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, hidden_size=32, moe_intermediate_size=32, n_routed_experts=2, num_experts_per_tok=1,
        num_hidden_layers=2, layout="modelopt",
    )  # fmt: skip
    linear = "model.layers.0.self_attn.q_proj"
    variants.add_tensors(tmp_path, {f"{linear}.lora_A.weight": torch.ones(4, 32), f"{linear}.bias": torch.ones(4)})
    checkpoint = Checkpoint.open(tmp_path)
    with raises(f"{linear}.lora_A.weight'", "got a leaf 'lora_A.weight' that nothing would apply") as caught:
        checkpoint.linear(linear)
    assert checkpoint.refusals() == ((linear, str(caught.value)),)
    checkpoint.linear("model.layers.0.self_attn.k_proj")


def test_no_quadratic_time() -> None:
    roots = [f"layers.{layer}.experts." for layer in range(50_000)]
    names = [f"layers.{layer}.experts.0.x" for layer in range(50_000)] + ["experts." * 100_000]
    started = time.perf_counter()
    found = leftovers(roots, [TensorInfo(name, "U8", (), 1, Path()) for name in names])
    assert time.perf_counter() - started < 5.0
    assert len(found) == 50_000
