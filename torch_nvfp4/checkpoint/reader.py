"""`Checkpoint`: a directory of published files as NVFP4 weights, one layer or one rank's part of it at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_nvfp4.checkpoint.contents import Contents, id_spans
from torch_nvfp4.checkpoint.experts import Expert, LayerExperts
from torch_nvfp4.checkpoint.headers import collect_tensors, listing, load_json
from torch_nvfp4.checkpoint.layouts import BIAS_LEAVES
from torch_nvfp4.checkpoint.records import ExpertWeights, LayerConfig, Refusal, Summary
from torch_nvfp4.checkpoint.transforms import check_transforms
from torch_nvfp4.checkpoint.weights import Shards, check_other_leaves, read_experts, read_matrix
from torch_nvfp4.errors import CheckpointError, refusal, shown
from torch_nvfp4.format import GROUP_SIZE, NVFP4Weight
from torch_nvfp4.gate import Gate
from torch_nvfp4.model_config import ModelConfig

__all__ = ["Checkpoint", "ExpertWeights", "LayerConfig", "Refusal", "Summary", "open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """`Checkpoint.open`."""
    return Checkpoint.open(path)


class Checkpoint:
    """A checkpoint directory whose configs and headers were read and checked. Tensor data is read when asked for.

    Attributes:
        path: the directory.
        config: config.json.
        quant_config: the quantization section of config.json, else of hf_quant_config.json, else empty.
        tensors: every tensor by name; with an index, those that it names.
        layout: the name of a row of `layouts.LAYOUTS` ("deepseek", "modelopt", "compressed-tensors", ...), or None when
            nothing is NVFP4 or MXFP4.
        layers: the layers whose experts are NVFP4 or MXFP4, ascending; `refusals` names those that cannot be loaded.
        linears: the NVFP4 modules that are not routed experts.
    """

    def __init__(self, path: Path, config: dict[str, Any], quant_config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.quant_config = quant_config
        self._model = ModelConfig(path / "config.json", config)
        self.tensors, self._left_out = collect_tensors(path)
        self._contents = Contents(path, self.tensors, self._model)
        self.layout = self._contents.layout
        self.layers = tuple(sorted(self._contents.layers.keys() | self._contents.refused.keys()))
        self.linears = tuple(self._contents.linears)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads config.json, hf_quant_config.json, the index and every shard's header; no tensor data.

        With model.safetensors.index.json, the tensors that it names are read from the shards that it names, and no
        others. Without it, model.safetensors is read, else every *.safetensors of the directory.

        Raises:
            CheckpointError: missing directory, config, index entry or shard; a file that is not a regular file;
                invalid JSON; a truncated file; a tensor that two shards hold; a quantized module with a missing leaf, a
                wrong dtype or shape; missing expert ids; a value in the config that cannot be what its key says; a
                clamp limit whose form is not understood; a checkpoint of which no layer could be loaded.
        """
        path = Path(path)
        try:
            return cls._open(path)
        except OSError as error:
            raise CheckpointError(
                refusal(path, "a directory that can be read", error.strerror or str(error))
            ) from error

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        # os.path answers False for a name that no file can have.
        if not os.path.isdir(path):
            got = "a file" if os.path.exists(path) else "no such path"
            raise CheckpointError(refusal(path, "a checkpoint directory", got))
        if not os.path.lexists(path / "config.json"):
            raise CheckpointError(refusal(path, "config.json in the directory", listing(path)))
        config = load_json(path / "config.json")
        file = path / "hf_quant_config.json"
        separate = load_json(file).get("quantization") if os.path.lexists(file) else None
        sections = [config] + [section for key in ("text_config", "language_config", "llm_config")
                               if isinstance(section := config.get(key), dict)]  # fmt: skip
        declared = [section["quantization_config"] for section in sections if section.get("quantization_config")]
        quant_config = (declared or [separate or {}])[0]
        if not isinstance(quant_config, dict):
            where = path / "config.json" if declared else file
            raise CheckpointError(refusal(f"{where}: quantization section", "an object", shown(quant_config)))
        return cls(path, config, quant_config)

    @property
    def num_experts(self) -> int:
        """Routed experts of the first layer (all ranks). Raises CheckpointError when no layer has quantized ones."""
        return len(self._first_layer().experts)

    @property
    def hidden_size(self) -> int:
        """K of the experts. Raises CheckpointError when no layer has quantized ones."""
        return self._first_layer().hidden_size

    @property
    def intermediate_size(self) -> int:
        """I of the experts of the first layer. Raises CheckpointError when no layer has quantized ones."""
        return self._first_layer().intermediate_size

    @property
    def top_k(self) -> int:
        """Experts per token of the first layer.

        Raises:
            CheckpointError: config.json does not declare it, or declares 0 or more than there are experts.
        """
        return self.layer_top_k(next(iter(self._contents.layers), 0))

    def layer_top_k(self, layer: int) -> int:
        """Experts per token of one layer.

        Raises:
            CheckpointError: as `top_k`.
        """
        top_k = self._model.top_k(layer)
        content = self._contents.layers.get(layer)
        if content is not None and top_k > len(content.experts):
            expected = f"at most as many experts per token as layer {layer} has experts, {len(content.experts)}"
            raise CheckpointError(refusal(self.path / "config.json", expected, f"{top_k}"))
        return top_k

    @property
    def hidden_act(self) -> str | None:
        """The activation's name as config.json spells it."""
        return self._model.hidden_act

    def layer_config(self, layer: int) -> LayerConfig:
        """Sizes, gate and top-k of one layer's routed experts.

        Raises:
            CheckpointError: a layer without quantized experts or one that cannot be loaded; as `gate`.
        """
        content = self._layer(layer)
        return LayerConfig(
            num_experts=len(content.experts),
            hidden_size=content.hidden_size,
            intermediate_size=content.intermediate_size,
            top_k=self._model.declared_top_k(layer),
            gate=self.gate(layer),
            apply_router_weight_on_input=self.apply_router_weight_on_input(layer),
            gated=content.gated,
            has_w13_bias=content.has_w13_bias,
            has_w2_bias=content.has_w2_bias,
        )

    def clamp_limit(self, layer: int) -> float | None:
        """The SwiGLU clamp limit of a layer's routed experts, None for no clamp."""
        return self._model.clamp_limit(layer)

    def gate(self, layer: int) -> Gate:
        """The gate that the config declares for a layer's routed experts, with its clamp limit.

        Raises:
            CheckpointError: an activation that is not known, a clamp on an activation that has none (a clamp is never
                dropped), or gpt-oss's blocks in a model whose config does not say what their gate is.
        """
        gate = self._model.gate(layer)
        content = self._contents.layers.get(layer)
        if content is not None and content.are_blocks_of_gpt_oss:
            self._model.check_gate_of_blocks()
        return gate if content is None or content.gated else replace(gate, gated=False)

    def activation(self, layer: int) -> Gate:
        """The former name of `gate`."""
        return self.gate(layer)

    def apply_router_weight_on_input(self, layer: int) -> bool:
        """Whether the model scales an expert's input with the router's weight (Llama 4) and not its output."""
        return self._model.apply_router_weight_on_input

    def experts(
        self,
        layer: int,
        *,
        tp_rank: int = 0,
        tp_size: int = 1,
        ep_rank: int = 0,
        ep_size: int = 1,
        experts: range | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ExpertWeights:
        """Reads the experts of one layer, or one rank's part; no byte of another layer is read.

        MXFP4 becomes NVFP4 with the same values, bit for bit (see `torch_nvfp4.mxfp4`).

        Args:
            layer: one of `layers`.
            tp_rank, tp_size: slice I: rows of gate and up, columns of down. I / tp_size must be a multiple of 16.
            ep_rank, ep_size: slice the experts. ep_size must divide their number.
            experts: the consecutive experts to read, at least one, instead of ep_rank and ep_size.
            progress: called with (experts read, experts to read) after each expert. Without it as many threads read
                as torch has, up to 8.

        Returns:
            w13 [E / ep_size, 2I / tp_size, K] with global_scale [E / ep_size, 2] (gate, up), gate rows first, and
            w2 [E / ep_size, K, I / tp_size] with global_scale [E / ep_size]; biases where there are any. Without a gate
            w13 is [E / ep_size, I / tp_size, K] with global_scale [E / ep_size].

        Raises:
            CheckpointError: a layer without quantized experts or one that `refusals` names, a slice that does not fit,
                a NaN scale, a global scale that is not finite, MXFP4 exponents that NVFP4 does not have, a bias that
                is not finite, a tensor of the experts (adapter, pre_quant_scale other than one) that `moe` could not
                apply.
        """
        content = self._layer(layer)
        rows = self._rank_part("tp", tp_rank, tp_size, "intermediate size", content.intermediate_size, GROUP_SIZE)
        part = self._rank_part("ep", ep_rank, ep_size, "number of experts", len(content.experts))
        if experts is not None:
            part = self._expert_part(experts, len(content.experts), ep_size)
        chosen = content.experts[part]
        with Shards() as shards:
            self._check_leaves(shards, content, chosen)
            return read_experts(shards, content, chosen, rows, tp_rank == 0, progress)

    def expert_map(self, ep_rank: int = 0, ep_size: int = 1, *, layer: int | None = None) -> Tensor:
        """int32 [E]: a global expert's index in `experts(layer, ep_rank=..., ep_size=...)`, or -1 elsewhere.

        layer: None takes the first one.
        """
        num = len((self._first_layer() if layer is None else self._layer(layer)).experts)
        local = self._rank_part("ep", ep_rank, ep_size, "number of experts", num)
        expert_map = torch.full((num,), -1, dtype=torch.int32, device="cpu")
        expert_map[local] = torch.arange(local.stop - local.start, dtype=torch.int32, device="cpu")
        return expert_map

    def linear(self, name: str) -> NVFP4Weight:
        """Reads one quantized module, a dense linear of `linears` or a single expert's projection.

        Returns:
            data [N, K/2], scale [N, K/16], global_scale 0-d. A bias is not part of it: `tensor(name + ".bias")`.

        Raises:
            CheckpointError: no such NVFP4 module, a NaN scale, a global scale that is not finite, or a leaf (for
                instance pre_quant_scale) that would change the result.
        """
        matrix = self._contents.matrix(name)
        if matrix is None:
            raise CheckpointError(refusal(self.path, "the name of an NVFP4 module", shown(name)))
        with Shards() as shards:
            check_other_leaves(shards, matrix.stored.others, allowed=BIAS_LEAVES)
            return read_matrix(shards, matrix)

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor as it is stored. Raises CheckpointError when there is none of that name."""
        if name not in self.tensors:
            raise CheckpointError(refusal(self.path, f"the name of one of {len(self.tensors)} tensors", shown(name)))
        with Shards() as shards:
            return shards.tensor(self.tensors[name])

    def refusals(self) -> tuple[Refusal, ...]:
        """Every layer and linear that loading would refuse for what it holds, in the words in which it would.

        A declared top-k that no token can have is one of them ("top-k of layer 3"), though the weights would load. A
        NaN among the scales, and MXFP4 exponents that NVFP4 does not have, are only found by loading. Reads the
        activation scales of AWQ (pre_quant_scale), where there are any, and no other tensor.
        """
        result = []
        with Shards() as shards:
            for layer in self.layers:
                try:
                    content = self._layer(layer)
                    self._check_leaves(shards, content, content.experts)
                    self.gate(layer)
                except CheckpointError as error:
                    result.append(Refusal(f"layer {layer}", str(error)))
            for layer in self._contents.layers:
                try:
                    if self._model.declared_top_k(layer) is not None:
                        self.layer_top_k(layer)
                except CheckpointError as error:
                    result.append(Refusal(f"top-k of layer {layer}", str(error)))
            for name, module in self._contents.linears.items():
                try:
                    check_other_leaves(shards, module.others, allowed=BIAS_LEAVES)
                except CheckpointError as error:
                    result.append(Refusal(name, str(error)))
        return tuple(result)

    def summary(self) -> Summary:
        """What is quantized how, with counts and bytes. Reads what `refusals` reads."""
        loadable = self._contents.layers
        quant_method, quant_algo = (
            next((value for key in keys if isinstance(value := self.quant_config.get(key), str)), None)
            for keys in (("quant_method",), ("moe_quant_algo", "quant_algo"))
        )
        first = next(iter(loadable.items()), None)
        return Summary(
            path=self.path,
            layout=self.layout,
            model_type=self._model.model_type,
            quant_method=quant_method,
            quant_algo=quant_algo,
            shards=len({info.file for info in self.tensors.values()}),
            nbytes=sum(info.nbytes for info in self.tensors.values()),
            layers=self.layers,
            num_experts=len(first[1].experts) if first else None,
            top_k=self._model.declared_top_k(first[0] if first else 0),
            hidden_size=first[1].hidden_size if first else None,
            intermediate_size=first[1].intermediate_size if first else None,
            hidden_act=self.hidden_act,
            clamp_limits={layer: self.clamp_limit(layer) for layer in self.layers},
            categories=self._contents.categories(),
            expert_counts={layer: len(content.experts) for layer, content in loadable.items()},
            top_ks={layer: k for layer in loadable if (k := self._model.declared_top_k(layer)) is not None},
            intermediate_sizes={layer: content.intermediate_size for layer, content in loadable.items()},
            apply_router_weight_on_input=self._model.apply_router_weight_on_input,
            refusals=self.refusals(),
            left_out=self._left_out,
        )

    def _first_layer(self) -> LayerExperts:
        for content in self._contents.layers.values():
            return content
        raise CheckpointError(refusal(self.path, "a checkpoint with NVFP4 or MXFP4 experts", "none in its headers"))

    def _layer(self, layer: int) -> LayerExperts:
        if layer in self._contents.refused:
            raise CheckpointError(str(self._contents.refused[layer]))
        if layer not in self._contents.layers:
            expected = f"a layer with NVFP4 or MXFP4 experts ({id_spans(self.layers)})"
            raise CheckpointError(refusal(self.path, expected, shown(layer)))
        return self._contents.layers[layer]

    def _check_leaves(self, shards: Shards, content: LayerExperts, experts: Sequence[Expert]) -> None:
        """Refuses experts with leaves that `moe` could not apply; a stack is looked at once."""
        check_other_leaves(shards, content.leftovers)
        names = (matrix.stored.name for expert in content.kinds(experts) for matrix in expert.matrices)
        check_transforms(f"{self.path}: quantization section", self.quant_config.get("transform_config"), names)
        for expert in content.kinds(experts):
            for others in dict.fromkeys(matrix.stored.others for matrix in expert.matrices):
                check_other_leaves(shards, others, allowed=BIAS_LEAVES)

    def _expert_part(self, experts: range, total: int, ep_size: int) -> slice:
        if ep_size != 1 or experts.step != 1 or not 0 <= experts.start < experts.stop <= total:
            expected = f"experts as a range of consecutive ones below {total}, without an ep_size"
            raise CheckpointError(refusal(self.path, expected, f"{experts}, ep_size {ep_size}"))
        return slice(experts.start, experts.stop)

    def _rank_part(self, kind: str, rank: int, size: int, what: str, total: int, multiple: int = 1) -> slice:
        if size < 1 or not 0 <= rank < size:
            expected = f"{kind}_size >= 1 and 0 <= {kind}_rank < {kind}_size"
            raise CheckpointError(refusal(self.path, expected, f"{kind}_rank {rank}, {kind}_size {size}"))
        if total % (size * multiple):
            unit = f"multiples of {multiple} (the group of an NVFP4 scale)" if multiple > 1 else "whole experts"
            expected = f"a {kind}_size that splits the {what} {total} into {unit}"
            raise CheckpointError(refusal(self.path, expected, f"{kind}_size {size}: {total / size:g} each"))
        part = total // size
        return slice(rank * part, (rank + 1) * part)
