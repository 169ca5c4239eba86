"""How far models are from the same model in fp32: their logits, and their experts on what the model gives them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from torch_nvfp4.bench.layer import BenchError
from torch_nvfp4.bench.vllm.reference import closer, distance
from torch_nvfp4.checkpoint import open_checkpoint
from torch_nvfp4.format import NVFP4Weight, dequantize
from torch_nvfp4.integrations.transformers.modules import PackedExperts
from torch_nvfp4.testing import relative_l2

__all__ = ["compare", "expert_errors", "expert_modules", "reference_model"]

_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")


class _Dequantizing:
    """[E, N, K] in fp32 for a module that takes one expert at a time; only the packed weights are kept, on the CPU."""

    def __init__(self, weight: NVFP4Weight, device: torch.device) -> None:
        self.weight = weight
        self.device = device

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        index = int(expert)
        return dequantize(NVFP4Weight(*(part[index].to(self.device) for part in self.weight)), torch.float32)


def expert_modules(packed: nn.Module) -> dict[str, int]:
    """The name of each module of packed experts in a model, and its layer."""
    return {name: module.layer for name, module in packed.named_modules() if isinstance(module, PackedExperts)}


def reference_model(
    path: Path, state: Mapping[str, Tensor], experts: Mapping[str, int], *, device: torch.device
) -> Any:
    """transformers' own model in fp32, whose own eager experts dequantize one expert after the other.

    Args:
        path: the checkpoint with the packed experts.
        state: the parameters and buffers of everything else, of a loaded model.
        experts: the names of the modules of the experts, and their layers in the checkpoint.
    """
    checkpoint = open_checkpoint(path)
    config = transformers.AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in _EXPERT_COUNTS:  # all of them would not fit
        if hasattr(config, name):
            setattr(config, name, 1)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    model.eval().requires_grad_(False)
    for name, layer in experts.items():
        module = model.get_submodule(name)
        w13, w2 = checkpoint.experts(layer)
        for part, weight in (("gate_up_proj", w13), ("down_proj", w2)):
            delattr(module, part)
            setattr(module, part, _Dequantizing(weight, device))
        module.num_experts = len(w13.data)
    for name, value in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        if name not in state:
            raise BenchError(f"expected {name} in the loaded model, got no such parameter")
        source = state[name].detach().to(device, torch.float32 if value.is_floating_point() else value.dtype)
        module = model.get_submodule(owner)
        if isinstance(value, nn.Parameter):
            setattr(module, leaf, nn.Parameter(source, requires_grad=False))
        else:
            setattr(module, leaf, source)
    return model


@torch.inference_mode()
def log_probs(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """fp32 [positions, vocab]: after each token of each prompt but the last, what the model expects next."""
    rows = []
    for _, group in itertools.groupby(prompts, len):  # prompts of one length at a time: each reads the experts again
        logits = model(torch.tensor([list(ids) for ids in group], device=model.device), use_cache=False).logits
        rows.append(logits[:, :-1].float().log_softmax(-1).flatten(0, 1))
    return torch.cat(rows)


def compare(models: Mapping[str, Any], reference: Any, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The distance of each model's log-probabilities from the reference's, and which of two is closer."""
    expected = log_probs(reference, prompts)
    following = torch.tensor([token for ids in prompts for token in ids[1:]], device=expected.device)
    values = {side: log_probs(model, prompts) for side, model in models.items()}
    result: dict[str, Any] = {side: asdict(distance(value, expected, following)) for side, value in values.items()}
    if len(values) == 2:
        ours, theirs = values.values()
        gain, error = closer(ours, theirs, expected)
        result["gain"] = {"mean": gain, "standard_error": error}
    return result


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What the named modules are called with: name -> (args, kwargs) of the last call."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hooks = []
    for name in names:

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            calls[name] = (args, kwargs)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()


@torch.inference_mode()
def expert_errors(
    models: Mapping[str, Any], giving: Any, reference: Any, ids: Sequence[int], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Per module of experts and model the relative L2 error against fp32, on what ``giving`` gives the module."""
    with recorded(giving, names) as calls:
        giving(torch.tensor([list(ids)], device=giving.device), use_cache=False)
    errors: dict[str, dict[str, float]] = {}
    for name, (args, kwargs) in calls.items():
        hidden, index, weights = (*args, *kwargs.values())
        expected = reference.get_submodule(name)(hidden.float(), index, weights.float())
        errors[name] = {
            side: relative_l2(model.get_submodule(name)(hidden, index, weights), expected)
            for side, model in models.items()
        }
    return errors
