"""``NVFP4Linear``: values against the fp64 reference, on the kernel and without one."""

from __future__ import annotations

import pytest
import torch

from helpers.modules import (
    DTYPES,
    K,
    linear,
)
from torch_nvfp4 import reference, testing
from torch_nvfp4.format import dequantize, quantize
from torch_nvfp4.nn import NVFP4Linear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_values(dtype: torch.dtype, bias: bool) -> None:
    module = linear(bias).to(dtype)
    x = torch.randn(2, 3, K).to(dtype)
    out = module(x)
    assert out.dtype == dtype
    testing.assert_accurate(out, reference.linear(x, module.unpacked_weight(), module.bias))
    assert module(x[:0]).shape == (0, 3, 48)


def test_linear_from_float_and_bias_of_another_dtype() -> None:
    dense, bias = torch.randn(32, K), torch.randn(32)
    module = NVFP4Linear.from_float(dense, bias)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    expected = x.double() @ dequantize(quantize(dense), torch.float64).T + bias.to(torch.bfloat16)
    testing.assert_accurate(module(x), expected)


def test_linear_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    module = linear()
    assert module.backend == "reference"
    x = torch.randn(3, K)
    testing.assert_accurate(module(x), reference.linear(x, module.unpacked_weight(), module.bias))


def test_linear_bias_follows_the_dtype() -> None:
    module = linear()
    assert module.half().bias is not None
    assert module.bias is not None
    assert module.bias.dtype == torch.float16


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match=r"bias: expected shape \[48\], got \[64\]"):
        NVFP4Linear.from_weight(testing.random_weight((48, K)), torch.zeros(64))
    with pytest.raises(ValueError, match=r"expected a weight \[N, K\]"):
        NVFP4Linear.from_weight(testing.random_weight((2, 48, K)))


def test_an_input_of_another_width_is_refused() -> None:
    """The packed weight has its columns padded to 64: to the op, 48 and 64 inputs look alike."""
    module = NVFP4Linear.from_float(torch.randn(32, 48))
    for columns in (16, 64, 128):
        with pytest.raises(ValueError, match=rf"expected x \[..., 48\] \(in_features\), got \[2, {columns}\]"):
            module(torch.randn(2, columns))
    assert module(torch.randn(48)).shape == (32,)
