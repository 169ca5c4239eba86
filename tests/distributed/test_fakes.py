"""The shapes of results that DTensor asks the ops' fakes for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from torch_nvfp4 import distributed
from torch_nvfp4.ops import _library
from torch_nvfp4.ops._checks import packed_shape

MOE, MOE_OUT = torch.ops.nvfp4.moe.default, torch.ops.nvfp4.moe.out
EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 3, 64, 32, 5, 2


def spec(device: str, shape: list[int], dtype: torch.dtype) -> DTensorSpec:
    meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), dtype)
    mesh: Any = SimpleNamespace(device_type=device, ndim=1)
    return DTensorSpec(mesh, (Replicate(),), tensor_meta=meta)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_packed_shapes_are_those_of_the_mesh(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.11, where DTensor makes its tensors on the CPU for every mesh."""

    def on_the_cpu(arg: DTensorSpec) -> torch.Tensor:
        assert arg.tensor_meta is not None
        return torch.empty_strided(arg.tensor_meta.shape, arg.tensor_meta.stride, dtype=arg.tensor_meta.dtype)

    like: Any = SimpleNamespace(device=torch.device(device))
    arguments = [
        ([TOKENS, HIDDEN], torch.bfloat16),
        (packed_shape(like, EXPERTS, 2 * INNER, HIDDEN, gated=True), torch.uint8),
        ([EXPERTS, 2], torch.float32),
        (packed_shape(like, EXPERTS, HIDDEN, INNER, gated=False), torch.uint8),
        ([EXPERTS], torch.float32),
        ([TOKENS, TOP_K], torch.float32),
        ([TOKENS, TOP_K], torch.int64),
    ]
    schema = OpSchema(MOE, tuple(spec(device, shape, dtype) for shape, dtype in arguments), {})
    monkeypatch.setattr("torch.distributed.tensor._op_schema._rebuild_tensor_from_dtensor_meta", on_the_cpu)
    monkeypatch.setattr(_library, "_before_fakes", [distributed.sharding._on_mesh_device])
    propagator = ShardingPropagator()
    meta = propagator._propagate_tensor_meta_non_cached(schema)
    assert isinstance(meta, TensorMeta)
    assert (meta.shape, meta.dtype) == ((TOKENS, HIDDEN), torch.bfloat16)

    # A buffer for the result is a keyword.
    with_out = OpSchema(MOE_OUT, schema.args_schema, {"out": schema.args_schema[0]})
    assert propagator._propagate_tensor_meta_non_cached(with_out) is None

    other: Any = SimpleNamespace(device=torch.device("cpu" if device == "cuda" else "cuda"))
    arguments[1] = (packed_shape(other, EXPERTS, 2 * INNER, HIDDEN, gated=True), torch.uint8)
    schema = OpSchema(MOE, tuple(spec(device, shape, dtype) for shape, dtype in arguments), {})
    with pytest.raises(RuntimeError, match=rf"w13 must have shape .* gives on {device} for K = 64"):
        propagator._propagate_tensor_meta_non_cached(schema)
