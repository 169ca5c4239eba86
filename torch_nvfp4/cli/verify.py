"""``torch-nvfp4 verify``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.cli.options import (
    BackendOption,
    CheckpointArgument,
    DeviceOption,
    JsonOption,
    parse_device,
    parse_dtype,
)
from torch_nvfp4.cli.terminal import (
    console_for,
    fail,
    make_table,
    one_line_errors,
    print_line,
    progress_bar,
    spans,
    write_json,
)
from torch_nvfp4.errors import CheckpointError
from torch_nvfp4.verify import verify_layer


def command(
    checkpoint: CheckpointArgument,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; repeatable.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Random tokens, each routed to top-k random experts.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the activations: bf16, fp16, on the CPU also fp32.")] = "bf16",
    device: DeviceOption = "",
    backend: BackendOption = "",
    seed: Annotated[int, typer.Option(help="Of the random tokens and routings.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Check the kernel against an fp64 reference on the checkpoint's own weights. Exit code 1 if a layer fails.

    \b
    Examples:
      torch-nvfp4 verify DeepSeek-V4-Flash-NVFP4 --layer 3
      torch-nvfp4 verify DeepSeek-V4-Flash-NVFP4 --tokens 64 --dtype fp16 --json checks.json
    """
    console = console_for(json_file)
    with one_line_errors("verify"):
        opened = Checkpoint.open(checkpoint)
        where = parse_device(device)
        activations = parse_dtype(dtype, where)
        layers = opened.layers if layer is None else tuple(layer)
        if not layers:
            raise CheckpointError(f"{checkpoint}: expected a checkpoint with NVFP4 experts, got none in its headers")
        checks = []
        with progress_bar(Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(layers))
            for index in layers:
                progress.update(task, description=f"layer {index}")
                check = verify_layer(
                    opened, index, tokens=tokens, dtype=activations, device=where, backend=backend or None, seed=seed
                )
                checks.append(check)
                progress.advance(task)
        write_json(
            json_file,
            {
                "checkpoint": str(checkpoint), "device": str(where), "dtype": dtype, "tokens": tokens, "seed": seed,
                "passed": all(check.passed for check in checks),
                "layers": [check.to_json() for check in checks],
            },
        )  # fmt: skip
    table = make_table(
        "layer", "backend", "gate", "experts", "clamped", "rel. L2", "tolerance", "", left=("backend", "gate")
    )
    for check in checks:
        table.add_row(
            str(check.layer),
            check.backend,
            check.gate,
            str(check.experts_hit),
            f"{check.clamped_share:.1%}",
            f"{check.relative_l2:.2e}",
            f"{check.tolerance:.0e}",
            "ok" if check.passed else "FAILED",
            style=None if check.passed else "red",
        )
    console.print(table)
    failed = [check.layer for check in checks if not check.passed]
    if failed:
        fail("verify", f"{len(failed)} of {len(checks)} layers above the tolerance: {spans(failed)}")
        raise typer.Exit(1)
    print_line(
        console, f"verify passed: {len(checks)} layers within {checks[0].tolerance:g} of the fp64 reference", "green"
    )
