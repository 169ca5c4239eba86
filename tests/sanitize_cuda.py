"""Every op on every CUDA path at small sizes, values checked: what ``make gpu-sanitize`` gives to compute-sanitizer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import torch_nvfp4
from torch_nvfp4 import NVFP4Weight, reference, reference_fp8
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight, relative_l2

BF16, FP16 = torch.bfloat16, torch.float16
LIMIT = 2.0
# E, K, I, top_k, M, dtype: a single token; up to 32 slots, which are not sorted; slots that every CTA sorts on SM90;
# narrow and wide tiles; a routing that several blocks sort; wgmma with tall and with wide tiles, and its ring of stages
# when it wraps.
MOE = [
    (8, 192, 96, 2, 1, BF16),
    (8, 192, 96, 2, 12, BF16),
    (8, 192, 96, 2, 25, BF16),
    (16, 192, 96, 2, 50, FP16),
    (8, 192, 96, 2, 40, BF16),
    (8, 192, 96, 2, 40, FP16),
    (8, 192, 96, 2, 90, BF16),
    (4, 80, 48, 6, 400, BF16),
    (2, 1280, 640, 2, 100, BF16),
    (2, 1280, 640, 2, 150, BF16),
    (2, 256, 128, 2, 60, FP16),
]


def check_moe(e: int, k: int, i: int, top_k: int, m: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(m)
    w13 = random_weight((e, 2 * i, k), gated=True, generator=generator, device=device)
    w2 = random_weight((e, k, i), generator=generator, device=device)
    p13, p2 = torch_nvfp4.pack(w13, gated=True), torch_nvfp4.pack(w2)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    topk_weights, topk_ids = random_routing(m, e, top_k, generator=generator, device=device)
    topk_ids[: m // 2, 0] = 1  # an expert of several tiles
    topk_ids[m // 2, 0] = -1
    expected = reference.moe(x, w13, w2, topk_weights, topk_ids, clamp_limit=LIMIT)
    weights = p13, w13.global_scale, p2, w2.global_scale
    out = torch_nvfp4.moe(x, *weights, topk_weights, topk_ids, clamp_limit=LIMIT)
    assert_accurate(out, expected)
    invariant = torch_nvfp4.moe(x, *weights, topk_weights, topk_ids, clamp_limit=LIMIT, batch_invariant=True)
    assert_accurate(invariant, expected)
    in_place = x.clone()
    assert torch.equal(
        torch_nvfp4.moe(in_place, *weights, topk_weights, topk_ids, clamp_limit=LIMIT, out=in_place), out
    )
    order, offsets = torch_nvfp4.route(topk_ids, None, e)
    hidden = torch_nvfp4.grouped_gemm_swiglu(x, p13, w13.global_scale, order, offsets, clamp_limit=LIMIT)
    rows = torch_nvfp4.grouped_gemm(hidden, p2, w2.global_scale, order, offsets)
    assert_accurate(torch_nvfp4.combine(rows, topk_weights, topk_ids, None, e), expected)


def check_other_experts(e: int, k: int, i: int, top_k: int, m: int, dtype: torch.dtype, device: str) -> None:
    """Biases, with a gate and without: the kernels that have them in their epilogues."""
    generator = torch.Generator().manual_seed(m)
    w2 = random_weight((e, k, i), generator=generator, device=device)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    topk_weights, topk_ids = random_routing(m, e, top_k, generator=generator, device=device)
    topk_ids[m // 2, 0] = -1
    for gated, gate in (
        (True, {"clamp_limit": LIMIT}),
        (True, {"activation": "situ"}),
        (False, {"activation": "relu2"}),
    ):
        rows = 2 * i if gated else i
        w13 = random_weight((e, rows, k), gated=gated, generator=generator, device=device)
        biases = [torch.randn(e, n, generator=generator).to(device) for n in (rows, k)]
        weights = torch_nvfp4.pack(w13, gated=gated), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale
        expected = reference.moe(x, w13, w2, topk_weights, topk_ids, None, *biases, **gate)
        assert_accurate(torch_nvfp4.moe(x, *weights, topk_weights, topk_ids, None, *biases, **gate), expected)
        order, offsets = torch_nvfp4.route(topk_ids, None, e)
        gemm = (x, weights[0], weights[1], order, offsets, None, biases[0])
        hidden = torch_nvfp4.grouped_gemm_swiglu(*gemm, **gate)
        expected = reference.grouped_gemm_swiglu(x, w13, order, offsets, None, biases[0], gated=gated, **gate)
        assert_accurate(hidden, expected)
        torch_nvfp4.grouped_gemm(*gemm)


# E, K, I, T, the counts: tiles of stream_gemm and of wgmma_experts, an odd number of k-blocks and tokens that are
# permuted in the buffer of the result.
BATCHED = [
    (4, 192, 96, 5, [5, 0, 2, 1]),
    (4, 192, 96, 40, [1, 0, 3, 9]),
    (4, 192, 96, 40, [40, 0, 33, 17]),
    (4, 256, 128, 150, [20, 40, 0, 12]),
    (4, 256, 128, 150, [150, 0, 113, 1]),
]


def check_batched_moe(e: int, k: int, i: int, t: int, counts: list[int], dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(t)
    w13 = random_weight((e, 2 * i, k), gated=True, generator=generator, device=device)
    w2 = random_weight((e, k, i), generator=generator, device=device)
    weights = torch_nvfp4.pack(w13, gated=True), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale
    tokens = torch.tensor(counts, dtype=torch.int32, device=device)
    # Rows behind the counts are memory that nobody has written.
    x = torch.empty(e, t, k, dtype=dtype, device=device)
    for rows, count in zip(x, counts, strict=True):
        rows[:count] = torch.randn(count, k, generator=generator).to(device, dtype)
    expected = reference.batched_moe(x, w13, w2, tokens, clamp_limit=LIMIT)
    assert_accurate(torch_nvfp4.batched_moe(x, *weights, tokens, clamp_limit=LIMIT), expected)
    for out in (torch.empty_like(x), x):
        torch_nvfp4.batched_moe(x, *weights, tokens, clamp_limit=LIMIT, out=out)
        for rows, wanted, count in zip(out, expected, counts, strict=True):
            assert_accurate(rows[:count], wanted[:count])


# E, K, I, top_k, M: tiles of 32 tokens, with and without one that is full, of 64, and of 128.
GRADIENTS = [(8, 192, 96, 2, 3), (4, 144, 48, 2, 70), (2, 256, 160, 2, 150), (72, 320, 176, 2, 160)]


def check_gradients(e: int, k: int, i: int, top_k: int, m: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(m)
    flow = torch.randn(m, k, generator=generator).to(device, dtype)
    topk_weights, topk_ids = random_routing(m, e, top_k, generator=generator, device=device)
    topk_ids[: m // 2, 0], topk_ids[m // 2] = 1, -1
    w2 = random_weight((e, k, i), generator=generator, device=device)
    for gated, gate in ((True, {"clamp_limit": LIMIT}), (False, {"activation": "relu2"})):
        rows = 2 * i if gated else i
        w13 = random_weight((e, rows, k), gated=gated, generator=generator, device=device)
        biases = [torch.randn(e, n, generator=generator).to(device) for n in (rows, k)]
        weights = torch_nvfp4.pack(w13, gated=gated), w13.global_scale, torch_nvfp4.pack(w2), w2.global_scale
        values = torch.randn(m, k, generator=generator).to(device, dtype)
        for on_input in (False, True):
            leaves = values.clone().requires_grad_(), topk_weights.clone().requires_grad_()
            exact = values.double().requires_grad_(), topk_weights.double().requires_grad_()
            options = {**gate, "apply_router_weight_on_input": on_input}
            torch_nvfp4.moe(leaves[0], *weights, leaves[1], topk_ids, None, *biases, **options).backward(flow)
            reference.moe(exact[0], w13, w2, exact[1], topk_ids, None, *biases, **options).backward(flow.double())
            for leaf, wanted in zip(leaves, exact, strict=True):
                assert_accurate(leaf.grad, wanted.grad, dtype=dtype)
        order, offsets = torch_nvfp4.route(topk_ids, None, e)
        x, scales = values.clone().requires_grad_(), topk_weights.clone().requires_grad_()
        torch_nvfp4.grouped_gemm(x, *weights[:2], order, offsets, scales).sum().backward()
        torch_nvfp4.grouped_gemm_swiglu(x, *weights[:2], order, offsets, scales, **gate).sum().backward()
        torch_nvfp4.linear(x, torch_nvfp4.pack(first_of(w13), gated=gated), w13.global_scale[0]).sum().backward()


def first_of(weight: NVFP4Weight) -> NVFP4Weight:
    scale = weight.scale.view(torch.uint8)[0].view(weight.scale.dtype)
    return NVFP4Weight(weight.data[0], scale, weight.global_scale[0])


# E, K, I, top_k, M of experts with FP8 activations: tall and wide tiles, odd numbers of k-blocks, a panel that is half.
FP8 = [(8, 192, 96, 2, 20), (4, 704, 176, 3, 160), (2, 256, 128, 2, 300)]


def check_moe_fp8(e: int, k: int, i: int, top_k: int, m: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(m)
    w13 = random_weight((e, 2 * i, k), gated=True, generator=generator, device=device)
    w2 = random_weight((e, k, i), generator=generator, device=device)
    p13, p2 = (
        torch_nvfp4.pack(w13, gated=True, input_quant="fp8"),
        torch_nvfp4.pack(w2, input_quant="fp8"),
    )
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    topk_weights, topk_ids = random_routing(m, e, top_k, generator=generator, device=device)
    topk_ids[m // 2, 0] = -1
    routing = topk_weights, topk_ids
    out = torch_nvfp4.moe(x, p13, w13.global_scale, p2, w2.global_scale, *routing, clamp_limit=LIMIT, input_quant="fp8")
    expected = reference_fp8.moe(x, w13, w2, *routing, clamp_limit=LIMIT)
    error = relative_l2(out, expected)
    assert error < 2e-2, f"expected a relative L2 error below 2e-2 against the specification, got {error:.1e}"


def check_the_rest(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = random_weight((96, 192), generator=generator, device=device)
    packed = torch_nvfp4.pack(weight)
    assert torch.equal(torch_nvfp4.unpack(packed, 192, weight.global_scale).data, weight.data)
    x = torch.randn(37, 192, generator=generator).to(device, BF16)
    assert_accurate(torch_nvfp4.linear(x, packed, weight.global_scale), reference.linear(x, weight))
    gate_up = torch.randn(7, 66, generator=generator).to(device, BF16)
    assert_accurate(torch_nvfp4.swiglu(gate_up, clamp_limit=1.0), reference.swiglu(gate_up, clamp_limit=1.0))
    # Rows that are no whole vectors.
    rows, topk_weights = torch.randn(10, 13, generator=generator).to(device, BF16), torch.rand(5, 2).to(device)
    topk_ids = torch.tensor([[0, 1], [1, 0], [-1, 0], [2, 1], [0, 0]], device=device)
    expected = reference.combine(rows, topk_weights, topk_ids, None, 2)
    assert_accurate(torch_nvfp4.combine(rows, topk_weights, topk_ids, None, 2), expected)


Check = tuple[str, Callable[..., None], tuple[Any, ...]]  # TORCH_NVFP4_ARCH, the check, what it is called with


def checks(device: str) -> list[Check]:
    found: list[Check] = []
    for arch in ("", "80"):
        for case in MOE:
            found += [(arch, check_moe, (*case, device)), (arch, check_other_experts, (*case, device))]
        found += [(arch, check_batched_moe, (*case, dtype, device)) for case in BATCHED for dtype in (BF16, FP16)]
        found += [(arch, check_gradients, (*case, dtype, device)) for case in GRADIENTS for dtype in (BF16, FP16)]
        found.append((arch, check_the_rest, (device,)))
    if torch.cuda.get_device_capability(device)[0] == 9:
        found += [("", check_moe_fp8, (*case, dtype, device)) for case in FP8 for dtype in (BF16, FP16)]
    return found


def main(device: str = "cuda", part: str = "0/1") -> None:
    """``part``: I/N for every Nth check from the Ith on, so that N processes share the work."""
    first, _, step = part.partition("/")
    for arch, check, arguments in checks(device)[int(first) :: int(step)]:
        os.environ["TORCH_NVFP4_ARCH"] = arch
        check(*arguments)
    print("all values are right")


if __name__ == "__main__":
    main(part=sys.argv[1] if len(sys.argv) > 1 else "0/1")
