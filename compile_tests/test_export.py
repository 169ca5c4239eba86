"""torch.export with a dynamic number of tokens: saved, loaded and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from expecttest import assert_expected_inline
from torch import Tensor

import torch_nvfp4  # noqa: F401  (registers the ops)


def export(model: torch.nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens")}}, strict=False)


def test_export_save_load_run(make_model: Any, tokens: Any, device: str, tmp_path: Path) -> None:
    model = make_model(3, device)
    path = tmp_path / "model.pt2"
    torch.export.save(export(model, tokens(5, device)), path)
    loaded = torch.export.load(path).module()
    for m in (0, 1, 2, 5, 33, 256):
        x = tokens(m, device)
        assert torch.equal(loaded(x), model(x))


def test_exported_state_is_the_packed_weights(make_model: Any, tokens: Any) -> None:
    model = make_model(2, "cpu")
    program = export(model, tokens(5, "cpu"))
    assert program.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(program.state_dict[name], tensor) for name, tensor in model.state_dict().items())


def test_graph(make_model: Any, tokens: Any, render: Any) -> None:
    program = export(make_model(1, "cpu"), tokens(5, "cpu"))
    assert_expected_inline(
        render(program.graph),
        """\
%1: float32[M, 64] = aten.to.dtype(%0: bfloat16[M, 64], torch.float32)
%3: float32[M, 8] = aten.linear.default(%1, %2: float32[8, 64])
%4: float32[M, 8] = aten.softmax.int(%3, -1)
%5: (float32[M, 2], int64[M, 2]) = aten.topk.default(%4, 2)
%6: float32[M, 2] = getitem(%5, 0)
%7: int64[M, 2] = getitem(%5, 1)
%12: bfloat16[M, 64] = nvfp4.moe.default(%0, %8: uint8[8, 2, 32, 1, 36], %9: float32[8, 2], %10: uint8[8, 64,
    1, 36], %11: float32[8], %6, %7, clamp_limit=7.0)
%13: bfloat16[M, 64] = aten.mul.Tensor(%12, 0.125)
%14: bfloat16[M, 64] = aten.add.Tensor(%0, %13)
return [%14]""",
    )


def test_decomposing_keeps_the_op(make_model: Any, tokens: Any, render: Any) -> None:
    program = export(make_model(2, "cpu"), tokens(5, "cpu")).run_decompositions()
    assert render(program.graph).count("nvfp4.moe.default(") == 2
