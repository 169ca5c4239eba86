"""The environment of the engines that the tests start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else one NUMA node per worker is asked for
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture
def engine_environment(tmp_path: Path) -> dict[str, str]:
    """Variables of a process that runs an engine; its caches are of this test, so that nothing compiled is old."""
    unset = ("TORCH_NVFP4_VLLM", "VLLM_PLUGINS", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return kept | CPU | {"VLLM_CACHE_ROOT": str(tmp_path / "vllm_cache")}
