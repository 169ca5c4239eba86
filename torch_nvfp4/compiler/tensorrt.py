"""``torch.ops.nvfp4.moe`` inside TensorRT engines that Torch-TensorRT builds.

Importing this module where ``tensorrt`` and ``torch_tensorrt`` can be imported registers

- the TensorRT plugin ``torch_nvfp4::moe``, which runs the op's CUDA kernels on the engine's stream, and
- a converter from ``torch.ops.nvfp4.moe`` to that plugin, dynamic token counts included.

Elsewhere importing it has no effect; ``unavailable_reason()`` says why. A call that the plugin cannot take (see
``unsupported_reason``) stays a PyTorch block between TensorRT blocks, as every call does without this module.

The plugin has a schema of its own: TensorRT has no optional arguments, no uint8 tensors and no keyword arguments. No
clamp is infinity, no expert_map is the identity, packed weights are int32 words with their shape beside them. It is a
quick deployable plugin with a Python implementation: an engine that holds it runs in processes that have imported this
module, and not in a C++-only one.

It needs Torch-TensorRT 2.12 or later: 2.11 asks for TensorRT 10.15, and has the plugins of that release switched off.
TensorRT-RTX has no plugins.

What was run is in three steps. Built: with torch-tensorrt-rtx 2.13 and TensorRT-RTX 1.5 on a machine without a GPU, the
engines on both sides of the op, which stays in PyTorch (``make test-tensorrt``). Tested against the interfaces alone,
with Torch-TensorRT 2.13 and the Python bindings of TensorRT 11.0 on libraries that do nothing: registration of plugin
and converter, partitioning, the converter on a network that records, creation of the plugin object, and the plugin's
implementation on CPU tensors. Never run: an engine that holds the plugin, and any engine on a GPU, because TensorRT's
own libraries could not be had.

Private APIs: ``torch._subclasses.fake_tensor.unset_fake_temporarily`` (run with torch 2.13), and of Torch-TensorRT
``torch_tensorrt._features``, ``dynamo.conversion.converter_utils`` (2.13).
"""

# No `from __future__ import annotations`: TensorRT reads the plugin's annotations as objects.
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from torch_nvfp4.ops.moe import moe

__all__ = ["available", "bind_arguments", "unavailable_reason", "unsupported_reason"]

PLUGIN_NAMESPACE, PLUGIN_NAME = "torch_nvfp4", "moe"

# Arrays even for single values: TensorRT hands an attribute over as an array, whatever type it was declared with.
Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

_WEIGHTS = ("w13", "w13_global_scale", "w2", "w2_global_scale")

_log = logging.getLogger(__name__)
_registered = False


def unavailable_reason() -> str | None:
    """Why nothing is registered here, or None."""
    for package in ("tensorrt", "torch_tensorrt"):
        if importlib.util.find_spec(package) is None:
            return f"expected the package {package}, got none; install torch-tensorrt for your version of torch"
    try:
        # In this order: torch_tensorrt chooses which TensorRT `import tensorrt` gives.
        torch_tensorrt = importlib.import_module("torch_tensorrt")
        features = importlib.import_module("torch_tensorrt._features").ENABLED_FEATURES
        version: str = importlib.import_module("tensorrt").__version__
    except Exception as error:  # torch_tensorrt raises a bare Exception where TensorRT's libraries are missing
        return f"expected torch_tensorrt to be importable, got {type(error).__name__}: {error}"
    if getattr(features, "tensorrt_rtx", False):
        return f"expected a TensorRT with plugins, got TensorRT-RTX {version}, which has none"
    if not features.qdp_plugin:  # which releases of TensorRT have broken ones is Torch-TensorRT's to know
        return (
            "expected a TensorRT whose quick deployable plugins torch_tensorrt enables, got TensorRT "
            f"{version} with torch_tensorrt {torch_tensorrt.__version__}; install torch-tensorrt 2.12 or later"
        )
    return None


def available() -> bool:
    """Whether plugin and converter are registered."""
    return _registered


def bind_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``torch.ops.nvfp4.moe`` by name, with the schema's defaults, however they were passed."""
    bound: dict[str, Any] = {}
    for index, argument in enumerate(torch.ops.nvfp4.moe.default._schema.arguments):
        if not argument.kwarg_only and index < len(args):
            bound[argument.name] = args[index]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
        else:
            raise TypeError(f"nvfp4::moe: expected the argument {argument.name}, got none")
    return bound


def unsupported_reason(node: Node) -> str | None:
    """Why this call of ``torch.ops.nvfp4.moe`` has to stay in PyTorch, or None."""
    bound = bind_arguments(node.args, node.kwargs)
    if bound["batch_invariant"]:
        return "expected a call without batch_invariant, got one with it: the plugin does not know it"
    for name in ("w13_bias", "w2_bias"):
        if bound[name] is not None:
            return f"expected a call without {name}, got one with it: the plugin does not know it"
    for name in _WEIGHTS:
        if not (isinstance(bound[name], Node) and bound[name].op == "get_attr"):
            return f"expected {name} to be a constant of the graph, got {bound[name]}"
    hidden_states = bound["hidden_states"]
    value = hidden_states.meta.get("val") if isinstance(hidden_states, Node) else None
    if not isinstance(value, Tensor):
        return f"expected hidden_states to be a node with a value in its meta, got {hidden_states}"
    if value.device.type != "cuda" or value.dtype not in (torch.bfloat16, torch.float16):
        return f"expected hidden_states in bfloat16 or float16 on cuda, got {value.dtype} on {value.device}"
    return None


def _supports(node: Node, settings: object = None) -> bool:
    reason = unsupported_reason(node)
    if reason is not None:
        _log.info("nvfp4::moe stays in PyTorch: %s", reason)
    return reason is None


def _plugin_attributes(bound: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The plugin's attributes for the arguments of one call, in the order of its schema."""
    limit = bound["clamp_limit"]
    return {
        "w13_shape": np.array(bound["w13"].shape, np.int64),
        "w2_shape": np.array(bound["w2"].shape, np.int64),
        "activation": np.array([bound["activation"]], np.int64),
        "clamp_limit": np.array([math.inf if limit is None else limit], np.float64),
        "alpha": np.array([bound["alpha"]], np.float64),
        "beta": np.array([bound["beta"]], np.float64),
        "apply_router_weight_on_input": np.array([bound["apply_router_weight_on_input"]], np.int64),
    }


class _DeviceBytes:
    """Memory that torch can take over without a copy: TensorRT's own interface refuses bfloat16."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {"data": (pointer, False), "shape": (size,), "typestr": "|u1", "version": 3}


def _tensor_at(pointer: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if math.prod(shape) == 0:
        return torch.empty(tuple(shape), dtype=dtype, device="cuda")
    size = math.prod(shape) * dtype.itemsize
    return torch.as_tensor(_DeviceBytes(pointer, size), device="cuda").view(dtype).view(tuple(shape))


def _register() -> None:
    import tensorrt.plugin as trtp
    from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter

    describe, implement = _plugin_functions()
    trtp.register(f"{PLUGIN_NAMESPACE}::{PLUGIN_NAME}")(describe)
    trtp.impl(f"{PLUGIN_NAMESPACE}::{PLUGIN_NAME}")(implement)
    dynamo_tensorrt_converter(
        torch.ops.nvfp4.moe.default, supports_dynamic_shapes=True, capability_validator=_supports
    )(_convert)


# Over 60 lines: TensorRT reads names and types off the two signatures, and the types exist only where TensorRT does.
def _plugin_functions() -> tuple[Callable[..., Any], Callable[..., None]]:
    """The plugin's description of its output, and its implementation on the engine's stream."""
    import tensorrt as trt
    import tensorrt.plugin as trtp

    dtypes = {
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.HALF: torch.float16,
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT64: torch.int64,
    }

    def to_torch(tensor: Any) -> Tensor:
        return _tensor_at(tensor.data_ptr, tuple(tensor.shape), dtypes[tensor.dtype])

    def describe(
        hidden_states: trtp.TensorDesc,
        w13: trtp.TensorDesc,
        w13_global_scale: trtp.TensorDesc,
        w2: trtp.TensorDesc,
        w2_global_scale: trtp.TensorDesc,
        topk_weights: trtp.TensorDesc,
        topk_ids: trtp.TensorDesc,
        expert_map: trtp.TensorDesc,
        w13_shape: Integers,
        w2_shape: Integers,
        activation: Integers,
        clamp_limit: Floats,
        alpha: Floats,
        beta: Floats,
        apply_router_weight_on_input: Integers,
    ) -> trtp.TensorDesc:
        return hidden_states.like()

    def implement(
        hidden_states: trtp.Tensor,
        w13: trtp.Tensor,
        w13_global_scale: trtp.Tensor,
        w2: trtp.Tensor,
        w2_global_scale: trtp.Tensor,
        topk_weights: trtp.Tensor,
        topk_ids: trtp.Tensor,
        expert_map: trtp.Tensor,
        w13_shape: Integers,
        w2_shape: Integers,
        activation: Integers,
        clamp_limit: Floats,
        alpha: Floats,
        beta: Floats,
        apply_router_weight_on_input: Integers,
        outputs: tuple[trtp.Tensor],
        stream: int,
    ) -> None:
        limit = float(clamp_limit[0])
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            result = moe(
                to_torch(hidden_states),
                to_torch(w13).view(torch.uint8).view(w13_shape.tolist()),
                to_torch(w13_global_scale),
                to_torch(w2).view(torch.uint8).view(w2_shape.tolist()),
                to_torch(w2_global_scale),
                to_torch(topk_weights),
                to_torch(topk_ids),
                to_torch(expert_map),
                activation=int(activation[0]),
                clamp_limit=None if math.isinf(limit) else limit,
                alpha=float(alpha[0]),
                beta=float(beta[0]),
                apply_router_weight_on_input=bool(apply_router_weight_on_input[0]),
            )
            to_torch(outputs[0]).copy_(result)

    return describe, implement


def _convert(ctx: Any, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """One call of ``torch.ops.nvfp4.moe`` as a layer of the network that ``ctx`` builds; returns its output tensor."""
    import tensorrt.plugin as trtp
    from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

    bound = bind_arguments(args, kwargs)
    for weight in _WEIGHTS:
        if not isinstance(bound[weight], Tensor):
            raise TypeError(f"nvfp4::moe: expected {weight} to be a constant of the graph, got {bound[weight]!r}")
    attributes = _plugin_attributes(bound)
    # A conversion may run under FakeTensorMode, with real constants.
    with unset_fake_temporarily():
        for weight in ("w13", "w2"):
            bound[weight] = bound[weight].contiguous().view(-1).view(torch.int32)
        if bound["expert_map"] is None:
            bound["expert_map"] = torch.arange(int(attributes["w13_shape"][0]), dtype=torch.int32)
    plugin = getattr(getattr(trtp.op, PLUGIN_NAMESPACE), PLUGIN_NAME)
    tensors = [get_trt_tensor(ctx, bound[key], f"{name}_{key}") for key in plugin.input_tensor_names]
    layer = ctx.net.add_plugin(plugin(*tensors, **attributes), aot=False)
    if not layer:
        raise RuntimeError(f"nvfp4::moe: expected TensorRT to add the plugin layer {name}, got none")
    layer.name = f"[{target}]-[{name}]"
    return layer.get_output(0)


_reason = unavailable_reason()
if _reason is None:
    _register()
    _registered = True
elif importlib.util.find_spec("torch_tensorrt") is not None:
    _log.warning("nvfp4::moe stays a PyTorch block between TensorRT's engines: %s", _reason)
