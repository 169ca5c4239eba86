"""What transformers calls while it loads and saves a model with packed weights."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.quantizers.base import HfQuantizer

from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.integrations.transformers.config import TorchNVFP4Config
from torch_nvfp4.integrations.transformers.expert_layout import layout_of
from torch_nvfp4.integrations.transformers.gates import gate_of
from torch_nvfp4.integrations.transformers.modules import PackedExperts, PackedLinear
from torch_nvfp4.integrations.transformers.placement import Placement, place
from torch_nvfp4.integrations.transformers.saving import published_state

__all__ = ["TorchNVFP4Quantizer"]

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
# Leaves of quantized modules that no parameter takes: what they say is in the weights, or is not used.
_UNUSED_LEAVES = (
    r"\.(input_scale|input_global_scale|[kv]_scale|scale|weight_scale_inv|weight_scale|weight_scale_2|"
    r"weight_global_scale|activation_scale)$"
)


class TorchNVFP4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Leaves the NVFP4, MXFP4 and FP8 weights of a checkpoint out of transformers' loading and reads them itself."""

    requires_calibration = False

    def __init__(self, quantization_config: TorchNVFP4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Also for a checkpoint with hf_quant_config.json alone, where config.json does not say so.
        self.pre_quantized = True
        self._checkpoint: Checkpoint | None = None
        self._placement = Placement()
        self._conversions: Any = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The directory that the model is loaded from."""
        assert self._checkpoint is not None, "set before the weights are loaded"
        return self._checkpoint

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of what is not packed; never that of FP8 codes, which a config may name."""
        return torch.bfloat16 if dtype is not None and dtype.itemsize == 1 else dtype

    def update_device_map(self, device_map: Any) -> Any:
        """The same, where it is one device.

        Raises ValueError for several, the CPU beside a GPU and the disk, with what to do instead.
        """
        if isinstance(device_map, str) and device_map in _SPREAD:
            count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
            if count <= 1:
                kind = torch.accelerator.current_accelerator() if count else None
                return {"": "cpu" if kind is None else torch.device(kind.type, 0)}
            raise _several_devices(f"{device_map!r} over {count} devices")
        if isinstance(device_map, dict) and len({str(device) for device in device_map.values()}) > 1:
            raise _several_devices(", ".join(sorted({str(device) for device in device_map.values()})))
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise _several_devices("disk")
        return device_map

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, use_kernels: bool = False, **kwargs: Any
    ) -> Any:
        self._checkpoint = Checkpoint.open(_directory(checkpoint_files))
        _check_same_files(self.checkpoint, checkpoint_files)
        if not self.quantization_config.source:  # what save_pretrained writes again
            self.quantization_config.source = {"quant_method": "modelopt", **self.checkpoint.quant_config}
        self._placement = place(model, self.checkpoint)
        if use_kernels:
            _check_kernels(model, self._placement)
        config = model.config.get_text_config(decoder=True)
        for layer, name in self._placement.experts.items():
            experts = model.get_submodule(name)
            layout, _ = layout_of(experts)
            gate = gate_of(experts, config, layer, name, layout)
            sizes = self.checkpoint.layer_config(layer)
            own = getattr(experts, "config", config)
            chosen = self.quantization_config.get_loading_attributes()
            model.set_submodule(name, PackedExperts(layer, sizes, gate, own, layout=layout, **chosen))
        for source, name in self._placement.linears.items():
            linear = model.get_submodule(name)
            dtype = None if linear.bias is None else linear.bias.dtype
            shell = PackedLinear(source, linear.in_features, linear.out_features, linear.bias is not None, dtype)
            model.set_submodule(name, shell)
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {_UNUSED_LEAVES} | set(self._own_names(model))
        return model

    def _own_names(self, model: Any) -> list[str]:
        """Patterns of the names that transformers gives the tensors of replaced modules, in parts of 100 modules."""
        prefix = f"{model.base_model_prefix}."
        names = [*self._placement.experts.values(), *self._placement.linears.values()]
        names = [re.escape(name.removeprefix(prefix)) for name in names]
        parts = ["|".join(names[start : start + 100]) for start in range(0, len(names), 100)]
        return [rf"(^|\.)({part})(\.(?!bias$)|$)" for part in parts]

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Nothing: plans shard the shells' placeholders, which have the names of the parameters they stand for."""

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _check_parallelism(model)
        device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
        for module in model.modules():
            if isinstance(module, (PackedExperts, PackedLinear)):
                module.pack(self.checkpoint, device)
        for name, weight in self._placement.fp8.items():
            owner, _, leaf = name.rpartition(".")
            module = _submodule(model, owner)
            if module is not None:
                parameter = getattr(module, leaf)
                _fill(parameter, weight.dequantized(self.checkpoint, parameter.dtype, device))
        self._conversions = getattr(model, "_weight_conversions", None)
        model._weight_conversions = []  # the names that are saved are the checkpoint's already
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What save_pretrained writes: see ``published_state``; for a model with adapters, those alone."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return published_state(model, self.checkpoint, self._placement, self._conversions), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _directory(checkpoint_files: list[str] | None) -> Path:
    """The one directory of the files that transformers resolved."""
    folders = sorted({os.path.dirname(file) for file in checkpoint_files or ()})
    if len(folders) != 1:
        got = ", ".join(folders) or "no files (a state dict?)"
        raise CheckpointError(refusal("from_pretrained", "safetensors files of one directory", got))
    return Path(folders[0])


def _check_same_files(checkpoint: Checkpoint, checkpoint_files: list[str] | None) -> None:
    """Raises CheckpointError where transformers reads other files than ``Checkpoint``: weights of two models.

    With model.safetensors and an index side by side, it takes the one and ``Checkpoint`` the other.
    """
    theirs = {os.path.basename(file) for file in checkpoint_files or ()}
    ours = {info.file.name for info in checkpoint.tensors.values()}
    if theirs != ours:
        first, second = (", ".join(sorted(names)[:3]) for names in (theirs, ours))
        got = f"{first}, which transformers reads, and an index that names {second}"
        expected, advice = "one model in a directory", "remove what does not belong to the checkpoint"
        raise CheckpointError(refusal(checkpoint.path, expected, got, advice))


def _check_kernels(model: Any, placement: Placement) -> None:
    """Raises ValueError where a kernel of the Hub would run the block around the experts, and read dense weights."""
    for name in placement.experts.values():
        block = model.get_submodule(name.rpartition(".")[0])
        kernel = getattr(block, "kernel_layer_name", None)
        if kernel is not None:
            expected = f"False for {type(block).__name__}, whose kernel {kernel} reads dense experts"
            raise ValueError(refusal("use_kernels", expected, "True with packed ones"))


def _several_devices(got: str) -> ValueError:
    return ValueError(
        f"device_map: expected one device, got {got}; pass device_map='cuda:0' where the model fits one GPU, and "
        "tp_plan='auto' under torchrun to spread it over several; NVFP4 weights are not offloaded to CPU or disk"
    )


def _check_parallelism(model: Any) -> None:
    distributed = getattr(model.config, "distributed_config", None)
    if getattr(distributed, "dp_size", 1) > 1:
        got = f"dp_size={distributed.dp_size}"  # type: ignore[union-attr]
        raise NotImplementedError(
            refusal(
                "distributed_config", "tensor or expert parallelism", got, "NVFP4 weights cannot be sharded by FSDP"
            )
        )


def _submodule(model: Any, name: str) -> nn.Module | None:
    """None where pipeline parallelism gave the module to another rank."""
    try:
        module: nn.Module = model.get_submodule(name)
    except AttributeError:
        return None
    return module


def _fill(parameter: Tensor, value: Tensor) -> None:
    """Copies a whole value into a parameter, or this rank's part of it."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        whole = value.to(parameter.to_local().device)
        local = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(local.to_local())
    else:
        parameter.copy_(value)
