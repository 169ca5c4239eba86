"""Models with NVFP4 weights under torch.compile, with a static cache, and in batches with padding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.hf_models import greedy, prompt, relative, write_model

transformers = pytest.importorskip("transformers", minversion="5.23")

from torch_nvfp4.integrations.transformers import register, unregister  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register()
    torch.compiler.reset()
    yield
    unregister()
    torch.compiler.reset()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen"), "modelopt", num_hidden_layers=2) / "packed"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("deepseek"), "deepseek") / "packed"


def load(path: Path) -> Any:
    return AutoModel.from_pretrained(path, dtype=torch.float32).eval()


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


def test_qwen3_decodes_in_one_graph_with_a_static_cache(qwen: Path) -> None:
    model = load(qwen)
    ids = prompt(1, 8)
    expected = greedy(model, ids, 6)
    counting = Counting()
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    step = torch.compile(model.forward, backend=counting, fullgraph=True, dynamic=False)
    tokens: list[int] = []
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        for position in range(ids.shape[1], ids.shape[1] + 6):
            tokens.append(int(logits[0, -1].argmax()))
            logits = step(
                torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True,
                position_ids=torch.tensor([[position]]),
            ).logits  # fmt: skip
    assert tokens == expected[0].tolist()
    assert counting.graphs == 1


def test_qwen3_generates_with_a_static_cache(qwen: Path) -> None:
    model = load(qwen)
    expected = greedy(model, prompt(), 6)
    assert torch.equal(greedy(model, prompt(), 6, cache_implementation="static", disable_compile=True), expected)


def test_left_padding_changes_nothing(qwen: Path) -> None:
    model = load(qwen)
    short, long = prompt(1, 7), prompt(1, 12)
    batch = torch.cat([torch.nn.functional.pad(short, (5, 0), value=2), long])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    got = greedy(model, batch, 8, attention_mask=mask)
    assert torch.equal(got[:1], greedy(model, short, 8))
    assert torch.equal(got[1:], greedy(model, long, 8))


def test_deepseek_forward_is_one_graph(deepseek: Path) -> None:
    model = load(deepseek)
    counting = Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    with torch.no_grad():
        expected, got = model(prompt(), use_cache=False).logits, compiled(prompt(), use_cache=False).logits
    assert relative(got, expected) < 1e-6
    assert counting.graphs == 1
