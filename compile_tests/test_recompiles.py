"""One compilation for every number of tokens: the recipes for ``mark_dynamic`` and ``mark_unbacked``.

Private torch APIs: ``torch._dynamo.mark_dynamic``, ``torch._dynamo.decorators.mark_unbacked`` and
``torch._dynamo.testing.CompileCounterWithBackend``. Run with torch 2.11, 2.13 and 2.15, the first on a GPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend

from torch_nvfp4.nn import NVFP4Experts, NVFP4Linear
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 64, 32, 2

Inputs = tuple[Tensor, Tensor, Tensor]


class Layer(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w13 = random_weight((EXPERTS, 2 * INTERMEDIATE, HIDDEN), gated=True, generator=generator, device=device)
        w2 = random_weight((EXPERTS, HIDDEN, INTERMEDIATE), generator=generator, device=device)
        shared = random_weight((HIDDEN, HIDDEN), generator=generator, device=device)
        self.experts = NVFP4Experts.from_weights(w13, w2, clamp_limit=10.0)
        self.shared = NVFP4Linear.from_weight(shared)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return x + self.shared(x).relu() + self.experts(x, topk_weights, topk_ids)


def make_inputs(tokens: int, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(device, torch.bfloat16)
    return x, *random_routing(tokens, EXPERTS, TOP_K, generator=generator, device=device)


def marked(mark: Callable[[Tensor, int], None], inputs: Inputs) -> Inputs:
    for tensor in inputs:
        mark(tensor, 0)
    return inputs


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check(compiled: Callable[..., Tensor], layer: Layer, tokens: int, device: str) -> None:
    inputs = make_inputs(tokens, device)
    assert_accurate(compiled(*inputs), layer(*inputs))


def test_mark_unbacked_compiles_once_for_every_size(device: str) -> None:
    layer = Layer(device)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    compiled(*marked(mark_unbacked, make_inputs(8, device)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (*range(65), 300):
            check(compiled, layer, tokens, device)
    assert counter.frame_count == 1


def test_mark_dynamic_needs_one_more_for_a_single_token(device: str) -> None:
    """torch specializes on sizes 0 and 1 unless they are unbacked."""
    layer = Layer(device)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    compiled(*marked(torch._dynamo.mark_dynamic, make_inputs(8, device)))
    compiled(*make_inputs(1, device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (*range(1, 65), 300):
            check(compiled, layer, tokens, device)
    assert counter.frame_count == 2


def test_unequal_token_counts_are_an_error(device: str) -> None:
    """Guarded on, never assumed: the second call is traced anew, and the op's own check stops it."""
    layer = Layer(device)
    compiled = torch.compile(layer, fullgraph=True)
    compiled(*marked(mark_unbacked, make_inputs(8, device)))
    x, _, topk_ids = make_inputs(5, device)
    _, topk_weights, _ = make_inputs(4, device)
    with pytest.raises(RuntimeError, match=r"nvfp4::moe: topk_weights must have shape \["):
        compiled(x, topk_weights, topk_ids)
