"""A small MoE model, a compiler backend that keeps its graphs, and a rendering of graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from textwrap import fill
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import torch_nvfp4
from torch_nvfp4.testing import random_weight

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 8, 2


class Layer(nn.Module):
    """Router, experts and residual."""

    def __init__(self, generator: torch.Generator, device: str) -> None:
        super().__init__()
        w13 = random_weight((EXPERTS, 2 * INTERMEDIATE, HIDDEN), gated=True, generator=generator, device=device)
        w2 = random_weight((EXPERTS, HIDDEN, INTERMEDIATE), generator=generator, device=device)
        self.register_buffer("w13", torch_nvfp4.pack(w13, gated=True))
        self.register_buffer("w13_global_scale", w13.global_scale)
        self.register_buffer("w2", torch_nvfp4.pack(w2))
        self.register_buffer("w2_global_scale", w2.global_scale)
        self.register_buffer("router", torch.randn(EXPERTS, HIDDEN, generator=generator).to(device))
        self.clamp_limit = 7.0

    def forward(self, x: Tensor) -> Tensor:
        topk_weights, topk_ids = F.linear(x.float(), self.router).softmax(-1).topk(TOP_K)
        experts = (self.w13, self.w13_global_scale, self.w2, self.w2_global_scale)
        y = torch_nvfp4.moe(x, *experts, topk_weights, topk_ids, clamp_limit=self.clamp_limit)
        return x + 0.125 * y


class Model(nn.Module):
    def __init__(self, layers: int, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(Layer(generator, device) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def make_model() -> Callable[[int, str], nn.Module]:
    """make_model(layers, device)"""
    return Model


@pytest.fixture
def tokens() -> Callable[[int, str], Tensor]:
    """tokens(m, device): bf16 [m, HIDDEN] activations"""

    def make(m: int, device: str) -> Tensor:
        return torch.randn(m, HIDDEN, generator=torch.Generator().manual_seed(m)).to(device, torch.bfloat16)

    return make


def render_graph(graph: fx.Graph) -> str:
    """One statement per call, with values numbered in the order of their first use and dynamic sizes by letter.

    Names of nodes, inputs and symbols and the order of inputs, which differ between versions of torch, are left out.
    """
    numbers: dict[fx.Node, str] = {}
    letters: dict[str, str] = {}

    def value(node: fx.Node) -> Any:
        return node.meta.get("val", node.meta.get("example_value"))

    def size(s: Any) -> str:
        constant = s if isinstance(s, int) else s.node.maybe_as_int()
        if constant is not None:
            return str(constant)
        return re.sub(r"[su]\d+", lambda symbol: letters.setdefault(symbol[0], "MNPQRSTUV"[len(letters)]), str(s))

    def kind(v: Any) -> str:
        if isinstance(v, Tensor):
            dtype = str(v.dtype).removeprefix("torch.")
            return f"{dtype}[{', '.join(map(size, v.shape))}]"
        if isinstance(v, (tuple, list)):
            return f"({', '.join(map(kind, v))})"
        return size(v) if isinstance(v, torch.SymInt) else ""

    def show(argument: Any) -> str:
        if isinstance(argument, fx.Node):
            if isinstance(value(argument), torch.SymInt):
                return size(value(argument))
            if argument not in numbers:
                # Placeholders and constants are named when they are used; a call is named where it stands.
                numbers[argument] = f"%{len(numbers)}"
                return f"{numbers[argument]}: {kind(value(argument))}"
            return numbers[argument]
        if isinstance(argument, (tuple, list)):
            return f"[{', '.join(map(show, argument))}]"
        return repr(argument)

    lines = []
    for node in graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            continue  # what export asserts changes between versions
        arguments = [*map(show, node.args), *(f"{name}={show(v)}" for name, v in sorted(node.kwargs.items()))]
        if node.op == "output":
            lines.append(f"return {', '.join(arguments)}")
        elif node.op in ("call_function", "call_method", "call_module"):
            name = node.target if isinstance(node.target, str) else str(node.target)
            if name.startswith("<built-in"):
                name = name.removeprefix("<built-in ").removesuffix(">").split()[-1]
            numbers[node] = f"%{len(numbers)}"
            lines.append(f"{numbers[node]}: {kind(value(node))} = {name}({', '.join(arguments)})")
    return "\n".join(fill(line, 110, subsequent_indent="    ", break_on_hyphens=False) for line in lines)


@pytest.fixture
def render() -> Callable[[fx.Graph], str]:
    return render_graph


class Recorder:
    """A backend that runs AOTAutograd's graph as it is and keeps what it was given.

    ``compiled`` counts finished compilations: dynamo starts its first attempt over once it finds that float arguments
    have to be constants.
    """

    def __init__(self) -> None:
        self.dynamo: list[str] = []
        self.aot: list[str] = []

    @property
    def compiled(self) -> int:
        return len(self.aot)

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        text = render_graph(module.graph)

        def compile_forward(forward: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
            self.dynamo.append(text)
            self.aot.append(render_graph(forward.graph))
            return make_boxed_func(forward.forward)

        return aot_autograd(fw_compiler=compile_forward)(module, inputs)


@pytest.fixture
def recorder() -> Recorder:
    torch._dynamo.reset()
    return Recorder()
