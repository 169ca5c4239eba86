"""What is done to modules: dtypes, devices, state dicts, copies, pickles, the meta device."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from helpers.modules import (
    LIMIT,
    E,
    I,
    K,
    experts,
    inputs,
    linear,
    make,
    raw,
    same_weight,
    unpacked,
    weights,
)
from torch_nvfp4 import backends, testing
from torch_nvfp4.nn import NVFP4Experts, NVFP4Linear

every_kind = pytest.mark.parametrize("kind", ["experts", "experts-reference", "linear"])


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "float": nn.Module.float,
    "double": nn.Module.double,
    "to": lambda module: module.to(torch.float16),
    "to_cpu": lambda module: module.to("cpu", torch.bfloat16),
    "type": lambda module: module.type(torch.float32),
    "channels_last": lambda module: module.to(memory_format=torch.channels_last),
    "share_memory": nn.Module.share_memory,
    "parent": lambda module: nn.Sequential(module).half()[0],
}


@every_kind
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_leave_weights_alone(kind: str, conversion: str) -> None:
    module, args = make(kind)
    expected = module(*args)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    converted = CONVERSIONS[conversion](module)
    assert converted is module
    after = dict(module.named_buffers())
    assert list(after) == list(before)
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype
        assert after[name].is_contiguous()
        assert torch.equal(raw(after[name]), raw(buffer))
    testing.assert_accurate(module(*args), expected.double())


@every_kind
def test_state_dict_is_canonical_and_round_trips(kind: str) -> None:
    module, args = make(kind)
    state = module.state_dict()
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    if kind == "linear":
        assert shapes == {
            "bias": ((48,), torch.float32),
            "weight": ((48, K // 2), torch.uint8),
            "weight_scale": ((48, K // 16), torch.float8_e4m3fn),
            "weight_scale_2": ((), torch.float32),
        }
        fresh: nn.Module = NVFP4Linear(K, 48)
    else:
        assert shapes == {
            "w13_weight": ((E, 2 * I, K // 2), torch.uint8),
            "w13_weight_scale": ((E, 2 * I, K // 16), torch.float8_e4m3fn),
            "w13_weight_scale_2": ((E, 2), torch.float32),
            "w2_weight": ((E, K, I // 2), torch.uint8),
            "w2_weight_scale": ((E, K, I // 16), torch.float8_e4m3fn),
            "w2_weight_scale_2": ((E,), torch.float32),
        }
        # Another backend, so another layout.
        other = "cpu" if kind == "experts-reference" else "reference"
        fresh = NVFP4Experts(E, K, I, clamp_limit=LIMIT, backend=other)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert fresh.load_state_dict(torch.load(file)) == nn.modules.module._IncompatibleKeys([], [])
    assert all(map(same_weight, unpacked(fresh), unpacked(module)))
    testing.assert_accurate(fresh(*args), module(*args).double())


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_load_inside_a_model(kind: str, assign: bool) -> None:
    module, args = make(kind)
    model = nn.ModuleDict({"a": module, "b": nn.Linear(2, 2)})
    target = copy.deepcopy(model)
    for buffer in target["a"].buffers():
        raw(buffer).zero_()
    held = dict(target["a"].named_buffers())
    target.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(target["a"](*args), module(*args))
    if not assign:  # in place: whoever holds a buffer sees the new values
        assert all(held[name] is buffer for name, buffer in target["a"].named_buffers())


@every_kind
@pytest.mark.parametrize("full", [False, True])
def test_state_dict_of_a_distributed_checkpoint(kind: str, full: bool) -> None:
    """It looks for every name of a state dict among the attributes of the module, where leaves are not."""
    module, args = make(kind)
    model = nn.ModuleDict({"a": module, "b": nn.Linear(2, 2)})
    target = copy.deepcopy(model)
    for buffer in target["a"].buffers():
        raw(buffer).zero_()
    options = StateDictOptions(full_state_dict=full)
    state = get_model_state_dict(model, options=options)
    assert state.keys() == model.state_dict().keys()
    set_model_state_dict(target, state, options=options)
    assert torch.equal(target["a"](*args), module(*args))
    assert not hasattr(NVFP4Linear(16, 16), "weight")  # for whoever looks for a dense one


def test_state_dict_errors() -> None:
    module = experts()
    state = module.state_dict()
    with pytest.raises(RuntimeError, match=r"w2_weight: expected shape \[4, 64, 24\] .*, got \[4, 64, 32\]"):
        module.load_state_dict(state | {"w2_weight": torch.zeros(4, 64, 32, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match=r"w13_weight_scale: expected .*float8_e4m3fn, got .* of torch.float16"):
        module.load_state_dict(state | {"w13_weight_scale": state["w13_weight_scale"].half()})
    with pytest.raises(RuntimeError, match=r"Missing key.*w2_weight_scale_2"):
        module.load_state_dict({key: value for key, value in state.items() if key != "w2_weight_scale_2"})
    with pytest.raises(RuntimeError, match=r"expected w2_weight, .* together, got only w2_weight, w2_weight_scale"):
        module.load_state_dict({key: value for key, value in state.items() if key != "w2_weight_scale_2"}, strict=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*w13"):
        module.load_state_dict(state | {"w13": torch.zeros(1)})
    nan = state["w2_weight_scale"].clone()
    nan.view(torch.uint8)[0, 1, 2] = 0xFF
    with pytest.raises(RuntimeError, match=r"scale: expected finite E4M3 values, got NaN .* at index \[0, 1, 2\]"):
        module.load_state_dict(state | {"w2_weight_scale": nan})
    assert all(map(same_weight, module.unpacked_weights(), weights()))  # nothing was changed by any of them


def test_not_strict_loads_the_weights_that_are_there() -> None:
    module, other = experts(), NVFP4Experts(E, K, I)
    part = {key: value for key, value in module.state_dict().items() if key.startswith("w2_")}
    missing, unexpected = other.load_state_dict(part, strict=False)
    assert missing == ["w13_weight", "w13_weight_scale", "w13_weight_scale_2"]
    assert unexpected == []
    w13, w2 = other.unpacked_weights()
    assert same_weight(w2, module.unpacked_weights()[1])
    assert not w13.data.any()


@every_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_pickles(kind: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    module, args = make(kind)
    twin = duplicate(module)
    assert repr(twin) == repr(module)
    assert torch.equal(twin(*args), module(*args))
    assert all(map(same_weight, unpacked(twin), unpacked(module)))


def test_deepcopy_is_independent() -> None:
    module = experts()
    expected = module(*inputs())
    twin = copy.deepcopy(module)
    twin.load_state_dict(NVFP4Experts(E, K, I).state_dict())
    assert torch.equal(module(*inputs()), expected)


def test_pickle_holds_the_canonical_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where it is loaded, another backend may be the one to run it.
    module = NVFP4Experts.from_weights(*weights(), clamp_limit=LIMIT)
    data = pickle.dumps(module)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    twin = pickle.loads(data)
    assert (module.backend, twin.backend) == ("cpu", "reference")
    testing.assert_accurate(twin(*inputs()), module(*inputs()).double())


def meta_module(kind: str) -> nn.Module:
    with torch.device("meta"):
        return NVFP4Linear(K, 48) if kind == "linear" else NVFP4Experts(E, K, I, clamp_limit=LIMIT)


@every_kind
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("to_empty", [False, True])
def test_meta_device(kind: str, assign: bool, to_empty: bool) -> None:
    module, args = make(kind)
    meta = meta_module(kind)
    assert {tensor.device.type for tensor in (*meta.buffers(), *meta.parameters())} == {"meta"}
    assert meta(*(arg.to("meta") for arg in args)).shape == module(*args).shape
    if to_empty:
        assert meta.to_empty(device="cpu") is meta
    meta.load_state_dict(module.state_dict(), assign=assign)
    assert "backend=reference" not in repr(meta)
    assert torch.equal(meta(*args), copy.deepcopy(meta)(*args))
    testing.assert_accurate(meta(*args), module(*args).double())


def test_expert_map_comes_with_the_state_dict() -> None:
    expert_map = torch.tensor([3, -1, 0, 2, 1], dtype=torch.int32)
    module = experts(expert_map=expert_map)
    with torch.device("meta"):
        meta = NVFP4Experts(E, K, I, clamp_limit=LIMIT, expert_map=torch.empty(5, dtype=torch.int32))
    for target in (meta, copy.deepcopy(meta).to_empty(device="cpu")):
        target.load_state_dict(module.state_dict())
        assert torch.equal(target(*inputs()), module(*inputs()))
    with pytest.raises(RuntimeError, match=r"Missing key.*expert_map"):
        module.load_state_dict(experts().state_dict())


@every_kind
def test_to_meta_and_no_way_back_without_data(kind: str) -> None:
    module, _ = make(kind)
    module.to("meta")
    assert {tensor.device.type for tensor in (*module.buffers(), *module.parameters())} == {"meta"}
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        module.to("cpu")


def test_partial_state_dict_onto_meta_stays_meta() -> None:
    meta = meta_module("experts")
    state = {key: value for key, value in experts().state_dict().items() if key.startswith("w2_")}
    with pytest.raises(RuntimeError, match=r"Missing key.*w13_weight"):
        meta.load_state_dict(state)
    assert meta.device.type == "meta"


def test_repr() -> None:
    expected = (
        "NVFP4Experts(num_experts=4, hidden_size=64, intermediate_size=48, activation=silu, clamp_limit=0.6, "
        "alpha=1.702, beta=1.0, backend=cpu)"
    )
    assert repr(experts(alpha=1.702, beta=1.0)) == expected
    assert repr(linear()) == "NVFP4Linear(in_features=64, out_features=48, bias=True, backend=kernel)"


def test_functional_call_takes_buffers() -> None:
    module, other = experts(), NVFP4Experts(E, K, I, clamp_limit=LIMIT)
    out = torch.func.functional_call(other, dict(module.named_buffers()), inputs())
    assert torch.equal(out, module(*inputs()))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["experts", "linear"])
def test_devices(kind: str) -> None:
    module, args = make(kind)
    on_gpu = tuple(arg.cuda() for arg in args)
    expected = module(*args).double()
    original = unpacked(module)
    state = module.state_dict()
    assert module.cuda() is module
    assert {buffer.device.type for buffer in module.buffers()} == {"cuda"}
    testing.assert_accurate(module(*on_gpu).cpu(), expected)
    gpu_state = module.state_dict()
    for name, value in state.items():
        assert gpu_state[name].device.type == "cuda"
        assert torch.equal(raw(gpu_state[name]).cpu(), raw(value))
    data = pickle.dumps(module)
    module.to("cpu", torch.bfloat16)
    assert all(map(same_weight, unpacked(module), original))
    testing.assert_accurate(module(*args), expected)
    # Saved on one device, loaded on the other, both ways.
    module.load_state_dict(gpu_state)
    testing.assert_accurate(module(*args), expected)
    testing.assert_accurate(pickle.loads(data)(*on_gpu).cpu(), expected)
    file = io.BytesIO()
    torch.save(pickle.loads(data), file)
    file.seek(0)
    testing.assert_accurate(torch.load(file, map_location="cpu", weights_only=False)(*args), expected)


@pytest.mark.gpu
def test_explicit_backend_holds_on_every_device() -> None:
    module = experts("cpu")
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run this MoE layer .*got cuda"):
        module.cuda()
    testing.assert_accurate(module(*inputs()), experts()(*inputs()).double())
