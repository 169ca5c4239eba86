"""A model of several layers in torch.compile and torch.export."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.modules import (
    TOP_K,
    E,
    K,
    experts,
    linear,
)
from torch_nvfp4.nn import NVFP4Linear


class Model(nn.Module):
    """Several layers, as a model has them."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.router = nn.Linear(K, E, dtype=torch.bfloat16)
        self.proj = linear()
        self.back = NVFP4Linear.from_float(torch.randn(K, 48))
        self.layers = nn.ModuleList(experts(backend) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        topk_weights, topk_ids = self.router(x).float().softmax(-1).topk(TOP_K)
        for layer in self.layers:
            x = x + 0.1 * layer(x, topk_weights, topk_ids)
        return self.back(self.proj(x))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compile_without_a_graph_break_once(backend: str | None) -> None:
    torch._dynamo.reset()
    model = Model(backend).requires_grad_(False)
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for tokens in (2, 7, 33):
        x = torch.randn(tokens, K, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", [None, "reference"])
def test_export_with_dynamic_tokens(backend: str | None) -> None:
    model = Model(backend).requires_grad_(False)
    tokens = torch.export.Dim("tokens", min=2)
    x = torch.randn(9, K, dtype=torch.bfloat16)
    program = torch.export.export(model, (x[:4],), dynamic_shapes=({0: tokens},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), model(x))
