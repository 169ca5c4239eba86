"""As much of vLLM as its plug-in touches, made from the table of what each version has, for tests without vLLM.

``tests/engines`` runs the plug-in inside the real one.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_TABLE = json.loads((Path(__file__).parent.parent / "data" / "vllm_signatures.json").read_text())
VERSIONS = sorted({version for texts in _TABLE.values() for versions in texts.values() for version in versions})
ORACLE = "vllm.model_executor.layers.fused_moe.oracle.nvfp4"
CONFIG = "vllm.model_executor.layers.fused_moe.config"
KERNEL = "vllm.model_executor.layers.fused_moe.modular_kernel"
FINALIZE = "vllm.model_executor.layers.fused_moe.topk_weight_and_reduce"
ACTIVATION = "vllm.model_executor.layers.fused_moe.activation"
# A module that has imported the three functions by name, as vLLM's quantization methods have.
USER = "vllm.model_executor.layers.quantization.modelopt"


def names_of(version: str) -> dict[tuple[str, str], list[str]]:
    """(module, name) -> its parameters or attributes, in the sources of that version."""
    found = {}
    for key, texts in _TABLE.items():
        text = next(text for text, versions in texts.items() if version in versions)
        module, _, name = key.partition(":")
        found[module, name] = text.split(", ")
    return found


def function(name: str, parameters: list[str]) -> Callable[..., Any]:
    """A function of these parameters that returns its name and what it was given."""
    defaults = ", ".join(parameter if parameter == "self" else f"{parameter}=None" for parameter in parameters)
    made: Callable[..., Any] = eval(f"lambda {defaults}: ({name!r}, dict(locals()))")
    return made


def stubs(version: str) -> dict[str, ModuleType]:
    """Modules with the functions and classes of the table, which have the right signatures and do nothing."""
    modules: dict[str, ModuleType] = {}
    for (module, name), content in names_of(version).items():
        scope: Any = modules.setdefault(module, ModuleType(module))
        *classes, last = name.split(".")
        for part in classes:
            if not hasattr(scope, part):
                setattr(scope, part, type(part, (), {}))
            scope = getattr(scope, part)
        if name in ("FusedMoEConfig", "FusedMoEParallelConfig", "FusedMoEQuantConfig"):  # dataclasses without defaults
            fields = {"__dataclass_fields__": dict.fromkeys(content)}
            setattr(scope, last, type(last, (getattr(scope, last, object),), fields))
        elif last[0].isupper():
            known = getattr(scope, last, None) or type(last, (), {})
            setattr(scope, last, known)
            for attribute in content:
                setattr(known, attribute, None)
        else:
            setattr(scope, last, function(last, content))
    return modules


class Format(Enum):
    Standard = 0
    BatchedExperts = 1


class Experts:
    """FusedMoEExpertsModular: what vLLM's own does with the hooks that the plug-in overrides."""

    def __init__(
        self, moe_config: Any, quant_config: Any, max_num_tokens: Any = None, num_dispatchers: Any = None
    ) -> None:
        self.moe_config, self.quant_config = moe_config, quant_config

    @staticmethod
    def is_supported_config(
        cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
    ) -> tuple[bool, str | None]:
        if not cls._supports_quant_scheme(weight_key, activation_key):
            return False, f"kernel does not support quantization scheme {weight_key}x{activation_key}"
        if sys.modules["vllm.envs"].VLLM_BATCH_INVARIANT and not cls._supports_batch_invariance():  # type: ignore[attr-defined]
            return False, "kernel does not support batch invariance"
        if moe_config.is_lora_enabled:
            return False, "kernel does not support LoRA"
        return True, None

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return False

    @property
    def g1_alphas(self) -> Any:
        return self.quant_config.g1_alphas

    @property
    def g2_alphas(self) -> Any:
        return self.quant_config.g2_alphas

    @property
    def w1_bias(self) -> Any:
        return self.quant_config.w1_bias

    @property
    def w2_bias(self) -> Any:
        return self.quant_config.w2_bias


class AlreadyReduced:
    """TopKWeightAndReduceNoOP."""

    def apply(
        self,
        output: Any,
        fused_expert_output: Any,
        topk_weights: Any,
        topk_ids: Any,
        apply_router_weight_on_input: bool,
    ) -> Any:
        if output is None or output is fused_expert_output:
            return fused_expert_output
        output.copy_(fused_expert_output)
        return output


class QuantConfig(SimpleNamespace):
    """FusedMoEQuantConfig of weights in 4 bits and activations in 16."""

    gemm1_clamp_limit = gemm1_alpha = gemm1_beta = w1_bias = w2_bias = None


def quant_config(*parameters: str) -> Callable[..., QuantConfig]:
    """``FusedMoEQuantConfig.make`` with these parameters; any other is a TypeError."""

    names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in parameters]
    signature = inspect.Signature(names)

    def make(*args: Any, **kwargs: Any) -> QuantConfig:
        return QuantConfig(**signature.bind(*args, **kwargs).arguments)

    make.__signature__ = signature  # type: ignore[attr-defined]
    return make


def engine(version: str, device: str = "cpu", capability: tuple[int, int] | None = None) -> dict[str, ModuleType]:
    """The modules of a vLLM of that version on that device, for ``sys.modules``."""
    modules = stubs(version)
    names = names_of(version)
    table_experts = modules[KERNEL].FusedMoEExpertsModular
    for method in ("apply", "finalize_weight_and_reduce_impl", "workspace_shapes", "moe_problem_size"):
        setattr(Experts, method, getattr(table_experts, method))
    for attribute in names[KERNEL, "FusedMoEExperts"]:
        if not hasattr(Experts, attribute):
            setattr(Experts, attribute, None)
    modules[KERNEL].FusedMoEExperts = modules[KERNEL].FusedMoEExpertsModular = Experts
    modules[KERNEL].FusedMoEActivationFormat = Format
    modules[CONFIG].FusedMoEQuantConfig.make = staticmethod(quant_config(*names[CONFIG, "FusedMoEQuantConfig.make"]))
    activation = modules["vllm.model_executor.layers.activation"]
    activation.swiglustep_and_mul_triton = lambda output, input, limit=7.0: None
    keys = "vllm.model_executor.layers.quantization.utils.quant_utils"
    for module in ("vllm", "vllm.envs", "vllm.platforms", keys, USER):
        modules[module] = ModuleType(module)
    modules["vllm"].__version__ = version
    modules["vllm.envs"].VLLM_BATCH_INVARIANT = False
    modules[FINALIZE].TopKWeightAndReduceNoOP = AlreadyReduced
    modules[FINALIZE].TopKWeightAndReduceDelegate = type("TopKWeightAndReduceDelegate", (), {})
    modules[keys].kNvfp4Static, modules[keys].kNvfp4Dynamic = "static", "dynamic"
    modules["vllm.platforms"].current_platform = SimpleNamespace(
        is_cpu=lambda: device == "cpu",
        is_cuda=lambda: device == "cuda",
        device_name=device,
        get_device_capability=lambda: capability and SimpleNamespace(major=capability[0], minor=capability[1]),
    )
    for name in ("select_nvfp4_moe_backend", "convert_to_nvfp4_moe_kernel_format", "make_nvfp4_moe_quant_config"):
        setattr(modules[USER], name, getattr(modules[ORACLE], name))
    for name in list(modules):  # `import vllm.a.b as c` goes through the packages
        while "." in name:
            parent, _, child = name.rpartition(".")
            package = modules.setdefault(parent, ModuleType(parent))
            package.__path__ = []
            setattr(package, child, modules[name])
            name = parent
    return modules


def moe_config(**changes: Any) -> SimpleNamespace:
    """FusedMoEConfig of a layer that the plug-in takes."""
    parallel = SimpleNamespace(
        use_batched_activation_format=changes.pop("batched", False), enable_eplb=changes.pop("enable_eplb", False),
        dp_size=changes.pop("dp_size", 1), use_all2all_kernels=changes.pop("use_all2all_kernels", False),
        all2all_backend=changes.pop("all2all_backend", "allgather_reducescatter"), tp_rank=changes.pop("tp_rank", 0),
    )  # fmt: skip
    activation = SimpleNamespace(name=changes.pop("activation", "SILU"))
    fields = {
        "hidden_dim": 64, "hidden_dim_unpadded": 64, "intermediate_size_per_partition": 32,
        "intermediate_size_per_partition_unpadded": 32, "in_dtype": torch.bfloat16, "moe_backend": "auto",
        "has_bias": False, "is_act_and_mul": not activation.name.endswith("_NO_MUL"), "is_lora_enabled": False,
        "swiglu_limit": None, "swiglu_alpha": None, "swiglu_beta": None,
    } | changes  # fmt: skip
    return SimpleNamespace(activation=activation, moe_parallel_config=parallel, **fields)
