"""Published layers at full size on the GPU, on both code paths, against one fp64 reference per layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from torch_nvfp4 import NVFP4Weight, reference
from torch_nvfp4.bench import SHAPES, Layer, Shape
from torch_nvfp4.testing import TOLERANCE, random_routing, relative_l2

pytestmark = pytest.mark.gpu

LIMIT = 10.0
# Up to 32 slots are not sorted; wgmma takes over from 7 tokens per expert on, with wide tiles from 113 to 176 (bf16).
TOKENS = (1, 2, 5, 6, 16, 64, 200, 512, 1024, 3000, 5500)
LAYERS = {
    "dsv4-flash": (SHAPES["dsv4-flash"], (*TOKENS, 8192, 16384)),
    "dsv4-flash-tp4": (SHAPES["dsv4-flash-tp4"], TOKENS),
    "dsv4-flash-tp8": (Shape(256, 4096, 256, 6), TOKENS),
    "qwen3-30b": (SHAPES["qwen3-30b"], TOKENS),
    "deepseek-r1": (SHAPES["deepseek-r1"], TOKENS),
    "qwen3.6": (SHAPES["qwen3.6"], (*TOKENS, 128)),
    "gemma-4": (SHAPES["gemma-4"], (*TOKENS, 128)),
    "kimi-k3-tp8": (SHAPES["kimi-k3-tp8"], (1, 3, 16, 64, 200, 1024, 4096, 8192)),
}


@dataclass
class Full:
    """A layer, an input as long as its largest case, and what the reference makes of it."""

    tokens: tuple[int, ...]
    packed: tuple[Tensor, Tensor, Tensor, Tensor]
    x: Tensor  # fp16 values that bf16 holds too
    topk_weights: Tensor
    topk_ids: Tensor
    expected: Tensor

    def run(self, m: int, dtype: torch.dtype) -> Tensor:
        x, topk_weights, topk_ids = self.x[:m].to(dtype), self.topk_weights[:m], self.topk_ids[:m]
        return torch_nvfp4.moe(x, *self.packed, topk_weights, topk_ids, clamp_limit=LIMIT)

    def check(self, m: int, dtype: torch.dtype) -> None:
        error = relative_l2(self.run(m, dtype), self.expected[:m])
        assert error <= TOLERANCE[dtype], f"M = {m}, {dtype}: {error:g}"


def make_full(shape: Shape, tokens: tuple[int, ...], *, one_expert_set: bool = False) -> Full:
    layer = Layer.random(shape, clamp_limit=LIMIT, device="cuda")
    w13, w2 = torch_nvfp4.pack(layer.w13, gated=True), torch_nvfp4.pack(layer.w2)
    assert w13.nbytes + w2.nbytes <= 1.01 * 0.5625 * 3 * shape.experts * shape.hidden * shape.intermediate
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(max(tokens), shape.hidden, generator=generator, device="cuda")
    expert = NVFP4Weight(*(part[0] for part in layer.w13))
    x *= LIMIT / (x[:64] @ torch_nvfp4.dequantize(expert, torch.float32).T).std()
    x = x.bfloat16().half()
    topk_weights, topk_ids = random_routing(
        max(tokens), shape.experts, shape.top_k, generator=generator, device="cuda", skew=0.5
    )
    if one_expert_set:
        topk_ids = topk_ids[:1].repeat(max(tokens), 1)
        topk_ids[3, 0], topk_ids[-1, 1] = -1, shape.experts
    result = reference.moe_with_clamped_share(
        x.double(), layer.w13, layer.w2, topk_weights, topk_ids, clamp_limit=LIMIT
    )
    assert result.clamped_share > 0.01
    packed = (w13, layer.w13.global_scale, w2, layer.w2.global_scale)
    return Full(tokens, packed, x, topk_weights, topk_ids, result.output)


@pytest.fixture(scope="module", params=list(LAYERS))
def full(request: pytest.FixtureRequest) -> Iterator[Full]:
    yield make_full(*LAYERS[request.param])
    torch.cuda.empty_cache()


@pytest.fixture(params=["", "80"], ids=["best", "sm80"])
def _arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_ARCH", request.param)


@pytest.mark.usefixtures("_arch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accuracy(full: Full, dtype: torch.dtype) -> None:
    for m in full.tokens:
        full.check(m, dtype)


@pytest.mark.usefixtures("_arch")
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [(Shape(256, 4096, 256, 6), (1, 40, 700, 5000)), (SHAPES["qwen3.6"], (17, 128, 220))],
    ids=["dsv4-flash-tp8", "qwen3.6"],
)
def test_all_tokens_on_the_same_experts(shape: Shape, tokens: tuple[int, ...]) -> None:
    full = make_full(shape, tokens, one_expert_set=True)
    for m in full.tokens:
        full.check(m, torch.bfloat16)


@pytest.mark.usefixtures("_arch")
@pytest.mark.parametrize("shape", ["dsv4-flash-tp4", "qwen3.6"])
def test_20_runs_are_bit_equal(shape: str) -> None:
    full = make_full(SHAPES[shape], TOKENS)
    for m in full.tokens:
        first = full.run(m, torch.bfloat16)
        assert all(torch.equal(full.run(m, torch.bfloat16), first) for _ in range(19)), f"M = {m}"


@pytest.mark.usefixtures("_arch")
def test_workspace_is_the_two_intermediates() -> None:
    """[slots, I] between the GEMMs and [slots, K] before the sum, and lists of slots and tiles."""
    shape = Shape(64, 2048, 1024, 6)
    full = make_full(shape, (1, 40, 700, 5000))
    for m in full.tokens:
        full.run(m, torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = full.run(m, torch.bfloat16)
        x = 2 * m * shape.hidden  # run() makes a copy of the input
        workspace = torch.cuda.max_memory_allocated() - before - out.nbytes - x
        slots = m * shape.top_k
        assert workspace <= 1.02 * 2 * (slots + 8 * shape.experts) * (shape.intermediate + shape.hidden) + 2**16
