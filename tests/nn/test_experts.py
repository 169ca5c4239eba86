"""``NVFP4Experts``: values against the fp64 reference, and the choice of its backend."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.modules import (
    DTYPES,
    LIMIT,
    TOP_K,
    E,
    I,
    K,
    experts,
    inputs,
    same_weight,
    weights,
)
from torch_nvfp4 import backends, reference, testing
from torch_nvfp4.format import NVFP4Weight, quantize
from torch_nvfp4.gate import Gate
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.quant_config import MoEQuantConfig


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "gate",
    [
        {},
        {"clamp_limit": LIMIT},
        {"clamp_limit": LIMIT, "alpha": 1.702, "beta": 1.0},
        {"activation": "swiglustep", "clamp_limit": LIMIT},
        {"activation": "gelu"},
    ],
    ids=str,
)
def test_experts_values(dtype: torch.dtype, gate: dict[str, Any], device: str) -> None:
    w13, w2 = weights(device)
    module = NVFP4Experts.from_weights(w13, w2, **gate)
    args = inputs(dtype=dtype, device=device)
    if device == "cuda" and dtype == torch.float32:
        with pytest.raises(RuntimeError, match="must be bfloat16 or float16, got float32"):
            module(*args)
        return
    out = module(*args)
    assert out.dtype == dtype
    testing.assert_accurate(out, reference.moe(args[0], w13, w2, *args[1:], **gate))


def test_experts_from_float() -> None:
    w13, w2 = torch.randn(E, 2 * I, K) / 8, torch.randn(E, K, I) / 8
    module = NVFP4Experts.from_float(w13, w2, clamp_limit=LIMIT)
    q13, q2 = quantize(w13, gated=True), quantize(w2)
    assert all(map(same_weight, module.unpacked_weights(), (q13, q2)))
    args = inputs()
    testing.assert_accurate(module(*args), reference.moe(args[0], q13, q2, *args[1:], clamp_limit=LIMIT))


def test_one_global_scale_for_gate_and_up() -> None:
    w13, w2 = weights()
    shared = w13._replace(global_scale=w13.global_scale[:, 0].clone())
    module = NVFP4Experts.from_weights(shared, w2)
    args = inputs()
    testing.assert_accurate(module(*args), reference.moe(args[0], shared, w2, *args[1:]))


def test_leading_dimensions_empty_batches_and_router_dtype() -> None:
    module = experts()
    x, topk_weights, topk_ids = inputs(6)
    out = module(x, topk_weights, topk_ids)
    batched = module(x.reshape(2, 3, K), topk_weights.reshape(2, 3, TOP_K), topk_ids.reshape(2, 3, TOP_K))
    assert torch.equal(batched.reshape(6, K), out)
    assert module(x[:0], topk_weights[:0], topk_ids[:0]).shape == (0, K)
    transposed = module(x.T.contiguous().T, topk_weights, topk_ids)
    assert torch.equal(transposed, out)
    rounded = topk_weights.to(torch.bfloat16)
    assert torch.equal(module(x, rounded, topk_ids), module(x, rounded.float(), topk_ids))


def test_hidden_states_of_another_width() -> None:
    module, (_, topk_weights, topk_ids) = experts(), inputs(6)
    for columns in (K // 2, 2 * K):
        got = rf"expected hidden_states \[..., {K}\] \(hidden_size\), got \[2, 3, {columns}\]"
        with pytest.raises(ValueError, match=got):
            module(torch.randn(2, 3, columns), topk_weights, topk_ids)


def test_leading_dimensions_that_differ() -> None:
    """As many tokens in another order would give each one another's experts."""
    module = experts()
    x, topk_weights, topk_ids = inputs(6)
    batch = {
        "hidden_states": x.view(2, 3, K),
        "topk_weights": topk_weights.view(2, 3, TOP_K),
        "topk_ids": topk_ids.view(2, 3, TOP_K),
    }
    for name, tensor in batch.items():
        swapped = batch | {name: tensor.transpose(0, 1)}
        got = ", ".join(f"{other} {list(value.shape)}" for other, value in swapped.items())
        with pytest.raises(ValueError, match=re.escape(f"the same dimensions before the last one, got {got}")):
            module(**swapped)
    with pytest.raises(ValueError, match=r"got topk_weights \[2, 3, 2\], topk_ids \[3, 2, 2\]"):
        module(x, batch["topk_weights"], topk_ids.view(3, 2, TOP_K))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(**batch), module(**batch))
    # A router's matrix beside a batch of sequences, and one token.
    out = module(x, topk_weights, topk_ids)
    assert torch.equal(module(batch["hidden_states"], topk_weights, topk_ids).view(6, K), out)
    assert torch.equal(module(x, batch["topk_weights"], batch["topk_ids"]), out)
    assert torch.equal(module(x[0], topk_weights[0], topk_ids[0]), module(x[:1], topk_weights[:1], topk_ids[:1])[0])


@pytest.mark.parametrize("tokens", [(2, 3), (2, 0), (0, 3), (6,)])
def test_no_expert_for_any_token(tokens: tuple[int, ...]) -> None:
    none = torch.zeros(*tokens, 0)
    out = experts()(torch.ones(*tokens, K), none, none.long())
    assert torch.equal(out, torch.zeros(*tokens, K))


def test_router_weight_on_input_and_expert_map() -> None:
    w13, w2 = weights()
    expert_map = torch.tensor([3, -1, 0, 2, 1], dtype=torch.int32)
    x, topk_weights, _ = inputs()
    topk_ids = torch.randint(0, 5, (7, TOP_K))
    module = NVFP4Experts.from_weights(
        w13, w2, clamp_limit=LIMIT, expert_map=expert_map, apply_router_weight_on_input=True
    )
    expected = reference.moe(
        x, w13, w2, topk_weights, topk_ids, expert_map, clamp_limit=LIMIT, apply_router_weight_on_input=True
    )
    testing.assert_accurate(module(x, topk_weights, topk_ids), expected)


def test_weights_that_are_not_contiguous() -> None:
    w13, w2 = weights()
    strided = NVFP4Weight(*(torch.stack((part, part), -1)[..., 0] for part in w13))
    assert not strided.global_scale.is_contiguous()
    for backend in ("cpu", "reference"):
        module = NVFP4Experts.from_weights(strided, w2, clamp_limit=LIMIT, backend=backend)
        assert torch.equal(module(*inputs()), experts(backend)(*inputs()))


def test_bad_weights() -> None:
    w13, w2 = weights()
    with pytest.raises(ValueError, match=r"w2: expected shape \[4, 64, 48\] .*, got \[4, 48, 64\]"):
        NVFP4Experts.from_weights(w13, testing.random_weight((E, I, K)))
    with pytest.raises(ValueError, match=r"expected w13 \[E, 2I, K\] and w2 \[E, K, I\], got"):
        NVFP4Experts.from_weights(testing.random_weight((2 * I, K)), w2)
    with pytest.raises(TypeError, match=r"scale: expected dtype torch.float8_e4m3fn"):
        NVFP4Experts.from_weights(w13._replace(scale=w13.scale.view(torch.uint8)), w2)
    with pytest.raises(ValueError, match=r"expert_map: expected int32 .*, got torch.int64 of shape \[4\]"):
        NVFP4Experts.from_weights(w13, w2, expert_map=torch.arange(4))
    x, topk_weights, topk_ids = inputs()
    with pytest.raises(RuntimeError, match="topk_weights must have shape"):
        experts()(x[:3], topk_weights, topk_ids)


def test_gradients_are_those_of_the_reference() -> None:
    x, topk_weights, topk_ids = inputs(dtype=torch.float32)
    leaves, exact = [[t.clone().to(d).requires_grad_() for t in (x, topk_weights)] for d in (x.dtype, torch.float64)]
    module = experts("cpu")
    module(leaves[0], leaves[1], topk_ids).sum().backward()
    reference.moe(exact[0], *weights(), exact[1], topk_ids, clamp_limit=LIMIT).sum().backward()
    for leaf, wanted in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="nvfp4_reference"):  # the backend that only runs where no kernel can
        experts("reference")(leaves[0], topk_weights, topk_ids).sum().backward()


MAP = torch.tensor([3, -1, 0, 2, 1], dtype=torch.int32)
GPT_OSS = Gate("silu", LIMIT, 1.702, 1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"activation": "swiglustep", "clamp_limit": LIMIT}, {"gate": Gate("swiglustep", LIMIT)}),
        ({"clamp_limit": LIMIT, "alpha": 1.702, "beta": 1.0}, {"gate": GPT_OSS}),
        ({"alpha": 1.702}, {"gate": Gate(alpha=1.702)}),
        ({"gate": GPT_OSS}, {"gate": GPT_OSS}),
        ({"quant_config": MoEQuantConfig(GPT_OSS, a13_scale=0.5)}, {"gate": GPT_OSS}),
        ({"expert_map": MAP}, {"expert_map": True}),
        ({"apply_router_weight_on_input": True}, {"apply_router_weight_on_input": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("equal_scales", [False, True])
def test_selection_sees_the_whole_layer(
    options: dict[str, Any], expected: dict[str, Any], equal_scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these decides whether the Blackwell backend may run a layer."""
    seen = []
    choose = backends.select_moe_backend
    monkeypatch.setattr(
        "torch_nvfp4.nn.experts.select_moe_backend", lambda config, name: seen.append(config) or choose(config, name)
    )
    w13, w2 = weights()
    if equal_scales:
        w13 = w13._replace(global_scale=w13.global_scale[:, :1].repeat(1, 2))
    module = NVFP4Experts.from_weights(w13, w2, **options)
    assert seen == [backends.MoEBackendConfig("cpu", K, I, equal_gate_up_scales=equal_scales, **expected)]
    module.to("meta")  # where there is nothing to choose for
    assert len(seen) == 1


def test_gate_as_one_value() -> None:
    args = inputs()
    expected = NVFP4Experts.from_weights(*weights(), clamp_limit=LIMIT, alpha=1.702, beta=1.0)(*args)
    for options in ({"gate": GPT_OSS}, {"quant_config": MoEQuantConfig(GPT_OSS)}):
        module = NVFP4Experts.from_weights(*weights(), **options)
        assert module.clamp_limit == LIMIT
        assert torch.equal(module(*args), expected)


def test_every_maker_has_the_constructors_keywords() -> None:
    def keywords(function: Callable[..., Any]) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name: (p.default, p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}

    expected = keywords(NVFP4Experts)
    for name in ("device", "gated", "biases", "_weights", "_biases"):  # the weights' own
        del expected[name]
    got = keywords(NVFP4Experts.from_weights)
    assert got == keywords(NVFP4Experts.from_float)
    assert {name: got.pop(name)[0] for name in ("w13_bias", "w2_bias")} == {"w13_bias": None, "w2_bias": None}
    assert got == expected
    for unknown in ("device", "dtype", "clamp"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{unknown}'"):
            NVFP4Experts.from_weights(*weights(), **{unknown: None})


def test_clamp_that_cannot_be_applied_raises() -> None:
    with pytest.raises(ValueError, match="expected clamp_limit to be None for activation gelu"):
        NVFP4Experts.from_weights(*weights(), activation="gelu", clamp_limit=7.0)
    with pytest.raises(ValueError, match=r"backend='flashinfer_trtllm' cannot run.*clamp_limit 0.6 to swiglustep"):
        NVFP4Experts.from_weights(*weights(), activation="swiglustep", clamp_limit=LIMIT, backend="flashinfer_trtllm")
    with pytest.raises(ValueError, match=r"expected the gate once, .* got .* \(silu, clamp_limit 7\) and quant_config"):
        NVFP4Experts.from_weights(*weights(), clamp_limit=7.0, quant_config=MoEQuantConfig())
    with pytest.raises(ValueError, match=r"got gate \(gelu, no clamp\) and quant_config \(silu, no clamp\)$"):
        NVFP4Experts.from_weights(*weights(), gate=Gate("gelu"), quant_config=MoEQuantConfig())
