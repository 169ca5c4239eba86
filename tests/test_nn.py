"""The modules: values against the fp64 reference, the limit's way from a config to the kernel, and everything that is
done to modules (devices, dtypes, state dicts, copies, pickles, the meta device, compilers).
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_nvfp4 import backends, reference, testing
from torch_nvfp4.checkpoint import Checkpoint, CheckpointError
from torch_nvfp4.format import NVFP4Weight, dequantize, quantize
from torch_nvfp4.gate import Activation, Gate
from torch_nvfp4.nn import NVFP4Experts, NVFP4Linear
from torch_nvfp4.quant_config import MoEQuantConfig

E, K, I, TOP_K = 4, 64, 48, 2  # noqa: E741
LIMIT = 0.6  # clamps a good part of the pre-activations of these weights
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


def weights(device: str = "cpu") -> tuple[NVFP4Weight, NVFP4Weight]:
    generator = torch.Generator().manual_seed(0)
    w13 = testing.random_weight((E, 2 * I, K), gated=True, generator=generator, device=device)
    return w13, testing.random_weight((E, K, I), generator=generator, device=device)


def inputs(tokens: int = 7, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, K, generator=generator).to(device, dtype)
    return x, *testing.random_routing(tokens, E, TOP_K, generator=generator, device=device)


def experts(backend: str | None = None, **kwargs: Any) -> NVFP4Experts:
    return NVFP4Experts.from_weights(*weights(), clamp_limit=LIMIT, backend=backend, **kwargs)


def linear(bias: bool = True) -> NVFP4Linear:
    generator = torch.Generator().manual_seed(2)
    weight = testing.random_weight((48, K), generator=generator)
    return NVFP4Linear.from_weight(weight, torch.randn(48, generator=generator) if bias else None)


def make(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A module and inputs for it."""
    return (linear(), inputs()[:1]) if kind == "linear" else (experts(kind.partition("-")[2] or None), inputs())


every_kind = pytest.mark.parametrize("kind", ["experts", "experts-reference", "linear"])


def same_weight(got: NVFP4Weight, expected: NVFP4Weight) -> bool:
    return (
        torch.equal(got.data, expected.data)
        and torch.equal(raw(got.scale), raw(expected.scale))
        and torch.equal(got.global_scale, expected.global_scale)
    )


def raw(tensor: Tensor) -> Tensor:
    """As bytes: torch compares no E4M3 tensors on every device."""
    return tensor.reshape(-1).view(torch.uint8)


def unpacked(module: nn.Module) -> tuple[NVFP4Weight, ...]:
    if isinstance(module, NVFP4Linear):
        return (module.unpacked_weight(),)
    assert isinstance(module, NVFP4Experts)
    return module.unpacked_weights()


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_values(dtype: torch.dtype, bias: bool) -> None:
    module = linear(bias).to(dtype)
    x = torch.randn(2, 3, K).to(dtype)
    out = module(x)
    assert out.dtype == dtype
    testing.assert_accurate(out, reference.linear(x, module.unpacked_weight(), module.bias))
    assert module(x[:0]).shape == (0, 3, 48)


def test_linear_from_float_and_bias_of_another_dtype() -> None:
    dense, bias = torch.randn(32, K), torch.randn(32)
    module = NVFP4Linear.from_float(dense, bias)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    expected = x.double() @ dequantize(quantize(dense), torch.float64).T + bias.to(torch.bfloat16)
    testing.assert_accurate(module(x), expected)


def test_linear_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    module = linear()
    assert module.backend == "reference"
    x = torch.randn(3, K)
    testing.assert_accurate(module(x), reference.linear(x, module.unpacked_weight(), module.bias))


def write_checkpoint(path: Path, **config: Any) -> tuple[NVFP4Weight, NVFP4Weight]:
    """Two layers in DeepSeek-V4's layout; returns the weights of layer 1."""
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        w13, w2 = weights()
        for e in range(E):
            gate, up = (tuple(part[e].chunk(2)[half] for part in w13) for half in (0, 1))
            for name, leaves in (("w1", gate), ("w3", up), ("w2", tuple(part[e] for part in w2))):
                prefix = f"layers.{layer}.ffn.experts.{e}.{name}."
                values = zip(("weight", "weight_scale", "weight_scale_2"), leaves, strict=True)
                tensors.update({prefix + leaf: value.contiguous() for leaf, value in values})
                tensors[prefix + "weight_scale_2"] = tensors[prefix + "weight_scale_2"].reshape(())
    dense = quantize(torch.randn(32, K))
    names = ("weight", "weight_scale", "weight_scale_2")
    tensors |= {f"layers.0.attn.proj.{leaf}": value for leaf, value in zip(names, dense, strict=True)}
    tensors["layers.0.attn.proj.bias"] = torch.randn(32)
    save_file(tensors, path / "model.safetensors")
    base = {"model_type": "deepseek_v4", "hidden_act": "silu", "num_hidden_layers": 2, "num_experts_per_tok": TOP_K}
    (path / "config.json").write_text(json.dumps(base | config))
    return w13, w2


class Calls(TorchDispatchMode):
    """The keyword arguments of every call of an MoE op, as they arrive at the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.limits: list[float | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.nvfp4.moe.default:
            self.limits.append((kwargs or {}).get("clamp_limit"))
        elif func is torch.ops.nvfp4_reference.moe.default:
            self.limits.append(args[11])
        return func(*args, **(kwargs or {}))


CONFIGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"swiglu_limit": LIMIT}, {"clamp_limit": LIMIT}),
    ({"swiglu_limit": 0.3}, {"clamp_limit": 0.3}),
    ({"model_type": "gpt_oss", "swiglu_limit": LIMIT}, {"clamp_limit": LIMIT, "alpha": 1.702, "beta": 1.0}),
    (
        {"model_type": "step3p5", "swiglu_limits": [0.1, LIMIT]},
        {"activation": "swiglustep", "clamp_limit": LIMIT},
    ),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("config", "gate"), CONFIGS)
def test_declared_limit_is_the_limit_that_the_kernel_applies(
    tmp_path: Path, backend: str, config: dict[str, Any], gate: dict[str, Any]
) -> None:
    w13, w2 = write_checkpoint(tmp_path, **config)
    args = inputs()
    expected, share = reference.moe_with_clamped_share(args[0], w13, w2, *args[1:], **gate)
    assert share > 0.1
    for module in (
        NVFP4Experts.from_checkpoint(tmp_path, 1, backend=backend),
        NVFP4Experts.from_weights(w13, w2, quant_config=MoEQuantConfig.from_config(config, 1), backend=backend),
    ):
        assert module.backend == backend
        assert module.clamp_limit == gate["clamp_limit"]
        with Calls() as calls:
            out = module(*args)
        assert calls.limits == [gate["clamp_limit"]]
        testing.assert_accurate(out, expected)


def test_selection_sees_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    choose = backends.select_moe_backend
    monkeypatch.setattr(
        "torch_nvfp4.nn.experts.select_moe_backend", lambda config, name: seen.append(config) or choose(config, name)
    )
    NVFP4Experts.from_weights(*weights(), activation="swiglustep", clamp_limit=LIMIT)
    (config,) = seen
    assert (config.gate.clamp_limit, config.gate.activation) == (LIMIT, Activation.swiglustep)
    assert (config.device_type, config.hidden_size, config.intermediate_size) == ("cpu", K, I)
    assert not config.equal_gate_up_scales


def test_clamp_that_cannot_be_applied_raises() -> None:
    with pytest.raises(ValueError, match="expected clamp_limit to be None for activation gelu"):
        NVFP4Experts.from_weights(*weights(), activation="gelu", clamp_limit=7.0)
    with pytest.raises(ValueError, match=r"backend='flashinfer_trtllm' cannot run.*clamp_limit 0.6 to swiglustep"):
        NVFP4Experts.from_weights(*weights(), activation="swiglustep", clamp_limit=LIMIT, backend="flashinfer_trtllm")
    with pytest.raises(ValueError, match=r"expected the gate once, .* got .* \(silu, clamp_limit 7\) and quant_config"):
        NVFP4Experts.from_weights(*weights(), clamp_limit=7.0, quant_config=MoEQuantConfig())
    with pytest.raises(ValueError, match=r"got gate \(gelu, no clamp\) and quant_config \(silu, no clamp\)$"):
        NVFP4Experts.from_weights(*weights(), gate=Gate("gelu"), quant_config=MoEQuantConfig())


def test_tensor_and_expert_parallel_sums(tmp_path: Path) -> None:
    w13, w2 = write_checkpoint(tmp_path, swiglu_limit=LIMIT)
    checkpoint = Checkpoint.open(tmp_path)
    x, topk_weights, topk_ids = inputs(dtype=torch.float32)
    expected = reference.moe(x, w13, w2, topk_weights, topk_ids, clamp_limit=LIMIT)
    for kind, size in (("tp", 3), ("ep", 2)):
        ranks = [
            NVFP4Experts.from_checkpoint(checkpoint, 1, **{f"{kind}_rank": rank, f"{kind}_size": size})
            for rank in range(size)
        ]
        assert ranks[0].intermediate_size == (I // size if kind == "tp" else I)
        assert ranks[0].num_experts == (E // size if kind == "ep" else E)
        partial = sum(module(x, topk_weights, topk_ids).double() for module in ranks)
        testing.assert_accurate(partial, expected, dtype=torch.float32)


def test_linear_from_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    module = NVFP4Linear.from_checkpoint(tmp_path, "layers.0.attn.proj")
    checkpoint = Checkpoint.open(tmp_path)
    x = torch.randn(3, K)
    expected = reference.linear(
        x, checkpoint.linear("layers.0.attn.proj"), checkpoint.tensor("layers.0.attn.proj.bias")
    )
    testing.assert_accurate(module(x), expected)
    with pytest.raises(CheckpointError, match="expected a layer with NVFP4 experts"):
        NVFP4Experts.from_checkpoint(tmp_path, 5)


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


def test_linear_bias_follows_the_dtype() -> None:
    module = linear()
    assert module.half().bias is not None
    assert module.bias is not None
    assert module.bias.dtype == torch.float16


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


def test_weights_that_are_not_contiguous() -> None:
    w13, w2 = weights()
    strided = NVFP4Weight(*(torch.stack((part, part), -1)[..., 0] for part in w13))
    assert not strided.global_scale.is_contiguous()
    for backend in ("cpu", "reference"):
        module = NVFP4Experts.from_weights(strided, w2, clamp_limit=LIMIT, backend=backend)
        assert torch.equal(module(*inputs()), experts(backend)(*inputs()))


def test_functional_call_takes_buffers() -> None:
    module, other = experts(), NVFP4Experts(E, K, I, clamp_limit=LIMIT)
    out = torch.func.functional_call(other, dict(module.named_buffers()), inputs())
    assert torch.equal(out, module(*inputs()))


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
    with pytest.raises(ValueError, match=r"bias: expected shape \[48\], got \[64\]"):
        NVFP4Linear.from_weight(testing.random_weight((48, K)), torch.zeros(64))
    with pytest.raises(ValueError, match=r"expected a weight \[N, K\]"):
        NVFP4Linear.from_weight(testing.random_weight((2, 48, K)))
    x, topk_weights, topk_ids = inputs()
    with pytest.raises(RuntimeError, match=r"w13 must have shape"):
        experts()(torch.randn(7, 128), topk_weights, topk_ids)
    with pytest.raises(RuntimeError, match="topk_weights must have shape"):
        experts()(x[:3], topk_weights, topk_ids)


def test_backward_raises() -> None:
    x, topk_weights, topk_ids = inputs(dtype=torch.float32)
    for backend in ("cpu", "reference"):
        with pytest.raises((NotImplementedError, RuntimeError), match="nvfp4"):
            experts(backend)(x.clone().requires_grad_(), topk_weights, topk_ids).sum().backward()


class Model(nn.Module):
    """Several layers, as a model has them."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.router = nn.Linear(K, E, dtype=torch.bfloat16)
        self.proj = linear()
        self.back = NVFP4Linear.from_float(torch.randn(K, 48))
        self.layers = nn.ModuleList(experts(backend) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        topk_weights, topk_ids = self.router(x).float().softmax(-1).topk(TOP_K)
        for layer in self.layers:
            x = x + 0.1 * layer(x, topk_weights, topk_ids)
        return self.back(self.proj(x))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compile_without_a_graph_break_once(backend: str | None) -> None:
    torch._dynamo.reset()
    model = Model(backend).requires_grad_(False)
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for tokens in (2, 7, 33):
        x = torch.randn(tokens, K, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", [None, "reference"])
def test_export_with_dynamic_tokens(backend: str | None) -> None:
    model = Model(backend).requires_grad_(False)
    tokens = torch.export.Dim("tokens", min=2)
    x = torch.randn(9, K, dtype=torch.bfloat16)
    program = torch.export.export(model, (x[:4],), dynamic_shapes=({0: tokens},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), model(x))


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
