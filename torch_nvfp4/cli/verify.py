"""``torch-nvfp4 verify``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.cli.inspect import open_checkpoint
from torch_nvfp4.cli.options import (
    BackendOption,
    CheckpointArgument,
    DeviceOption,
    DtypeOption,
    InputQuantOption,
    JsonOption,
    parse_device,
    parse_dtype,
    parse_input_quant,
)
from torch_nvfp4.cli.output import json_writer
from torch_nvfp4.cli.process import failed
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.cli.wording import count, error, share, spans
from torch_nvfp4.errors import CheckpointError, refusal
from torch_nvfp4.verify import LayerCheck, verify_layer


def command(
    checkpoint: CheckpointArgument,
    layer: Annotated[
        list[int] | None, typer.Option("--layer", metavar="N", help="Only this layer; repeatable.", show_default=False)
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=1, max=2**20, metavar="M", show_default=False,
            help="Random tokens, each routed to top-k experts. Default: as many as reach every expert, at least 16.",
        ),
    ] = None,
    dtype: DtypeOption = "bf16",
    device: DeviceOption = "",
    backend: BackendOption = "",
    input_quant: InputQuantOption = "",
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the random tokens and routings.")] = 0,
    json_file: JsonOption = None,
) -> None:  # fmt: skip
    """Check the kernel against an fp64 reference on the checkpoint's own weights. Exit code 1 if a layer fails.

    A layer passes when the relative L2 error of its output is within the tolerance of the dtype. It fails when nothing
    was checked: no token reaches an expert, or the reference is not finite or zero. Experts that no token reached are
    named. With --input-quant fp8 the output has to be close to FP8's specification, and to fp64 as FP8 can be: within
    0.06, and a tenth of the share of clamped values more.

    \b
    Examples:
      torch-nvfp4 verify DeepSeek-V4-Flash-NVFP4 --layer 3
      torch-nvfp4 verify DeepSeek-V4-Flash-NVFP4 --tokens 64 --dtype fp16 --json checks.json
      torch-nvfp4 verify DeepSeek-V4-Flash-NVFP4 --input-quant fp8 --tokens 512
    """
    terminal = Terminal(json_file)
    with json_writer(json_file, checkpoint) as write_json:
        where = parse_device(device)
        activations = parse_dtype(dtype, where)
        quant = parse_input_quant(input_quant, where)
        opened = open_checkpoint(terminal, checkpoint)
        layers = opened.layers if layer is None else tuple(dict.fromkeys(layer))  # each once
        if not layers:
            expected = "a checkpoint with NVFP4 or MXFP4 experts"
            raise CheckpointError(refusal(checkpoint, expected, "none in its headers"))
        checks = _check_layers(terminal, opened, layers, tokens, activations, where, backend or None, quant, seed)
        write_json(
            {
                "checkpoint": str(checkpoint), "device": str(where), "dtype": dtype, "input_quant": quant,
                "tokens": checks[0].tokens, "seed": seed, "passed": all(check.passed for check in checks),
                "layers": [check.to_json() for check in checks],
            }
        )  # fmt: skip
    _print_checks(terminal, checks)


def _check_layers(
    terminal: Terminal, checkpoint: Checkpoint, layers: Sequence[int], tokens: int | None, dtype: torch.dtype,
    device: torch.device, backend: str | None, input_quant: str | None, seed: int,
) -> list[LayerCheck]:  # fmt: skip
    checks = []
    with terminal.progress() as progress:
        progress.stage(len(layers))
        for layer in layers:
            checks.append(
                verify_layer(
                    checkpoint, layer, tokens=tokens, dtype=dtype, device=device, backend=backend,
                    input_quant=input_quant, seed=seed, tell=progress.begin,
                )
            )  # fmt: skip
            progress.advance()
    return checks


def _print_checks(terminal: Terminal, checks: Sequence[LayerCheck]) -> None:
    # Beside the error that FP8 makes, the one that only a fault of the kernel makes.
    of_fp8 = ("to FP8 spec.", "tolerance") if checks[0].input_quant is not None else ()
    terminal.table(
        ("layer", "backend", "gate", "experts", "clamped", "rel. L2", "tolerance", *of_fp8, ""),
        [
            (
                str(check.layer),
                check.backend,
                check.gate,
                f"{check.experts_hit} of {check.num_experts}",
                "-" if check.clamped_share is None else share(check.clamped_share),
                error(check.relative_l2),
                f"{check.tolerance:.3g}",
                *_of_specification(check),
                "ok" if check.passed else "FAILED",
            )
            for check in checks
        ],
        left=("backend", "gate"),
        marked=[number for number, check in enumerate(checks) if not check.passed],
    )
    for check in checks:
        if check.experts_unchecked and check.experts_hit:
            terminal.line(
                f"layer {check.layer}: not checked, as no token reached them: experts {spans(check.experts_unchecked)}"
            )
    idle = [check.layer for check in checks if check.passed and check.clamped_share == 0.0]
    if idle:
        terminal.line(f"the clamp changed no value, so that it was not checked: layers {spans(idle)}")
    wrong = [check for check in checks if not check.passed]
    if wrong:
        failed(
            "verify",
            f"{len(wrong)} of {count(len(checks), 'layer')} failed: {spans(check.layer for check in wrong)}; "
            f"layer {wrong[0].layer}: expected an error of at most {wrong[0].tolerance:.3g}, got {wrong[0].problem}",
        )
    within = f"within {max(check.tolerance for check in checks):.3g} of the fp64 reference"
    if checks[0].specification_tolerance is not None:
        within += f" and {checks[0].specification_tolerance:g} of the specification of FP8 activations"
    terminal.line(f"verify passed: {count(len(checks), 'layer')} {within}", "green")


def _of_specification(check: LayerCheck) -> tuple[str, ...]:
    if check.specification_l2 is None or check.specification_tolerance is None:
        return ()
    return error(check.specification_l2), f"{check.specification_tolerance:g}"
