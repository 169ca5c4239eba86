"""NVFP4 experts of other engines for CPUs as contenders: ggml's, and why kt-kernel's are none."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.bench.layer import GGML, BenchError, Case, Contender, Layer
from torch_nvfp4.format import NVFP4Weight


def ggml_blocks(weight: NVFP4Weight) -> Tensor:
    """ggml's ``block_nvfp4`` of codes [..., N, K / 2] and scales [..., N, K / 16]: uint8 [..., N, K / 64, 36].

    A block of 64 columns has its four scales and then, for each group of 16, eight bytes: byte j holds column j in its
    low nibble and column j + 8 in its high one. ``block_nvfp4`` has no global scale.
    """
    codes = torch.stack((weight.data & 15, weight.data >> 4), dim=-1).flatten(-2)
    low, high = codes.unflatten(-1, (-1, 4, 2, 8)).unbind(-2)
    scales = weight.scale.view(torch.uint8).unflatten(-1, (-1, 4))
    return torch.cat((scales, (low | high << 4).flatten(-2)), dim=-1).contiguous()


class _Graph:
    """The layer for one number of tokens."""

    def __init__(self, ggml: Any, layer: Layer, weights: tuple[Any, Any, Any], backend: Any, tokens: int) -> None:
        self._ggml, self._backend = ggml, backend
        self._memory, context = _context(ggml, 64 + 2 * layer.shape.top_k)
        hidden, top_k = layer.shape.hidden, layer.shape.top_k
        f32, i32 = ggml.GGML_TYPE_F32, ggml.GGML_TYPE_I32
        self.x = ggml.ggml_new_tensor_3d(context, f32, hidden, 1, tokens)
        self.ids = ggml.ggml_new_tensor_2d(context, i32, top_k, tokens)
        # Global scales of w13, and those of w2 times the router's weights, by slot.
        self.scale = ggml.ggml_new_tensor_3d(context, f32, 1, top_k, tokens)
        self.weight = ggml.ggml_new_tensor_3d(context, f32, 1, top_k, tokens)
        for tensor in (self.x, self.ids, self.scale, self.weight):
            ggml.ggml_set_input(tensor)

        def product(matrix: Any, x: Any, scale: Any) -> Any:
            return ggml.ggml_mul(context, ggml.ggml_mul_mat_id(context, matrix, x, self.ids), scale)

        gate, up, down = weights
        limit = layer.clamp_limit
        g = ggml.ggml_clamp(context, product(gate, self.x, self.scale), -3e38, limit)
        u = ggml.ggml_clamp(context, product(up, self.x, self.scale), -limit, limit)
        slots = product(down, ggml.ggml_swiglu_split(context, g, u), self.weight)  # [hidden, top_k, tokens]
        row = hidden * 4
        views = [ggml.ggml_view_2d(context, slots, hidden, tokens, row * top_k, row * slot) for slot in range(top_k)]
        out = views[0] if top_k > 1 else ggml.ggml_cont(context, views[0])
        for view in views[1:]:
            out = ggml.ggml_add(context, out, view)
        self.out = out
        ggml.ggml_set_output(out)
        self._graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(self._graph, out)
        self._allocator = ggml.ggml_gallocr_new(ggml.ggml_backend_get_default_buffer_type(backend))
        if not ggml.ggml_gallocr_alloc_graph(self._allocator, self._graph):
            raise BenchError(f"--peer ggml: expected memory for {tokens} tokens, got none")

    def run(self, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        for tensor, value in zip((self.x, self.ids, self.scale, self.weight), inputs, strict=True):
            self._ggml.ggml_backend_tensor_set(tensor, value.data_ptr(), 0, value.nbytes)
        self._ggml.ggml_backend_graph_compute(self._backend, self._graph)
        out = torch.empty_like(inputs[0])
        self._ggml.ggml_backend_tensor_get(self.out, out.data_ptr(), 0, out.nbytes)
        return out


def _context(ggml: Any, tensors: int) -> tuple[Any, Any]:
    """A context for descriptions of that many tensors, and the memory that it needs as long as it lives."""
    size = tensors * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
    memory = (ctypes.c_uint8 * size)()
    parameters = ggml.ggml_init_params(size, ctypes.cast(memory, ctypes.c_void_p), True)
    return memory, ggml.ggml_init(parameters)


class _Experts:
    """The weights, and a graph for each number of tokens."""

    def __init__(self, ggml: Any, layer: Layer) -> None:
        self._ggml, self._layer = ggml, layer
        experts, hidden, intermediate, _ = layer.shape
        self._backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self._backend, torch.get_num_threads())
        self._memory, context = _context(ggml, 3)
        sizes = ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
        kind = ggml.GGML_TYPE_NVFP4
        self._weights = tuple(ggml.ggml_new_tensor_3d(context, kind, k, n, experts) for k, n in sizes)
        self._buffer = ggml.ggml_backend_alloc_ctx_tensors(context, self._backend)
        matrices = (*ggml_blocks(layer.w13).chunk(2, dim=1), ggml_blocks(layer.w2))
        for tensor, blocks in zip(self._weights, matrices, strict=True):
            blocks = blocks.contiguous()
            ggml.ggml_backend_tensor_set(tensor, blocks.data_ptr(), 0, blocks.nbytes)
        # Layer.random gives gate and up the same global scale.
        self._scale, self._down_scale = layer.w13.global_scale[:, 0].contiguous(), layer.w2.global_scale
        self._graphs: dict[int, _Graph] = {}

    def run(self, case: Case) -> Tensor:
        x, topk_weights, topk_ids = case
        if len(x) not in self._graphs:
            self._graphs[len(x)] = _Graph(self._ggml, self._layer, self._weights, self._backend, len(x))
        ids = topk_ids.long()
        scales = self._scale[ids], self._down_scale[ids] * topk_weights
        return self._graphs[len(x)].run((x.contiguous(), topk_ids.contiguous(), *scales))


def ggml_contender(layer: Layer) -> Contender:
    """ggml's ``mul_mat_id`` over NVFP4 weights, clamps and ``swiglu_split``; it rounds activations to 8 bits.

    Raises BenchError when ggml-python is not there or has no NVFP4.
    """
    try:
        ggml = importlib.import_module("ggml")
        _ = ggml.GGML_TYPE_NVFP4
    except (ImportError, AttributeError) as error:
        raise BenchError(
            f"--peer ggml: expected the package ggml-python (0.0.45) with NVFP4, got: {error}; pip install ggml-python"
        ) from error
    if layer.shape.hidden % 64 or layer.shape.intermediate % 64:
        raise BenchError(f"--peer ggml: expected K and I to be multiples of 64, its block, got {tuple(layer.shape)}")
    return Contender(GGML, _Experts(ggml, layer).run, torch.float32, ids_dtype=torch.int32)


def kt_contender(layer: Layer) -> Contender:
    """Raises BenchError: kt-kernel (0.7.2) has NVFP4 experts for AVX2, but refuses a clamp with them.

    Without its clamp a layer is another function, which is not timed.
    """
    try:
        wrapper = importlib.import_module("kt_kernel").KTMoEWrapper
    except (ImportError, AttributeError) as error:
        raise BenchError(
            f"--peer kt: expected the package kt-kernel, got: {error}; pip install --no-deps kt-kernel gguf "
            "pyyaml (0.7.2 wants torch 2.9.1), which refuses a clamp with NVFP4, so that it is not timed"
        ) from error
    experts, hidden, intermediate, top_k = layer.shape
    try:
        wrapper(
            0, experts, top_k, hidden, intermediate, gpu_experts_mask=None, cpuinfer_threads=torch.get_num_threads(),
            threadpool_count=1, weight_path="", chunked_prefill_size=512, method="NVFP4",
            swiglu_limit=layer.clamp_limit,
        )  # fmt: skip
        got = "one that takes it, whose weights this benchmark cannot load yet"
    except Exception as error:  # whatever it is, its words say why
        got = str(error)
    raise BenchError(
        f"--peer kt: expected a kt-kernel whose NVFP4 takes swiglu_limit={layer.clamp_limit:g}, got: {got}"
    )
