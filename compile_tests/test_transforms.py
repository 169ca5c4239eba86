"""The ops under PyTorch's other transforms: each is right, or raises an error that names the op and what to use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import torch_nvfp4
from torch_nvfp4 import NVFP4Weight
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K = 4, 64, 32, 10, 2


def weights(device: str = "cpu", seed: int = 0) -> tuple[NVFP4Weight, NVFP4Weight, NVFP4Weight]:
    """w13 and w2 of the routed experts, and a shared projection."""
    generator = torch.Generator().manual_seed(seed)
    w13 = random_weight((EXPERTS, 2 * INTERMEDIATE, HIDDEN), gated=True, generator=generator, device=device)
    w2 = random_weight((EXPERTS, HIDDEN, INTERMEDIATE), generator=generator, device=device)
    return w13, w2, random_weight((HIDDEN, HIDDEN), generator=generator, device=device)


class Layer(nn.Module):
    """Routed experts and a shared projection that call the ops on buffers of their own."""

    def __init__(self, device: str = "cpu", seed: int = 0) -> None:
        super().__init__()
        w13, w2, shared = weights(device, seed)
        self.register_buffer("w13", torch_nvfp4.pack(w13, gated=True))
        self.register_buffer("w13_global_scale", w13.global_scale)
        self.register_buffer("w2", torch_nvfp4.pack(w2))
        self.register_buffer("w2_global_scale", w2.global_scale)
        self.register_buffer("shared", torch_nvfp4.pack(shared))
        self.register_buffer("shared_global_scale", shared.global_scale)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        experts = (self.w13, self.w13_global_scale, self.w2, self.w2_global_scale)
        routed = torch_nvfp4.moe(x, *experts, topk_weights, topk_ids, clamp_limit=7.0)
        return routed + torch_nvfp4.linear(x, self.shared, self.shared_global_scale)


def reference(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    w13, w2, shared = weights(x.device.type)
    routed = torch_nvfp4.reference.moe(x, w13, w2, topk_weights, topk_ids, clamp_limit=7.0)
    return routed + torch_nvfp4.reference.linear(x, shared)


def inputs(
    dtype: torch.dtype = torch.bfloat16, *, batch: tuple[int, ...] = (), device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*batch, TOKENS, HIDDEN, generator=generator).to(device, dtype) * 4
    count = TOKENS * int(torch.tensor(batch).prod()) if batch else TOKENS
    topk_weights, topk_ids = random_routing(count, EXPERTS, TOP_K, generator=generator, device=device)
    return x, topk_weights.view(*batch, TOKENS, TOP_K), topk_ids.view(*batch, TOKENS, TOP_K)


def assert_same(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_functional_call(device: str) -> None:
    """The buffers of one layer in the code of another."""
    args = inputs(device=device)
    layer, other = Layer(device), Layer(device, seed=7)
    out = torch.func.functional_call(layer, dict(other.named_buffers()), args)
    assert not torch.equal(out, layer(*args))
    assert_same(out, other(*args))


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled])
def test_copies(duplicate: Callable[[nn.Module], nn.Module], device: str) -> None:
    args, layer = inputs(device=device), Layer(device)
    expected = layer(*args)
    twin = duplicate(layer)
    assert_same(twin(*args), expected)
    if duplicate is not copy.copy:
        twin.w2_global_scale.zero_()
        twin.shared_global_scale.zero_()
        assert not twin(*args).any()
        assert_same(layer(*args), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_of_experts(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    args = inputs()
    experts = torch_nvfp4.NVFP4Experts.from_weights(*weights()[:2], clamp_limit=7.0)
    expected = experts(*args)
    assert_same(duplicate(experts)(*args), expected)
    buffers = dict(experts.named_buffers())
    assert_same(torch.func.functional_call(experts, buffers, args), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_16_bit_activations_alone(dtype: torch.dtype, device: str) -> None:
    """They keep the dtype of their input: autocast decides for the layers before them, not for them."""
    layer = Layer(device)
    for kept in (torch.bfloat16, torch.float16):
        args = inputs(kept, device=device)
        with torch.autocast(device, dtype=dtype):
            out = layer(*args)
        assert out.dtype == kept
        assert_same(out, layer(*args))
    x, *routing = inputs(torch.float32, device=device)
    projection = nn.Linear(HIDDEN, HIDDEN, device=device).requires_grad_(False)
    with torch.autocast(device, dtype=dtype):
        out = layer(projection(x), *routing)
    assert out.dtype == dtype


def steps_of_moe(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    w13, w2, shared = weights(x.device.type)
    order, offsets = torch_nvfp4.route(topk_ids, None, EXPERTS)
    packed = torch_nvfp4.pack(w13, gated=True)
    gated = torch_nvfp4.grouped_gemm_swiglu(x, packed, w13.global_scale, order, offsets, clamp_limit=7.0)
    both = torch_nvfp4.grouped_gemm(x, packed, w13.global_scale, order, offsets)
    assert both.dtype == gated.dtype
    w2_packed = torch_nvfp4.pack(w2)
    out = torch_nvfp4.grouped_gemm(gated, w2_packed, w2.global_scale, order, offsets)
    batch = x[None].expand(EXPERTS, -1, -1).contiguous()
    counts = torch.full((EXPERTS,), len(x), dtype=torch.int32, device=x.device)
    experts = (packed, w13.global_scale, w2_packed, w2.global_scale)
    assert torch_nvfp4.batched_moe(batch, *experts, counts).dtype == gated.dtype
    bias = torch.ones(HIDDEN, dtype=x.dtype, device=x.device)
    combined = torch_nvfp4.combine(out, topk_weights, topk_ids, None, EXPERTS)
    return combined + torch_nvfp4.linear(x, torch_nvfp4.pack(shared), shared.global_scale, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_float32_activations(dtype: torch.dtype, device: str) -> None:
    """As those of ``nn.Linear``; the CUDA kernels take no others. Router weights and scales stay float32."""
    x, *routing = inputs(torch.float32, device=device)
    for run in (Layer(device), steps_of_moe):
        with torch.autocast(device, dtype=dtype):
            out = run(x, *routing)
            inside = run(x.to(dtype), *routing)
        assert out.dtype == dtype
        assert_same(out, inside)
    out = Layer(device)(x.to(dtype), *routing)
    assert_accurate(out, reference(x.to(dtype), *routing))


def test_gradients_under_autocast(device: str) -> None:
    layer, (x, *routing) = Layer(device), inputs(torch.float32, device=device)
    experts = (layer.w13, layer.w13_global_scale, layer.w2, layer.w2_global_scale)

    def loss(x: Tensor) -> Tensor:
        return torch_nvfp4.moe(x, *experts, *routing, clamp_limit=7.0).float().square().sum()

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return loss(nn.functional.layer_norm(x, (HIDDEN,)))

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        run(leaf).backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = gradient(lambda x: loss(nn.functional.layer_norm(x, (HIDDEN,)).bfloat16()))
    assert torch.equal(gradient(under_autocast), expected)
    torch.testing.assert_close(gradient(torch.compile(under_autocast, fullgraph=True, backend="aot_eager")), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(mode: Callable[[], object], device: str) -> None:
    args, layer = inputs(device=device), Layer(device)
    with mode():
        out = layer(*args)
    assert out.is_inference() == (mode is torch.inference_mode)
    assert not out.requires_grad
    assert_accurate(out.clone(), reference(*args))


def test_inference_tensors_outside_inference_mode(device: str) -> None:
    with torch.inference_mode():
        layer, args = Layer(device), inputs(device=device)
    assert_same(layer(*args), Layer(device)(*inputs(device=device)))


def test_functionalize(device: str) -> None:
    args, layer = inputs(device=device), Layer(device)
    assert_same(torch.func.functionalize(layer)(*args), layer(*args))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, None), (1, 0, 0)], ids=str)
def test_vmap(in_dims: tuple[int | None, ...], device: str) -> None:
    """As a loop: torch warns that there is no batching rule. Tokens are a batch already, so flatten instead."""
    layer, batched = Layer(device), inputs(batch=(3,), device=device)
    args = [tensor if dim is not None else tensor[0] for tensor, dim in zip(batched, in_dims, strict=True)]
    args[0] = args[0].movedim(0, in_dims[0]) if in_dims[0] is not None else args[0]
    out = torch.func.vmap(layer, in_dims=in_dims)(*args)
    rows = [[batched[a][b if in_dims[a] is not None else 0] for a in range(3)] for b in range(3)]
    assert_same(out, torch.stack([layer(*row) for row in rows]))
    if in_dims == (0, 0, 0):
        flat = layer(*(tensor.flatten(0, 1) for tensor in batched))
        assert_accurate(flat, torch.stack([reference(*row) for row in rows]).flatten(0, 1))


ERROR = r"nvfp4::(moe|linear)(_backward)? has no gradient.*torch_nvfp4\.reference\.(moe|linear) "
LAYER = Layer()


def scalar(x: Tensor, *routing: Tensor) -> Tensor:
    return LAYER(x, *routing).float().sum()


def gradient(x: Tensor, *routing: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    scalar(leaf, *routing).backward()
    assert leaf.grad is not None
    return leaf.grad


def compiled(x: Tensor, *routing: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    torch.compile(scalar, backend="aot_eager")(leaf, *routing).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "transform",
    [
        lambda x, *routing: torch.func.grad(scalar)(x, *routing),
        lambda x, *routing: torch.func.jacrev(scalar)(x, *routing),
        lambda x, *routing: torch.func.vjp(lambda x: scalar(x, *routing), x)[1](torch.tensor(1.0))[0],
        lambda x, *routing: torch.func.vmap(torch.func.grad(scalar), (0, None, None))(x[None], *routing)[0],
        compiled,
    ],
    ids=["grad", "jacrev", "vjp", "vmap_of_grad", "compiled"],
)
def test_reverse_mode(transform: Callable[..., Tensor]) -> None:
    args = inputs()
    expected = gradient(*args)
    assert_same(transform(*args), expected)
    x, *routing = inputs(torch.float64)
    reference(x.requires_grad_(), *routing).sum().backward()
    assert_accurate(expected, x.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "transform",
    [
        lambda x, *routing: torch.func.jvp(lambda x: scalar(x, *routing), (x,), (x,)),
        lambda x, *routing: torch.func.jacfwd(scalar)(x, *routing),
        lambda x, *routing: torch.func.hessian(scalar)(x, *routing),
        lambda x, *routing: torch.func.jvp(lambda x: torch.func.grad(scalar)(x, *routing), (x,), (x,)),
        lambda x, *routing: torch.func.grad(lambda x: torch.func.grad(scalar)(x, *routing).float().sum())(x),
        lambda x, *routing: torch.func.jacrev(torch.func.jacrev(scalar))(x, *routing),
        lambda x, *routing: torch.func.grad(scalar)(x.requires_grad_(), *routing).sum().backward(),
    ],
    ids=["jvp", "jacfwd", "hessian", "jvp_of_grad", "grad_of_grad", "jacrev_of_jacrev", "backward_of_grad"],
)
def test_other_derivatives_are_refused(transform: Callable[..., object]) -> None:
    """Forward mode, and second derivatives, where an op without a rule would give zeros."""
    with pytest.raises(NotImplementedError, match=ERROR):
        transform(*inputs())


def test_forward_mode_with_dual_numbers() -> None:
    x, *routing = inputs()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=ERROR):
        Layer()(torch.autograd.forward_ad.make_dual(x, x), *routing)


def test_a_mode_that_differentiates() -> None:
    """What a mode adds to the op's result has its gradient, also where nothing of the op itself wants one."""
    added = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)

    class Adapter(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            is_op = function in (torch.ops.nvfp4.moe.default, torch.ops.nvfp4.linear.default)
            return result + added if is_op else result

    args = inputs()
    with Adapter():
        out = LAYER(*args)
    assert_same(out, LAYER(*args))
    out.sum().backward()
    assert torch.equal(added.grad, torch.full_like(added, 2.0))  # type: ignore[arg-type]


def test_reference_has_a_gradient() -> None:
    """What the error says to use."""
    x, *routing = inputs(torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-6 * direction
    reference(x.requires_grad_(), *routing).sum().backward()
    difference = (reference(x + step, *routing) - reference(x - step, *routing)).sum() / 2e-6
    torch.testing.assert_close((x.grad * direction).sum(), difference, rtol=1e-6, atol=0)
