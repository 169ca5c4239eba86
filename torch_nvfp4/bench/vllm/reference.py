"""The served model in fp32 with dequantized weights, and how far a run of vLLM is from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from torch_nvfp4.bench.layer import BenchError
from torch_nvfp4.format import NVFP4Weight, dequantize

__all__ = ["Distance", "closer", "distance", "reference_log_probs"]


@dataclass(frozen=True)
class Distance:
    """How far log-probabilities are from the reference's, over all positions."""

    positions: int
    mean_error: float  # of the log-probability of the token that follows, absolute
    max_error: float
    mean_kl: float  # Kullback-Leibler divergence from the reference, nats
    max_kl: float
    same_top: float  # share of the positions with the same most likely token


def distance(log_probs: Tensor, reference: Tensor, following: Tensor) -> Distance:
    """Args:
    log_probs, reference: [positions, vocab], of the run and of the reference.
    following: the token that follows at each position, int64 [positions].

    Raises BenchError unless every log-probability is a number.
    """
    _check(log_probs, reference)
    columns = following.view(-1, 1)
    error = (log_probs.gather(1, columns).double() - reference.gather(1, columns).double()).abs()
    kl = _divergence(log_probs, reference)
    return Distance(
        positions=len(following),
        mean_error=float(error.mean()),
        max_error=float(error.max()),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        same_top=float((log_probs.argmax(1) == reference.argmax(1)).double().mean()),
    )


def closer(ours: Tensor, theirs: Tensor, reference: Tensor) -> tuple[float, float]:
    """The mean over the positions of (divergence of theirs - divergence of ours), and its standard error.

    Positive: ours is closer to the reference. A mean of less than two standard errors says that they are equal.
    """
    gain = _divergence(theirs, reference) - _divergence(ours, reference)
    return float(gain.mean()), float(gain.std()) / math.sqrt(len(gain))


def _divergence(log_probs: Tensor, reference: Tensor) -> Tensor:
    return (reference.double().exp() * (reference.double() - log_probs.double())).sum(1)


def _check(log_probs: Tensor, reference: Tensor) -> None:
    if log_probs.shape != reference.shape:
        raise BenchError(f"expected log-probabilities {list(reference.shape)}, got {list(log_probs.shape)}")
    if not bool(log_probs.isfinite().all()):
        raise BenchError(f"expected finite log-probabilities, got {int((~log_probs.isfinite()).sum())} others")


@torch.inference_mode()
def reference_log_probs(
    path: Path,
    prompts: Sequence[Sequence[int]],
    *,
    device: torch.device,
    progress: Callable[[str], None] | None = None,
) -> Tensor:
    """fp32 [positions, vocab] on the CPU: after each token of each prompt but the last, what the model expects next.

    transformers' own Qwen3-MoE, in fp32 with dequantized weights, one layer at a time: one layer of experts takes
    2.4 GB, all of them would not fit.
    """
    import transformers

    tell = progress or (lambda _: None)
    config = transformers.AutoConfig.from_pretrained(path)
    layers = config.num_hidden_layers
    config.num_hidden_layers = 1
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.eval().requires_grad_(False)
    weights = _Weights(path, device)
    _copy(model.model.embed_tokens.weight, weights.dense("model.embed_tokens.weight"))
    _copy(model.model.norm.weight, weights.dense("model.norm.weight"))
    _copy(model.lm_head.weight, weights.dense("lm_head.weight"))
    states = [model.model.embed_tokens(torch.tensor([list(ids)], device=device)) for ids in prompts]
    block = model.model.layers[0]
    for layer in range(layers):
        tell(f"reference, layer {layer + 1} of {layers}")
        _load_layer(block, weights, f"model.layers.{layer}", config)
        states = [_run(model, block, state) for state in states]
    logits = torch.cat([model.lm_head(model.model.norm(state[0, :-1])) for state in states])
    return logits.log_softmax(-1).cpu()


def _run(model: Any, block: Any, state: Tensor) -> Tensor:
    """One layer over one prompt [1, tokens, K], each token of which sees those before it."""
    tokens = state.shape[1]
    positions = torch.arange(tokens, device=state.device).view(1, -1)
    hidden = torch.full((tokens, tokens), -torch.inf, device=state.device).triu(1).view(1, 1, tokens, tokens)
    out = block(
        state,
        attention_mask=hidden,
        position_ids=positions,
        position_embeddings=model.model.rotary_emb(state, position_ids=positions),
    )
    return out[0] if isinstance(out, tuple) else out


def _load_layer(block: Any, weights: _Weights, prefix: str, config: Any) -> None:
    for name, parameter in block.named_parameters():
        if ".experts." not in name:
            _copy(parameter, weights.dense(f"{prefix}.{name}"))
    experts = block.mlp.experts
    middle = config.moe_intermediate_size
    for expert in range(config.num_experts):
        module = f"{prefix}.mlp.experts.{expert}"
        _copy(experts.gate_up_proj[expert, :middle], weights.nvfp4(f"{module}.gate_proj"))
        _copy(experts.gate_up_proj[expert, middle:], weights.nvfp4(f"{module}.up_proj"))
        _copy(experts.down_proj[expert], weights.nvfp4(f"{module}.down_proj"))


def _copy(target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape:
        raise BenchError(f"expected a weight {list(target.shape)}, got {list(source.shape)}")
    target.copy_(source)


class _Weights:
    """The tensors of a directory of shards, by name."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.device = device
        self.files = [safe_open(file, framework="pt", device="cpu") for file in sorted(path.glob("*.safetensors"))]
        self.places = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118

    def _raw(self, name: str) -> Tensor:
        if name not in self.places:
            raise BenchError(f"expected a tensor {name} in the model, got none")
        return self.places[name].get_tensor(name).to(self.device)

    def dense(self, name: str) -> Tensor:
        return self._raw(name).float()

    def nvfp4(self, module: str) -> Tensor:
        data, scale = self._raw(f"{module}.weight"), self._raw(f"{module}.weight_scale")
        return dequantize(NVFP4Weight(data, scale, self._raw(f"{module}.weight_scale_2")), torch.float32)
