"""What the integration relies on in transformers, and the check that it is there."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator

from torch_nvfp4.integrations.interface import Load, differences

__all__ = ["FIRST", "HOOKS", "check_installed", "unknown_version", "unmet"]

FIRST, MAJOR = (5, 23), 5
"""The oldest version that was run, and the major version that it stands for."""

_BASE = "transformers.quantizers.base"
# (module, name in it) -> the parameters that are passed or received; () for something that only has to be there.
HOOKS: dict[tuple[str, str], tuple[str, ...]] = {
    # Public: the quantizer and its config have a name of their own.
    ("transformers.quantizers.auto", "register_quantization_config"): ("method",),
    ("transformers.quantizers.auto", "register_quantizer"): ("name",),
    # Private: the choice is made by quant_method alone, and DeepSeek-V4's says "fp8".
    ("transformers.quantizers.auto", "AUTO_QUANTIZATION_CONFIG_MAPPING"): (),
    ("transformers.quantizers.auto", "AUTO_QUANTIZER_MAPPING"): (),
    ("transformers.quantizers.auto", "LOADING_ATTRIBUTES_CONFIG_TYPES"): (),
    # Private: asked before a checkpoint is known to be quantized, for those with hf_quant_config.json alone.
    ("transformers.modeling_utils", "get_hf_quantizer"): ("config", "quantization_config"),
    # Overridden.
    (_BASE, "HfQuantizer.update_device_map"): ("self", "device_map"),
    (_BASE, "HfQuantizer.update_dtype"): ("self", "dtype"),
    (_BASE, "HfQuantizer.update_parallel_plan"): ("self", "model", "plan"),
    (_BASE, "HfQuantizer._process_model_before_weight_loading"): ("self", "model"),
    (_BASE, "HfQuantizer._process_model_after_weight_loading"): ("self", "model"),
    (_BASE, "HfQuantizer.get_state_dict_and_metadata"): ("self", "model"),
    # Called, to know the model's name of a tensor of the checkpoint, and the checkpoint's of one of the model.
    ("transformers.conversion_mapping", "get_model_conversion_mapping"): ("model",),
    ("transformers.core_model_loading", "WeightRenaming"): (),
    ("transformers.core_model_loading", "rename_source_key"): (
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict",
    ),
    ("transformers.core_model_loading", "revert_weight_conversion"): ("model", "state_dict"),
    # Which class builds a model: asked, as AutoModelForCausalLM knows none for some models of images and text.
    ("transformers.models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING"): (),
    ("transformers.models.auto.modeling_auto", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"): (),
    # What says which gate a model computes.
    ("transformers.integrations.moe", "use_experts_implementation"): (
        "experts_class", "is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm",
    ),
    ("transformers.integrations.moe", "_default_apply_gate"): ("self", "gate_up_out"),
}  # fmt: skip


def unknown_version(version: str) -> str | None:
    """Why a version of transformers is not a known one, as "expected ..., got ...", or None."""
    found = re.match(r"(\d+)\.(\d+)(?:\D|$)", version)
    if found is not None and FIRST <= (int(found[1]), int(found[2])) < (MAJOR + 1, 0):
        return None
    return f"expected transformers >= {FIRST[0]}.{FIRST[1]}, < {MAJOR + 1}, got {version}"


def unmet(load: Load = importlib.import_module) -> Iterator[str]:
    """Every difference between ``HOOKS`` and what ``load`` gives for the names of their modules, as a text each."""
    return differences(HOOKS, {}, load, exact=False)


def check_installed() -> None:
    """Raises RuntimeError, with the version and every hook that differs, where the installed transformers is another.

    A known version whose hooks are all there passes; nothing is changed before.
    """
    import transformers

    version = str(transformers.__version__)
    problems = [problem] if (problem := unknown_version(version)) is not None else list(unmet())
    if problems:
        raise RuntimeError(f"torch_nvfp4 with transformers {version}: {'; '.join(problems)}")
