"""Adapters of PEFT on a model with NVFP4 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.hf_models import prompt, relative, write_model

transformers = pytest.importorskip("transformers", minversion="5.23")
peft = pytest.importorskip("peft")

from torch_nvfp4.integrations.transformers.modules import PackedLinear  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM


pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("peft"), "modelopt")


def with_adapter(model: Any) -> Any:
    """LoRA on the NVFP4 attention; both matrices random, so that it does something."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def test_forward_is_that_of_the_dequantized_model(path: Path) -> None:
    packed = with_adapter(AutoModel.from_pretrained(path / "packed", dtype=torch.float32))
    oracle = with_adapter(AutoModel.from_pretrained(path / "dense", dtype=torch.float32))
    layer = packed.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.get_base_layer(), PackedLinear)
    with torch.no_grad():
        got, expected = packed(prompt()).logits, oracle(prompt()).logits
        with packed.disable_adapter():
            without = packed(prompt()).logits
    assert relative(got, expected) < 1e-5
    assert relative(without, expected) > 1e-2


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_is_refused(path: Path, safe_merge: bool) -> None:
    model = with_adapter(AutoModel.from_pretrained(path / "packed", dtype=torch.float32))
    with torch.no_grad():
        before = model(prompt()).logits
    words = (
        "expected a linear with a dense weight to merge an adapter into, got a packed NVFP4 weight; keep the adapter"
    )
    with pytest.raises(ValueError, match=words):
        model.merge_and_unload(safe_merge=safe_merge)
    with torch.no_grad():
        assert torch.equal(model(prompt()).logits, before)


def test_an_adapter_is_saved_and_loaded_alone(path: Path, tmp_path: Path) -> None:
    model = with_adapter(AutoModel.from_pretrained(path / "packed", dtype=torch.float32))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(path / "packed", dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(prompt()).logits, model(prompt()).logits)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000
