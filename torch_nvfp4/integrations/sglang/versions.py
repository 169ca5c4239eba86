"""What the plug-in relies on in SGLang, and the check that it is there.

Only the registration of a runner is an interface that SGLang offers, so a version is either known (its sources were
read, and their signatures stand here) or refused with words. Does not import SGLang.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator

from torch_nvfp4.integrations.interface import Load, differences

__all__ = ["ATTRIBUTES", "KNOWN", "SIGNATURES", "check_installed", "unknown_version", "unmet"]

KNOWN = ("0.5.23",)

_MOE = "sglang.srt.layers.moe"
_QUANTIZATION = "sglang.srt.layers.quantization"
_SCHEMES = f"{_QUANTIZATION}.compressed_tensors.schemes"
_METHOD = (f"{_QUANTIZATION}.modelopt_quant", "ModelOptNvFp4FusedMoEMethod")
_CREATE_WEIGHTS = (
    "self", "layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype",
    "extra_weight_attrs",
)  # fmt: skip
_RUNNER = ("self", "layer", "moe_runner_config")

# (module, function) -> its parameters.
SIGNATURES: dict[tuple[str, str], tuple[str, ...]] = {
    (f"{_MOE}.moe_runner.runner", "register_moe_runner_core"): ("backend_name", "factory"),
    (f"{_MOE}.moe_runner.runner", "MoeRunner.__init__"): ("self", "runner_backend", "config", "lora_enabled"),
    (f"{_MOE}.moe_runner.runner", "MoeRunner.run"): ("self", "dispatch_output", "quant_info", "lora_info"),
    (f"{_MOE}.moe_runner.base", "DispatchMoeRunnerCore.__init__"): ("self", "config"),
    (f"{_MOE}.moe_runner.base", "DispatchMoeRunnerCore.run_from_dispatch"): (
        "self", "dispatch_output", "quant_info", "runner_config", "hooks",
    ),
    (_METHOD[0], "deinterleave_w13"): ("weight", "up_first"),
    (_METHOD[0], f"{_METHOD[1]}.__init__"): ("self", "quant_config"),
    (_METHOD[0], f"{_METHOD[1]}.create_weights"): _CREATE_WEIGHTS,
    (_METHOD[0], f"{_METHOD[1]}.create_moe_runner"): _RUNNER,
    (_METHOD[0], f"{_METHOD[1]}.process_weights_after_loading"): ("self", "layer"),
    (_METHOD[0], f"{_METHOD[1]}.get_moe_runner_backend"): ("self", "layer"),
    (_METHOD[0], f"{_METHOD[1]}.apply"): ("self", "layer", "dispatch_output"),
    (f"{_QUANTIZATION}.compressed_tensors.compressed_tensors", "CompressedTensorsConfig.get_moe_scheme"): (
        "self", "layer", "layer_name",
    ),
    (f"{_QUANTIZATION}.compressed_tensors.compressed_tensors", "CompressedTensorsConfig._check_scheme_supported"): (
        "self", "min_capability", "error",
    ),
    (_SCHEMES, "CompressedTensorsW4A16Nvfp4MoE.__init__"): ("self", "has_input_global_scale"),
    (_SCHEMES, "CompressedTensorsW4A16Nvfp4MoE.create_weights"): _CREATE_WEIGHTS,
    (_SCHEMES, "CompressedTensorsW4A16Nvfp4MoE.create_moe_runner"): _RUNNER,
    (_SCHEMES, "CompressedTensorsW4A16Nvfp4MoE.process_weights_after_loading"): ("self", "layer"),
    (_SCHEMES, "CompressedTensorsW4A16Nvfp4MoE.apply_weights"): ("self", "layer", "dispatch_output"),
    (_SCHEMES, "CompressedTensorsW4A4Nvfp4MoE.__init__"): ("self",),
    ("sglang.srt.runtime_context", "override_platform"): ("facts",),
}  # fmt: skip

# (module, class) -> attributes, fields or members that are read.
ATTRIBUTES: dict[tuple[str, str], tuple[str, ...]] = {
    (f"{_MOE}.moe_runner.base", "MoeRunnerConfig"): (
        "activation", "is_gated", "swiglu_limit", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit",
        "gate_up_interleaved", "apply_router_weight_on_input", "no_combine", "routed_scaling_factor", "hidden_size",
        "intermediate_size_per_partition", "num_experts", "num_local_experts",
    ),
    (f"{_MOE}.token_dispatcher.standard", "StandardDispatchOutput"): (
        "hidden_states", "hidden_states_scale", "topk_output", "format",
    ),
    (f"{_MOE}.token_dispatcher.standard", "StandardCombineInput"): ("hidden_states",),
    (f"{_MOE}.topk", "StandardTopKOutput"): ("topk_weights", "topk_ids"),
    (f"{_MOE}.topk", "PackedTopKOutput"): ("packed_topk_ids",),
    (f"{_MOE}.topk", "TopKOutputChecker"): ("format_is_standard", "format_is_packed"),
    (f"{_MOE}.utils", "RegisteredMoeRunnerBackend"): ("is_marlin", "is_auto"),
}  # fmt: skip


def unknown_version(version: str) -> str | None:
    """Why a version of SGLang is not a known one, as "expected ..., got ...", or None."""
    base = version.partition("+")[0]
    return None if base in KNOWN else f"expected sglang {' or '.join(KNOWN)}, got {version}"


def unmet(version: str, load: Load = importlib.import_module) -> Iterator[str]:
    """Every difference between what is known of a version and what ``load`` gives for the names of its modules.

    Yields one text per difference, each with what was expected and what came.
    """
    problem = unknown_version(version)
    if problem is not None:
        yield problem
        return
    yield from differences(SIGNATURES, ATTRIBUTES, load)


def check_installed(version: str | None = None, load: Load = importlib.import_module) -> None:
    """Raises RuntimeError with every difference between the SGLang of this process and the known one.

    Args:
        version: None: the installed one.
        load: what imports a module.
    """
    version = importlib.metadata.version("sglang") if version is None else version
    problems = list(unmet(version, load))
    if problems:
        raise RuntimeError(
            f"torch_nvfp4's plug-in does not know this SGLang ({version}): {'; '.join(problems)}. Set "
            "TORCH_NVFP4_SGLANG=off to serve with SGLang's own kernels, or install versions that fit each other."
        )
