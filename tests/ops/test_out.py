"""The out overloads: the same bits as the op, in the caller's buffer and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_nvfp4
from helpers.layers import BF16, GATES, activations, make_layer, routed, to

E, K, I, TOP_K = 4, 192, 96, 2  # noqa: E741
# On CUDA: slots that are not sorted, that every CTA sorts, and enough per expert for wgmma, tokens permuted in place of
# the result or (K = 192) in the workspace.
TOKENS = [0, 1, 12, 40, 200]

ops = pytest.mark.parametrize("op", ["moe", "batched_moe"])


def guarded(like: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A buffer as ``like`` inside a larger one, and whether all around it is as it was."""
    room = 256  # bytes on either side, which leave it aligned
    size = like.numel() * like.element_size()
    memory = torch.full((size + 2 * room,), 0xA5, dtype=torch.uint8, device=like.device)
    around = (memory[:room], memory[room + size :])
    return memory[room : room + size].view(like.dtype).view(like.shape), lambda: all(
        bool((part == 0xA5).all()) for part in around
    )


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("k", [K, 256])
def test_moe_writes_the_buffer(m: int, k: int, target: str, dtype: torch.dtype) -> None:
    layer = make_layer(E, k, I, seed=1).packed(target)
    topk_weights, topk_ids, _, _ = routed(m, E, TOP_K, seed=2)
    x = activations(m, k, seed=3).to(target, dtype)
    routing = to(target, topk_weights, topk_ids)
    for options in (GATES["gpt-oss-tight"], {"clamp_limit": 0.5, "apply_router_weight_on_input": True}):
        expected = torch_nvfp4.moe(x, *layer, *routing, **options)
        out, untouched = guarded(x)
        assert torch_nvfp4.moe(x, *layer, *routing, out=out, **options) is out
        assert torch.equal(out, expected)
        assert untouched()


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("k", [K, 256])
def test_moe_in_place(m: int, k: int, target: str, dtype: torch.dtype) -> None:
    layer = make_layer(E, k, I, seed=4).packed(target)
    topk_weights, topk_ids, _, _ = routed(m, E, TOP_K, seed=5)
    x = activations(m, k, seed=6).to(target, dtype)
    routing = to(target, topk_weights, topk_ids)
    expected = torch_nvfp4.moe(x, *layer, *routing, clamp_limit=0.5)
    for _ in range(5):
        values = x.clone()
        assert torch_nvfp4.moe(values, *layer, *routing, clamp_limit=0.5, out=values) is values
        assert torch.equal(values, expected)


def arguments_of(op: str, device: str) -> dict[str, Any]:
    layer = make_layer(E, K, I, seed=7).packed(device)
    if op == "batched_moe":
        counts = torch.tensor([1, 0, 2, 2], dtype=torch.int32, device=device)
        x = activations(E, 2, K, seed=9) * (torch.arange(2)[:, None] < counts.cpu()[:, None, None])
        return {"hidden_states": x.to(device, BF16), **layer._asdict(), "expert_num_tokens": counts}
    topk_weights, topk_ids, _, _ = routed(6, E, TOP_K, seed=8)
    arguments: dict[str, Any] = layer._asdict()
    x = activations(6, K, seed=9).to(device, BF16)
    expert_map = torch.arange(E, dtype=torch.int32, device=device)
    routing = {"topk_weights": topk_weights.to(device), "topk_ids": topk_ids.to(device), "expert_map": expert_map}
    return {"hidden_states": x, **arguments, **routing}


def message_of(call: Callable[..., Any], **arguments: Any) -> str:
    with pytest.raises(RuntimeError) as raised:
        call(**arguments)
    return str(raised.value)


@ops
def test_out_may_share_memory_with_no_argument(op: str, device: str) -> None:
    arguments = arguments_of(op, device)
    size = arguments["hidden_states"].numel() * 2
    overload = getattr(torch.ops.nvfp4, op).out
    for name, good in arguments.items():
        length = good.numel() * good.element_size()
        for distance in (-size + 16, -16, 16, length - 16):  # from the argument to out, which overlaps either end of it
            if not -size < distance < length:
                continue
            memory = torch.zeros(2 * size + length, dtype=torch.uint8, device=device)
            argument = memory[size : size + length].view(good.dtype).view(good.shape).copy_(good)
            out = memory[size + distance :][:size].view(BF16).view(arguments["hidden_states"].shape)
            rule = f"be {name} itself or share no memory with it" if name == "hidden_states" else (
                f"share no memory with {name}"
            )  # fmt: skip
            assert message_of(overload, **{**arguments, name: argument}, out=out) == (
                f"nvfp4::{op}.out: out must {rule}, got one that overlaps it; take one from torch.empty"
            )
        # Side by side is apart.
        memory = torch.zeros(2 * size + length, dtype=torch.uint8, device=device)
        argument = memory[size : size + length].view(good.dtype).view(good.shape).copy_(good)
        out = memory[:size].view(BF16).view(arguments["hidden_states"].shape)
        overload(**{**arguments, name: argument}, out=out)
        assert torch.equal(out, getattr(torch.ops.nvfp4, op)(**arguments))


@ops
def test_out_that_begins_between_elements(op: str, device: str) -> None:
    arguments = arguments_of(op, device)
    x = arguments["hidden_states"]
    multiple, distance = (16, 8) if device == "cuda" else (2, 1)
    memory = torch.zeros(x.numel() * 2 + 16, dtype=torch.uint8, device=device)
    if device == "cpu":  # torch views bytes as bf16 only where they begin at an element
        begin = distance + memory.data_ptr() % 2
        out = torch.frombuffer(memory.numpy(), dtype=BF16, offset=begin, count=x.numel()).view(x.shape)
    else:
        out = memory[distance:][: x.numel() * 2].view(BF16).view(x.shape)
    assert message_of(getattr(torch.ops.nvfp4, op).out, **arguments, out=out) == (
        f"nvfp4::{op}.out: out must begin at a multiple of {multiple} bytes in memory, got a view that does not; "
        "take one from torch.empty"
    )


@ops
def test_a_backward_that_saved_the_buffer_notices(op: str, device: str) -> None:
    arguments = arguments_of(op, device)
    out = torch.ones_like(arguments["hidden_states"])
    factor = torch.ones_like(out, requires_grad=True)
    product = factor * out
    getattr(torch.ops.nvfp4, op).out(**arguments, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    for mode in (torch.no_grad, torch.inference_mode):
        product = factor * out
        with mode():
            getattr(torch.ops.nvfp4, op).out(**arguments, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
    with torch.inference_mode():
        buffer = torch.ones_like(out)
        getattr(torch.ops.nvfp4, op).out(**arguments, out=buffer)
    getattr(torch.ops.nvfp4, op).out(**arguments, out=buffer)
    assert torch.equal(buffer, out)
