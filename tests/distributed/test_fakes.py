"""The shapes of results that DTensor asks the ops' fakes for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
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


def on_two_ranks(**placements: Placement) -> dict[str, DTensorSpec]:
    """The tensors of ``moe_fp8`` on a mesh of two GPUs, as its sharding rule sees them; replicated unless named."""
    like: Any = SimpleNamespace(device=torch.device("cuda"))
    tensors = {
        "hidden_states": ([TOKENS, HIDDEN], torch.bfloat16),
        "w13": (packed_shape(like, EXPERTS, 2 * INNER, HIDDEN, gated=True), torch.int8),
        "w13_global_scale": ([EXPERTS, 2], torch.float32),
        "w2": (packed_shape(like, EXPERTS, HIDDEN, INNER, gated=False), torch.int8),
        "w2_global_scale": ([EXPERTS], torch.float32),
        "topk_weights": ([TOKENS, TOP_K], torch.float32),
        "topk_ids": ([TOKENS, TOP_K], torch.int64),
        "expert_map": ([2 * EXPERTS], torch.int32),
    }
    mesh: Any = SimpleNamespace(device_type="cuda", ndim=1, shape=(2,))
    if "expert_map" not in placements:
        del tensors["expert_map"]
    return {
        name: DTensorSpec(
            mesh,
            (placements.get(name, Replicate()),),
            tensor_meta=TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), dtype),
        )
        for name, (shape, dtype) in tensors.items()
    }


WEIGHTS = ("w13", "w13_global_scale", "w2", "w2_global_scale")


def test_fp8_is_sharded_as_moe_is() -> None:
    rule, by_half = distributed.sharding._RULES["moe_fp8"], Shard(0)
    needed, output = rule("moe_fp8", on_two_ranks(hidden_states=by_half), 0)
    assert output == by_half
    assert {name for name, placement in needed.items() if placement == by_half} == {
        "hidden_states", "topk_weights", "topk_ids",
    }  # fmt: skip
    by_expert = dict.fromkeys((*WEIGHTS, "expert_map"), by_half)
    needed, output = rule("moe_fp8", on_two_ranks(**by_expert), 0)
    assert output == Partial()
    assert {name for name, placement in needed.items() if placement == by_half} == set(by_expert)
    for placements, words in (
        (dict.fromkeys(WEIGHTS, by_half), "nvfp4::moe_fp8 on DTensors: expected an expert_map beside experts"),
        ({"w13": Shard(2)}, r"w13 to be replicated or sharded by experts.*, got S.*packed bytes cannot be sliced"),
    ):
        with pytest.raises(RuntimeError, match=words):
            rule("moe_fp8", on_two_ranks(**placements), 0)


def test_the_order_for_fp8_is_sharded_by_experts() -> None:
    rule = distributed.sharding._RULES["order_for_fp8"]
    for placement in (Shard(0), Replicate()):
        packed = {"packed": on_two_ranks(w2=placement)["w2"]}
        assert rule("order_for_fp8", packed, 0) == ({"packed": placement}, placement)
    packed = {"packed": on_two_ranks(w2=Shard(1))["w2"]}
    with pytest.raises(
        RuntimeError, match="nvfp4::order_for_fp8 on DTensors: expected packed to be replicated or shard"
    ):
        rule("order_for_fp8", packed, 0)
