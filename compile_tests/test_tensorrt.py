"""``torch_nvfp4.compiler.tensorrt``: TensorRT plugin, Torch-TensorRT converter, and the PyTorch fallback.

How much runs depends on what is installed:

- nothing: binding of arguments, and that the module has no effect;
- ``pip install --no-deps torch-tensorrt tensorrt-cu13-bindings dllist psutil`` (the Python of both, no GPU): the
  registries, the partition and the converter, on libraries that are built here and do nothing. Run with Torch-TensorRT
  2.13 and TensorRT 11.0;
- TensorRT with its libraries, and a GPU: everything. The tests marked ``gpu`` have never been run.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

import torch_nvfp4
import torch_nvfp4.compiler.tensorrt as tensorrt_moe
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight

MOE = torch.ops.nvfp4.moe.default
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 64, 32, 2

# Everything that TensorRT's Python bindings import from its libraries.
STAND_IN_SOURCE = "".join(
    f"void* {name}() {{ return 0; }}\n"
    for name in (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
)

Inputs = tuple[Tensor, Tensor, Tensor]


class Model(nn.Module):
    """Experts between ops that TensorRT has."""

    def __init__(self, device: str = "cpu", **gate: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w13 = random_weight((EXPERTS, 2 * INTERMEDIATE, HIDDEN), gated=True, generator=generator, device=device)
        w2 = random_weight((EXPERTS, HIDDEN, INTERMEDIATE), generator=generator, device=device)
        self.experts = NVFP4Experts.from_weights(w13, w2, **gate)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return self.experts(torch.relu(x) * 2, topk_weights, topk_ids) + x


def make_inputs(tokens: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(device, dtype)
    return x, *random_routing(tokens, EXPERTS, TOP_K, generator=generator, device=device)


def moe_node(graph: GraphModule) -> Node:
    (node,) = (node for node in graph.graph.nodes if node.target is MOE)
    return node


@pytest.mark.parametrize("missing", ["tensorrt", "torch_tensorrt"])
def test_says_what_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorrt", "torch_tensorrt"):
        present = ModuleType(package)
        present.__spec__ = importlib.machinery.ModuleSpec(package, None)
        monkeypatch.setitem(sys.modules, package, None if package == missing else present)
    assert tensorrt_moe.unavailable_reason() == (
        f"expected the package {missing}, got none; install torch-tensorrt for your version of torch"
    )


@pytest.mark.parametrize(
    ("version", "features", "reason"),
    [
        ("11.0.0", {"qdp_plugin": True, "tensorrt_rtx": False}, None),
        ("10.15.1", {"qdp_plugin": True}, None),  # Torch-TensorRT knows which releases have plugins that work
        (
            "10.15.1",
            {"qdp_plugin": False, "tensorrt_rtx": False},
            "expected a TensorRT whose quick deployable plugins torch_tensorrt enables, got TensorRT 10.15.1 with "
            "torch_tensorrt 2.11.0; install torch-tensorrt 2.12 or later",
        ),
        (
            "1.5.0",
            {"qdp_plugin": False, "tensorrt_rtx": True},
            "expected a TensorRT with plugins, got TensorRT-RTX 1.5.0, which has none",
        ),
    ],
)
def test_needs_a_tensorrt_with_plugins(
    version: str, features: dict[str, bool], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "torch_tensorrt", "torch_tensorrt._features"):
        module: Any = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        module.__version__ = version if name == "tensorrt" else "2.11.0"
        module.ENABLED_FEATURES = type("Features", (), features)
        monkeypatch.setitem(sys.modules, name, module)
    assert tensorrt_moe.unavailable_reason() == reason


def test_a_broken_installation_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").touch()
    (tmp_path / "torch_tensorrt").mkdir()
    (tmp_path / "torch_tensorrt" / "__init__.py").write_text("raise Exception('libnvinfer.so.11 is missing')")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tensorrt", "torch_tensorrt")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert tensorrt_moe.unavailable_reason() == (
        "expected torch_tensorrt to be importable, got Exception: libnvinfer.so.11 is missing"
    )


def test_bind_arguments() -> None:
    names = [argument.name for argument in MOE._schema.arguments]
    positional, keyword_only = names[:10], names[10:]
    defaults = {
        "expert_map": None,
        "w13_bias": None,
        "w2_bias": None,
        "activation": 0,
        "clamp_limit": None,
        "alpha": 1.0,
        "beta": 0.0,
    }
    defaults |= {"apply_router_weight_on_input": False, "batch_invariant": False}
    bind = tensorrt_moe.bind_arguments
    assert bind(positional[:7], {}) == {**dict(zip(positional[:7], positional[:7], strict=True)), **defaults}
    by_name = {name: name for name in names}
    assert list(bind([], by_name).items()) == list(by_name.items())
    assert bind(positional, {name: name for name in keyword_only}) == by_name
    assert bind(positional[:3], {name: name for name in names[3:]}) == by_name
    with pytest.raises(TypeError, match="expected the argument topk_ids, got none"):
        bind(positional[:6], {})


class Registry:
    """Stands for TensorRT's plugin registry."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[namespace, creator.name] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[namespace, name]


@contextlib.contextmanager
def stand_ins(folder: Path) -> Iterator[None]:
    """Lets TensorRT's Python bindings and Torch-TensorRT be imported without TensorRT and without a GPU."""
    (folder / "stand_in.c").write_text(STAND_IN_SOURCE)
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        path = folder / f"lib{library}.so"
        version = importlib.metadata.version("tensorrt-cu13-bindings").partition(".")[0]
        soname = f"-Wl,-soname,lib{library}.so.{version}"
        subprocess.run(["cc", "-shared", "-fPIC", folder / "stand_in.c", "-o", path, soname], check=True)
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    bindings = importlib.import_module("tensorrt_bindings")
    registry = Registry()
    isfile = os.path.isfile
    with pytest.MonkeyPatch.context() as patch:
        sys.modules["tensorrt"] = bindings  # NVIDIA's package of this name only forwards to the bindings
        bindings.get_plugin_registry = lambda: registry
        if not torch.cuda.is_available():
            # Its C++ runtime needs CUDA libraries.
            patch.setattr(os.path, "isfile", lambda path: "libtorchtrt" not in str(path) and isfile(path))
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
            patch.setattr(torch._C, "_CudaDeviceProperties", object, raising=False)
        yield


@pytest.fixture(scope="module")
def torch_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    if importlib.util.find_spec("torch_tensorrt") is None:
        pytest.skip("needs torch-tensorrt")
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("tensorrt") is None:
            if importlib.util.find_spec("tensorrt_bindings") is None or shutil.which("cc") is None:
                pytest.skip("needs tensorrt, or tensorrt-cu13-bindings and a C compiler")
            stack.enter_context(stand_ins(tmp_path_factory.mktemp("stand_ins")))
        module = importlib.import_module("torch_tensorrt")
        if module._features.ENABLED_FEATURES.tensorrt_rtx:
            pytest.skip("needs TensorRT, got TensorRT-RTX: test_tensorrt_rtx.py has its tests")
        if not tensorrt_moe.available():
            importlib.reload(tensorrt_moe)
        assert tensorrt_moe.available(), tensorrt_moe.unavailable_reason()
        yield module


@pytest.fixture
def lowered(torch_tensorrt: ModuleType) -> Callable[[Model], GraphModule]:
    """The graph that Torch-TensorRT partitions, with dynamic tokens; ``device`` is what its values claim."""
    from torch_tensorrt.dynamo import CompilationSettings
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS
    from torch_tensorrt.dynamo.lowering import post_lowering

    def lower(model: Model) -> GraphModule:
        settings = CompilationSettings(min_block_size=1)
        DYNAMO_CONVERTERS.set_compilation_settings(settings)
        tokens = torch.export.Dim("tokens", min=1, max=64)
        program = torch.export.export(model, make_inputs(4), dynamic_shapes=({0: tokens},) * 3, strict=False)
        return post_lowering(program.run_decompositions({}).module(), settings)

    return lower


def claim_cuda(graph: GraphModule) -> None:
    """Values of CUDA tensors, on a machine without any."""
    value = next(node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    mode: FakeTensorMode = value.fake_mode
    with mode:
        for node in graph.graph.nodes:
            if isinstance(node.meta.get("val"), Tensor):
                value = node.meta["val"]
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="cuda")


def blocks(partitioned: GraphModule) -> list[tuple[bool, set[Any]]]:
    """(for TensorRT?, the ops) of every block, in the order in which they run."""
    return [
        ("_run_on_acc" in name, {node.target for node in block.graph.nodes if node.op == "call_function"})
        for name, block in partitioned.named_children()
        if isinstance(block, GraphModule)
    ]


def test_registered_in_both_registries(torch_tensorrt: ModuleType) -> None:
    from tensorrt.plugin._lib import QDP_REGISTRY
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS

    definition = QDP_REGISTRY["torch_nvfp4::moe"]
    assert definition.input_tensor_names == [argument.name for argument in MOE._schema.arguments[:8]]
    assert list(definition.input_attrs) == list(definition.impl_attr_names)
    assert definition.num_outputs == 1
    assert MOE in DYNAMO_CONVERTERS
    support = [s for registry in DYNAMO_CONVERTERS.registries for s in registry.get(MOE, ())]
    assert len(support) == 1
    assert support[0].supports_dynamic_shapes


@pytest.mark.parametrize("partitioner", ["fast", "global"])
def test_what_the_plugin_cannot_take_stays_in_pytorch(
    partitioner: str, lowered: Callable[[Model], GraphModule]
) -> None:
    """Here because it is on the CPU; the blocks around it are for TensorRT, and the whole gives the same values."""
    from torch_tensorrt.dynamo import partitioning

    model = Model(clamp_limit=2.0)
    graph = lowered(model)
    assert "on cuda, got torch.bfloat16 on cpu" in tensorrt_moe.unsupported_reason(moe_node(graph))
    partitioned, _ = getattr(partitioning, f"{partitioner}_partition")(graph, min_block_size=1)
    if partitioner == "fast":
        found = blocks(partitioned)
        assert [for_tensorrt for for_tensorrt, _ in found] == [True, False, True]
        assert found[1][1] == {MOE}
        assert all(MOE not in ops and ops for _, ops in (found[0], found[2]))
    else:
        assert any(node.target is MOE for node in partitioned.graph.nodes)
        assert any("_run_on_acc" in name for name, _ in partitioned.named_children())
    for tokens in (1, 5, 64):
        inputs = make_inputs(tokens)
        assert torch.equal(partitioned(*inputs), model(*inputs))


def test_what_the_plugin_takes_is_one_block_with_its_neighbours(lowered: Callable[[Model], GraphModule]) -> None:
    from torch_tensorrt.dynamo import partitioning
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS

    graph = lowered(Model(clamp_limit=2.0))
    claim_cuda(graph)
    assert tensorrt_moe.unsupported_reason(moe_node(graph)) is None
    partitioned, _ = partitioning.fast_partition(graph, min_block_size=1)
    ((for_tensorrt, ops),) = blocks(partitioned)
    assert for_tensorrt
    assert MOE in ops
    (block,) = partitioned.children()
    assert moe_node(block) in DYNAMO_CONVERTERS  # the interpreter asks again, inside the block


def test_weights_that_are_inputs_stay_in_pytorch(lowered: Callable[[Model], GraphModule]) -> None:
    graph = lowered(Model())
    claim_cuda(graph)
    node = moe_node(graph)
    node.replace_input_with(node.args[1], node.args[0])
    assert tensorrt_moe.unsupported_reason(node).startswith("expected w13 to be a constant of the graph, got")


def test_batch_invariant_calls_stay_in_pytorch(lowered: Callable[[Model], GraphModule]) -> None:
    graph = lowered(Model())
    claim_cuda(graph)
    node = moe_node(graph)
    node.update_kwarg("batch_invariant", True)
    assert tensorrt_moe.unsupported_reason(node).startswith("expected a call without batch_invariant, got one with it")
    node.kwargs = {"w2_bias": node.args[0]}
    assert tensorrt_moe.unsupported_reason(node).startswith("expected a call without w2_bias, got one with it")


class RecordingNetwork:
    """Stands for trt.INetworkDefinition."""

    def __init__(self) -> None:
        import tensorrt

        self.constants: dict[int, Any] = {}
        self.plugins: list[tuple[list[Any], Any]] = []
        self.aot: list[bool] = []
        self._type = type("RecordedTensor", (tensorrt.ITensor,), {})

    def tensor(self) -> Any:
        import tensorrt

        return tensorrt.ITensor.__new__(self._type)

    def _layer(self) -> Any:
        output = self.tensor()
        return type("Layer", (), {"get_output": lambda self, index: output})()

    def add_constant(self, shape: Any, weights: Any) -> Any:
        layer = self._layer()
        self.constants[id(layer.get_output(0))] = (layer, tuple(shape), weights.numpy().copy())
        return layer

    def add_plugin(self, create: Callable[[], Any], aot: bool) -> Any:
        inputs, shape_inputs, plugin = create()
        assert shape_inputs == []
        self.plugins.append((inputs, plugin))
        self.aot.append(aot)
        return self._layer()


GATES: list[dict[str, Any]] = [
    {},
    {"clamp_limit": 7.0, "alpha": 1.702, "beta": 1.0},
    {"activation": "swiglustep", "clamp_limit": 1.5},
    {"activation": "relu2", "apply_router_weight_on_input": True},
]


@pytest.fixture
def convert(torch_tensorrt: ModuleType) -> Callable[..., tuple[RecordingNetwork, list[Any]]]:
    """Runs the registered converter; tensors of the call that are not given as constants are network tensors."""
    from torch_tensorrt.dynamo import CompilationSettings
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS
    from torch_tensorrt.dynamo.conversion._ConversionContext import ConversionContext

    def run(args: Any, kwargs: Any) -> RecordingNetwork:
        network = RecordingNetwork()
        converter, _ = DYNAMO_CONVERTERS.get_unvalidated(MOE)
        settings = CompilationSettings()
        arguments = [network.tensor() if argument == "network" else argument for argument in args]
        named = {key: network.tensor() if value == "network" else value for key, value in kwargs.items()}
        output = converter(ConversionContext(network, settings), MOE, tuple(arguments), named, "moe")
        assert isinstance(output, network._type)
        return network

    return run


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("fake", [False, True])
def test_converter_and_plugin_give_the_values_of_the_op(
    gate: dict[str, Any], with_map: bool, fake: bool, convert: Callable[..., RecordingNetwork],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The converter's constants and attributes, through TensorRT's plugin fields, into the plugin's implementation."""
    import tensorrt as trt

    experts = Model(**gate).experts
    weights = tuple(experts.get_buffer(name) for name in ("w13", "w13_global_scale", "w2", "w2_global_scale"))
    x, topk_weights, topk_ids = make_inputs(5)
    expert_map = torch.tensor([2, -1, 0, 3, 1], dtype=torch.int32) if with_map else None
    quant = experts.quant_config
    kwargs = {
        "activation": int(quant.activation),
        "clamp_limit": quant.gemm1_clamp_limit,
        "alpha": quant.gemm1_alpha,
        "beta": quant.gemm1_beta,
        "apply_router_weight_on_input": experts.apply_router_weight_on_input,
    }
    if with_map:  # as keywords, too
        kwargs |= {"expert_map": expert_map, "topk_ids": "network"}
    args = ("network", *weights, "network", *([] if with_map else ["network"]))
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        network = convert(args, kwargs)
    ((inputs, plugin),) = network.plugins
    assert network.aot == [False]
    assert [id(tensor) in network.constants for tensor in inputs] == [False, *[True] * 4, False, False, True]

    class PluginTensor:
        """Stands for trt.plugin.Tensor: the memory that the engine hands over."""

        def __init__(self, tensor: Tensor) -> None:
            self.data_ptr, self.shape, self.dtype = tensor, tensor.shape, names[tensor.dtype]

    names = {
        torch.bfloat16: trt.DataType.BF16,
        torch.float32: trt.DataType.FLOAT,
        torch.int32: trt.DataType.INT32,
        torch.int64: trt.DataType.INT64,
    }
    dynamic = iter((x, topk_weights, topk_ids))
    tensors = []
    for tensor in inputs:
        if id(tensor) in network.constants:
            _, shape, values = network.constants[id(tensor)]
            tensors.append(torch.from_numpy(values).view(shape))
        else:
            tensors.append(next(dynamic))
    monkeypatch.setattr(tensorrt_moe, "_tensor_at", lambda tensor, shape, dtype: tensor)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    output = torch.empty_like(x)
    attributes = [plugin.attrs[name] for name in plugin.impl_attr_names]
    plugin.impl_function(*map(PluginTensor, tensors), *attributes, (PluginTensor(output),), stream=0)
    expected = torch_nvfp4.moe(x, *weights, topk_weights, topk_ids, expert_map, **kwargs_of_moe(kwargs))
    assert torch.equal(output, expected)
    assert np.isinf(plugin.attrs["clamp_limit"][0]) == (quant.gemm1_clamp_limit is None)


def kwargs_of_moe(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in ("expert_map", "topk_ids")}


def test_converter_refuses_weights_that_are_no_constants(convert: Callable[..., RecordingNetwork]) -> None:
    with pytest.raises(TypeError, match="expected w13 to be a constant of the graph, got"):
        convert(("network",) * 7, {})


@pytest.fixture
def real_tensorrt(torch_tensorrt: ModuleType) -> ModuleType:
    tensorrt = importlib.import_module("tensorrt")
    if tensorrt.get_plugin_registry() is None or isinstance(tensorrt.get_plugin_registry(), Registry):
        pytest.skip("needs TensorRT's libraries")
    return torch_tensorrt


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_engine_with_dynamic_tokens(dtype: torch.dtype, real_tensorrt: ModuleType) -> None:
    model = Model("cuda", clamp_limit=2.0).eval()
    tokens = torch.export.Dim("tokens", min=1, max=64)
    program = torch.export.export(model, make_inputs(4, "cuda", dtype), dynamic_shapes=({0: tokens},) * 3)
    specs = [
        real_tensorrt.Input(min_shape=(1, width), opt_shape=(4, width), max_shape=(64, width), dtype=kind)
        for width, kind in ((HIDDEN, dtype), (TOP_K, torch.float32), (TOP_K, torch.int64))
    ]
    compiled = real_tensorrt.dynamo.compile(program, inputs=specs, min_block_size=1)
    assert not any(node.target is MOE for node in compiled.graph.nodes)
    assert not any("_run_on_gpu" in name for name, _ in compiled.named_children())
    for size in (1, 4, 33, 64):
        inputs = make_inputs(size, "cuda", dtype)
        assert_accurate(compiled(*inputs), model(*inputs))


@pytest.mark.gpu
def test_torch_compile_backend(real_tensorrt: ModuleType) -> None:
    model = Model("cuda", activation="swiglustep", clamp_limit=1.5).eval()
    compiled = torch.compile(model, backend="torch_tensorrt", dynamic=False, options={"min_block_size": 1})
    inputs = make_inputs(8, "cuda")
    assert_accurate(compiled(*inputs), model(*inputs))


@pytest.mark.gpu
def test_fallback_between_engines(real_tensorrt: ModuleType) -> None:
    model = Model("cuda", clamp_limit=2.0).eval()
    inputs = make_inputs(8, "cuda")
    program = torch.export.export(model, inputs)
    compiled = real_tensorrt.dynamo.compile(program, inputs=inputs, min_block_size=1, torch_executed_ops={MOE})
    assert any("_run_on_gpu" in name for name, _ in compiled.named_children())
    assert_accurate(compiled(*inputs), model(*inputs))
