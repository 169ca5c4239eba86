"""What the plug-in asks SGLang about this process."""

from __future__ import annotations

from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.runtime_context import get_exec, get_lora, get_parallel
from sglang.srt.utils import get_device_capability, is_cpu, is_cuda, is_hip, is_musa, is_npu, is_xpu

from torch_nvfp4.integrations.sglang.support import Process

__all__ = ["device", "process"]


def device() -> tuple[str, tuple[int, int] | None]:
    """ "cpu", "cuda" or the name of another platform, and the compute capability of a CUDA device."""
    if is_cuda():
        major, minor = get_device_capability()
        return "cuda", (major, minor)
    if is_cpu():
        return "cpu", None
    others = {"hip": is_hip, "xpu": is_xpu, "npu": is_npu, "musa": is_musa}
    return next((name for name, here in others.items() if here()), "no device (SGLANG_USE_CPU_ENGINE=1 is a CPU)"), None


def process() -> Process:
    """This process, as far as a layer depends on it. Needs SGLang's published configuration."""
    lora, moe = get_lora(), get_exec().moe
    return Process(
        *device(),
        runner_backend=get_moe_runner_backend().value,
        all_to_all=get_moe_a2a_backend().value,
        lora=bool(lora.enable_lora or lora.lora_paths),
        load_balancing=bool(moe.enable_eplb),
        paged_experts=bool(moe.enable_paged_experts),
        replicated_weights=get_parallel().dwdp_size > 1,
        cpu_experts=moe.kt_weight_path is not None,
    )
