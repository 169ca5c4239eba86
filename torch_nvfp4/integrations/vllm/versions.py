"""What the plug-in relies on in each version of vLLM, and the check that it is there.

vLLM has no stable interface for MoE backends, so a version is either known (its sources were read, and their signatures
stand here) or refused with words. Does not import vLLM.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator

from torch_nvfp4.integrations.interface import Load, differences

__all__ = [
    "FIRST", "FIRST_ON_CPU", "FIRST_WITH_BIASES", "LAST", "LAST_WITH_COPY", "ORACLE", "attributes", "bias_error",
    "check_installed", "cpu_error", "marlin_error", "parameters", "release", "unknown_version", "unmet",
]  # fmt: skip

FIRST, LAST = (0, 24), (0, 33)
"""The known versions, both inclusive. 0.24 is the first whose backends apply ``swiglu_limit`` to NVFP4 experts."""

FIRST_ON_CPU = (0, 30)
"""Earlier ones take the buffers of every modular MoE kernel through an interface that needs an accelerator."""

FIRST_WITH_BIASES = (0, 25)
"""Earlier ones configure the kernel without the layer, which holds the biases of its experts."""

LAST_WITH_COPY = (0, 26)
"""Later ones hand standard experts the layer's output itself where it is contiguous, on CUDA and on CPUs."""

_MOE = "vllm.model_executor.layers.fused_moe"
ORACLE = f"{_MOE}.oracle.nvfp4"

_CONVERT = (
    "nvfp4_backend", "layer", "w13", "w13_scale", "w13_scale_2", "a13_scale", "w2", "w2_scale", "w2_scale_2",
    "a2_scale", "is_act_and_mul",
)  # fmt: skip
_CONFIGURE = (
    "backend", "w13_scale", "w2_scale", "w13_scale_2", "w2_scale_2", "a13_scale", "a2_scale", "swiglu_limit",
)  # fmt: skip
_APPLY = (
    "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
    "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta",
    "apply_router_weight_on_input",
)  # fmt: skip
_WORKSPACE = (
    "self", "M", "N", "K", "topk", "global_num_experts", "local_num_experts", "expert_tokens_meta", "activation",
)  # fmt: skip
_QUANTIZED = (
    "quant_dtype", "per_act_token_quant", "per_out_ch_quant", "block_shape", "w1_scale", "w2_scale", "a1_scale",
    "a2_scale", "g1_alphas", "g2_alphas", "a1_gscale", "a2_gscale", "w1_bias", "w2_bias", "w1_zp", "w2_zp",
    "weight_dtype", "is_scale_swizzled",
)  # fmt: skip
_GATE = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")

# (module, function) -> its parameters, by the first version that has them.
SIGNATURES: dict[tuple[str, str], dict[tuple[int, int], tuple[str, ...]]] = {
    (ORACLE, "select_nvfp4_moe_backend"): {(0, 24): ("config", "weight_key", "activation_key")},
    (ORACLE, "convert_to_nvfp4_moe_kernel_format"): {
        (0, 24): _CONVERT,
        (0, 29): (*_CONVERT, "use_a16"),
        (0, 32): (*_CONVERT, "use_a16", "trtllm_hidden_alignment"),
    },
    (ORACLE, "make_nvfp4_moe_quant_config"): {
        (0, 24): _CONFIGURE,
        (0, 25): (*_CONFIGURE, "layer"),
        (0, 28): (*_CONFIGURE, "swiglu_alpha", "swiglu_beta", "layer"),
        (0, 29): (*_CONFIGURE, "swiglu_alpha", "swiglu_beta", "layer", "use_a16"),
    },
    (f"{_MOE}.config", "FusedMoEQuantConfig.make"): {
        (0, 24): (*_QUANTIZED, *_GATE),
        (0, 33): (*_QUANTIZED, "is_scale_transposed", *_GATE),
    },
    (f"{_MOE}.modular_kernel", "FusedMoEExperts.__init__"): {
        (0, 24): ("self", "moe_config", "quant_config", "max_num_tokens", "num_dispatchers"),
    },
    (f"{_MOE}.modular_kernel", "FusedMoEExperts.is_supported_config"): {
        (0, 24): ("cls", "moe_config", "weight_key", "activation_key", "activation_format"),
    },
    (f"{_MOE}.modular_kernel", "FusedMoEExpertsModular.apply"): {(0, 24): _APPLY},
    (f"{_MOE}.modular_kernel", "FusedMoEExpertsModular.workspace_shapes"): {(0, 24): _WORKSPACE},
    (f"{_MOE}.modular_kernel", "FusedMoEExpertsModular.moe_problem_size"): {
        (0, 24): ("self", "a1", "w1", "w2", "topk_ids"),
    },
    (f"{_MOE}.modular_kernel", "FusedMoEExpertsModular.finalize_weight_and_reduce_impl"): {(0, 24): ("self",)},
    (f"{_MOE}.topk_weight_and_reduce", "TopKWeightAndReduceNoOP.apply"): {
        (0, 24): (
            "self", "output", "fused_expert_output", "topk_weights", "topk_ids", "apply_router_weight_on_input",
        ),
    },
    ("vllm.model_executor.layers.activation", "swiglustep_and_mul_triton"): {(0, 24): ("output", "input", "limit")},
}  # fmt: skip

# (module, class) -> attributes, fields or members that are read.
ATTRIBUTES: dict[tuple[str, str], tuple[str, ...]] = {
    (f"{_MOE}.config", "FusedMoEConfig"): (
        "activation", "hidden_dim", "hidden_dim_unpadded", "intermediate_size_per_partition",
        "intermediate_size_per_partition_unpadded", "in_dtype", "moe_backend", "has_bias", "is_act_and_mul",
        "moe_parallel_config", "swiglu_limit", "swiglu_alpha", "swiglu_beta",
    ),
    (f"{_MOE}.config", "FusedMoEParallelConfig"): (
        "all2all_backend", "dp_size", "enable_eplb", "tp_rank", "use_all2all_kernels", "use_batched_activation_format",
    ),
    (f"{_MOE}.config", "FusedMoEQuantConfig"): (
        "gemm1_clamp_limit", "gemm1_alpha", "gemm1_beta", "w1_bias", "w2_bias",
    ),
    (f"{_MOE}.modular_kernel", "ExpertTokensMetadata"): ("expert_num_tokens",),
    (f"{_MOE}.modular_kernel", "FusedMoEActivationFormat"): ("Standard", "BatchedExperts"),
    (f"{_MOE}.modular_kernel", "FusedMoEExperts"): (
        "activation_format", "g1_alphas", "g2_alphas", "w1_bias", "w2_bias", "_supports_current_device",
        "_supports_no_act_and_mul", "_supports_quant_scheme", "_supports_activation", "_supports_parallel_config",
        "_supports_batch_invariance",
    ),
    (f"{_MOE}.activation", "MoEActivation"): (
        "SILU", "GELU", "GELU_TANH", "RELU2", "SWIGLUOAI", "SWIGLUOAI_UNINTERLEAVE", "SWIGLUSTEP", "SILU_NO_MUL",
        "GELU_NO_MUL", "GELU_TANH_NO_MUL", "RELU2_NO_MUL",
    ),
}  # fmt: skip

# Likewise, of what is in all versions from one on and in none before.
LATER_ATTRIBUTES: dict[tuple[int, int], dict[tuple[str, str], tuple[str, ...]]] = {
    (0, 27): {
        (f"{_MOE}.config", "FusedMoEConfig"): ("activation_situ_beta", "activation_situ_linear_beta"),
        (f"{_MOE}.activation", "MoEActivation"): ("SITU",),
    },
}


def parameters(module: str, function: str, version: tuple[int, int]) -> tuple[str, ...]:
    """The parameters that a function has in a known version of vLLM."""
    by_version = SIGNATURES[module, function]
    return by_version[max(first for first in by_version if first <= version)]


def attributes(version: tuple[int, int]) -> dict[tuple[str, str], tuple[str, ...]]:
    """(module, class) -> what is read of it in a known version of vLLM."""
    merged = dict(ATTRIBUTES)
    for first, added in LATER_ATTRIBUTES.items():
        if first <= version:
            merged |= {place: (*merged[place], *names) for place, names in added.items()}
    return merged


def release(version: str) -> tuple[int, int] | None:
    """(0, 32) of "0.32.1" or "0.32.0rc1+cpu"; None where the text does not begin so."""
    found = re.match(r"(\d+)\.(\d+)(?:\D|$)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def unknown_version(version: str) -> str | None:
    """Why a version of vLLM is not a known one, as "expected ..., got ...", or None."""
    number = release(version)
    if number is not None and FIRST <= number <= LAST:
        return None
    return f"expected vllm {FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}, got {version}"


def cpu_error(version: str) -> str | None:
    """Why a known version of vLLM cannot call torch_nvfp4 on a CPU, or None."""
    number = release(version)
    if number is not None and number >= FIRST_ON_CPU:
        return None
    return f"expected vllm {FIRST_ON_CPU[0]}.{FIRST_ON_CPU[1]} or later on a CPU, got {version}"


def bias_error(version: str) -> str | None:
    """Why a known version of vLLM cannot hand over the biases of experts, or None."""
    number = release(version)
    if number is not None and number >= FIRST_WITH_BIASES:
        return None
    first = "{}.{}".format(*FIRST_WITH_BIASES)
    return f"expected vllm {first} or later for experts with biases, got {version}"


def marlin_error(version: str) -> str | None:
    """Why a known version of vLLM wants its own backend whatever the device, or None."""
    number = release(version)
    asked = os.environ.get("VLLM_TEST_FORCE_FP8_MARLIN", "0").strip().lower() in ("1", "true")
    if asked and number is not None and number < (0, 29):  # later ones do not know it
        return "expected VLLM_TEST_FORCE_FP8_MARLIN not to be set, got 1"
    return None


def unmet(version: str, load: Load = importlib.import_module) -> Iterator[str]:
    """Every difference between what is known of a version and what ``load`` gives for the names of its modules.

    Yields one text per difference, each with what was expected and what came.
    """
    problem = unknown_version(version)
    number = release(version)
    if problem is not None or number is None:
        yield problem or version
        return
    signatures = {(module, function): parameters(module, function, number) for module, function in SIGNATURES}
    yield from differences(signatures, attributes(number), load)


def check_installed(version: str, load: Load = importlib.import_module) -> None:
    """Raises RuntimeError with every difference between the vLLM of this process and the known one."""
    problems = list(unmet(version, load))
    if problems:
        raise RuntimeError(
            f"torch_nvfp4's plug-in does not know this vLLM ({version}): {'; '.join(problems)}. Set "
            "TORCH_NVFP4_VLLM=off to serve with vLLM's own kernels, or install versions that fit each other."
        )
