"""The dtypes of activations that a device takes."""

from __future__ import annotations

import pytest
import torch

from helpers.layers import DTYPES, FP32


@pytest.fixture(params=DTYPES, ids=["bf16", "fp16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of activations; ask for it beside ``target`` or ``device``."""
    if request.param is FP32 and any(str(value).startswith("cuda") for value in request.node.callspec.params.values()):
        pytest.skip("CUDA takes bfloat16 and float16")
    return request.param
