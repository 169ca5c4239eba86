"""Torch-TensorRT on TensorRT-RTX, which has no plugins: the op stays in PyTorch, and the engines around it are built.

TensorRT-RTX builds engines without a GPU, so this needs its packages alone: ``make test-tensorrt`` installs them into
an environment of their own. Only loading an engine needs a driver, so here one is taken as built when it has its bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_nvfp4
from torch_nvfp4.compiler import tensorrt as tensorrt_moe
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.testing import assert_accurate, random_routing, random_weight

MOE = torch.ops.nvfp4.moe.default
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, LIMIT = 4, 64, 32, 2, 2.0


class Model(nn.Module):
    """Experts between layers that TensorRT has."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w13 = random_weight((EXPERTS, 2 * INTERMEDIATE, HIDDEN), gated=True, generator=generator)
        self.w2 = random_weight((EXPERTS, HIDDEN, INTERMEDIATE), generator=generator)
        self.before, self.after = (nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
        self.experts = NVFP4Experts.from_weights(self.w13, self.w2, clamp_limit=LIMIT)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return self.after(self.experts(torch.relu(self.before(x)), topk_weights, topk_ids))


@pytest.fixture(scope="module")
def torch_tensorrt() -> Iterator[ModuleType]:
    if importlib.util.find_spec("torch_tensorrt") is None or importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs torch-tensorrt-rtx: make test-tensorrt")
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    assert libraries is not None
    assert libraries.origin is not None
    isfile = os.path.isfile
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", str(Path(libraries.origin).parent), prepend=os.pathsep)
        if not torch.cuda.is_available():
            # Its C++ runtime needs CUDA's libraries; its Python asks which GPU there is.
            patch.setattr(os.path, "isfile", lambda path: "libtorchtrt" not in str(path) and isfile(path))
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
            patch.setattr(torch._C, "_CudaDeviceProperties", object, raising=False)
        yield importlib.import_module("torch_tensorrt")


def test_says_that_the_op_stays_in_pytorch(torch_tensorrt: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "torch_nvfp4"):
        importlib.reload(tensorrt_moe)
    reason = tensorrt_moe.unavailable_reason()
    assert reason is not None
    assert reason.startswith("expected a TensorRT with plugins, got TensorRT-RTX ")
    assert not tensorrt_moe.available()
    assert [record.getMessage() for record in caplog.records] == [
        f"nvfp4::moe stays a PyTorch block between TensorRT's engines: {reason}"
    ]


class Engine:
    """Stands for an engine that a driver would load."""

    def __init__(self, serialized: bytes) -> None:
        self.serialized = serialized

    def serialize(self) -> bytes:
        return self.serialized


class Runtime:
    def __init__(self, logger: object) -> None:
        pass

    def deserialize_cuda_engine(self, serialized: Any) -> Engine:
        return Engine(bytes(serialized))


def test_the_engines_on_both_sides_are_built(torch_tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_tensorrt.dynamo import CompilationSettings, partitioning
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS, _TRTInterpreter, interpret_module_to_result
    from torch_tensorrt.dynamo.lowering import post_lowering

    model = Model().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, HIDDEN, generator=generator).bfloat16()
    routing = random_routing(4, EXPERTS, TOP_K, generator=generator)
    settings = CompilationSettings(min_block_size=1)
    DYNAMO_CONVERTERS.set_compilation_settings(settings)
    program = torch.export.export(model, (x, *routing), strict=False)
    graph = post_lowering(program.run_decompositions({}).module(), settings)
    partitioned, _ = partitioning.fast_partition(graph, min_block_size=1)

    blocks = {name: block for name, block in partitioned.named_children() if isinstance(block, torch.fx.GraphModule)}
    assert ["_run_on_acc" in name for name in blocks] == [True, False, True]
    with_the_op = [any(node.target is MOE for node in block.graph.nodes) for block in blocks.values()]
    assert with_the_op == [False, True, False]

    monkeypatch.setattr(_TRTInterpreter.trt, "Runtime", Runtime)
    for name, block in blocks.items():
        if "_run_on_acc" in name:
            inputs = partitioning.construct_submodule_inputs(block)
            result = interpret_module_to_result(block, inputs, settings)
            weights = sum(parameter.nbytes for parameter in (model.before.weight, model.before.bias))
            assert len(bytes(result.serialized_engine)) > weights

    with torch.no_grad():
        hidden = torch.relu(model.before(x))
        routed = torch_nvfp4.reference.moe(hidden, model.w13, model.w2, *routing, clamp_limit=LIMIT)
        expected = model.after.double()(routed)
        model.after.bfloat16()
        assert_accurate(partitioned(x, *routing), expected)
