"""QLoRA: adapters of PEFT around attention, below and above frozen NVFP4 experts, beside the dequantized model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.hf_models import prompt, relative, write_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from torch_nvfp4.integrations.transformers import register, unregister  # noqa: E402
from torch_nvfp4.integrations.transformers.modules import PackedExperts, PackedLinear  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
# The layout, and the attention's modules that adapters go around: in modelopt's they are NVFP4 linears themselves.
# Not the indexer's, whose scores choose tokens and have no gradient.
MODELS = {"deepseek": r".*self_attn\.(q_b_proj|o_b_proj)", "modelopt": ["q_proj", "o_proj"]}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register()
    yield
    unregister()


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param) / request.param, request.param)


def with_adapters(path: Path, kind: str, **options: Any) -> Any:
    """Both matrices of every adapter random, so that both have a gradient."""
    model = AutoModel.from_pretrained(path / kind, dtype=torch.float32, **options)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODELS[path.name], init_lora_weights=False)
    return peft.get_peft_model(model, config).train()


def adapters(model: Any) -> dict[str, Tensor]:
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found
    assert all("lora_" in name for name in found)
    return found


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(prompt(), labels=prompt()).loss
    return loss


def test_gradients_are_those_of_the_dequantized_model(path: Path) -> None:
    packed, oracle = with_adapters(path, "packed"), with_adapters(path, "dense")
    assert any(isinstance(module, PackedExperts) for module in packed.modules())
    assert any(isinstance(module, PackedLinear) for module in packed.modules()) == (path.name == "modelopt")
    for model in (packed, oracle):
        loss_of(model).backward()
    expected = adapters(oracle)
    got = adapters(packed)
    assert got.keys() == expected.keys()
    for name, parameter in got.items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any())
        assert relative(parameter.grad, expected[name].grad) < 1e-4, name  # type: ignore[arg-type]


def test_training_lowers_the_loss(path: Path) -> None:
    """Step for step as the dequantized model, with its layers checkpointed."""
    losses: dict[str, list[float]] = {}
    for kind in ("packed", "dense"):
        model = with_adapters(path, kind)
        if kind == "packed":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        before = [parameter.detach().clone() for parameter in model.parameters() if not parameter.requires_grad]
        optimizer = torch.optim.SGD(adapters(model).values(), lr=0.5)
        losses[kind] = []
        for _ in range(6):
            loss = loss_of(model)
            losses[kind].append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    assert losses["packed"][-1] < losses["packed"][0] - 0.01
    torch.testing.assert_close(losses["packed"], losses["dense"], rtol=1e-4, atol=1e-4)


def test_prepared_for_kbit_training_under_autocast(path: Path) -> None:
    """The recipe for QLoRA: what is not quantized becomes float32, and autocast makes 16 bits of what the packed layers
    get, since on a GPU they take no others. The loss is no measure here: rounding changes some tokens' experts."""
    model = AutoModel.from_pretrained(path / "packed", dtype=torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODELS[path.name], init_lora_weights=False)
    model = peft.get_peft_model(model, settings).train()
    got = []

    def check(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        got.append(args[0].dtype)
        assert output.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(output, module.forward(args[0].bfloat16(), *args[1:]))

    for module in model.modules():
        if isinstance(module, (PackedExperts, PackedLinear)):
            module.register_forward_hook(check)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert torch.float32 in got
    for name, parameter in adapters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_the_trainer_takes_it(path: Path, tmp_path: Path) -> None:
    """It refuses quantized models whose quantizer cannot train."""
    model = with_adapters(path, "packed")
    before = {name: parameter.detach().clone() for name, parameter in adapters(model).items()}
    rows = [{"input_ids": row, "labels": row} for row in prompt(4)]
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    result = transformers.Trainer(model=model, args=settings, train_dataset=rows).train()
    assert result.global_step == 2
    assert all(not torch.equal(parameter, before[name]) for name, parameter in adapters(model).items())
