"""Writes small checkpoints in the layouts of published ones, for `torch-nvfp4 demo`, the tests and the fuzzer.

Names, dtypes and config fields are those of nvidia/DeepSeek-V4-Flash-NVFP4 (`layout="deepseek"`), of Qwen3-30B-A3B
quantized by ModelOpt ("modelopt") and by llm-compressor ("compressed-tensors"), and of the models that
`layouts.LAYOUTS` names for the other rows, those of MXFP4 among them; the values are random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from torch_nvfp4 import mxfp4
from torch_nvfp4.checkpoint.synthetic_config import (
    COMPRESS_RATIOS,
    FP8_BLOCK,
    HEAD_DIM,
    HEADS,
    HYPER_CONNECTIONS,
    LORA_RANK,
    VOCAB_SIZE,
    Sizes,
    config_of,
    has_hf_quant_config,
    hf_quant_config,
    is_plain,
)
from torch_nvfp4.checkpoint.writer import (
    ROWS,
    WRITTEN,
    dense_spelling,
    module_leaves,
    mxfp4_leaves,
    stacked_experts,
    write_json,
    write_shards,
)
from torch_nvfp4.format import E4M3_MAX, NVFP4Weight, quantize
from torch_nvfp4.mxfp4 import MXFP4Weight

__all__ = ["LayoutName", "write_checkpoint"]

LayoutName = Literal[
    "deepseek",
    "modelopt",
    "compressed-tensors",
    "modelopt-stack",
    "compressed-tensors-stack",
    "modelopt-parameters",
    "compressed-tensors-parameters",
    "modelopt-rows",
    "compressed-tensors-rows",
    "nemotron",
    "deepseek-mxfp4",
    "quark-mxfp4",
    "compressed-tensors-mxfp4",
    "gpt-oss",
]

_MTP_EXPERTS = 2
# Experts quantized at a time: enough for both cores, without a fp32 copy of the layer.
_BATCH = 8


def write_checkpoint(
    path: str | Path,
    *,
    hidden_size: int = 1024,
    moe_intermediate_size: int | Sequence[int] = 512,
    n_routed_experts: int | Sequence[int] = 32,
    num_experts_per_tok: int = 6,
    num_hidden_layers: int = 4,
    swiglu_limit: float | None = 10.0,
    layout: LayoutName = "deepseek",
    seed: int = 0,
) -> Path:
    """Writes a checkpoint with random weights: two shards, an index and the configs.

    The weights are scaled so that the limit bites: for activations from a standard normal distribution, gate
    pre-activations have a standard deviation of 1.5 limits (a quarter of them clamp) and up pre-activations of 0.75
    limits (18 % clamp). Gate and up therefore differ in their global scales by a factor of about two, where the layout
    has one for each. Without a limit, both deviations are as with a limit of 1.

    Args:
        path: the directory, made when it is not there; files of earlier calls are overwritten.
        hidden_size: K, a multiple of 16, in a layout of MXFP4 of 32.
        moe_intermediate_size: I, as K, or one for each layer.
        n_routed_experts: E, or one for each layer (as after pruning).
        swiglu_limit: the clamp limit that config.json declares, None for no clamp. In the layouts of models whose
            activation has no clamp ("nemotron", relu2; "compressed-tensors-mxfp4", situ) the weights alone follow it.
        layout: whose names and leaves to write. Only "deepseek" and "deepseek-mxfp4" are models that transformers runs.
        seed: of everything random; the same arguments write the same bytes.

    Returns:
        path.

    Raises:
        ValueError: a size that is not a positive multiple of 16 (of MXFP4 32), more experts per token than experts, no
            layer, sizes for another number of layers, an unknown layout, a limit that is not positive and finite.
    """
    if num_hidden_layers < 1:
        raise ValueError(f"expected num_hidden_layers >= 1, got {num_hidden_layers}")
    sizes = Sizes(
        hidden=hidden_size,
        intermediate=_per_layer("moe_intermediate_size", moe_intermediate_size, num_hidden_layers),
        num_experts=_per_layer("n_routed_experts", n_routed_experts, num_hidden_layers),
        top_k=num_experts_per_tok,
        num_layers=num_hidden_layers,
        limit=swiglu_limit,
    )
    if layout not in get_args(LayoutName):
        raise ValueError(f"expected layout to be one of {', '.join(get_args(LayoutName))}, got {layout!r}")
    multiple = ROWS[layout].spelling.group_size
    for name, size in (("hidden_size", hidden_size), *(("moe_intermediate_size", size) for size in sizes.intermediate)):
        if size < multiple or size % multiple:
            raise ValueError(f"expected {name} to be a positive multiple of {multiple}, got {size}")
    if not 1 <= num_experts_per_tok <= min(sizes.num_experts):
        raise ValueError(f"expected 1 <= num_experts_per_tok <= {min(sizes.num_experts)}, got {num_experts_per_tok}")
    if swiglu_limit is not None and not 0 < swiglu_limit < math.inf:
        raise ValueError(f"expected swiglu_limit to be positive and finite, or None, got {swiglu_limit}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    _Writer(sizes, layout, seed).write(path)
    return path


def _per_layer(name: str, value: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    values = (value,) * num_layers if isinstance(value, int) else tuple(value)
    if len(values) != num_layers:
        raise ValueError(f"expected {name} to be one number or {num_layers}, one for each layer, got {len(values)}")
    return values


class _Writer:
    def __init__(self, sizes: Sizes, layout: LayoutName, seed: int) -> None:
        self.sizes = sizes
        self.hidden = sizes.hidden
        self.layout: LayoutName = layout
        self.written = WRITTEN[layout]
        self.generator = torch.Generator().manual_seed(seed)

    def write(self, path: Path) -> None:
        write_shards(path, self._shards())
        config = config_of(self.sizes, self.layout)
        write_json(path / "config.json", config)
        if not has_hf_quant_config(self.layout):
            (path / "hf_quant_config.json").unlink(missing_ok=True)
        else:
            write_json(path / "hf_quant_config.json", hf_quant_config(config["quantization_config"]))

    def _shards(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        deepseek = self.written.model == "deepseek"
        layer = self._deepseek_layer if deepseek else self._qwen_layer
        if is_plain(self.layout):
            layer = self._plain_layer
        half = self.sizes.num_layers // 2
        for number in range(2):
            tensors: dict[str, Tensor] = {}
            for index in range(half * number, self.sizes.num_layers if number else half):
                tensors.update(layer(index))
            if number == 1:
                tensors.update(self._deepseek_outer() if deepseek else self._qwen_outer())
            yield f"model-{number + 1:05}-of-00002.safetensors", tensors

    def _randn(self, *shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=self.generator).mul_(std)

    def _bf16(self, *shape: int) -> Tensor:
        return self._randn(*shape, std=shape[-1] ** -0.5).to(torch.bfloat16)

    def _ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    def _experts(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """The routed experts of one layer."""
        limit = 1.0 if self.sizes.limit is None else self.sizes.limit
        k, i, experts = self.hidden, self.sizes.intermediate[layer], self.sizes.num_experts[layer]
        projections = ((i, k, 1.5 * limit), (i, k, 0.75 * limit), (k, i, 2.0))[-len(self.written.projections) :]
        row = ROWS[self.layout]
        if row.kind != "matrix":
            projections = ((i, k, 1.5 * limit), (i, k, 0.75 * limit), (k, i, 2.0))
        stacks: tuple[list[Tensor], ...] = tuple([] for _ in projections)
        for start in range(0, experts, _BATCH):
            num = min(_BATCH, experts - start)
            for stack, (position, (rows, cols, gain)) in zip(stacks, enumerate(projections), strict=True):
                dense = self._randn(num, rows, cols, std=gain * cols**-0.5)
                if row.kind != "matrix":
                    stack.append(dense)
                    continue
                module = f"{self.written.experts.format(layer)}.{{}}.{self.written.projections[position]}"
                yield from self._matrices(module, start, dense)
        if row.kind != "matrix":
            yield from stacked_experts(self.layout, layer, *(torch.cat(stack) for stack in stacks))

    def _matrices(self, module: str, first: int, dense: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A matrix for each expert from `first` on; {} in the module's name is for its id."""
        spelling = ROWS[self.layout].spelling
        if spelling.is_mxfp4:
            data, scale = mxfp4.quantize(dense)
            for expert in range(len(dense)):
                name = module.format(first + expert)
                yield from mxfp4_leaves(name, spelling, MXFP4Weight(data[expert], scale[expert]))
            return
        weights = quantize(dense)
        for expert in range(len(dense)):
            weight = NVFP4Weight(*(part[expert] for part in weights))
            yield from module_leaves(module.format(first + expert), spelling, weight)

    def _fp8(self, module: str, rows: int, cols: int) -> Iterator[tuple[str, Tensor]]:
        """An FP8 matrix in 128 x 128 blocks with power-of-two (E8M0) scales."""
        dense = self._randn(rows, cols, std=cols**-0.5)
        grid = (-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
        padded = torch.zeros(grid[0] * FP8_BLOCK, grid[1] * FP8_BLOCK)
        padded[:rows, :cols] = dense
        blocks = padded.reshape(grid[0], FP8_BLOCK, grid[1], FP8_BLOCK)
        scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3)) / E4M3_MAX)))
        codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :cols].contiguous()
        yield f"{module}.weight", codes.to(torch.float8_e4m3fn)
        yield f"{module}.scale", scale.to(torch.float8_e8m0fnu)

    def _mxfp4(self, module: str, rows: int, cols: int) -> Iterator[tuple[str, Tensor]]:
        """Dummy MXFP4 codes and scales (2^-6), the source format of DeepSeek-V4's experts."""
        codes = torch.randint(-128, 128, (rows, cols // 2), generator=self.generator, dtype=torch.int8)
        yield f"{module}.weight", codes
        yield f"{module}.scale", torch.full((rows, -(-cols // 32)), 2.0**-6).to(torch.float8_e8m0fnu)

    def _compressor(self, module: str, ratio: int, head_dim: int) -> Iterator[tuple[str, Tensor]]:
        width = head_dim * (2 if ratio == 4 else 1)  # ratio 4 compresses overlapping windows
        yield f"{module}.wkv.weight", self._bf16(width, self.hidden)
        yield f"{module}.wgate.weight", self._bf16(width, self.hidden)
        yield f"{module}.ape", self._randn(ratio, width, std=0.02)
        yield f"{module}.norm.weight", self._ones(head_dim)

    def _deepseek_attention(self, module: str, ratio: int) -> Iterator[tuple[str, Tensor]]:
        heads = HEADS * HEAD_DIM
        yield f"{module}.attn_sink", torch.zeros(HEADS)
        yield f"{module}.q_norm.weight", self._ones(LORA_RANK)
        yield f"{module}.kv_norm.weight", self._ones(HEAD_DIM)
        yield from self._fp8(f"{module}.wq_a", LORA_RANK, self.hidden)
        yield from self._fp8(f"{module}.wq_b", heads, LORA_RANK)
        yield from self._fp8(f"{module}.wkv", HEAD_DIM, self.hidden)
        yield from self._fp8(f"{module}.wo_a", 2 * LORA_RANK, heads // 2)
        yield from self._fp8(f"{module}.wo_b", self.hidden, 2 * LORA_RANK)
        if ratio:
            yield from self._compressor(f"{module}.compressor", ratio, HEAD_DIM)
        if ratio == 4:
            yield from self._fp8(f"{module}.indexer.wq_b", heads, LORA_RANK)
            yield f"{module}.indexer.weights_proj.weight", self._bf16(HEADS, self.hidden)
            yield from self._compressor(f"{module}.indexer.compressor", ratio, HEAD_DIM)

    def _deepseek_block(self, block: str, ratio: int, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Everything of a decoder block but its routed experts; that of multi-token prediction is as the last layer."""
        yield from self._deepseek_attention(f"{block}.attn", ratio)
        mixes = (2 + HYPER_CONNECTIONS) * HYPER_CONNECTIONS
        for part in ("attn", "ffn"):
            yield f"{block}.{part}_norm.weight", self._ones(self.hidden)
            yield f"{block}.hc_{part}_fn", self._randn(mixes, HYPER_CONNECTIONS * self.hidden, std=0.02)
            yield f"{block}.hc_{part}_base", torch.zeros(mixes)
            yield f"{block}.hc_{part}_scale", torch.ones(3)
        experts, top_k = self.sizes.num_experts[layer], self.sizes.top_k
        yield f"{block}.ffn.gate.weight", self._bf16(experts, self.hidden)
        if layer == 0:
            ids = torch.arange(VOCAB_SIZE * top_k).reshape(VOCAB_SIZE, top_k) % experts
            yield f"{block}.ffn.gate.tid2eid", ids
        else:
            yield f"{block}.ffn.gate.bias", torch.zeros(experts)
        intermediate = self.sizes.intermediate[layer]
        yield from self._fp8(f"{block}.ffn.shared_experts.w1", intermediate, self.hidden)
        yield from self._fp8(f"{block}.ffn.shared_experts.w2", self.hidden, intermediate)
        yield from self._fp8(f"{block}.ffn.shared_experts.w3", intermediate, self.hidden)

    def _deepseek_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        ratio = COMPRESS_RATIOS[layer % len(COMPRESS_RATIOS)]
        yield from self._deepseek_block(f"layers.{layer}", ratio, layer)
        yield from self._experts(layer)

    def _deepseek_outer(self) -> Iterator[tuple[str, Tensor]]:
        yield "embed.weight", self._bf16(VOCAB_SIZE, self.hidden)
        yield "norm.weight", self._ones(self.hidden)
        yield "head.weight", self._bf16(VOCAB_SIZE, self.hidden)
        for root in ("", "mtp.0."):
            yield f"{root}hc_head_fn", self._randn(HYPER_CONNECTIONS, HYPER_CONNECTIONS * self.hidden, std=0.02)
            yield f"{root}hc_head_base", torch.zeros(HYPER_CONNECTIONS)
            yield f"{root}hc_head_scale", torch.ones(1)
        yield from self._deepseek_block("mtp.0", 0, -1)
        for name in ("e_proj", "h_proj"):
            yield from self._fp8(f"mtp.0.{name}", self.hidden, self.hidden)
        for name in ("enorm", "hnorm", "norm"):
            yield f"mtp.0.{name}.weight", self._ones(self.hidden)
        intermediate = self.sizes.intermediate[-1]
        for expert in range(_MTP_EXPERTS):
            root = f"mtp.0.ffn.experts.{expert}"
            yield from self._mxfp4(f"{root}.w1", intermediate, self.hidden)
            yield from self._mxfp4(f"{root}.w2", self.hidden, intermediate)
            yield from self._mxfp4(f"{root}.w3", intermediate, self.hidden)

    def _qwen_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        block = self.written.experts.format(layer)
        root = block[: block.index(f"layers.{layer}.") + len(f"layers.{layer}")]
        heads = HEADS * HEAD_DIM
        for name, rows, cols in (
            ("q_proj", heads, self.hidden),
            ("k_proj", heads, self.hidden),
            ("v_proj", heads, self.hidden),
            ("o_proj", self.hidden, heads),
        ):
            weight = quantize(self._randn(rows, cols, std=cols**-0.5))
            yield from module_leaves(f"{root}.self_attn.{name}", dense_spelling(self.layout), weight)
        if not ROWS[self.layout].spelling.reciprocal:
            yield f"{root}.self_attn.k_proj.k_scale", torch.tensor(0.01)
            yield f"{root}.self_attn.v_proj.v_scale", torch.tensor(0.01)
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            yield f"{root}.{name}.weight", self._ones(HEAD_DIM)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{root}.{name}.weight", self._ones(self.hidden)
        yield f"{root}.mlp.gate.weight", self._bf16(self.sizes.num_experts[layer], self.hidden)
        yield from self._experts(layer)

    def _plain_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Experts beside a router, an attention and norms in bf16, under names like the model's."""
        module = self.written.experts.format(layer)
        block, root = module.rpartition(".")[0], module[: module.index(f"layers.{layer}.") + len(f"layers.{layer}")]
        experts, intermediate = self.sizes.num_experts[layer], self.sizes.intermediate[layer]
        router = "router" if self.written.model == "gpt-oss" else "gate"
        yield f"{root}.input_layernorm.weight", self._ones(self.hidden)
        yield f"{root}.self_attn.o_proj.weight", self._bf16(self.hidden, HEADS * HEAD_DIM)
        yield f"{block}.{router}.weight", self._bf16(experts, self.hidden)
        yield from self._experts(layer)
        if self.written.model == "gpt-oss":
            yield f"{block}.router.bias", torch.zeros(experts, dtype=torch.bfloat16)
            for name, rows in (("gate_up_proj", 2 * intermediate), ("down_proj", self.hidden)):
                yield f"{module}.{name}_bias", self._randn(experts, rows, std=0.5).to(torch.bfloat16)

    def _qwen_outer(self) -> Iterator[tuple[str, Tensor]]:
        yield "model.embed_tokens.weight", self._bf16(VOCAB_SIZE, self.hidden)
        yield "model.norm.weight", self._ones(self.hidden)
        yield "lm_head.weight", self._bf16(VOCAB_SIZE, self.hidden)
